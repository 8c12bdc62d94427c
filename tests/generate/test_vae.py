"""The VAE reproduces the golden encodings and decodings from every file form, and refuses what is no Wan 2.1 VAE."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from longcat_core.checkpoints import wan_vae
from longcat_core.errors import CheckpointError, LongCatError
from longcat_core.files.safetensors_io import read_header, read_tensors, write_safetensors
from longcat_core.generate.vae import load_vae, save_vae

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
TOLERANCE = 2e-5


def error(got: Tensor, want: Tensor) -> float:
    assert got.shape == want.shape and got.dtype == want.dtype == torch.float32
    return ((got - want).abs().max() / want.std()).item()


def pixels(images: Tensor) -> Tensor:
    """uint8 [F,H,W,3] to [1,3,F,H,W] in -1..1."""
    return (images.float() / 127.5 - 1).permute(3, 0, 1, 2)[None]


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return read_tensors(GOLDEN / "generate.safetensors")


@pytest.fixture(scope="module")
def vae():
    return load_vae(GOLDEN / "vae.safetensors")


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return read_tensors(GOLDEN / "vae.safetensors")


def test_decode(vae, golden):
    video = vae.decode(golden["t2v.latents"])
    assert error(video, golden["t2v.video"]) < TOLERANCE
    assert video.min() >= 0 and video.max() <= 1


def test_encode_an_image_and_a_clip(vae, golden):
    assert error(vae.encode(pixels(golden["image"][None])), golden["i2v.cond_latents"]) < TOLERANCE
    assert error(vae.encode(pixels(golden["clip"])), golden["vc.cond_latents"]) < TOLERANCE


def test_decode_clamps(vae):
    video = vae.decode(torch.full((1, 16, 1, 2, 2), 1e4))
    assert video.shape == (1, 1, 16, 16, 3)
    assert video.min() >= 0 and video.max() <= 1


def test_comfyui_names_decode_alike(tmp_path, state, vae, golden):
    path = tmp_path / "wan_2.1_vae.safetensors"
    write_safetensors(path, wan_vae.to_wan(state))
    latents = golden["t2v.latents"][:, :, :2]
    assert torch.equal(load_vae(path).decode(latents), vae.decode(latents))


def test_diffusers_folder_and_its_parent(tmp_path, vae, golden):
    folder = tmp_path / "vae"
    folder.mkdir()
    shutil.copy(GOLDEN / "vae.safetensors", folder / "diffusion_pytorch_model.safetensors")
    config = json.loads((GOLDEN / "vae_config.json").read_text())
    config |= {"_class_name": "AutoencoderKLWan", "_diffusers_version": "0.35.0", "latents_mean": [0.5] * 16}
    (folder / "config.json").write_text(json.dumps(config))
    for path in (folder, tmp_path):
        loaded = load_vae(path)
        assert loaded.mean.flatten().tolist() == [0.5] * 16  # the config's normalization wins
        assert torch.equal(loaded.std, vae.std)
    shifted = golden["t2v.latents"][:, :, :1] + (vae.mean - 0.5) / vae.std
    assert torch.allclose(loaded.decode(shifted), vae.decode(golden["t2v.latents"][:, :, :1]), atol=1e-5)


def test_single_file_without_any_config(tmp_path, golden):
    path = tmp_path / "vae.safetensors"
    shutil.copy(GOLDEN / "vae.safetensors", path)
    shutil.copy(GOLDEN / "config.json", tmp_path / "config.json")  # a network's, to be left alone
    assert error(load_vae(path).encode(pixels(golden["image"][None])), golden["i2v.cond_latents"]) < TOLERANCE


def test_save_in_comfyui_names_and_bf16(tmp_path, vae, golden):
    path = tmp_path / "nano_vae_bf16.safetensors"
    save_vae(path, vae.model)
    header = read_header(path)
    assert len(header) == 194 and "decoder.middle.0.residual.0.gamma" in header
    assert {dtype for dtype, _ in header.values()} == {torch.bfloat16}
    loaded = load_vae(path)
    assert loaded.dtype == torch.float32
    assert error(loaded.decode(golden["t2v.latents"]), golden["t2v.video"]) < 0.05


def test_dtype_device_and_output(capfd):
    loaded = load_vae(GOLDEN / "vae.safetensors", dtype=torch.bfloat16, device="cpu")
    assert loaded.dtype == torch.bfloat16 and loaded.device == torch.device("cpu")
    assert loaded.decode(torch.zeros(1, 16, 1, 2, 2)).dtype == torch.float32
    assert loaded.encode(torch.zeros(1, 3, 1, 16, 16)).dtype == torch.float32
    assert loaded.to(dtype=torch.float32) is loaded and loaded.dtype == torch.float32
    assert "".join(capfd.readouterr()) == ""


def test_tiling_is_an_option(vae):
    assert not vae.tiling
    tiled = load_vae(GOLDEN / "vae.safetensors", tiling=True)
    assert tiled.tiling
    small = torch.zeros(1, 16, 1, 4, 4)
    assert torch.equal(tiled.decode(small), vae.decode(small))  # below the tile size nothing changes
    tiled.tiling = False
    assert not tiled.model.use_tiling


def test_the_loaded_vae_does_not_hang_on_its_file(tmp_path, state):
    path = tmp_path / "vae.safetensors"
    shutil.copy(GOLDEN / "vae.safetensors", path)
    loaded = load_vae(path)
    path.write_bytes(bytes(path.stat().st_size))
    assert torch.equal(loaded.model.decoder.conv_in.weight, state["decoder.conv_in.weight"])


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 3, 4, 16, 16), "4 frames"),
        ((1, 3, 1, 12, 16), "12x16"),
        ((3, 1, 16, 16), "B,3,F,H,W"),
        ((1, 4, 1, 16, 16), "B,3"),
    ],
)
def test_encode_refuses(vae, shape, message):
    with pytest.raises(LongCatError, match=message):
        vae.encode(torch.zeros(shape))


def test_decode_refuses_other_channels(vae):
    with pytest.raises(LongCatError, match="B,16,T,h,w"):
        vae.decode(torch.zeros(1, 48, 1, 2, 2))


def _missing(path, state):
    del state["decoder.conv_out.bias"], state["encoder.norm_out.gamma"]
    write_safetensors(path, state)


def _extra(path, state):
    write_safetensors(path, state | {"loss.logvar": torch.zeros(1)})


def _misshapen(path, state):
    write_safetensors(path, state | {"quant_conv.bias": torch.zeros(31)})


def _truncated(path, state):
    path.write_bytes((GOLDEN / "vae.safetensors").read_bytes()[:-1])


def _transformer(path, state):
    shutil.copy(GOLDEN / "dit.safetensors", path)


def _wrong_config(path, state):
    write_safetensors(path, state)
    path.with_name("vae_config.json").write_text(json.dumps({"base_dim": 16, "z_dim": 16}))


def _wrong_normalization(path, state):
    write_safetensors(path, state)
    path.with_name("vae_config.json").write_text(json.dumps({"z_dim": 16, "latents_mean": [0.0]}))


def _broken_config(path, state):
    write_safetensors(path, state)
    path.with_name("vae_config.json").write_text("{")


def _wan22_config(path, state):
    write_safetensors(path, state)
    path.with_name("vae_config.json").write_text(json.dumps({"z_dim": 48, "patch_size": 2}))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_missing, "lacks: encoder.norm_out.gamma; decoder.conv_out.bias; "),
        (_extra, "holds unknown tensors: loss.logvar; check that it is a Wan 2.1 VAE"),
        (_misshapen, r"quant_conv.bias has shape \[31\], the network wants \[32\]"),
        (_truncated, "is truncated"),
        (_transformer, r"is not a Wan 2.1 VAE"),
        (_wrong_config, "base_dim 16, the VAE beside it 8"),
        (_wrong_normalization, "needs 16 values in latents_mean"),
        (_broken_config, "is not a config .*JSON"),
        (_wan22_config, r"Wan 2.2"),
    ],
)
def test_bad_files(tmp_path, state, make, message):
    path = tmp_path / "vae.safetensors"
    make(path, dict(state))
    with pytest.raises(CheckpointError, match=message) as caught:
        load_vae(path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_bad_folders(tmp_path):
    with pytest.raises(CheckpointError, match=r"no .safetensors file"):
        load_vae(tmp_path)
    shutil.copy(GOLDEN / "vae.safetensors", tmp_path)
    with pytest.raises(CheckpointError, match=r"no config.json"):
        load_vae(tmp_path)
    shutil.copy(GOLDEN / "config.json", tmp_path)
    with pytest.raises(CheckpointError, match="not the config of an AutoencoderKLWan"):
        load_vae(tmp_path)
    with pytest.raises(CheckpointError, match="does not exist"):
        load_vae(tmp_path / "none.safetensors")
    (tmp_path / "vae.ckpt").write_bytes(b"\x80\x02")
    with pytest.raises(CheckpointError, match="pickle"):
        load_vae(tmp_path / "vae.ckpt")


def test_without_diffusers(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(LongCatError, match=r"longcat-video\[headless\]"):
        load_vae(GOLDEN / "vae.safetensors")


def test_import_is_cheap():
    code = "import sys, longcat_core.generate.vae as _; sys.exit(any(m in sys.modules for m in ('diffusers', 'av')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=GOLDEN.parents[2], check=False).returncode == 0
