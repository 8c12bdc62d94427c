"""The table of names of the Wan VAE covers the whole architecture, both ways, at every width."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan

from longcat_core.checkpoints import wan_vae
from longcat_core.checkpoints.stored import Stored
from longcat_core.errors import CheckpointError
from longcat_core.files.safetensors_io import read_header, write_safetensors

GOLDEN = Path(__file__).parents[1] / "data" / "golden"


def golden_shapes() -> dict[str, tuple[int, ...]]:
    return {name: shape for name, (_, shape) in read_header(GOLDEN / "vae.safetensors").items()}


def diffusers_shapes(**config) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(t.shape) for name, t in AutoencoderKLWan(**config).state_dict().items()}


def opened(path: Path, shapes: dict[str, tuple[int, ...]]) -> Stored:
    write_safetensors(path, {name: torch.zeros(shape, dtype=torch.float8_e4m3fn) for name, shape in shapes.items()})
    return wan_vae.open_vae(path)


@pytest.mark.parametrize("base_dim", [8, 12, 96])
def test_every_name_goes_there_and_back(base_dim):
    shapes = diffusers_shapes(base_dim=base_dim)
    wan = wan_vae.to_wan(shapes)
    assert len(wan) == len(shapes) == 194
    assert not any("block" in name or "resnets" in name or "conv_" in name.replace("time_conv", "") for name in wan)
    back = {wan: diffusers for diffusers, wan in wan_vae.DIFFUSERS_TO_WAN.items()}
    assert {
        f"{back[name.rpartition('.')[0]]}.{name.rpartition('.')[2]}": shape for name, shape in wan.items()
    } == shapes


# Read off ComfyUI's WanVAE and the released wan_2.1_vae.safetensors: numbers that a shifted table would get wrong.
@pytest.mark.parametrize(
    ("wan", "shape"),
    [
        ("conv1.weight", (32, 32, 1, 1, 1)),
        ("conv2.weight", (16, 16, 1, 1, 1)),
        ("encoder.conv1.weight", (96, 3, 3, 3, 3)),
        ("encoder.downsamples.2.resample.1.weight", (96, 96, 3, 3)),
        ("encoder.downsamples.3.shortcut.weight", (192, 96, 1, 1, 1)),
        ("encoder.downsamples.3.residual.0.gamma", (96, 1, 1, 1)),
        ("encoder.downsamples.5.time_conv.weight", (192, 192, 3, 1, 1)),
        ("encoder.downsamples.6.residual.2.weight", (384, 192, 3, 3, 3)),
        ("encoder.downsamples.10.residual.6.weight", (384, 384, 3, 3, 3)),
        ("encoder.middle.1.to_qkv.weight", (1152, 384, 1, 1)),
        ("encoder.head.0.gamma", (384, 1, 1, 1)),
        ("encoder.head.2.weight", (32, 384, 3, 3, 3)),
        ("decoder.conv1.weight", (384, 16, 3, 3, 3)),
        ("decoder.upsamples.3.time_conv.weight", (768, 384, 3, 1, 1)),
        ("decoder.upsamples.4.shortcut.weight", (384, 192, 1, 1, 1)),
        ("decoder.upsamples.11.resample.1.weight", (96, 192, 3, 3)),
        ("decoder.upsamples.14.residual.3.gamma", (96, 1, 1, 1)),
        ("decoder.head.0.gamma", (96, 1, 1, 1)),
        ("decoder.head.2.bias", (3,)),
    ],
)
def test_known_names_of_the_released_file(wan, shape):
    assert wan_vae.to_wan(diffusers_shapes(base_dim=96))[wan] == shape


def test_the_table_holds_the_architecture_and_nothing_else():
    modules = {name.rpartition(".")[0] for name in diffusers_shapes(base_dim=8)}
    spare = set(wan_vae.DIFFUSERS_TO_WAN) - modules
    # Blocks that keep their width have no shortcut, levels that keep their frames no time convolution.
    assert all(name.endswith(("conv_shortcut", "time_conv")) for name in spare)
    assert modules <= set(wan_vae.DIFFUSERS_TO_WAN)
    assert len(wan_vae.DIFFUSERS_TO_WAN) == len(set(wan_vae.DIFFUSERS_TO_WAN.values()))


def test_sizes_by_shapes_in_either_naming(tmp_path):
    shapes = golden_shapes()
    config = wan_vae.sizes(opened(tmp_path / "a.safetensors", shapes))
    assert (config["base_dim"], config["decoder_base_dim"], config["z_dim"]) == (8, None, 16)
    assert wan_vae.sizes(opened(tmp_path / "b.safetensors", wan_vae.to_wan(shapes))) == config
    assert diffusers_shapes(**config) == shapes
    uneven = diffusers_shapes(base_dim=8, decoder_base_dim=16)
    assert diffusers_shapes(**wan_vae.sizes(opened(tmp_path / "c.safetensors", uneven))) == uneven


def test_normalization_is_the_published_one():
    with torch.device("meta"):
        published = AutoencoderKLWan(base_dim=8).config
    assert list(wan_vae.LATENTS_MEAN) == list(published.latents_mean)
    assert list(wan_vae.LATENTS_STD) == list(published.latents_std)


WAN22 = {
    "base_dim": 8, "decoder_base_dim": 8, "z_dim": 48, "in_channels": 12, "out_channels": 12, "is_residual": True,
    "patch_size": 2, "latents_mean": [0.0] * 48, "latents_std": [1.0] * 48, "temperal_downsample": [False, True, True],
}  # fmt: skip


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (lambda: diffusers_shapes(**WAN22), "is a Wan 2.2 VAE"),
        (lambda: {"encoder.conv1.weight": (8, 12, 3, 3, 3), wan_vae.WAN22_ONLY[0]: (8,)}, "is a Wan 2.2 VAE"),
        (lambda: golden_shapes() | {"post_quant_conv.weight": (48, 48, 1, 1, 1)}, "has 48 latent channels"),
        (lambda: golden_shapes() | {"encoder.conv_in.weight": (8, 4, 3, 3, 3)}, "takes 4 and gives 3 image channels"),
        (lambda: golden_shapes() | {"encoder.conv_in.weight": (0, 3, 3, 3, 3)}, "is not a Wan 2.1 VAE"),
        (lambda: {"encoder.conv_in.weight": (128, 3, 3, 3)}, "no 3-D convolution 'encoder.conv_in.weight'"),
        (lambda: {"a.weight": (1,)}, r"is not a Wan 2.1 VAE \(it holds a.weight\); choose wan_2.1_vae"),
    ],
)
def test_other_vaes_are_refused(tmp_path, shapes, message):
    with pytest.raises(CheckpointError, match=f"f.safetensors .*{message}|f.safetensors {message}"):
        wan_vae.sizes(opened(tmp_path / "f.safetensors", shapes()))
