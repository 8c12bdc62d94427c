"""Where GPU memory is short ComfyUI keeps weights in RAM and hands them over at their use; forced here."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from .conftest import MODEL, ON_CPU
from .test_lora import STRENGTH, error, official

ONE = {"steps": 1, "guidance": 1.0}


@pytest.fixture(scope="module", params=["fp32", "fp8 rowwise"])
def loaded(comfy, request):
    return comfy("LongCatModelLoader", model_name=MODEL, weight_dtype=request.param)


@pytest.fixture
def streaming(monkeypatch, loaded):
    """How many bytes of weights stay in RAM, load by load."""
    from comfy import model_management

    loading, listing, kept = type(loaded).load, type(loaded)._load_list, []

    def load(self, device_to=None, lowvram_model_memory=0, force_patch_weights=False, full_load=False):
        if type(self.model).__name__ != "LongCatVideo":
            return loading(self, device_to, lowvram_model_memory, force_patch_weights, full_load)
        # On a GPU a block with a part in RAM is not compiled: one that has no LoRA lies on it as a whole.
        last = set() if ON_CPU else set(self.model.diffusion_model.blocks[-1].modules())
        with monkeypatch.context() as patch:
            patch.setattr(self, "_load_list", lambda: [entry for entry in listing(self) if entry[-2] in last])
            # A full load would move the other blocks too, which would be compiled as well: with other layers' casts.
            self.model.to(self.offload_device)
            loading(self, device_to, 1 << 40, force_patch_weights, False)
            patch.setattr(self, "_load_list", lambda: [entry for entry in listing(self) if entry[-2] not in last])
            out = loading(self, device_to, 64 * 1024, force_patch_weights, False)
        waiting = [m for m in self.model.modules() if hasattr(m, "prev_comfy_cast_weights")]
        kept.append(sum(p.nbytes for m in waiting for p in m.parameters(recurse=False)))
        return out

    monkeypatch.setattr(type(loaded), "load", load)
    model_management.unload_all_models()
    yield kept
    model_management.unload_all_models()


@pytest.fixture
def compiles(comfy, monkeypatch):
    compiled = comfy.core("optimize.compiled_blocks").COMPILED_BLOCK
    monkeypatch.setattr(compiled, "backend", CompileCounterWithBackend("aot_eager"))
    compiled.forget()
    yield compiled
    compiled.forget()
    torch._dynamo.reset()


@pytest.mark.parametrize("by", ["LongCatOptimizations", "a stock node"])
@pytest.mark.parametrize("with_lora", [False, True])
def test_compiled_blocks(comfy, loaded, sample, empty, streaming, compiles, with_lora, by):
    """Blocks with a LoRA that is added at their use run as they are; the others share one graph."""

    def chosen(strength: float):
        if not with_lora:
            return loaded
        lora = comfy.save("loras", "streamed.safetensors", official(comfy))
        return comfy("LoraLoaderModelOnly", model=loaded, lora_name=lora, strength_model=strength)

    def compiled(model):
        if by == "a stock node":
            from comfy_api.torch_helpers import set_torch_compile_wrapper

            model = model.clone()
            set_torch_compile_wrapper(model, backend=compiles.backend)
            return sample(empty, model, **ONE)
        model, report = comfy("LongCatOptimizations", model=model, compile="blocks")
        assert "compile: blocks" in report
        return sample(empty, model, **ONE)

    expected = sample(empty, chosen(STRENGTH).clone(), **ONE)
    assert streaming and streaming[-1] > 0
    out = compiled(chosen(STRENGTH))
    assert error(expected, out) < 1e-3
    assert compiles.backend.frame_count == 1 and not compiles._failed
    again = compiled(chosen(STRENGTH / 2))
    assert compiles.backend.frame_count == 1
    assert (error(out, again) > 1e-2) == with_lora


def test_blocks_whose_weights_are_elsewhere_are_not_compiled(comfy, loaded, monkeypatch):
    streams, block = comfy.node("comfy_network").is_streamed, loaded.model.diffusion_model.blocks[0]
    # Where the card has more memory than the machine, ComfyUI loads onto it at once.
    block.to("cpu")
    for layer in block.modules():
        # A LoRA of the tests above waits for the block's next use.
        for name in ("weight_function", "bias_function"):
            if hasattr(layer, name):
                monkeypatch.setattr(layer, name, [])
    assert not streams(block, torch.device("cpu")) and streams(block, torch.device("cuda"))
