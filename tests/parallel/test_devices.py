"""Which GPUs a group takes, and what is refused."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from longcat_core.errors import LongCatError
from longcat_core.parallel.devices import devices_of

BIG, SMALL = ("NVIDIA H100", 80 << 30), ("NVIDIA L4", 24 << 30)


@pytest.fixture
def machine(monkeypatch):
    """A machine with the given cards, and without torchrun."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)

    def put(*cards, **variables):
        found = [SimpleNamespace(name=name, total_memory=memory) for name, memory in cards]
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(found))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda at: found[at])
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return put


def chosen(gpus, device="cuda"):
    return [str(each) for each in devices_of(gpus, torch.device(device))]


def test_the_named_gpu_comes_first(machine):
    machine(BIG, BIG, SMALL, BIG)
    assert chosen(1) == chosen(None) == ["cuda"]
    assert chosen(2) == ["cuda:0", "cuda:1"]
    assert chosen(2, "cuda:1") == ["cuda:1", "cuda:0"]
    assert chosen("auto") == ["cuda:0", "cuda:1", "cuda:3"]
    assert chosen("auto", "cuda:2") == ["cuda:2"]


def test_a_cpu_is_shared_when_asked(machine):
    machine()
    assert chosen("auto", "cpu") == ["cpu"]
    assert chosen(3, "cpu") == ["cpu"] * 3


def test_torchrun_decides(machine):
    machine(BIG, BIG, RANK="0", LOCAL_RANK="0", WORLD_SIZE="4", LOCAL_WORLD_SIZE="2")
    assert chosen(None) == chosen("auto") == chosen(4) == ["cuda:0", "cuda:1", "cuda:0", "cuda:1"]
    assert chosen(1) == ["cuda"]
    assert chosen(None, "cpu") == ["cpu"] * 4


@pytest.mark.parametrize(
    ("gpus", "device", "variables", "words"),
    [
        (4, "cuda", {}, "4 GPUs were asked for, but PyTorch sees 3; give --gpus 3 or auto"),
        (4, "cuda", {"CUDA_VISIBLE_DEVICES": "0,1,2"}, "PyTorch sees 3 .CUDA_VISIBLE_DEVICES hides the others.; give"),
        (3, "cuda", {}, "GPU 0 is NVIDIA H100 with 80.0 GiB and GPU 2 NVIDIA L4 with 24.0 GiB, but all must be alike"),
        (2, "mps", {}, "several GPUs must be those of CUDA or ROCm, not mps"),
        (0, "cuda", {}, "gpus cannot be 0; give a number from 1 to 64, or auto"),
        ("all", "cuda", {}, "gpus cannot be 'all'"),
        (2, "cuda", {"WORLD_SIZE": "4"}, "2 GPUs were asked for, but torchrun started 4 processes; leave --gpus out"),
        (None, "cuda", {"WORLD_SIZE": "4"}, "torchrun started 4 processes on a host where PyTorch sees 3 GPUs; give"),
    ],
)
def test_what_cannot_be_is_a_sentence(machine, gpus, device, variables, words):
    if "WORLD_SIZE" in variables:
        variables = variables | {"RANK": "0", "LOCAL_RANK": "0"}
    machine(BIG, BIG, SMALL, **variables)
    with pytest.raises(LongCatError, match=words):
        chosen(gpus, device)
