"""Memory that ranks write into, real processes on a CPU."""

from __future__ import annotations

import pytest
import torch

from longcat_core.optimize.shared_memory import Place, can_share
from longcat_core.parallel import windows
from longcat_core.parallel.division import Division
from longcat_core.parallel.start import start

from . import work
from .work import do

pytestmark = pytest.mark.skipif(not can_share(), reason="this system has no such memory")


@pytest.mark.parametrize("count", [2, 4])
def test_what_ranks_write_is_there_once_it_arrived(count):
    """Also after a window has grown, and after all were freed."""
    with start([torch.device("cpu")] * count, "tests.support.ranks") as group:
        for length in (1, 3, 2000, 5):
            assert do(group, work.written, length) == [[float(of + 1)] * length for of in range(count)]
        do(group, work.released)
        assert do(group, work.written, 2) == [[float(of + 1)] * 2 for of in range(count)]


@pytest.mark.parametrize("why", ["a place that nobody can map", "no such memory"])
def test_without_windows_ranks_send_messages(monkeypatch, why):
    if why == "no such memory":
        monkeypatch.setattr(windows, "can_share", lambda: False)
    else:
        plain = windows.shared
        monkeypatch.setattr(windows, "shared", lambda size: (plain(size)[0], Place("/proc/1/fd/none", "none", size)))
    with start([torch.device("cpu")] * 2, "tests.support.ranks") as group:
        assert not do(group, work.has_windows)


def test_a_group_on_one_machine_has_windows_for_each_number_of_ranks_that_share():
    with start([torch.device("cpu")] * 4, "tests.support.ranks") as group:
        assert do(group, work.has_windows)
        assert sorted(Division.of(group).windows) == [2, 4]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_second_group_of_gpus_has_windows_too():
    """Its processes are new, and this one is not."""
    for length in (1, 2000):
        with start([torch.device("cuda", i) for i in range(2)], "tests.support.ranks") as group:
            assert do(group, work.has_windows)
            assert do(group, work.written, length) == [[1.0] * length, [2.0] * length]
            do(group, work.released)
