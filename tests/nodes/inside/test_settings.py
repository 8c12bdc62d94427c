"""What newer versions of ComfyUI write into a checkpoint beside its weights."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from ...checkpoints.written_forms import comfyui, fastvideo, fp8_scaled
from .test_stock import difference

NAMES = {"official": lambda state: state, "comfyui": comfyui, "fastvideo": fastvideo}
SETTING = ".comfy_attention.config"


def setting(kernel: str) -> torch.Tensor:
    return torch.tensor(list(json.dumps({"attention": kernel}).encode()), dtype=torch.uint8)


@pytest.fixture(scope="module")
def nano(comfy) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(comfy.core("generate.paths").NANO_MODEL)


def written(form: str, nano: dict[str, torch.Tensor], kernels: dict[int, str]) -> dict[str, torch.Tensor]:
    """nano in a form, with settings of the self-attention in these blocks."""
    state = {name: tensor.contiguous() for name, tensor in NAMES[form](nano).items()}
    layer = "attn" if form == "official" else "self_attn"
    return state | {f"blocks.{i}.{layer}{SETTING}": setting(kernel) for i, kernel in kernels.items()}


@pytest.mark.parametrize("form", NAMES)
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("loader, widget", [("LongCatModelLoader", "model_name"), ("UNETLoader", "unet_name")])
def test_unknown_keys_do_not_hide_the_model(comfy, nano, sample, empty, caplog, form, prefix, loader, widget):
    extra = {
        "blocks.0.cross_attn" + SETTING: setting("comfy_kitchen_int8"),
        "blocks.1.ffn.w2.later": torch.zeros(3),
        "later": torch.zeros(()),
        "comfy_later.version": setting("2"),
    }
    state = written(form, nano, {0: "unknown kernel"}) | extra
    name = f"keys_{form}{len(prefix)}.safetensors"
    comfy.save("diffusion_models", name, {prefix + key: tensor for key, tensor in state.items()})
    with caplog.at_level(logging.WARNING):
        dtype = "fp32" if loader == "LongCatModelLoader" else "default"
        loaded = comfy(loader, **{widget: name}, weight_dtype=dtype)
    assert type(loaded.model).__name__ == "LongCatVideo"
    assert difference(sample(empty, steps=1), sample(empty, loaded, steps=1)) < 1e-5
    said = [record.getMessage() for record in caplog.records]
    assert any(
        "the checkpoint sets the attention of" in sentence and "blocks.0.cross_attn" in sentence for sentence in said
    )
    assert any("unet unexpected" in sentence and "blocks.1.ffn.down.later" in sentence for sentence in said)


@pytest.mark.parametrize("dtype", ["default", "fp8 rowwise"])
def test_quantized_files_with_settings(comfy, nano, sample, empty, dtype):
    plain = {name: tensor.contiguous() for name, tensor in fp8_scaled(comfyui(nano)).items()}
    models = []
    for name, extra in (("plain", {}), ("set", {f"blocks.0.self_attn{SETTING}": setting("comfy_kitchen_int8")})):
        file = comfy.save("diffusion_models", f"scaled_{name}.safetensors", plain | extra)
        models.append(comfy("LongCatModelLoader", model_name=file, weight_dtype=dtype))
    one, two = (sample(empty, model, steps=1) for model in models)
    assert torch.equal(one, two)


class Setting(torch.nn.Module):
    """A stand-in for the module that reads the settings of one layer in newer versions."""

    kernels: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.config = self.function = None

    def _load_from_state_dict(self, state: dict, prefix: str, *rest: Any) -> None:
        stored = state.pop(f"{prefix}config", None)
        self.config = None if stored is None else json.loads(bytes(stored.tolist()))
        self.function = self.kernels.get((self.config or {}).get("attention"))
        super()._load_from_state_dict(state, prefix, *rest)

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.config is not None:
            destination[f"{prefix}config"] = setting(self.config["attention"])


@pytest.fixture
def calls(monkeypatch) -> list[int]:
    """The blocks in which the checkpoint's kernel "halved" ran; its output is half of attention's."""
    from comfy.ldm.modules import attention

    found: list[int] = []

    def halved(q, k, v, heads, *, transformer_options):
        found.append(transformer_options["block_index"])
        tensors = [
            part.take() if hasattr(part, "take") and not isinstance(part, torch.Tensor) else part for part in (q, k, v)
        ]
        return attention.attention_pytorch(*tensors, heads) / 2

    monkeypatch.setattr(attention, "ComfyAttention", Setting, raising=False)
    monkeypatch.setattr(Setting, "kernels", {"halved": halved})
    return found


@pytest.fixture(params=NAMES)
def preferring(comfy, nano, calls, request) -> Any:
    """A MODEL whose file wants another attention in blocks 1 and 3."""
    state = written(request.param, nano, {1: "halved", 2: "not here", 3: "halved"})
    file = comfy.save("diffusion_models", f"prefers_{request.param}.safetensors", state)
    return comfy("LongCatModelLoader", model_name=file, weight_dtype="fp32")


@pytest.mark.parametrize("preferring", ["official"], indirect=True)
@pytest.mark.parametrize("kv_cache", ["exact", "off"])
def test_settings_are_honored_with_conditioning_frames(model, preferring, sample, image_latent, calls, kv_cache):
    out = sample(image_latent, preferring, kv_cache=kv_cache, steps=1)
    assert {*calls} == {1, 3} and difference(out, sample(image_latent, model, kv_cache=kv_cache, steps=1)) > 0.01


def test_settings_of_each_block_are_honored(comfy, model, preferring, sample, empty, calls):
    depth = len(model.model.diffusion_model.blocks)
    out = sample(empty, preferring, steps=1)
    assert calls == [1, 3]
    assert difference(out, sample(empty, model, steps=1)) > 0.01
    report = comfy("LongCatOptimizations", model=preferring)[1]
    assert f"attention: auto (not used: the checkpoint's setting for 2 of {depth} blocks decides)" in report
    calls.clear()
    chosen, report = comfy("LongCatOptimizations", model=preferring, attention="sdpa")
    assert difference(sample(empty, chosen, steps=1), sample(empty, model, steps=1)) < 1e-5 and not calls
    assert "attention: sdpa\n" in report, "the user's choice comes before the file's"


@pytest.mark.parametrize("preferring", ["official"], indirect=True)
def test_an_override_comes_before_the_file(model, preferring, sample, empty, calls):
    overridden = preferring.clone()
    blocks = []

    def override(attention, *args, **kwargs):
        blocks.append(kwargs["transformer_options"]["block_index"])
        return attention(*args, **kwargs)

    overridden.model_options.setdefault("transformer_options", {})["optimized_attention_override"] = override
    assert difference(sample(empty, overridden, steps=1), sample(empty, model, steps=1)) < 1e-4
    assert not calls and blocks == list(range(len(model.model.diffusion_model.blocks)))


@pytest.mark.parametrize("preferring", ["comfyui"], indirect=True)
def test_settings_survive_saving(comfy, preferring, sample, empty, calls):
    import folder_paths
    from safetensors.torch import load_file

    comfy("ModelSave", model=preferring, filename_prefix="diffusion_models/settings")
    (path,) = Path(folder_paths.get_output_directory(), "diffusion_models").glob("settings*.safetensors")
    kept = {name for name in load_file(path) if name.endswith(SETTING)}
    assert kept == {f"model.diffusion_model.blocks.{i}.attn{SETTING}" for i in (1, 2, 3)}
    (comfy.folder / "models" / "diffusion_models" / path.name).symlink_to(path)
    again = comfy("LongCatModelLoader", model_name=path.name, weight_dtype="fp32")
    calls.clear()
    assert difference(sample(empty, preferring, steps=1), sample(empty, again, steps=1)) <= 1e-5
    assert calls == [1, 3, 1, 3]
