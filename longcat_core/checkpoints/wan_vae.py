"""Names of the Wan 2.1 VAE: ComfyUI and Wan on one side, diffusers' AutoencoderKLWan on the other.

One architecture of any width: four levels, two residual blocks per level in the encoder and three in the decoder, 2x in
space between levels and 2x in time between the last three. The two codebases differ only in names, so a table of
modules is the whole conversion.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from ..errors import CheckpointError
from .formats import Format
from .stored import Stored, stored_part
from .whole import open_whole

T = TypeVar("T")

REMEDY = "choose wan_2.1_vae, or longcat_nano_vae for the test model"

DIM_MULT = (1, 2, 4, 4)
RES_BLOCKS = 2
LATENT_CHANNELS = 16
# The arguments of diffusers' AutoencoderKLWan that shapes do not show.
STRUCTURE = {
    "dim_mult": list(DIM_MULT),
    "num_res_blocks": RES_BLOCKS,
    "attn_scales": [],
    "temperal_downsample": [False, True, True],  # diffusers' own spelling
}
# Mean and standard deviation per latent channel, as Wan 2.1 publishes them.
LATENTS_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
LATENTS_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip

# Wan 2.2 nests its blocks one level deeper; each naming has one name that shows it.
WAN22_ONLY = (
    "decoder.upsamples.0.upsamples.0.residual.2.weight",
    "decoder.up_blocks.0.upsampler.time_conv.weight",
)

RESIDUAL = (
    ("residual.0", "norm1"),
    ("residual.2", "conv1"),
    ("residual.3", "norm2"),
    ("residual.6", "conv2"),
    ("shortcut", "conv_shortcut"),
)
RESAMPLE = (("resample.1", "resample.1"), ("time_conv", "time_conv"))
ATTENTION = (("norm", "norm"), ("to_qkv", "to_qkv"), ("proj", "proj"))


def _blocks() -> Iterator[tuple[str, str, tuple[tuple[str, str], ...]]]:
    """(Wan block, diffusers block, table of the modules inside)."""
    for half in ("encoder", "decoder"):
        yield half, half, (("conv1", "conv_in"), ("head.0", "norm_out"), ("head.2", "conv_out"))
        yield f"{half}.middle.0", f"{half}.mid_block.resnets.0", RESIDUAL
        yield f"{half}.middle.1", f"{half}.mid_block.attentions.0", ATTENTION
        yield f"{half}.middle.2", f"{half}.mid_block.resnets.1", RESIDUAL
    # Both sides number the encoder's blocks straight through; diffusers nests the decoder's by level.
    down, up = RES_BLOCKS + 1, RES_BLOCKS + 2
    for level in range(len(DIM_MULT)):
        for block in range(RES_BLOCKS):
            index = level * down + block
            yield f"encoder.downsamples.{index}", f"encoder.down_blocks.{index}", RESIDUAL
        for block in range(RES_BLOCKS + 1):
            yield f"decoder.upsamples.{level * up + block}", f"decoder.up_blocks.{level}.resnets.{block}", RESIDUAL
    for level in range(len(DIM_MULT) - 1):
        index = level * down + RES_BLOCKS
        yield f"encoder.downsamples.{index}", f"encoder.down_blocks.{index}", RESAMPLE
        yield f"decoder.upsamples.{level * up + RES_BLOCKS + 1}", f"decoder.up_blocks.{level}.upsamplers.0", RESAMPLE


DIFFUSERS_TO_WAN = {"quant_conv": "conv1", "post_quant_conv": "conv2"} | {
    f"{diffusers}.{inner_diffusers}": f"{wan}.{inner_wan}"
    for wan, diffusers, table in _blocks()
    for inner_wan, inner_diffusers in table
}


def to_wan(state: Mapping[str, T]) -> dict[str, T]:
    """Rename AutoencoderKLWan keys (of tensors or shapes) to ComfyUI's and Wan's."""
    renamed = {}
    for name, value in state.items():
        module, _, parameter = name.rpartition(".")
        renamed[f"{DIFFUSERS_TO_WAN.get(module, module)}.{parameter}"] = value
    return renamed


def _format(name: str, signature: tuple[str, ...], modules: Mapping[str, str]) -> Format:
    outer = {module: (source,) for module, source in modules.items()}
    return Format(name, signature, outer, {}, model="Wan 2.1 VAE")


WAN = _format("Wan", ("encoder.conv1.",), DIFFUSERS_TO_WAN)
DIFFUSERS = _format("diffusers", ("encoder.conv_in.",), {module: module for module in DIFFUSERS_TO_WAN})


def open_vae(path: Path) -> Stored:
    """Parse the headers of a VAE in any form: a file, or a folder with its files. Raises CheckpointError."""
    return open_whole(path, (WAN, DIFFUSERS), REMEDY)


def sizes(stored: Stored) -> dict[str, Any]:
    """AutoencoderKLWan's arguments by the shapes of an opened VAE's tensors, with Wan 2.1's normalization.

    Raises CheckpointError for what is not a Wan 2.1 VAE of 16 latent channels.
    """
    source, table = stored.source, dict(stored.form.modules(0))
    if any(name in stored.where for name in WAN22_ONLY):
        raise CheckpointError(f"{source} is a Wan 2.2 VAE (48 latent channels); LongCat-Video needs the Wan 2.1 VAE")
    found: dict[str, Any] = {}
    for key, module, axis in (
        ("base_dim", "encoder.conv_in", 0),
        ("in_channels", "encoder.conv_in", 1),
        ("decoder_base_dim", "decoder.conv_out", 1),
        ("out_channels", "decoder.conv_out", 0),
        ("z_dim", "post_quant_conv", 0),
    ):
        part = stored_part(stored.where, table[module][0], "weight")
        shape = () if part is None else stored.shapes[part.name]
        if len(shape) != 5 or not all(shape):
            raise CheckpointError(
                f"{source} is not a Wan 2.1 VAE: it has no 3-D convolution '{table[module][0]}.weight'; {REMEDY}"
            )
        found[key] = shape[axis]
    if found["z_dim"] != LATENT_CHANNELS:
        raise CheckpointError(
            f"{source} has {found['z_dim']} latent channels; LongCat-Video needs Wan 2.1's {LATENT_CHANNELS}"
        )
    if (found["in_channels"], found["out_channels"]) != (3, 3):
        raise CheckpointError(
            f"{source} takes {found['in_channels']} and gives {found['out_channels']} image channels instead of 3"
        )
    if found["decoder_base_dim"] == found["base_dim"]:
        found["decoder_base_dim"] = None
    return found | STRUCTURE | {"latents_mean": list(LATENTS_MEAN), "latents_std": list(LATENTS_STD)}
