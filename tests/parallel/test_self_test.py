"""The self-test of several GPUs, on processes of a CPU: it passes, and names the rank that does something wrong."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
import torch

from longcat_core.cli import gpus
from longcat_core.cli import main as cli
from longcat_core.errors import LongCatError
from longcat_core.parallel import self_test
from longcat_core.parallel.group import Group
from longcat_core.parallel.start import start

from .faulty import FAULTY


@pytest.fixture(scope="module")
def group() -> Iterator[Group]:
    with start([torch.device("cpu")] * 3, FAULTY) as group:
        yield group


def lines(group: Group, fault: str) -> list[tuple[str, bool]]:
    group.send(fault)
    return list(self_test.report(group))


def test_two_processes_by_command(capsys):
    state = torch.get_rng_state()
    assert cli.main(["test-gpus", "--device", "cpu", "--gpus", "2"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "2 processes on the CPU"
    assert "GB/s all to all" in said[1] and "GB/s from the first to all" in said[1] and "us for a byte" in said[1]
    checks = dict(line.split(": ") for line in said[2:-1])
    assert checks.pop("known bytes from each to each") == "0 wrong"
    assert [name for name, result in checks.items() if "bit for bit" in result or "at most 1.0e-05" in result] == [
        "network in float32, a sample each",
        "network in float32, tokens shared",
        "decoding in float32, rows shared",
        "encoding in float32, rows shared",
    ]
    assert said[-1] == "all 2 processes compute and exchange what one does"
    assert (torch.get_rng_state() == state).all()


@pytest.mark.parametrize(
    ("fault", "after", "said"),
    [
        ("bytes", 1, r"rank 1 exchanges wrong bytes, mostly from rank 1 to rank \d; set NCCL_P2P_DISABLE=1"),
        ("weights", 2, r"rank 1 computes other numbers than rank 0; choose the other GPUs"),
        ("tokens", 3, "rank 1 has the largest share of a wrong result; set NCCL_P2P_DISABLE=1"),
        ("rows", 4, "rank 1 has the largest share of a wrong result; set NCCL_P2P_DISABLE=1"),
    ],
)
def test_a_fault_is_one_sentence_that_names_the_rank(group, fault, after, said):
    *before, (last, failed) = lines(group, fault)
    assert failed and not any(each for _, each in before)
    assert re.match(said, last), last
    checks = [line for line, _ in before if line.startswith(("known", "network", "decoding", "encoding"))]
    assert len(checks) == after


def test_it_works_again_in_the_same_group(group):
    assert lines(group, "")[-1] == ("all 3 processes compute and exchange what one does", False)


def test_what_gives_no_answer_is_ended(monkeypatch):
    monkeypatch.setattr(self_test, "LIMIT", 1.0)
    with start([torch.device("cpu")] * 2, FAULTY) as group:
        group.send("late")
        with pytest.raises(LongCatError, match=r"^the GPUs did not answer within"):
            list(self_test.self_test(group))
        assert group.failed


def test_the_command_tells_a_fault_by_its_exit_code(monkeypatch, capsys):
    monkeypatch.setattr(gpus, "start", lambda devices: start(devices, FAULTY))
    plain = gpus.report

    def faulty(group: Group) -> Iterator[tuple[str, bool]]:
        group.send("weights")
        yield from plain(group)

    monkeypatch.setattr(gpus, "report", faulty)
    assert cli.main(["test-gpus", "--device", "cpu", "--gpus", "2"]) == 1
    assert capsys.readouterr().out.splitlines()[-1].startswith("failed: rank 1 computes other numbers than rank 0; ")


def test_one_gpu_is_refused(capsys):
    assert cli.main(["test-gpus", "--device", "cpu"]) == cli.BAD_INPUT
    assert "one GPU has no other one to be compared with; give 2 or more" in capsys.readouterr().err
