"""Kernels that are compiled side by side before they are launched."""

from __future__ import annotations

import threading
from contextlib import nullcontext

import pytest
import torch

from longcat_core.optimize.kernels import jit as module
from longcat_core.optimize.kernels.jit import compiling, jit, ready

CPU = torch.device("cpu")
triton = pytest.importorskip("triton")


@pytest.fixture
def kernel(monkeypatch):
    """A kernel as Triton's compiler takes it, with what was asked of it: (how, thread, arguments)."""
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())

    @jit(do_not_specialize=["count"])
    def double(x, out, count):
        pass

    asked = []

    def run(self, *given, grid, warmup, **options):
        asked.append(("compiled" if warmup else "launched", threading.current_thread().name, given, options))
        return type("Compiled", (), {"run": property(lambda self: asked.append("ready to launch"))})()

    monkeypatch.setattr(triton.JITFunction, "run", run)
    return double, asked


def test_launches_are_compiled_by_other_threads_once(kernel):
    double, asked = kernel
    x = torch.ones(4, dtype=torch.bfloat16)
    here = threading.current_thread().name
    with compiling(CPU) as instead:
        with instead():
            for count in (4, 4, 8):
                double[(1,)](x, None, count, num_warps=8)
        double[(1,)](x, None, 4)
    compiled = [each for each in asked if each[0] == "compiled"]
    assert [given[2] for _, _, given, _ in compiled] == [4, 8] and asked.count("ready to launch") == 2
    for _, thread, given, options in compiled:
        assert thread.startswith("longcat-compile") and options == {"num_warps": 8}
        assert given[0].dtype == torch.bfloat16 and not isinstance(given[0], torch.Tensor), "no memory is held"
    assert [each[1] for each in asked if each[0] == "launched"] == [here]


def test_other_threads_launch_meanwhile(kernel):
    double, asked = kernel
    with compiling(CPU) as instead, instead():
        other = threading.Thread(target=lambda: double[(1,)](torch.ones(1), None, 1))
        other.start()
        other.join()
    assert [each[0] for each in asked] == ["launched"]


def test_a_kernel_that_does_not_compile_is_met_at_its_launch(kernel, monkeypatch):
    double, _ = kernel

    def fails(self, *given, **options):
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(triton.JITFunction, "run", fails)
    with compiling(CPU) as instead, instead():
        double[(1,)](torch.ones(1), None, 1)
    with pytest.raises(RuntimeError, match="no such instruction"):
        double[(1,)](torch.ones(1), None, 1)


def test_what_launches_a_kernel_is_made_too(kernel):
    double, asked = kernel
    ready(double, torch.float32, None, 16, num_warps=4)
    assert asked[0][0] == "compiled" and asked[1:] == ["ready to launch"]


def test_without_triton_functions_stay_plain(monkeypatch):
    monkeypatch.setattr(module, "triton", None)

    def plain() -> None:
        pass

    assert jit(plain) is plain and jit(do_not_specialize=["x"])(plain) is plain
