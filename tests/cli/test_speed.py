"""--speed: what it makes of the other options, in every command that has it, and what it says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from longcat_core.checkpoints.load import open_checkpoint
from longcat_core.cli import compare as comparing
from longcat_core.cli import main as cli
from longcat_core.cli import models as commands
from longcat_core.generate import speed_fit
from longcat_core.generate.calibration import write_calibration
from longcat_core.generate.options import of_command
from longcat_core.generate.paths import NANO_MODEL
from longcat_core.generate.speeds import BASE, KINDS, REFINE, SETS, Price, SpeedSet
from longcat_core.optimize import attention

from ..generate.test_calibration import calibration_of
from ..support.clips import numbered, write_clip

PROMPT = "a red circle moves right on a blue background"
# 24x32 tokens in each of 5 latent frames.
SIZE = ("--size", "384x512", "--frames", "17")
PRICE = Price(33.3, 41.2, "a model", 2.14, "a clock", "2026-11-29")
WHOLE = SpeedSet(PRICE, True, "cudnn-fp8", 0.15, 0.2, 0.05, 0.8)


class Loaded(Exception):
    """Loading began, so all checks are over."""


@pytest.fixture
def machine(monkeypatch) -> list[dict[str, Any]]:
    """A machine that has everything; how models would be loaded on it."""
    monkeypatch.setitem(SETS, "fast", dict.fromkeys(KINDS, WHOLE))
    monkeypatch.setattr(speed_fit, "missing", lambda device: "")
    monkeypatch.setattr(speed_fit, "only_plain", lambda inputs: "")
    monkeypatch.setattr(attention, "why_not", lambda name, inputs: "")
    loads: list[dict[str, Any]] = []

    def load(model, **settings):
        loads.append(settings)
        raise Loaded

    monkeypatch.setattr(commands, "load_pipeline", load)
    return loads


def run(capsys, *argv: str) -> list[str]:
    """The notes of a command up to where it loads a model."""
    with pytest.raises(Loaded):
        cli.main(list(argv))
    lines = capsys.readouterr().err.splitlines()
    return [line.removeprefix("longcat: note: ") for line in lines if line.startswith("longcat: note: ")]


def test_which_commands_have_it():
    names = [name for name in cli.COMMANDS if any(row.name == "speed" for row in of_command(name))]
    assert names == ["generate", "long", "avatar", "refine", "compare", "score-nano"]


@pytest.mark.parametrize("command", ["generate", "long"])
def test_a_word_loads_and_samples_by_its_set(machine, capsys, tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    notes = run(capsys, command, PROMPT, *SIZE, "--speed", "fast")
    assert (machine[0]["fp8"], machine[0]["optimizations"].attention) == (True, "cudnn-fp8")
    assert [note for note in notes if note.startswith("speed")] == [
        f"speed fast sets {WHOLE.in_words()}; 33.3 dB against exact, 2.14 times as fast (dB on a model, where two "
        "exact kernels are 41.2 dB apart; times by a clock; 2026-11-29)"
    ]
    assert not [note for note in notes if "not calibrated" in note]


def test_refining_takes_what_loading_can_do(machine, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(SETS, "fast", {REFINE: SpeedSet(PRICE, fp8=True)})
    write_clip(Path("a.mkv"), numbered(5))
    notes = run(capsys, "refine", "a.mkv", "--speed", "fast")
    assert machine[0]["fp8"] is True and machine[0]["optimizations"].attention == "auto"
    assert [note for note in notes if note.startswith("speed fast sets fp8; 33.3 dB")]


@pytest.mark.parametrize(
    ("given", "fp8", "backend", "own"),
    [
        (("--attention", "auto"), True, "auto", "attention"),
        (("--attention=sdpa",), True, "sdpa", "attention"),
        (("--fp8",), True, "cudnn-fp8", ""),
        (("--step-cache", "0"), True, "cudnn-fp8", "step cache"),
        (("--sparse", "1"), True, "cudnn-fp8", "sparse attention"),
        (("--guidance-until", "1"), True, "cudnn-fp8", "guidance until"),
    ],
)
def test_an_option_that_is_given_wins(machine, capsys, tmp_path, monkeypatch, given, fp8, backend, own):
    monkeypatch.chdir(tmp_path)
    notes = run(capsys, "generate", PROMPT, *SIZE, "--speed", "fast", *given)
    assert (machine[0]["fp8"], machine[0]["optimizations"].attention) == (fp8, backend)
    (note,) = [note for note in notes if note.startswith("speed")]
    assert (f"your own {own} takes precedence" in note) if own else ("precedence" not in note)


def test_a_calibration_replaces_the_words_density(machine, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_calibration(tmp_path / "own.json", calibration_of(open_checkpoint(NANO_MODEL)))
    notes = run(
        capsys, "generate", PROMPT, *SIZE, "--speed", "fast", "--sparse", "own.json", "--sparse-kernel", "plain"
    )
    (note,) = [note for note in notes if note.startswith("speed")]
    assert "your own sparse attention takes precedence" in note and machine[0]["fp8"] is True


def test_options_of_what_the_word_sets_have_an_effect(machine, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = ("--sparse-kernel", "plain")
    assert not [note for note in run(capsys, "generate", PROMPT, *SIZE, "--speed", "fast", *given) if "effect" in note]
    assert len([note for note in run(capsys, "generate", PROMPT, *SIZE, *given) if "has no effect" in note]) == 1


def test_a_folder_records_what_is_in_force(machine, capsys, tmp_path, monkeypatch):
    """The same as the options themselves, so that either resumes what the other began."""
    monkeypatch.chdir(tmp_path)
    requests = []
    monkeypatch.setattr(
        "longcat_core.cli.generate.long_video", lambda load, request, *_: requests.append(request) or load()
    )
    # On a CPU, where nothing is computed in bf16, which a folder records too.
    own = ("--sparse", "0.15", "--step-cache", "0.05", "--guidance-until", "0.8", "--fp8")
    for given in (("--speed", "fast", "--attention", "auto"), own):
        run(capsys, "long", PROMPT, PROMPT, *SIZE, "--device", "cpu", *given)
    word, spelled = requests
    for number in (0, 1):
        assert word.settings(number) == spelled.settings(number)
        assert word.settings(number)["lossy"].keys() == {"sparse", "step cache", "guidance until", "fp8"}


def test_comparing_a_word(machine, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sides: list[Any] = []
    real = comparing.sides_of
    monkeypatch.setattr(comparing, "sides_of", lambda *given: sides.extend(real(*given)) or sides)
    versus = ("--versus", "--speed fast", "--versus", "--speed fast --step-cache 0.1 --attention sdpa")
    notes = run(capsys, "compare", PROMPT, *SIZE, *versus)
    exact, fast, own = sides
    assert (exact.model["fp8"], exact.args.attention, exact.request.sparse) == (False, "auto", None)
    assert (fast.model["fp8"], fast.args.attention, fast.request.step_cache) == (True, "cudnn-fp8", 0.05)
    assert (own.model["fp8"], own.args.attention, own.request.step_cache) == (True, "sdpa", 0.1)
    assert len([note for note in notes if note.startswith("speed fast sets")]) == 2


def test_what_is_not_there_is_left_out_and_nothing_fails(monkeypatch, capsys, tmp_path):
    """Nano on a CPU: every word makes the exact video, and one note says why."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(SETS, "fast", {BASE: replace(WHOLE, step_cache=0.0, guidance_until=1.0)})
    given = ("--frames", "9", "--steps", "2", "--seed", "3", "--device", "cpu")
    for name, more in (("exact.mkv", ()), ("word.mkv", ("--speed", "exact")), ("fast.mkv", ("--speed", "fast"))):
        assert cli.main(["generate", PROMPT, *given, "-o", name, *more]) == 0
    said = capsys.readouterr().err
    assert said.count("note: speed") == 1 and "speed fast sets nothing here; it leaves out fp8 (" in said
    assert Path("exact.mkv").read_bytes() == Path("word.mkv").read_bytes() == Path("fast.mkv").read_bytes()


def test_another_word_is_refused(refused):
    for command in (("generate", PROMPT), ("long", PROMPT), ("refine", "a.mp4")):
        assert "--speed: invalid choice: 'quick'" in refused(*command, "--speed", "quick")
