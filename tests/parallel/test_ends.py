"""How groups end: in order, by the failure of a rank and by signals. Nothing is left of any of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from longcat_core.errors import LongCatError
from longcat_core.parallel import start as launching
from longcat_core.parallel import worker
from longcat_core.parallel.start import start
from longcat_core.parallel.worker import in_words

from ..support.ranks import SERVE
from .work import do, fails, process_of, sum_of_shares, waits

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
# Far more than it takes: machines are slow where much runs at once.
SECONDS = 60


def gone(process: int) -> bool:
    """Whether a process ends within SECONDS."""
    until = time.monotonic() + SECONDS
    while time.monotonic() < until:
        try:
            os.kill(process, 0)
            # A process whose parent has ended and that nobody has waited for yet.
            if Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (ProcessLookupError, FileNotFoundError):
            return True
        time.sleep(0.05)
    return False


def test_a_killed_rank_ends_all_and_rank_0_goes_on():
    """Rank 0 is this process, as inside ComfyUI, and can start the next group."""
    with start([CPU] * 3, SERVE) as group:
        processes = do(group, process_of)[1:]
        with pytest.raises(LongCatError, match=r"^rank 2: its process was killed; if nobody did that, the memory"):
            do(group, fails, 2, "killed")
        assert all(map(gone, processes))
        with pytest.raises(LongCatError, match="rank 2: "):
            group.send(1)
        # The failed group need not be ended first.
        with start([CPU] * 2, SERVE) as again:
            assert do(again, sum_of_shares, [1.0]).tolist() == [3.0]
            other = do(again, process_of)[1]
            os.kill(other, signal.SIGKILL)
            assert gone(other)
            # It was idle.
            with pytest.raises(LongCatError, match="rank 1: its process was killed"):
                do(again, sum_of_shares, [1.0])
    assert not dist.is_initialized()


def test_rank_0_says_what_another_rank_failed_of():
    with start([CPU] * 2, SERVE) as group, pytest.raises(LongCatError, match=r"^rank 1: the model does not fit"):
        do(group, fails, 1, "raises")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (LongCatError("the model does not fit"), "the model does not fit"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to"), "out of memory; use more GPUs"),
        (KeyError("norm"), "KeyError: 'norm'"),
    ],
)
def test_failures_in_words(error, words):
    assert in_words(error).startswith(words)


@pytest.fixture(scope="module")
def commands() -> Iterator[list[tuple[subprocess.Popen[str], list[int]]]]:
    """Commands whose rank 0 waits for the others, each with its workers' processes."""
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.parallel.ends"], cwd=ROOT, stdout=subprocess.PIPE, text=True,
            start_new_session=True,
        )
        for _ in range(3)
    ]  # fmt: skip
    found = []
    for command in started:
        assert command.stdout is not None
        found.append((command, [int(word) for word in command.stdout.readline().split()]))
        assert command.stdout.readline() == "waiting\n"
    yield found
    for command in started:
        command.kill()
        command.wait()


@pytest.mark.parametrize("how", ["rank 0 alone", "the whole process group", "killed"])
def test_nothing_is_left_when_rank_0_is_interrupted(commands, how):
    """By Ctrl-C as kill sends it and as a terminal does, or by SIGKILL; rank 0 is in a collective, out of Python."""
    command, processes = commands.pop()
    if how == "killed":
        command.kill()
    elif how == "rank 0 alone":
        command.send_signal(signal.SIGINT)
    else:
        os.killpg(command.pid, signal.SIGINT)
    said, _ = command.communicate(timeout=SECONDS)
    assert (command.returncode, said) == ((-signal.SIGKILL, "") if how == "killed" else (130, "interrupted\n"))
    assert all(map(gone, processes))


def test_an_exception_of_rank_0_ends_the_workers():
    with pytest.raises(ZeroDivisionError), start([CPU] * 2, SERVE) as group:
        other = do(group, process_of)[1]
        with group.working():
            group.send((f"{waits.__module__}.{waits.__name__}",))
            raise ZeroDivisionError
    assert gone(other)
    # A thread that outlives the group aborts a process that ends then.
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("longcat ")]


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]


def test_torchrun_starts_the_ranks():
    command = [*TORCHRUN, "tests.parallel.ends", "sum"]
    ended = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=100)
    assert (ended.returncode, ended.stdout) == (0, "[3.0]\n")


def test_processes_of_torchrun_may_end_without_a_group(monkeypatch):
    """Such as where all videos of a command are there already."""
    store = dist.HashStore()
    for module in (worker, launching):
        monkeypatch.setattr(module, "torchrun_store", lambda: store)
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    launching.release()
    worker.join()


def test_a_group_ends_while_another_thread_uses_it():
    """As ComfyUI does that ends during a prompt. A thread in a collective would abort the process."""
    raised = []

    def prompt() -> None:
        with pytest.raises(LongCatError) as error:
            do(group, waits)
        raised.append(str(error.value))

    with start([CPU] * 2, SERVE) as group:
        other = do(group, process_of)[1]
        thread = threading.Thread(target=prompt)
        thread.start()
        while group._idle.is_set():
            time.sleep(0.01)
        group.end()
        assert group._idle.is_set() and gone(other)
        thread.join(SECONDS)
    assert raised == ["the processes on the other GPUs were ended; run it again"]
