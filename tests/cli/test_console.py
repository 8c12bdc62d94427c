"""Words that cannot be written cost no work; what files and names bring in reaches the terminal as escapes."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from contextlib import redirect_stderr
from io import StringIO, TextIOWrapper
from pathlib import Path
from typing import Any

import pytest

from longcat_core.cli import main as cli
from longcat_core.cli.console import Progress, Stream, note, words
from longcat_core.generate.progress import LOADING, Part

from ..support.python_path import python_path

SMALL = ["--frames", "5", "--steps", "1", "--size", "16x16", "--device", "cpu"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"} | python_path(Path(__file__).parents[2])


def run(script: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """Run a shell script in `folder`, in which $LONGCAT is the command."""
    variables = ENVIRONMENT | {"LONGCAT": f"{sys.executable} -m longcat_core"} | environment
    return subprocess.run(
        ["bash", "-c", script], cwd=folder, env=variables, capture_output=True, timeout=120, check=False
    )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize("where", [">&-", "2>&-", "> /dev/full 2>&1"])
def test_a_video_is_made_wherever_its_words_go(tmp_path: Path, where: str) -> None:
    ended = run(f"$LONGCAT generate a {' '.join(SMALL)} -o o.mkv {where}", tmp_path)
    assert ended.returncode == 0 and os.listdir(tmp_path) == ["o.mkv"] and b"Traceback" not in ended.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize(("command", "why"), [("backends > /dev/full", "no space"), ("--help > /dev/full", "no space"),
                                              ("backends >&-", "it is closed")])  # fmt: skip
def test_a_result_that_does_not_arrive_is_an_error(tmp_path: Path, command: str, why: str) -> None:
    ended = run(f"$LONGCAT {command}", tmp_path)
    said = ended.stderr.decode()
    # With a GPU, packages of attention that are looked for print lines of their own.
    (own,) = [line for line in said.splitlines() if line.startswith("longcat")]
    assert ended.returncode == cli.BAD_INPUT and ("backends" in command or said == f"{own}\n")
    assert own.startswith("longcat: error: the result could not be printed (") and why in own
    assert "Traceback" not in said and "Exception ignored" not in said


def test_a_stream_that_fails_once_is_left_alone() -> None:
    class Gone(StringIO):
        tries = 0

        def write(self, text: str) -> int:
            self.tries += 1
            raise OSError(errno.EIO, "Input/output error")

    gone = Gone()
    stream = Stream(gone, escaped=False)
    for _ in range(3):
        print("words", file=stream, flush=True)
    assert gone.tries == 1 and isinstance(stream.lost, OSError)


class Terminal(StringIO):
    """What a terminal was sent."""

    def isatty(self) -> bool:
        return True

    @property
    def lines(self) -> list[str]:
        """What stands in each line in the end."""
        return [line.rpartition("\r")[2] for line in self.getvalue().split("\n")]


def test_a_command_says_at_once_what_it_does_and_nothing_of_it_stays() -> None:
    with redirect_stderr(Terminal()) as terminal:
        assert cli.main(["generate", "a", "--size", "33x48"]) == cli.BAD_INPUT
    error = "longcat: error: height 33 is not a multiple of 16; the nearest one is 32"
    places = [terminal.getvalue().index(what) for what in ("| starting", "| checking the input", error)]
    assert places == sorted(places) and terminal.lines == [error, ""]


def test_the_bar_is_that_of_weights_while_they_are_loaded_and_notes_stand_above_it() -> None:
    with redirect_stderr(Terminal()) as terminal, Progress() as bar:
        task = bar.plan([Part(4)])
        task.load(LOADING, 3 * 10**9, 4 * 10**9)
        assert (bar.bar.n, bar.bar.total) == (3 * 10**9, 4 * 10**9)
        note("a note")
        assert terminal.lines[0] == "longcat: note: a note"
        assert terminal.lines[1].startswith(" 75% |") and terminal.lines[1].endswith(
            "| loading the model, 3.0 of 4.0 GB"
        )
        task.phase("")
        assert (bar.bar.n, bar.bar.total) == (0, 5)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\nb\n", "a\nb\n"),
        ("\x1b[31mred\x07\n", "\\x1b[31mred\\x07\n"),
        ("caf\udce9.mp4", "caf\\udce9.mp4"),
        ("\u202egpj.exe", "\\u202egpj.exe"),
    ],
)
def test_what_names_bring_in_is_shown_as_escapes(text: str, shown: str) -> None:
    kept = StringIO()
    Stream(kept, escaped=True).write(text)
    assert kept.getvalue() == shown


@pytest.mark.parametrize(
    ("encoding", "shown"), [("ascii", b"caf\\xe9 \\U0001f600"), ("latin-1", b"caf\xe9 \\U0001f600")]
)
def test_a_terminal_shows_what_its_encoding_lacks_as_escapes(tmp_path: Path, encoding: str, shown: bytes) -> None:
    with open(tmp_path / "o", "wb") as file, TextIOWrapper(file, encoding, "strict") as terminal:
        Stream(terminal, escaped=True).write("caf\xe9 \U0001f600")
    assert (tmp_path / "o").read_bytes() == shown


def test_prompts_are_read_as_utf_8_in_any_locale(tmp_path: Path) -> None:
    typed = "一只球".encode().decode("ascii", "surrogateescape")
    assert words(typed) == words("一只球") == "一只球" and words([typed, "a"]) == ["一只球", "a"]
    assert words(None) is None and words(64) == 64 and words("\udce9") == "\udce9"


def test_a_run_that_is_hung_up_leaves_nothing(tmp_path: Path) -> None:
    script = (
        f"$LONGCAT generate a {' '.join(SMALL)} --frames 401 -o o.webp & "
        "while ! ls .o.* > /dev/null 2>&1; do sleep 0.05; done; kill -HUP $!; kill -HUP $!; wait $!"
    )
    ended = run(script, tmp_path)
    assert ended.returncode == cli.INTERRUPTED and os.listdir(tmp_path) == []


def test_nohup_stays_nohup(tmp_path: Path, monkeypatch: Any) -> None:
    ended = run(
        f"trap '' HUP; $LONGCAT generate a {' '.join(SMALL)} -o o.mkv & sleep 1; kill -HUP $!; wait $!", tmp_path
    )
    assert ended.returncode == 0 and os.listdir(tmp_path) == ["o.mkv"]
