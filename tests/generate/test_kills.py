"""Runs that are killed, by SIGKILL and at any moment, go on where they were and give what they would have given."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from ..support.python_path import python_path

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs SIGKILL and fork")

ROOT = Path(__file__).parents[2]
# The tiny model runs on the CPU, and a process that forks must not have opened a GPU.
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
PROMPTS = ("a", "b", "c")
KILLED = -9
KINDS = ("step", "picture", "flush", "open", "finished", "os.mkdir", "os.rename", "os.remove")


@dataclass(frozen=True)
class Run:
    """code: how it ended; events: what it did before that, among it "denoise" for every segment that was begun."""

    code: int
    events: list[str]

    @property
    def moments(self) -> list[str]:
        return [event for event in self.events if event != "denoise"]

    @property
    def begun(self) -> int:
        return self.events.count("denoise")


Start = Callable[..., Run]


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Iterator[Start]:
    """Makes a run in a process of its own; see killed_run.py."""
    logs = tmp_path_factory.mktemp("logs")
    command = [sys.executable, "-m", "tests.generate.killed_run"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=ROOT, env=ENVIRONMENT) as process:

        def run(
            folder: Path, die_at: int | None = None, prompts: tuple[str, ...] = PROMPTS, refine: bool = False
        ) -> Run:
            log = logs / f"{len(list(logs.iterdir()))}.txt"
            asked = {"folder": str(folder), "prompts": prompts, "refine": refine, "log": str(log), "die_at": die_at}
            process.stdin.write(json.dumps(asked) + "\n")
            process.stdin.flush()
            return Run(int(process.stdout.readline()), log.read_text().splitlines())

        yield run
        process.stdin.close()


@dataclass(frozen=True)
class Task:
    """A run to be killed. path: its uninterrupted result; base: the folder that it starts from, if any; take: where its
    segments lie in it."""

    path: Path
    whole: Run
    prompts: tuple[str, ...] = PROMPTS
    refine: bool = False
    base: Path | None = None
    take: str = ""

    def begin(self, path: Path) -> Path:
        return path if self.base is None else Path(shutil.copytree(self.base, path))

    @property
    def segments(self) -> int:
        return len(finished(self.path / self.take))


@pytest.fixture(scope="module")
def tasks(start, tmp_path_factory) -> dict[str, Task]:
    path = tmp_path_factory.mktemp("whole")
    long = Task(path / "long", start(path / "long"))
    assert long.whole.code == 0, long.whole.events[-1:]
    base = Path(shutil.copytree(long.path, path / "damaged"))
    for name in ("segment-002", "segment-003"):
        os.truncate(base / name / "frames.mkv", 100)
    shutil.copytree(base, path / "repaired")
    repaired = Task(path / "repaired", start(path / "repaired"), base=base)
    other = ("x", "b")
    shutil.copytree(long.path, path / "further")
    further = Task(path / "further", start(path / "further", prompts=other), other, base=long.path, take="take-002")
    refined = Task(path / "refined", start(path / "refined", refine=True), refine=True)
    return {"long": long, "repaired": repaired, "further": further, "refined": refined}


def finished(path: Path) -> list[str]:
    return sorted(item.name for item in path.glob("segment-*"))


def contents(path: Path) -> dict[str, bytes]:
    """All that is there: leftovers too."""
    return {str(item.relative_to(path)): item.read_bytes() if item.is_file() else b"" for item in path.rglob("*")}


def kinds(events: list[str]) -> list[str]:
    """Without names, because every run draws some of them at random."""
    return [event.split()[0] for event in events]


def moments_of(task: Task, kind: str) -> list[int]:
    return [index for index, found in enumerate(kinds(task.whole.moments)) if found == kind]


def is_kept(event: str) -> bool:
    """Whether a segment is there in whole after this."""
    name = event.split()
    return name[0] == "os.rename" and name[1].endswith(".new") and name[2].startswith("segment-")


def test_what_happens_in_a_run(tasks):
    long, repaired, further, refined = (tasks[name].whole for name in ("long", "repaired", "further", "refined"))
    assert {run.code for run in (long, repaired, further, refined)} == {0}
    assert (long.begun, repaired.begun, further.begun, refined.begun) == (3, 2, 2, 2)
    found = Counter(kinds(long.moments))
    # The record of the take; of a segment its latents, its frames and itself are renamed, three files and two folders
    # flushed, two of the files before they are renamed too; nine pictures.
    assert found["os.rename"] == 1 + 9 and found["flush"] == 21 and found["picture"] == 27 and found["step"] == 6
    assert set(found) == set(KINDS) and min(found.values()) >= 3
    # What is damaged is moved away first, and deleted file by file.
    assert len(moments_of(tasks["repaired"], "os.rmdir")) == 2
    assert len(moments_of(tasks["repaired"], "os.rename")) == 2 * 4
    assert len(moments_of(tasks["further"], "os.rmdir")) == 0
    assert {name: content for name, content in contents(tasks["further"].path).items() if "take-" not in name} == (
        contents(tasks["long"].path)
    )
    assert contents(tasks["repaired"].path) == contents(tasks["long"].path)
    assert len(moments_of(tasks["refined"], "os.rename")) == 1 + 2 * 3


def check_killed_and_resumed(start: Start, task: Task, path: Path, moment: int) -> None:
    before = {} if task.base is None else contents(task.base)
    task.begin(path)
    killed = start(path, moment, task.prompts, task.refine)
    assert killed.code == KILLED and kinds(killed.moments) == kinds(task.whole.moments[:moment])
    # What was finished is there; what the run replaces is only away between two renames.
    done = sum(map(is_kept, killed.moments))
    wanted, there = contents(task.path), contents(path)
    first = task.segments - task.whole.begun
    for number in range(first + done):
        name = str(Path(task.take, f"segment-{number + 1:03}")) + "/"
        assert {n: c for n, c in there.items() if n.startswith(name)} == {
            n: c for n, c in wanted.items() if n.startswith(name)
        }, f"segment {number + 1} was finished"
    for name in finished(path / task.take)[first + done :]:
        assert {n: c for n, c in there.items() if n.startswith(name + "/")} == {
            n: c for n, c in before.items() if n.startswith(name + "/")
        }, f"{name} is half there"
    resumed = start(path, None, task.prompts, task.refine)
    assert resumed.code == 0 and resumed.begun == task.whole.begun - done, "finished segments were computed again"
    assert contents(path) == wanted
    shutil.rmtree(path)


@pytest.mark.parametrize("kind", KINDS)
def test_killed_before_anything_that_happens(start, tasks, tmp_path, kind):
    # Pictures are many and alike.
    for moment in moments_of(tasks["long"], kind)[:: 4 if kind == "picture" else 1]:
        check_killed_and_resumed(start, tasks["long"], tmp_path / str(moment), moment)


@pytest.mark.parametrize("name", ["repaired", "further", "refined"])
@pytest.mark.parametrize("kind", ["os.mkdir", "os.rename", "os.remove", "os.rmdir"])
def test_killed_while_segments_are_repaired_a_take_is_begun_and_pieces_are_refined(start, tasks, tmp_path, name, kind):
    for moment in moments_of(tasks[name], kind):
        check_killed_and_resumed(start, tasks[name], tmp_path / str(moment), moment)


def test_killed_again_and_again(start, tasks, tmp_path):
    path, begun = tmp_path / "v", []
    for moment in range(3, 400, 7):
        run = start(path, moment)
        begun.append(run.begun)
        if run.code == 0:
            break
        assert run.code == KILLED
    assert run.code == 0 and len(begun) >= 5
    assert contents(path) == contents(tasks["long"].path)


# --- the command -----------------------------------------------------------------------------------------------------


def command(path: Path) -> list[str]:
    prompts = ["a red circle moves right on a blue background", "a red circle moves up on a blue background"]
    options = "--segments 3 --steps 6 --frames 17 --overlap 9 --seed 4 --device cpu -o video.mp4 --folder kept"
    return [sys.executable, "-m", "longcat_core", "long", *prompts, *options.split()]


def environment() -> dict[str, str]:
    return ENVIRONMENT | python_path(ROOT)


def test_the_command_is_killed_and_run_again(tmp_path):
    """By somebody else, while the second segment is sampled; the embedded model."""
    folders = [tmp_path / name for name in ("whole", "killed")]
    for folder in folders:
        folder.mkdir()
    whole = subprocess.run(
        command(folders[0]), cwd=folders[0], env=environment(), capture_output=True, text=True, timeout=300
    )
    assert whole.returncode == 0, whole.stderr
    pipe = subprocess.PIPE
    with subprocess.Popen(command(folders[1]), cwd=folders[1], env=environment(), stdout=pipe, stderr=pipe) as process:
        told = b""
        while b"segment 2 of 3, step" not in told:
            part = os.read(process.stderr.fileno(), 1 << 16)
            assert part, f"it ended by itself: {told.decode()}"
            told += part
        os.kill(process.pid, signal.SIGKILL)
        process.communicate(timeout=60)
    assert process.returncode == KILLED
    assert finished(folders[1] / "kept") == ["segment-001"] and not (folders[1] / "video.mp4").exists()
    again = subprocess.run(
        command(folders[1]), cwd=folders[1], env=environment(), capture_output=True, text=True, timeout=300
    )
    assert again.returncode == 0, again.stderr
    lines = again.stdout.splitlines()
    assert lines[0] == "segment 1 of 3: already in kept"
    assert lines[1].startswith("segment 2 of 3: finished and saved in kept; at its join the mean color changes by ")
    assert lines[-1].startswith("video.mp4: 33 frames of 64x96 at 15 fps, 3 segments, seed 4, in ")
    assert contents(folders[1] / "kept") == contents(folders[0] / "kept") and len(finished(folders[0] / "kept")) == 3
    assert sorted(item.name for item in folders[1].iterdir()) == ["kept", "video.mp4"]
