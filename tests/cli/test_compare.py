"""longcat compare: what is refused before a model is loaded, what is run with what, and what is left on the disk."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from longcat_core.cli import compare as fidelity_commands
from longcat_core.cli import main as cli
from longcat_core.cli import models as commands
from longcat_core.files import media
from longcat_core.generate.pipeline import Pipeline
from longcat_core.generate.request import GenerateRequest
from longcat_core.generate.text import TextEncoder
from longcat_core.optimize import attention as backends
from longcat_core.optimize.execution import Execution

PROMPT = "a red circle moves right on a blue background"
SMALL = ("--steps", "6", "--frames", "5")
B = ("--versus", "--step-cache 0.5")


@pytest.mark.parametrize(
    ("versus", "said"),
    [
        ("--size 80x96", "another height (80) than A (64)"),
        ("--frames 17", "another number of frames (17) than A (33)"),
        ("--image first.png", "another image (first.png) than A (None)"),
        ("--memory 4", "sets --memory, which holds for all"),
        ("--steps 0", "--versus '--steps 0': 0 steps"),
        ("--model missing", "missing does not exist"),
        ("--stepz 3", "--versus '--stepz 3'"),
        ("--output x", "--output"),
        ("--negative-prompt 'open", "cannot be read"),
        (" ", "--versus: it is empty"),
    ],
)
def test_settings_that_cannot_be_compared(refused: Any, monkeypatch: Any, versus: str, said: str) -> None:
    monkeypatch.setattr(commands, "check_memory", lambda *_: None)
    Image.new("RGB", (96, 64)).save("first.png")
    assert said in refused("compare", PROMPT, "--versus", versus)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("", "--versus"),
        ("--versus --fp8 --prompts-file empty.txt", "exclude each other"),
        ("--versus --fp8 --seeds 0", "0 seeds are out of range"),
        (f"--versus --fp8 --seed {2**63 - 1} --seeds 2", "2^63"),
        ("--versus --fp8 --floor magic", "'magic'"),
        ("--versus --fp8 --floor sdpa --attention sdpa", "A's own attention"),
        ("--versus --fp8 --output full", "full already exists and is not empty"),
        ("--versus --fp8 --output full/file.txt", "file.txt already exists"),
        ("--versus --fp8 --output missing/dir", "does not exist"),
        ("--versus --fp8 --page full/file.txt", "must end in .md"),
        ("--versus --fp8 --page full/notes.md", "notes.md already exists and is not from longcat compare"),
        ("--versus --fp8 --page full/other.md", "other-plot.png already exists"),
        ("--versus --fp8 --page missing/page.md", "does not exist"),
    ],
)
def test_bad_input(refused: Any, options: str, said: str) -> None:
    Path("full").mkdir()
    Path("full/file.txt").write_text("mine", encoding="utf-8")
    Path("full/notes.md").write_text("# Mine", encoding="utf-8")
    Path("full/other-plot.png").touch()
    assert said in refused("compare", PROMPT, *options.split())


def test_a_prompt_is_missing(refused: Any) -> None:
    assert "a PROMPT is missing" in refused("compare", *B)


def test_lossy_floor_is_refused(refused: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "check", lambda name: None)
    assert "--floor sage is lossy" in refused("compare", PROMPT, *B, "--floor", "sage")


def test_versus_takes_a_single_option_too() -> None:
    assert cli.joined(["compare", "x", "--versus", "--fp8", "--versus", "--steps 3"]) == [
        "compare", "x", "--versus=--fp8", "--versus=--steps 3",
    ]  # fmt: skip
    assert cli.joined(["compare", "--versus"]) == ["compare", "--versus"]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs a command on the bundled model: (whether in 8 bits, of every load; the kernel of every forward)."""
    loads, kernels = [], []
    load, choose = commands.load_pipeline, Execution.choose_kernels
    names = {backend.attend: backend.name for backend in backends.BACKENDS}

    def choose_kernels(self: Execution, device: torch.device) -> Any:
        chosen = choose(self, device)
        kernels.append(names[chosen.attend])
        return chosen

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(commands, "load_pipeline", lambda *a, **kw: loads.append(kw["fp8"]) or load(*a, **kw))
    monkeypatch.setattr(Execution, "choose_kernels", choose_kernels)

    def run(*arguments: str) -> tuple[list[bool], list[str]]:
        loads.clear(), kernels.clear()
        assert cli.main(["compare", *arguments, "--device", "cpu"]) == 0
        return loads, kernels

    return run


def test_encodings_are_kept_on_disk(run: Any, monkeypatch: Any) -> None:
    """So that the second model loads no text encoder, and neither does the next command."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(Path("kept").absolute()))
    encoded: list[str] = []
    encode_each = TextEncoder.encode_each

    def seen(self: TextEncoder, batches: Any, *more: Any, **options: Any) -> Any:
        encoded.extend(prompt for prompts in batches for prompt in prompts)
        return encode_each(self, batches, *more, **options)

    monkeypatch.setattr(TextEncoder, "encode_each", seen)
    words = (PROMPT, *SMALL, "--versus", "--fp8", "--floor", "off")
    run(*words, "--no-text-cache")
    assert encoded.count(PROMPT) == 2 and not Path("kept").exists()
    encoded.clear()
    run(*words)
    assert encoded.count(PROMPT) == 1 and list(Path("kept").rglob("*.safetensors"))


def test_settings_of_a_model_share_it_and_the_floor_has_another_kernel(run: Any, capsys: Any) -> None:
    versus = ("--versus", "--fp8", *B, "--versus", "--steps 3", "--versus", "--attention sdpa")
    loads, kernels = run(PROMPT, *SMALL, *versus, "--seeds", "2", "--page", "page.md")
    assert loads == [False, True]
    report = json.loads(Path("longcat-compare/report.json").read_text(encoding="utf-8"))
    rows = {row["name"]: row for row in report["rows"]}
    assert list(rows) == ["A", "B", "C", "D", "E", "noise floor"]
    assert [rows[name]["options"] for name in "BCDE"] == ["--fp8", "--step-cache 0.5", "--steps 3", "--attention sdpa"]
    assert rows["noise floor"]["options"] == "attention sdpa-math"
    assert rows["C"]["computed"] == [4, 4] and rows["D"]["computed"] == [3, 3] and rows["A"]["computed"] == [6, 6]
    # A first step of every setting but the floor, then turn by turn; at last the model in 8 bits.
    turn = ["sdpa"] * 6 + ["sdpa-math"] * 6 + ["sdpa"] * (4 + 3 + 6)
    assert kernels == ["sdpa"] * 4 + 2 * turn + ["sdpa"] * (1 + 2 * 6)
    assert (
        rows["E"]["identical"] and not rows["B"]["identical"] and rows["noise floor"]["psnr"] > rows["B"]["psnr"] + 20
    )
    assert all(len(rows[name]["seconds"]) == 2 and min(rows[name]["seconds"]) > 0 for name in "ABCDE")
    assert "E is identical to A" in rows["E"]["verdict"] and "beyond the noise floor" in rows["B"]["verdict"]
    out = capsys.readouterr().out
    assert f"D: --steps 3. {rows['D']['verdict']}" in out and "12 videos" in out

    files = sorted(os.listdir("longcat-compare"))
    videos = [f"{name}-{i}.mkv" for name in ("A", "B", "C", "D", "E", "noise-floor") for i in (1, 2)]
    assert files == sorted([*videos, "plot.png", "report.json", "report.md", "side-by-side.png"])
    first, second = (media.read_video(f"longcat-compare/A-{i}.mkv")[0] for i in (1, 2))
    pipeline = Pipeline.load()
    for seed, frames in enumerate((first, second)):
        assert np.array_equal(frames, pipeline.generate(GenerateRequest(PROMPT, seed=seed, steps=6, frames=5)).frames)
    few, _ = media.read_video("longcat-compare/D-1.mkv")
    error = np.square(few.astype(float) - first).mean(axis=(1, 2, 3))
    assert rows["D"]["frame_psnr"][0] == pytest.approx(10 * np.log10(255**2 / error))

    text = Path("longcat-compare/report.md").read_text(encoding="utf-8")
    assert text.startswith("# What an option costs") and "(plot.png)" in text and f"- {PROMPT}" in text
    assert Path("page.md").read_text(encoding="utf-8") == text.replace("(plot.png)", "(page-plot.png)").replace(
        "(side-by-side.png)", "(page-side-by-side.png)"
    )
    for name in ("plot", "side-by-side"):
        with Image.open(f"page-{name}.png") as page, Image.open(f"longcat-compare/{name}.png") as own:
            assert np.array_equal(np.asarray(page), np.asarray(own)) and np.asarray(page).std() > 20


def test_a_given_image_is_not_compared_and_a_page_is_rewritten(run: Any) -> None:
    Image.fromarray(np.full((64, 96, 3), 90, np.uint8)).save("first.png")
    Path("page.md").write_text(fidelity_commands.TITLE, encoding="utf-8")
    options = ("--image", "first.png", "--steps", "2", "--frames", "5", "--floor", "off", "--output", "out")
    _, kernels = run(PROMPT, "a green square moves up on a gray background", *options, *B, "--page", "page.md")
    report = json.loads(Path("out/report.json").read_text(encoding="utf-8"))
    assert [row["name"] for row in report["rows"]] == ["A", "B"] and set(kernels) == {"sdpa"}
    assert report["inputs"]["given"] == 1 and report["rows"][1]["first_frame"] == 1
    assert np.shape(report["rows"][1]["frame_ssim"]) == (2, 4)
    text = Path("page.md").read_text(encoding="utf-8")
    assert "generated frames only, from frame 1 on" in text and "No noise floor: it was not asked for" in text


def test_floor_that_runs_out_of_memory_costs_only_the_floor(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    choose = Execution.choose_kernels

    def exhausted(self: Execution, device: torch.device) -> Any:
        if self.optimizations.attention == "sdpa-math":
            raise torch.OutOfMemoryError("out of memory")
        return choose(self, device)

    monkeypatch.setattr(Execution, "choose_kernels", exhausted)
    run(PROMPT, *SMALL, *B, "--steps", "2")
    report = json.loads(Path("longcat-compare/report.json").read_text(encoding="utf-8"))
    assert [row["name"] for row in report["rows"]] == ["A", "B"]
    assert report["inputs"]["no_floor"] == "the other exact kernel, sdpa-math, ran out of memory"


def test_interrupted_leaves_whole_files_only(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(fidelity_commands, "write_page", interrupt)
    assert cli.main(["compare", PROMPT, "--steps", "2", "--frames", "5", *B, "--output", "out"]) == cli.INTERRUPTED
    assert sorted(os.listdir("out")) == ["A-1.mkv", "B-1.mkv", "noise-floor-1.mkv"]
    assert cli.main(["compare", PROMPT, *B, "--output", "out"]) == cli.BAD_INPUT
    assert len(os.listdir("out")) == 3
