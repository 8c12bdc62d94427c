"""Weights on their way into ComfyUI's network: by way of a GPU, to where they stay, shown, and stopped."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable

import pytest
import torch
from safetensors.torch import load_file

from ...support import pretend_cuda
from .conftest import MODEL, ON_CPU, version
from .test_forms import comfyui, fp8_scaled

GPU = torch.device("cuda", 0)


def save(comfy, form: str) -> str:
    """The embedded model in ComfyUI's names, as e4m3 with scales if `form` is scaled."""
    state = comfyui(load_file(comfy.core("generate.paths").NANO_MODEL))
    state = fp8_scaled(state, scale="weight_scale", marker=False) if form == "scaled" else state
    return comfy.save("diffusion_models", f"{form}_nano.safetensors", state)


def numbers(model) -> dict[str, torch.Tensor]:
    state = model.model.diffusion_model.state_dict()
    # A network that assigns has the file's dtypes.
    return {n: t.cpu().view(torch.uint8) if t.itemsize == 1 else t.cpu().float() for n, t in state.items()}


@pytest.fixture
def loader(comfy, monkeypatch) -> Callable[..., object]:
    """Loads as the node does, under ComfyUI's dynamic VRAM, which assigns tensors, or without."""
    from comfy import model_patcher

    loaders = comfy.node("loaders")

    def load(name: str, rowwise: bool, assign: bool) -> object:
        path = str(loaders.find("diffusion_models", name))
        with torch.inference_mode(), monkeypatch.context() as patch:
            patch.setattr(model_patcher.ModelPatcher, "is_dynamic", lambda self: assign, raising=False)
            return loaders.load_rowwise(path) if rowwise else loaders.load_model(path, {"dtype": torch.bfloat16})

    return load


@pytest.fixture
def played(comfy, monkeypatch) -> Callable[[], object]:
    """A GPU played by the CPU, once it is called, which takes pieces of a few rows; parameters may lie there."""
    if not ON_CPU:
        pytest.skip("there is a GPU")
    reading = comfy.node("comfy_reading")
    for name in ("optimize", "optimize.requirement", "generate", "generate.pipeline"):
        monkeypatch.setitem(sys.modules, f"longcat_core.{name}", comfy.core(name))
    monkeypatch.setitem(sys.modules, "longcat_core", sys.modules[comfy.core("errors").__package__])
    monkeypatch.setattr(comfy.core("checkpoints.reader"), "PIECE_CUDA", 20000)
    monkeypatch.setattr(comfy.node("loaders"), "import_ahead", lambda device: None)
    read = reading.Unread.read

    def enter(resident: bool) -> object:
        def on_gpu(self, network, assign):
            self.device = GPU
            for parameter in network.parameters() if resident else ():
                pretend_cuda.MEMORY.mark(parameter.data, True)
            return read(self, network, assign)

        monkeypatch.setattr(reading.Unread, "read", on_gpu)
        return pretend_cuda.pretended()

    return enter


@pytest.mark.parametrize("rowwise", [False, True], ids=["bf16", "rowwise"])
@pytest.mark.parametrize("form", ["official", "split", "scaled"])
def test_the_same_by_way_of_a_gpu(comfy, loader, played, monkeypatch, form, rowwise):
    name = MODEL if form == "official" else save(comfy, form)
    wanted = numbers(loader(name, rowwise, False))
    landing, landed = comfy.node("comfy_reading").Landing, set()
    put = landing.put
    monkeypatch.setattr(landing, "put", lambda self, to, x: (landed.add((x.is_cuda, to.is_cuda)), put(self, to, x)))
    for assign, resident in ((False, False), (True, False), (False, True)):
        landed.clear()
        with played(resident) as runtime:
            found = numbers(loader(name, rowwise, assign))
        assert not runtime.errors and not runtime.registered, "all memory is unpinned again"
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[key], wanted[key]) for key in wanted)
        # e4m3 with its scales is stored as it is.
        computed = rowwise != (form == "scaled")
        assert ((True, resident) in landed) == computed and {to for _, to in landed} == {resident}


def test_only_fused_parameters_take_memory_where_tensors_are_assigned(comfy, loader, monkeypatch):
    """All others stay in the file, and 8-bit weights are written to their layers at once."""
    if version() < (0, 9):
        pytest.skip("this ComfyUI assigns no tensors")
    reading, made = comfy.node("comfy_reading"), []
    memory = reading.Unread._memory
    monkeypatch.setattr(
        reading.Unread, "_memory", lambda self, parts: made.append(parts[0].name) or memory(self, parts)
    )
    name, biases = save(comfy, "split"), {"self_attn.q.bias", "cross_attn.k.bias"}
    weights = {"self_attn.q.weight", "cross_attn.k.weight", "ffn.w1.weight"}
    for rowwise, each in ((True, biases), (False, biases | weights)):
        made.clear()
        depth = len(loader(name, rowwise, True).model.diffusion_model.blocks)
        assert sorted(made) == sorted(f"blocks.{i}.{parameter}" for i in range(depth) for parameter in each)


def test_the_bar_and_an_interrupt(comfy, loader, monkeypatch):
    from comfy import model_management, utils

    shown: list[tuple[int, int]] = []
    monkeypatch.setattr(utils, "PROGRESS_BAR_HOOK", lambda done, of, picture, **_: shown.append((done, of)))
    loader(MODEL, True, False)
    totals = {of for _, of in shown}
    assert len(totals) == 1 and shown[-1] == 2 * (totals.pop(),)
    assert len(shown) > 1 and [done for done, _ in shown] == sorted({done for done, _ in shown})
    begun = len(shown)

    def stop(*_, **__) -> None:
        shown.append((0, 0))
        model_management.interrupt_current_processing(True)

    monkeypatch.setattr(utils, "PROGRESS_BAR_HOOK", stop)
    with pytest.raises(model_management.InterruptProcessingException):
        loader(MODEL, True, False)
    assert len(shown) == begun + 1
    assert not any(thread.name.startswith("longcat-read") for thread in threading.enumerate())
