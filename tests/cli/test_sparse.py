"""--sparse: a density or a calibration file, checked before a model is loaded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from longcat_core.checkpoints.load import open_checkpoint
from longcat_core.cli import main as cli
from longcat_core.cli import models as commands
from longcat_core.generate.calibration import write_calibration
from longcat_core.generate.paths import NANO_MODEL
from longcat_core.optimize.sparse import choose
from longcat_core.optimize.sparse.settings import Sparse

from ..generate.test_calibration import calibration_of

PROMPT = "a red circle moves right on a blue background"


class Loaded(Exception):
    """Loading began, so all checks are over."""


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("--sparse", "1.5"), "sparse density is 1.5; it must lie between 0 and 1"),
        (("--sparse", "missing.json"), "--sparse missing.json is neither a density from 0 to 1 nor a file"),
        (("--sparse", "other.json"), "other.json is of other weights than this model's; run longcat calibrate"),
        (("--sparse", "text.json"), "text.json"),
        (("--sparse", "0.15", "--sparse-kernel", "fa4"), "sparse kernel 'fa4' is unavailable"),
        (("--sparse-kernel", "quick"), "--sparse-kernel"),
    ],
)
def test_bad_values(refused, folder, monkeypatch, given, said):
    # A machine with a GPU may have that kernel.
    without = [replace(b, needs=replace(b.needs, module="missing")) if b.name == "fa4" else b for b in choose.BACKENDS]
    monkeypatch.setattr(choose, "BACKENDS", tuple(without))
    found = calibration_of(open_checkpoint(NANO_MODEL))
    marks = tuple(tuple(mark + 1 for mark in row) for row in found.model.marks)
    write_calibration(folder / "other.json", replace(found, model=replace(found.model, marks=marks)))
    Path("text.json").write_text("{}", encoding="utf-8")
    for command in ("generate", "long"):
        assert said in refused(command, PROMPT, *given)
    if "--sparse" in given:
        assert said in refused("compare", PROMPT, "--versus", " ".join(given))


def test_a_density_or_a_calibration_reaches_the_request(folder, monkeypatch, capsys):
    requests = []

    def load(*_, **__):
        raise Loaded

    monkeypatch.setattr(commands, "load_pipeline", load)
    make = commands.sparse_of
    monkeypatch.setattr("longcat_core.cli.generate.sparse_of", lambda args: requests.append(make(args)) or requests[-1])
    found = calibration_of(open_checkpoint(NANO_MODEL))
    write_calibration(folder / "own.json", found)
    for value in ("0.3", "own.json"):
        with pytest.raises(Loaded):
            cli.main(["generate", PROMPT, "--sparse", value])
    assert requests == [Sparse(0.3), found]
    assert capsys.readouterr().err.count("is not calibrated for this model") == 1


def test_a_small_video_is_dense_and_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    given = ("--frames", "9", "--steps", "2", "--seed", "3", "--device", "cpu")
    for name, more in (("dense.mkv", ()), ("sparse.mkv", ("--sparse", "0.15"))):
        assert cli.main(["generate", PROMPT, *given, "-o", name, *more]) == 0
    said = capsys.readouterr().err
    assert said.count("sparse attention: density 0.15, kernel plain\n") == 1
    assert said.count("too few for sparse attention, which needs 1024; it attends to all tokens") == 1
    assert Path("dense.mkv").read_bytes() == Path("sparse.mkv").read_bytes()
