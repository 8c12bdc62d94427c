"""Names of the Wan 2.1 VAE: ComfyUI and Wan on one side, diffusers' AutoencoderKLWan on the other.

One architecture of any width: four levels, two residual blocks per level in the encoder and three in the decoder, 2x in
space between levels and 2x in time between the last three. The two codebases differ only in names, so a table of
modules is the whole conversion.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from ..errors import CheckpointError

T = TypeVar("T")

DIM_MULT = (1, 2, 4, 4)
RES_BLOCKS = 2
LATENT_CHANNELS = 16
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


WAN_TO_DIFFUSERS = {"conv1": "quant_conv", "conv2": "post_quant_conv"} | {
    f"{wan}.{inner_wan}": f"{diffusers}.{inner_diffusers}"
    for wan, diffusers, table in _blocks()
    for inner_wan, inner_diffusers in table
}
DIFFUSERS_TO_WAN = {diffusers: wan for wan, diffusers in WAN_TO_DIFFUSERS.items()}


def is_wan_named(state: Mapping[str, object]) -> bool:
    """Whether the names are ComfyUI's and Wan's own rather than diffusers'."""
    return "encoder.conv1.weight" in state


def to_diffusers(state: Mapping[str, T]) -> dict[str, T]:
    """Rename ComfyUI/Wan keys (of tensors or shapes) to AutoencoderKLWan's; names not in the table stay as they are."""
    return _rename(state, WAN_TO_DIFFUSERS)


def to_wan(state: Mapping[str, T]) -> dict[str, T]:
    """Rename AutoencoderKLWan keys (of tensors or shapes) to ComfyUI's and Wan's; the inverse of `to_diffusers`."""
    return _rename(state, DIFFUSERS_TO_WAN)


def _rename(state: Mapping[str, T], table: Mapping[str, str]) -> dict[str, T]:
    renamed = {}
    for name, value in state.items():
        module, _, parameter = name.rpartition(".")
        renamed[f"{table.get(module, module)}.{parameter}"] = value
    return renamed


def config_from_state(shapes: Mapping[str, tuple[int, ...]], source: str = "the VAE") -> dict:
    """AutoencoderKLWan's arguments for a state dict given as name -> shape, in either naming.

    Raises CheckpointError, naming `source`, for what is not a Wan 2.1 VAE of 16 latent channels.
    """
    named = to_diffusers(shapes) if is_wan_named(shapes) else dict(shapes)
    if any(name in named for name in WAN22_ONLY):
        raise CheckpointError(f"{source} is a Wan 2.2 VAE (48 latent channels); LongCat-Video needs the Wan 2.1 VAE")
    sizes: dict[str, Any] = {}
    for key, name, axis in (
        ("base_dim", "encoder.conv_in.weight", 0),
        ("in_channels", "encoder.conv_in.weight", 1),
        ("decoder_base_dim", "decoder.conv_out.weight", 1),
        ("out_channels", "decoder.conv_out.weight", 0),
        ("z_dim", "post_quant_conv.weight", 0),
    ):
        shape = named.get(name, ())
        if len(shape) != 5:
            raise CheckpointError(f"{source} is not a Wan 2.1 VAE: it has no 3-D convolution '{name}'")
        sizes[key] = int(shape[axis])
    if sizes["z_dim"] != LATENT_CHANNELS:
        raise CheckpointError(
            f"{source} has {sizes['z_dim']} latent channels; LongCat-Video needs Wan 2.1's {LATENT_CHANNELS}"
        )
    if (sizes["in_channels"], sizes["out_channels"]) != (3, 3):
        raise CheckpointError(
            f"{source} takes {sizes['in_channels']} and gives {sizes['out_channels']} image channels instead of 3"
        )
    if sizes["decoder_base_dim"] == sizes["base_dim"]:
        sizes["decoder_base_dim"] = None
    return sizes | {
        "dim_mult": list(DIM_MULT),
        "num_res_blocks": RES_BLOCKS,
        "attn_scales": [],
        "temperal_downsample": [False, True, True],  # diffusers' own spelling
        "latents_mean": list(LATENTS_MEAN),
        "latents_std": list(LATENTS_STD),
    }
