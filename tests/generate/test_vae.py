"""The VAE reproduces the golden encodings and decodings from every file form, and refuses what is no Wan 2.1 VAE."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from longcat_core.checkpoints import wan_vae
from longcat_core.errors import CheckpointError, LongCatError
from longcat_core.files.safetensors_io import read_header, read_tensors, write_safetensors
from longcat_core.generate.paths import NANO_VAE
from longcat_core.generate.vae import load_vae, save_vae
from longcat_core.nano.world import Actor, Scene, render_clip
from longcat_core.vae import parts

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
TOLERANCE = 2e-5
SCENE = Scene("gray", (Actor("circle", "red", "right"),))


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
    large = torch.randn(1, 16, 1, 4, 36, generator=torch.Generator().manual_seed(0))
    with_tiles, whole = tiled.decode(large), vae.decode(large)
    assert torch.equal(with_tiles[..., :192, :], vae.decode(large[..., :32])[..., :192, :])
    assert with_tiles.shape == whole.shape and not torch.equal(with_tiles, whole)
    tiled.tiling = False
    assert torch.equal(tiled.decode(large), whole)


def test_other_gpus_share_what_is_not_done_in_tiles(vae, golden):
    spread, calls = load_vae(GOLDEN / "vae.safetensors"), []

    def called(run):
        return lambda x: calls.append((run.__name__, x.dtype)) or run(spread.model, x)

    spread.spread = SimpleNamespace(decode=called(parts.decoded), encode=called(parts.encoded))
    latents, video = golden["t2v.latents"], golden["t2v.video"].permute(0, 4, 1, 2, 3) * 2 - 1
    assert torch.equal(spread.decode(latents), vae.decode(latents))
    assert torch.equal(spread.encode(video), vae.encode(video))
    assert calls == [("decoded", torch.float32), ("encoded", torch.float32)]
    spread.tiling = True
    spread.decode(torch.zeros(1, 16, 1, 4, 36))
    spread.encode(torch.zeros(1, 3, 1, 16, 264))
    assert len(calls) == 2


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


def test_latents_that_are_not_finite_are_refused(vae):
    with pytest.raises(LongCatError, match=r"the VAE overflows in torch.float32; load it as bfloat16 or float32"):
        vae.encode(torch.full((1, 3, 1, 16, 16), torch.inf))


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


PREFIXES = ["model.", "vae.", "first_stage_model.", "model.first_stage_model.", "module.", "_orig_mod.", "vae.model."]


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("names", [dict, wan_vae.to_wan], ids=["diffusers", "wan"])
def test_a_prefix_is_taken_off(tmp_path, state, vae, golden, names, prefix):
    path = tmp_path / "vae.safetensors"
    # Other models may lie in the file too.
    other = {"dit.blocks.0.norm1.weight": torch.zeros(1), "cond_stage_model.a": torch.zeros(1)}
    write_safetensors(path, {prefix + name: tensor for name, tensor in names(state).items()} | other)
    latents = golden["t2v.latents"][:, :, :1]
    assert torch.equal(load_vae(path).decode(latents), vae.decode(latents))


def _one(value, name="decoder.mid_block.attentions.0.proj.weight"):
    def spoil(state):
        tensor = state[name].clone()
        tensor.view(-1)[3] = value
        return state | {name: tensor}

    return spoil


def _scaled(state):
    name = "decoder.mid_block.attentions.0.proj"
    weight = (state[f"{name}.weight"] * 8).to(torch.float8_e4m3fn)
    return state | {f"{name}.weight": weight, f"{name}.scale_weight": torch.tensor(0.125)}


def test_a_scaled_weight(tmp_path, state, vae, golden):
    write_safetensors(tmp_path / "vae.safetensors", _scaled(state) | {"scaled_fp8": torch.zeros(2)})
    latents = golden["t2v.latents"][:, :, :1]
    got, want = load_vae(tmp_path / "vae.safetensors").decode(latents), vae.decode(latents)
    assert 0 < (got - want).norm() / want.norm() < 0.05


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_one(torch.nan), "NaN or infinite values in decoder.mid_block.attentions.0.proj.weight"),
        (_one(-torch.inf, "quant_conv.bias"), "NaN or infinite values in quant_conv.bias"),
        (_one(torch.nan, "encoder.norm_out.gamma"), "NaN or infinite values in encoder.norm_out.gamma"),
        (lambda state: {name: tensor.long() for name, tensor in state.items()}, "encoder.conv_in"),
        (lambda state: state | {"quant_conv.bias": state["quant_conv.bias"].to(torch.uint8)}, "quant_conv"),
        (lambda state: state | {"quant_conv.weight": state["quant_conv.weight"].to(torch.int8)}, "quant_conv.*scale"),
        (lambda state: _scaled(state) | {"decoder.mid_block.attentions.0.proj.scale_weight": torch.ones(5)}, "shape"),
        (
            lambda state: _scaled(state) | {"quant_conv.weight": state["quant_conv.weight"].to(torch.float8_e4m3fn)},
            "lacks: quant_conv.scale_weight",
        ),
        (lambda state: state | {"vae.scaled_fp8": torch.zeros(2)}, "marker 'vae.scaled_fp8' but stores no matrix"),
        (lambda state: {f"{p}{n}": t for p in ("vae.", "ema.") for n, t in state.items()}, "more than one Wan 2.1 VAE"),
    ],
)
def test_what_is_wrong_with_the_weights_is_named(tmp_path, state, spoil, message):
    path = tmp_path / "vae.safetensors"
    write_safetensors(path, spoil(dict(state)))
    with pytest.raises(CheckpointError, match=message) as caught:
        load_vae(path)
    assert str(path) in str(caught.value) and len(str(caught.value)) < 700


MEAN, STD = list(wan_vae.LATENTS_MEAN), list(wan_vae.LATENTS_STD)


def test_a_loaded_vae_can_be_written_as_diffusers_has_it(tmp_path):
    """With its config.json, whose normalization is read again."""
    model = load_vae(NANO_VAE).model
    write_safetensors(tmp_path / "diffusion_pytorch_model.safetensors", model.state_dict())
    config = dict(model.config) | {"latents_mean": [0.5] * model.config.z_dim}
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = load_vae(tmp_path).model
    assert dict(loaded.config) == config
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latents_mean": STD, "latents_std": MEAN}, "-0.9497 in latents_std, which must be above 0"),
        ({"latents_std": [0.0, *STD[1:]]}, "0.0 in latents_std, which must be above 0"),
        ({"latents_std": [1e-300, *STD[1:]]}, "latents_std, which must be above 0"),
        ({"latents_mean": [1e300, *MEAN[1:]]}, "in latents_mean, which no latent reaches"),
        ({"latents_std": STD[:15]}, "needs 16 values in latents_std"),
        ({"latents_std": ["1"] * 16}, "latents_std"),
        ({"latents_std": [None] * 16}, "latents_std"),
        ({"latents_mean": [[0.1]] * 16}, "latents_mean"),
        ({"latents_std": [True] * 16}, "latents_std"),
        ({"latents_std": None}, "latents_std"),
        ({"latents_std": 1.5}, "latents_std"),
        ({"latents_std": {"0": 1.0}}, "latents_std"),
        ({"latents_std": [10**400, *STD[1:]]}, "latents_std"),
        ({"latents_std": [float("nan"), *STD[1:]]}, "config"),
        ({"num_res_blocks": 100000}, "num_res_blocks 100000, the VAE beside it 2"),
        ({"num_res_blocks": "2"}, "num_res_blocks"),
        ({"dim_mult": [1] * 1000}, "dim_mult"),
        ({"dim_mult": 4}, "dim_mult"),
        ({"temperal_downsample": [True, True, True]}, "temperal_downsample"),
        ({"attn_scales": [0.5]}, "attn_scales"),
        ({"base_dim": 0}, "base_dim 0"),
        ({"base_dim": 10**30}, "base_dim"),
        ({"z_dim": 16.5}, "z_dim"),
        ({"z_dim": "x" * 1000000}, "has more than 1,000,000 bytes"),
        ({"_class_name": None, "patch_size": [1]}, "patch_size"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(tmp_path, state, change, message):
    write_safetensors(tmp_path / "diffusion_pytorch_model.safetensors", state)
    config = json.loads((GOLDEN / "vae_config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message) as caught:
        load_vae(tmp_path)
    assert "config.json" in str(caught.value) and len(str(caught.value)) < 600


@pytest.mark.parametrize("text", ["1", "null", '"z_dim"', "[]", "[" * 100000, '{"z_dim":' * 10000, "{", "", "\x00"])
def test_a_config_that_is_none_is_refused(tmp_path, state, text):
    write_safetensors(tmp_path / "diffusion_pytorch_model.safetensors", state)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config.json is not"):
        load_vae(tmp_path)


def test_a_normalization_of_its_own_is_noted(tmp_path, state):
    write_safetensors(tmp_path / "diffusion_pytorch_model.safetensors", state)
    config = json.loads((GOLDEN / "vae_config.json").read_text()) | {"latents_std": [1.0] * 16}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.warns(UserWarning, match=r"config.json has another latents_mean or latents_std than Wan 2.1's"):
        assert load_vae(tmp_path).std.flatten().tolist() == [1.0] * 16


def test_files_of_a_folder_are_not_mixed(tmp_path, state):
    (tmp_path / "config.json").write_text((GOLDEN / "vae_config.json").read_text())
    for name in ("diffusion_pytorch_model", "old"):
        write_safetensors(tmp_path / f"{name}.safetensors", state)
    with pytest.raises(CheckpointError, match=r"is in both diffusion_pytorch_model.safetensors and old.safetensors"):
        load_vae(tmp_path)


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.safetensors", "config.json"])
def test_a_pipe_is_not_waited_for(tmp_path, state, name):
    write_safetensors(tmp_path / "diffusion_pytorch_model.safetensors", state)
    (tmp_path / "config.json").write_text((GOLDEN / "vae_config.json").read_text())
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    with pytest.raises(CheckpointError, match="is a pipe or a device"):
        load_vae(tmp_path)


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


def test_frames_leave_the_decoder_one_by_one(vae, golden, monkeypatch):
    monkeypatch.setattr(parts, "MOST_ON_CPU", 1)
    latents = golden["t2v.latents"]
    streamed = list(vae.decode_frames(latents))
    assert [part.shape[1] for part in streamed] == [1] * 17
    assert torch.equal(torch.cat(streamed, dim=1), vae.decode(latents))
    assert error(vae.decode(latents), golden["t2v.video"]) < TOLERANCE
    with pytest.raises(LongCatError, match="B,16,T,h,w"):
        vae.decode_frames(torch.zeros(1, 16, 0, 2, 2))


def test_16_bits_round_less_than_8_bits_do():
    """The bundled VAE on a clip of its world: in steps of 8 bits, of which rounding to them takes half."""
    clip = pixels(torch.from_numpy(render_clip(SCENE, frames=9, height=64, width=96, seed=1)))
    plain, half = load_vae(NANO_VAE), load_vae(NANO_VAE, dtype=torch.bfloat16)
    latents = plain.encode(clip)
    steps = (half.decode(latents) - plain.decode(latents)).abs() * 255
    assert 0 < steps.mean() < 0.15 and steps.flatten().quantile(0.98) < 0.8


def test_a_vae_runs_without_diffusers():
    code = (
        "import sys; sys.modules['diffusers'] = None; from longcat_core.generate.vae import load_vae; import torch; "
        f"load_vae({str(NANO_VAE)!r}).decode(torch.zeros(1, 16, 1, 2, 2))"
    )
    subprocess.run([sys.executable, "-c", code], cwd=GOLDEN.parents[2], check=True)


def test_import_is_cheap():
    code = "import sys, longcat_core.generate.vae as _; sys.exit(any(m in sys.modules for m in ('diffusers', 'av')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=GOLDEN.parents[2], check=False).returncode == 0
