"""`longcat long` and `longcat refine --folder`: bad input is one sentence before a model is loaded; runs go on."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from longcat_core.cli import main as cli
from longcat_core.cli import models as commands
from longcat_core.files import places
from longcat_core.files.media import read_video, write_video

from ..support.tiny import tiny_pipeline

ONE, TWO = "a red circle moves right on a blue background", "a red circle moves up on a blue background"
SMALL = ["--size", "16x32", "--frames", "9", "--overlap", "5", "--steps", "2", "--device", "cpu"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with some inputs, in which loading a model is a failure."""

    def load(*_: Any, **__: Any) -> None:
        pytest.fail("a model was loaded before the input was checked")

    monkeypatch.setattr(commands, "load_pipeline", load)
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (32, 16)).save("good.png")
    write_video("short.webp", clip(5), 15)
    Path("empty.txt").write_text(" \n\n", encoding="utf-8")
    Path("blank.txt").write_text(f"{ONE}\n&nbsp;\n", encoding="utf-8")
    Path("latin.txt").write_bytes("größer".encode("latin-1"))
    Path("two.txt").write_text(f"{ONE}\n\n  {TWO}  \n", encoding="utf-8")
    Path("file").touch()
    theirs = Path("theirs", "segment-001")
    theirs.mkdir(parents=True)
    (theirs / "holiday.jpg").write_bytes(b"precious")
    return tmp_path


@pytest.fixture
def loads(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The tiny model is loaded instead; how, and how often."""
    loaded, pipeline = [], tiny_pipeline()
    monkeypatch.setattr(commands, "load_pipeline", lambda paths, **options: loaded.append(options) or pipeline)
    return loaded


def clip(frames: int) -> np.ndarray:
    rows, columns = np.mgrid[:16, :32]
    return np.stack([np.stack([(rows * 9 + columns * 5 + 7 * i) % 256] * 3, -1) for i in range(frames)]).astype(
        np.uint8
    )


def files() -> dict[str, tuple[int, bytes | None]]:
    return {
        str(path): (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else None)
        for path in Path().rglob("*")
    }


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What the command says while it touches nothing."""
    before = files()
    assert cli.main(list(arguments)) == cli.BAD_INPUT
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("longcat: error: ") and err.count("\n") == 1 and "Traceback" not in err
    assert files() == before
    return err


BAD: dict[str, tuple[list[str], tuple[str, ...]]] = {
    # prompts and segments
    "no prompt": ([], ("prompt is empty", "say what the video shows")),
    "empty prompt": ([""], ("prompt is empty",)),
    "prompt not UTF-8": ([ONE, "\udc80"], ("prompt of segment 2 is not valid UTF-8",)),
    "prompts twice": ([ONE, "--prompts-file", "two.txt"], ("--prompts-file", "exclude each other")),
    "no file of prompts": (["--prompts-file", "none.txt"], ("none.txt",)),
    "folder of prompts": (["--prompts-file", "theirs"], ("theirs",)),
    "no prompts in it": (["--prompts-file", "empty.txt"], ("empty.txt holds no prompts", "one a line")),
    "prompts not UTF-8": (["--prompts-file", "latin.txt"], ("latin.txt is not UTF-8 text",)),
    "a prompt of an HTML blank": (["--prompts-file", "blank.txt"], ("prompt is empty",)),
    "no segments": ([ONE, "--segments", "0"], ("0 segments are out of range", "1 to 999")),
    "segments no number": ([ONE, "--segments", "many"], ("cannot read 'many' as a whole number",)),
    "more prompts than segments": ([ONE, TWO, "--segments", "1"], ("2 prompts are more than the 1", "at most")),
    # overlap
    "overlap not 4k+1": ([ONE, "--overlap", "12"], ("12 frames are not of the form 4k+1", "9 and 13")),
    "overlap of all": ([ONE, "--frames", "13"], ("leave nothing new", "at least 17 frames", "smaller overlap")),
    "hand-off": ([ONE, "--hand-off", "mail"], ("--hand-off", "frames", "latents")),
    # what all videos have: a row for all, see test_generate.py
    "frames": ([ONE, "--frames", "32"], ("32 frames are not of the form 4k+1", "29 and 33")),
    "schedules": ([ONE, "--distilled", "--schedule", "base"], ("--distilled", "--schedule base")),
    "model": ([ONE, "--model", "none"], ("none", "does not exist")),
    # what it begins with
    "no image": ([ONE, "--image", "none.png"], ("none.png does not exist",)),
    "image and clip": ([ONE, "--image", "good.png", "--video", "short.webp"], ("image", "video", "give the one")),
    "short clip for 9": (
        [ONE, "--video", "short.webp", "--cond-frames", "9"],
        ("short.webp has 5 frames", "9 conditioning", "at most 5"),
    ),
    # where it goes
    "output's form": ([ONE, "-o", "a.avi"], ("'a.avi'", ".mp4, .mkv, .webp, .gif")),
    "output's folder": ([ONE, "-o", "none/a.mp4"], ("none", "does not exist")),
    "output is the image": ([ONE, "--image", "good.png", "-o", "good.png"], ("good.png", "--output")),
    "folder is a file": ([ONE, "--folder", "file"], ("file is not a folder", "name a folder")),
    "folder in a file": ([ONE, "--folder", "file/kept"], ("file/kept", "cannot be written to", "name another folder")),
    "folder of somebody": ([ONE, "--folder", "theirs"], ("theirs/segment-001 is no segment", "holiday.jpg")),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_of_long_is_one_sentence(folder: Path, capsys: Any, name: str) -> None:
    arguments, said = BAD[name]
    told = refused(capsys, "long", *arguments)
    assert all(words in told for words in said), told


def test_a_video_that_is_not_from_this_command_stays(folder: Path, capsys: Any) -> None:
    write_video("longcat-long.mp4", clip(5), 15)
    told = refused(capsys, "long", ONE, *SMALL)
    assert "longcat-long.mp4 already exists and was not made by this command" in told and "--output" in told


def test_a_full_disk_is_reported_before_a_model_is_loaded(folder: Path, capsys: Any, monkeypatch: Any) -> None:
    usage = shutil.disk_usage(folder)
    monkeypatch.setattr(places.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    told = refused(capsys, "long", ONE, *SMALL)
    assert "longcat-long.mp4 may take" in told and "make room" in told
    # Room for the video, but not for a segment and what must be left beside it.
    monkeypatch.setattr(places.shutil, "disk_usage", lambda _: usage._replace(free=15_000_000))
    assert cli.main(["long", ONE, *SMALL]) == cli.BAD_INPUT
    told = capsys.readouterr().err
    assert "segment 1 may take" in told and "run the same command again to resume" in told and told.count("\n") == 1


# --- runs ------------------------------------------------------------------------------------------------------------


def test_a_run_and_the_same_again(folder: Path, loads: list, capsys: Any) -> None:
    arguments = ["long", ONE, TWO, "--segments", "3", *SMALL, "--seed", "5", "--fps", "12", "-o", "a.mkv"]
    assert cli.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(";")[0] for line in lines[:3]] == [
        f"segment {number} of 3: finished and saved in a-segments" for number in (1, 2, 3)
    ]
    assert "color changes by" not in lines[0] and "color changes by" in lines[1]
    assert lines[3].startswith("a.mkv: 17 frames of 16x32 at 12 fps, 3 segments, seed 5, in ")
    video, fps = read_video("a.mkv")
    parts = [read_video(path)[0] for path in sorted(Path("a-segments").glob("*/frames.mkv"))]
    assert fps == 12 and np.array_equal(video, np.concatenate([parts[0], *[part[5:] for part in parts[1:]]]))
    assert len(loads) == 1
    Path("a.mkv").unlink()
    assert cli.main(arguments) == 0 and len(loads) == 1
    assert "segment 3 of 3: already in a-segments" in capsys.readouterr().out
    assert np.array_equal(read_video("a.mkv")[0], video)


def test_the_default_names_serve_the_same_command_again(folder: Path, loads: list) -> None:
    for _ in range(2):
        assert cli.main(["long", ONE, "--segments", "2", *SMALL]) == 0
    assert Path("longcat-long.mp4").is_file() and len(loads) == 1
    assert sorted(path.name for path in Path("longcat-long-segments").glob("s*")) == ["segment-001", "segment-002"]
    assert not Path("longcat-long-2.mp4").exists()


def test_prompts_from_a_file(folder: Path, loads: list, capsys: Any) -> None:
    assert cli.main(["long", "--prompts-file", "two.txt", *SMALL]) == 0
    assert cli.main(["long", ONE, TWO, *SMALL]) == 0
    assert len(loads) == 1 and "2 segments" in capsys.readouterr().out
    assert cli.main(["long", ONE, ONE, *SMALL]) == 0 and len(loads) == 2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--size", "32x32"], "height 16 there, 32 now"),
        (["--frames", "13"], "frames 9 there, 13 now"),
        (["--seed", "1"], "seed 0 there, 1 now"),
        (["--steps", "3"], "steps 2 there, 3 now"),
        (["--overlap", "1"], "overlap 5 there, 1 now"),
        (["--guidance", "3"], "guidance_scale 4.0 there, 3.0 now"),
        (["--hand-off", "latents"], "hand_off frames there, latents now"),
        (["--kv-cache", "off"], "kv_cache exact there, off now"),
        (["--dtype", "bfloat16"], "dtype float32 there, bfloat16 now"),
        (["--fp8"], "fp8 False there, True now"),
        (["--attention", "sdpa"], "attention auto there, sdpa now"),
        (["--image", "good.png"], "given frames none there"),
        (["--schedule", "enhance_hf"], "schedule base there, enhance_hf now"),
    ],
)
def test_other_settings_mid_way_are_refused(
    folder: Path, loads: list, capsys: Any, options: list[str], said: str
) -> None:
    arguments = ["long", ONE, "--segments", "2", *SMALL, "-o", "a.webp"]
    assert cli.main(arguments) == 0 and len(loads) == 1
    Path("a-segments", ".lock").unlink()
    capsys.readouterr()
    told = refused(capsys, *arguments, *options)
    assert said in told and "a-segments holds segments with other settings" in told and len(loads) == 1


def test_another_model_is_refused(folder: Path, loads: list, capsys: Any) -> None:
    """By what is in its files, not by their names."""
    from longcat_core.generate.paths import NANO_MODEL, NANO_TEXT_ENCODER, NANO_VAE

    arguments = ["long", ONE, *SMALL, "-o", "a.webp", "--guidance", "3"]
    assert cli.main(arguments) == 0
    shutil.copy(NANO_MODEL, "same.safetensors")
    # The least bit of every second weight, as of a model that was trained on a little.
    content = np.fromfile(NANO_MODEL, np.uint8)
    content[len(content) // 2 :: 4] ^= 1
    content.tofile("other.safetensors")
    parts = ["--vae", str(NANO_VAE), "--text-encoder", str(NANO_TEXT_ENCODER)]
    assert cli.main([*arguments, "--model", "same.safetensors", *parts]) == 0
    capsys.readouterr()
    told = refused(capsys, *arguments, "--model", "other.safetensors", *parts)
    assert "(model " in told and told.count(" there, ") == 1 and len(loads) == 1


def test_an_interrupt_keeps_finished_segments(folder: Path, loads: list, capsys: Any, monkeypatch: Any) -> None:
    arguments = ["long", ONE, "--segments", "3", *SMALL, "-o", "a.webp"]
    with monkeypatch.context() as patch:
        patch.setattr("longcat_core.cli.console.Progress.__call__", stop_at("segment 2/3"))
        assert cli.main(arguments) == cli.INTERRUPTED
    assert sorted(os.listdir("a-segments")) == [".lock", "segment-001"] and not Path("a.webp").exists()
    assert cli.main(arguments) == 0
    assert "segment 1 of 3: already in a-segments" in capsys.readouterr().out


def stop_at(label: str) -> Callable[..., None]:
    def called(self: Any, step: Any, said: str = "") -> None:
        if said == label:
            raise KeyboardInterrupt

    return called


# --- refining in a folder --------------------------------------------------------------------------------------------

REFINE = ["refine", "clip.mkv", "--size", "16x32", "--steps", "12", "--piece", "9", "--overlap", "5", "--spatial-only"]


@pytest.fixture
def source(folder: Path) -> np.ndarray:
    video = clip(13)
    write_video("clip.mkv", video, 15)
    return video


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--folder", "file"], ("file is not a folder", "name a folder")),
        (["--folder", "theirs"], ("theirs/segment-001 is no segment", "holiday.jpg")),
        (["--folder", "kept", "--piece", "5"], ("leave nothing new", "longer pieces")),
        (["--folder", "kept", "--overlap", "0"], ("leave nothing new", "at least 1")),
        (["--folder", "kept", "--seed", "-1"], ("seed -1",)),
        (["--prompt", "a \udc80"], ("prompt is not valid UTF-8",)),
        (["--folder", "file/kept"], ("file/kept cannot be written to",)),
    ],
)
def test_bad_input_of_refine(folder: Path, source: np.ndarray, capsys: Any, options: list, said: tuple) -> None:
    told = refused(capsys, *REFINE, "-o", "out.mkv", "--device", "cpu", *options)
    assert all(words in told for words in said), told


@pytest.mark.parametrize("sparsity", ["0", "0.5"])
def test_refining_goes_on_from_its_folder(
    folder: Path, source: np.ndarray, loads: list, capsys: Any, sparsity: str
) -> None:
    arguments = [*REFINE, "--sparsity", sparsity, "--folder", "kept", "-o", "out.mkv", "--device", "cpu"]
    assert cli.main(arguments) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[:2] == ["piece 1: finished and saved in kept", "piece 2: finished and saved in kept"]
    assert out[2].startswith("out.mkv: 13 frames of 16x32 at 15 fps, seed 0, in ")
    video, _ = read_video("out.mkv")
    assert cli.main(arguments) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[:2] == ["piece 1: already in kept", "piece 2: already in kept"] and len(loads) == 1
    assert np.array_equal(read_video("out.mkv")[0], video)
    shutil.rmtree("kept/segment-002")
    assert cli.main(arguments) == 0 and len(loads) == 2
    assert np.array_equal(read_video("out.mkv")[0], video)
    plain = [argument for argument in arguments if argument not in ("--folder", "kept")]
    assert cli.main(plain) == 0 and np.array_equal(read_video("out.mkv")[0], video), "the same as without a folder"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--seed", "1"], "seed 0 there, 1 now"),
        (["--prompt", "a"], "prompt empty there, a now"),
        (["--size", "32x32"], "height 16 there, 32 now"),
        (["--piece", "13"], "piece 9 there, 13 now"),
        (["--sparsity", "0.5"], "block_sparse none there"),
        (["--fp8"], "fp8 False there, True now"),
    ],
)
def test_other_settings_of_refining_are_refused(
    folder: Path, source: np.ndarray, loads: list, capsys: Any, options: list[str], said: str
) -> None:
    arguments = [*REFINE, "--folder", "kept", "-o", "out.mkv", "--device", "cpu"]
    assert cli.main(arguments) == 0
    capsys.readouterr()
    told = refused(capsys, *arguments, *options)
    assert said in told and "kept holds segments with other settings" in told and len(loads) == 1
