"""A group of real processes over gloo."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from longcat_core.errors import LongCatError
from longcat_core.optimize.plan import Plan
from longcat_core.parallel.group import Group
from longcat_core.parallel.messages import packed, unpacked
from longcat_core.parallel.start import start

from ..support.python_path import python_path
from ..support.ranks import SERVE
from .work import bandwidths, described, do, sum_of_shares, tensors_of

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def group() -> Iterator[Group]:
    with start([CPU, CPU], SERVE) as group:
        yield group


def test_ranks_exchange_messages_and_tensors(group):
    assert (group.rank, group.size, group.device) == (0, 2, CPU)
    message = (Plan(3), torch.bfloat16, {"a": [1.5, None]})
    texts = do(group, described, message)
    assert [text.rpartition(" ")[0] for text in texts] == [repr(message)] * 2
    assert do(group, sum_of_shares, [1.0, -2.0]).tolist() == [3.0, -6.0]


def test_messages_hold_modules_and_tensors(group):
    layer = nn.Linear(2, 3)
    half = torch.arange(6).reshape(2, 3).T.to(torch.float8_e4m3fn)
    message = {"layer": layer, "again": layer.weight, "half": half, "flags": torch.tensor(True), "none": torch.zeros(0)}
    described = do(group, tensors_of, message)
    assert described[0] == described[1]
    assert "same" in described[1]


def test_all_ranks_know_the_same_bandwidth(group):
    first, second = do(group, bandwidths)
    assert first == second and [*first] == [2] and min(first[2]) > 0


def test_workers_share_the_cores(group):
    assert do(group, described, 0)[1] == f"0 {max(1, os.cpu_count() // 2)}"


def test_a_group_of_the_same_devices_is_used_again(group):
    assert start([CPU, CPU]) is group


def test_a_group_of_other_code_is_refused(group, monkeypatch):
    monkeypatch.setattr("longcat_core.parallel.start.current", lambda: None)
    with pytest.raises(LongCatError, match=r"torch.distributed is in use by other code in this process; use one GPU"):
        start([CPU, CPU])


PACK = """
import torch, torch.distributed as dist
from pack.longcat_core.optimize.plan import Plan
from pack.longcat_core.parallel.start import start
texts = [None] * 2
with start([torch.device("cpu")] * 2, "tests.support.ranks") as group, group.working():
    group.send(("tests.parallel.work.described", (Plan(2), Plan)))
    dist.all_gather_object(texts, "")
print(texts[1])
"""


def test_rank_0_may_know_the_package_under_another_name(tmp_path):
    """Inside ComfyUI it is a part of the pack, which has the name of its folder."""
    (tmp_path / "pack").mkdir()
    (tmp_path / "pack" / "longcat_core").symlink_to(ROOT / "longcat_core", target_is_directory=True)
    ended = subprocess.run(
        [sys.executable, "-c", PACK], cwd=ROOT, env=os.environ | python_path(tmp_path), capture_output=True, text=True
    )
    assert ended.stdout.startswith(f"({Plan(2)!r}, {Plan!r})"), ended.stderr


@pytest.mark.parametrize("thing", [os.system, eval, pickle.loads])
def test_messages_hold_no_other_classes(thing):
    with pytest.raises(pickle.UnpicklingError, match="cannot hold"):
        unpacked(packed(thing)[0])
