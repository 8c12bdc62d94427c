"""longcat calibrate: what is refused before a model is loaded, and the file that a run leaves."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from longcat_core.checkpoints.load import open_checkpoint
from longcat_core.cli import calibrate as command
from longcat_core.cli import main as cli
from longcat_core.cli import models as commands
from longcat_core.errors import LongCatError
from longcat_core.generate.calibration import check_fits, read_calibration
from longcat_core.generate.pipeline import Pipeline
from longcat_core.generate.request import NANO
from longcat_core.measure import calibrate as search

from ..support.quick import quick_pipeline
from ..support.tiny import GOLDEN

# 1,088 tokens, in a network that is far smaller than nano.
SMALL = ("--size", "128x128", "--frames", "65", "--steps", "4")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("", "have 216 tokens to generate, too few for sparse attention"),
        ("--budget 0 --size 192x320", "a budget of 0 is out of range"),
        ("--budget much", "cannot read 'much' as a number"),
        ("--dense-steps 1 --size 192x320", "leaves none of 10 to calibrate"),
        ("--dense-steps -1 --size 192x320", "a share of dense steps of -1 is out of range"),
        ("--steps 0 --size 192x320", "0 steps are out of range"),
        ("--size 100x320", "height 100"),
        ("missing", "missing does not exist"),
        ("--prompt x --prompts-file empty.txt", "exclude each other"),
        ("--prompts-file empty.txt", "holds no prompts"),
        ("--prompt x --prompt=", "the prompt is empty"),
        ("--image first.png --size 192x320", "needs a prompt of its own; give --prompt"),
        ("--attention sage --size 192x320", "--attention sage is lossy"),
        ("--size 192x320 -o found.txt", "must end in .json"),
        ("--size 192x320 -o missing/found.json", "does not exist"),
        ("--size 192x320 -o folder.json", "is a folder"),
        ("--step-cache 0.1", "--step-cache"),
        ("--size 192x320 --page found.txt", "must end in .md"),
        ("--size 192x320 --page notes.md", "notes.md already exists and is not from longcat calibrate"),
        ("--size 192x320 --page missing/page.md", "does not exist"),
    ],
)
def test_bad_input(refused: Any, options: str, said: str) -> None:
    Path("empty.txt").touch()
    Path("folder.json").mkdir()
    Image.new("RGB", (96, 64)).save("first.png")
    Path("notes.md").write_text("# What an option costs\n", encoding="utf-8")
    assert said in refused("calibrate", *options.split())


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder of commands whose model is a small one."""

    def load(opened: Any, **options: Any) -> Pipeline:
        assert options["work"].latents == (1, 16, 17, 16, 16)
        return quick_pipeline()

    monkeypatch.setattr(commands, "load_pipeline", load)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_run_leaves_a_calibration_and_nothing_else(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["calibrate", *SMALL, "--no-video", "--budget", "0.08", "--seed", "3"]) == 0
    out, err = capsys.readouterr()
    assert os.listdir(small) == [command.OUTPUT]
    found = read_calibration(command.OUTPUT)
    check_fits(found, open_checkpoint(GOLDEN / "dit.safetensors"))
    assert (found.settings.budget, found.settings.seed, found.settings.steps) == (0.08, 3, 4)
    assert (found.settings.frames, found.settings.height, found.settings.width) == (65, 128, 128)
    assert len(found.prompts) == 2 and found.video is None and 0 < found.density < 1
    assert f"mean density {found.density:.3f}" in out and f"{command.OUTPUT}: budget 0.08, 2 prompts, in " in out
    assert "2 videos, 8 steps" in err

    assert cli.main(["calibrate", *SMALL, "--no-video", "--prompt", "a red circle", "--seed", "3"]) == 0
    out, err = capsys.readouterr()
    assert "longcat-calibration-2.json: budget 0.1, one prompt" in out
    assert read_calibration("longcat-calibration-2.json").prompts == ("a red circle",)


def test_a_page_shows_every_layer_and_is_written_again(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = [*SMALL, "--no-video", "--prompt", "a red circle", "--page", "page.md", "-o", "found.json"]
    for _ in range(2):
        assert cli.main(["calibrate", *given]) == 0
    out, _ = capsys.readouterr()
    assert sorted(os.listdir(small)) == ["found.json", "page-curve.png", "page-layers.png", "page.md"]
    page, found = Path("page.md").read_text(encoding="utf-8"), read_calibration("found.json")
    assert "(page-layers.png)" in page and "(page-curve.png)" in page and "found.json: budget 0.1; " in page
    at = min((point.density for point in found.curve), key=lambda density: abs(density - 0.15))
    held = f"softmax in the blocks taken at density {at:g}: {sum(found.mass) / len(found.mass):.0%} "
    assert held in page and held in out
    rows = [line.split("|")[1:-1] for line in page.splitlines() if line.startswith("|")][2:]
    assert len(rows) == found.model.depth
    for row, mass, heads, best in zip(rows, found.mass, found.head_mass, found.best_mass, strict=True):
        assert [int(cell) for cell in row[1:4]] == [round(100 * share) for share in (mass, min(heads), max(heads))]
        assert len(heads) == found.model.heads and all(a <= b for a, b in zip(heads, best, strict=True))
    for name in ("layers", "curve"):
        with Image.open(f"page-{name}.png") as picture:
            assert picture.width == 960 and np.asarray(picture).std() > 10


def test_an_interrupted_run_leaves_nothing(small: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(search, "choose", interrupted)
    assert cli.main(["calibrate", *SMALL, "--no-video", "--prompt", "x", "-o", "found.json"]) == cli.INTERRUPTED
    assert os.listdir(small) == []


def test_distilled_takes_its_own_steps_and_guidance() -> None:
    args = cli.build_parser().parse_args(["calibrate", "--distilled"])
    assert command._request(args, "x").steps == command.DISTILLED_STEPS
    args = cli.build_parser().parse_args(["calibrate"])
    request = command._request(args, "x")
    assert request.steps == command.STEPS and request.filled(NANO).speed == "exact"
    with pytest.raises(LongCatError, match="exclude each other"):
        command._request(cli.build_parser().parse_args(["calibrate", "--distilled", "--schedule", "base"]), "x")
