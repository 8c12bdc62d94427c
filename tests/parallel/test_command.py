"""`longcat` on several processes of a CPU, with the bundled model."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest
import torch.distributed as dist

from longcat_core.cli import main as cli
from longcat_core.files.media import read_video
from longcat_core.generate.progress import Progress
from longcat_core.parallel import worker
from longcat_core.parallel.group import current

COMMAND = ["generate", "a red circle moves right on a blue background", "--steps", "2", "--frames", "9"]
COMMAND += ["--device", "cpu", "--guidance", "2"]


def test_a_video_of_two_processes_is_that_of_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main([*COMMAND, "-o", "one.mkv"]) == 0
    assert cli.main([*COMMAND, "--gpus", "2", "-o", "two.mkv"]) == 0
    # Of the blocks, one waits in CPU memory and one stays.
    blocks = ["--shard-blocks", "4", "--stream-blocks", "1"]
    assert cli.main([*COMMAND, "--gpus", "2", *blocks, "-o", "three.mkv"]) == 0
    said = capsys.readouterr().err
    assert "the weights of 4 of 6 blocks divided among the GPUs" in said
    assert said.count("2 processes share each step, one half of guidance each") == 2
    one, two, three = (read_video(name)[0].astype(int) for name in ("one.mkv", "two.mkv", "three.mkv"))
    assert abs(one - two).max() <= 1
    assert (two == three).all()
    assert not dist.is_initialized(), "the other process ends with the command"


def test_a_killed_process_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)

    def kill(task: Progress) -> None:
        if current() is not None:
            for process in psutil.Process().children():
                process.kill()

    assert cli.main([*COMMAND, "--gpus", "2", "-o", "two.mkv"], kill) == cli.BAD_INPUT
    assert "longcat: error: rank 1: its process was killed" in capsys.readouterr().err
    assert os.listdir() == []
    assert not dist.is_initialized()


def test_the_other_processes_of_torchrun_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    joined = []
    monkeypatch.setattr(worker, "join", lambda: joined.append(True))
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert cli.main(["generate", "nothing that anybody reads", "--unknown"]) == 0
    assert joined


@pytest.mark.parametrize("gpus", ["0", "many"])
def test_bad_numbers_are_refused(gpus, capsys) -> None:
    assert cli.main([*COMMAND, "--gpus", gpus]) == cli.BAD_INPUT
    assert f"gpus cannot be {gpus if gpus == '0' else repr(gpus)}; give a number from 1" in capsys.readouterr().err
