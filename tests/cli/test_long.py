"""`longcat long` and `longcat refine --folder`: bad input is one sentence before a model is loaded; runs go on."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from longcat_core.cli import main as cli
from longcat_core.cli import models as commands
from longcat_core.files.media import read_video, write_video
from longcat_core.generate.paths import NANO_MODEL, NANO_TEXT_ENCODER, NANO_VAE
from longcat_core.generate.segments import SPARE_BYTES

from ..support.clips import beeps, write_clip
from ..support.tiny import moving_clip, tiny_pipeline

ONE, TWO = "a red circle moves right on a blue background", "a red circle moves up on a blue background"
SMALL = ["--size", "16x32", "--frames", "9", "--overlap", "5", "--steps", "2", "--device", "cpu"]


@pytest.fixture
def inputs(folder: Path) -> None:
    """Files that some commands name."""
    Image.new("RGB", (32, 16)).save("good.png")
    write_video("short.webp", moving_clip(5), 15)
    Path("empty.txt").write_text(" \n\n", encoding="utf-8")
    Path("latin.txt").write_bytes("größer".encode("latin-1"))
    Path("two.txt").write_text(f"{ONE}\n\n  {TWO}  \n", encoding="utf-8")
    Path("file").touch()
    Path("theirs", "segment-001").mkdir(parents=True)
    Path("theirs", "segment-001", "holiday.jpg").write_bytes(b"precious")


@pytest.fixture
def loads(inputs: None, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The tiny model is loaded instead; how, and how often."""
    loaded, pipeline = [], tiny_pipeline()
    monkeypatch.setattr(commands, "load_pipeline", lambda paths, **options: loaded.append(options) or pipeline)
    return loaded


# What requests of long videos and folders of segments refuse is tested in tests/generate; here are the rules of the
# command, and a row for each of the others.
BAD: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "no prompt": ([], ("prompt is empty", "say what the video shows")),
    "prompts twice": ([ONE, "--prompts-file", "two.txt"], ("--prompts-file", "exclude each other")),
    "no file of prompts": (["--prompts-file", "none.txt"], ("none.txt",)),
    "folder of prompts": (["--prompts-file", "theirs"], ("theirs",)),
    "no prompts in it": (["--prompts-file", "empty.txt"], ("empty.txt holds no prompts", "one a line")),
    "prompts not UTF-8": (["--prompts-file", "latin.txt"], ("latin.txt is not UTF-8 text",)),
    "more prompts than segments": ([ONE, TWO, "--segments", "1"], ("2 prompts are more than the 1", "at most")),
    "hand-off": ([ONE, "--hand-off", "mail"], ("--hand-off", "frames", "latents")),
    "frames": ([ONE, "--frames", "32"], ("32 frames are not of the form 4k+1", "29 and 33")),
    "output is the image": ([ONE, "--image", "good.png", "-o", "good.png"], ("good.png", "--output")),
    "folder is the output": ([ONE, "--folder", "o.mp4", "-o", "./o.mp4"], ("are the same; give another name to one",)),
    "folder is a file": ([ONE, "--folder", "file"], ("file is not a folder", "name a folder")),
    "folder of somebody": ([ONE, "--folder", "theirs"], ("theirs/segment-001 is not a segment", "holiday.jpg")),
}


@pytest.mark.usefixtures("inputs")
@pytest.mark.parametrize("name", BAD)
def test_bad_input_of_long(refused: Any, name: str) -> None:
    arguments, said = BAD[name]
    sentence = refused("long", *arguments)
    assert all(words in sentence for words in said), sentence


def test_a_video_that_is_not_from_this_command_stays(refused: Any) -> None:
    write_video("longcat-long.mp4", moving_clip(5), 15)
    sentence = refused("long", ONE, *SMALL)
    assert "longcat-long.mp4 already exists and was not made by this command" in sentence and "--output" in sentence


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


def test_the_default_name_of_another_take_is_another(folder: Path, loads: list, capsys: Any) -> None:
    for prompt, name in ((ONE, "longcat-long"), (TWO, "longcat-long-take-002"), (TWO, "longcat-long-take-002")):
        assert cli.main(["long", prompt, "--segments", "2", *SMALL]) == 0
        assert f"{name}.mp4: 13 frames" in capsys.readouterr().out
    assert len(loads) == 2 and not Path("longcat-long-2.mp4").exists()
    assert not np.array_equal(*(read_video(f"longcat-long{ending}.mp4")[0] for ending in ("", "-take-002")))


def test_prompts_from_a_file(folder: Path, loads: list, capsys: Any) -> None:
    assert cli.main(["long", "--prompts-file", "two.txt", *SMALL]) == 0
    assert cli.main(["long", ONE, TWO, *SMALL]) == 0
    assert len(loads) == 1 and "2 segments" in capsys.readouterr().out
    assert cli.main(["long", ONE, ONE, *SMALL]) == 0 and len(loads) == 2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--seed", "1"], "seed 0 there, 1 now)"),
        (["--fp8"], "fp8 none there, on now); choose 'go on' as the lossy change to continue that one"),
        (["--dtype", "bfloat16"], "precision none there, bfloat16 now); choose 'go on'"),
    ],
)
def test_other_settings_begin_a_new_take(loads: list, capsys: Any, options: list[str], said: str) -> None:
    arguments = ["long", ONE, "--segments", "2", *SMALL, "-o", "a.webp"]
    assert cli.main(arguments) == 0 and len(loads) == 1
    capsys.readouterr()
    assert cli.main([*arguments, *options]) == 0 and len(loads) == 2
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(
        f"a new take begins in a-segments/take-002, because a-segments has other settings ({said}"
    )
    assert lines[1] == "segment 1 of 2: finished and saved in a-segments/take-002"
    for again, place in ((arguments, "a-segments"), ([*arguments, *options], "a-segments/take-002")):
        assert cli.main(again) == 0 and len(loads) == 2
        assert f"segment 2 of 2: already in {place}; " in capsys.readouterr().out


@pytest.mark.parametrize(
    "options", [["--attention", "sdpa"], ["--compile", "off"], ["--kv-cache", "off"], ["--split-guidance"]]
)
def test_what_does_not_change_the_result_does_not_matter(loads: list, capsys: Any, options: list[str]) -> None:
    arguments = ["long", ONE, "--segments", "2", *SMALL, "-o", "a.webp"]
    assert cli.main(arguments) == 0 and cli.main([*arguments, *options]) == 0 and len(loads) == 1
    assert "take" not in capsys.readouterr().out


def test_another_hand_off_keeps_the_first_segment(loads: list, capsys: Any) -> None:
    arguments = ["long", ONE, "--segments", "2", *SMALL, "-o", "a.webp"]
    assert cli.main(arguments) == 0 and cli.main([*arguments, "--hand-off", "latents"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[3] == "segment 1 of 2: already in a-segments"
    assert lines[4].startswith("segment 2 of 2: finished and saved in a-segments/segment-002-v2; ")


def test_going_on_in_a_take_with_lossy_settings(loads: list, capsys: Any) -> None:
    arguments = ["long", ONE, "--segments", "2", *SMALL, "-o", "a.webp"]
    assert cli.main(arguments) == 0
    assert cli.main([*arguments, "--fp8", "--segments", "3", "--lossy-change", "go on"]) == 0 and len(loads) == 2
    said = "the take in a-segments goes on with other lossy settings (fp8 none there, on now)"
    assert said in capsys.readouterr().out.splitlines()
    assert sorted(path.name for path in Path("a-segments").glob("s*")) == [f"segment-00{n}" for n in (1, 2, 3)]


def test_another_model_begins_a_new_take(loads: list, capsys: Any) -> None:
    """By what is in its files, not by their names."""
    # Without --overlap, of which a note would say that a single segment shares nothing.
    size = ["--size", "16x32", "--frames", "17", "--steps", "2", "--device", "cpu"]
    arguments = ["long", ONE, *size, "-o", "a.webp", "--guidance", "3"]
    assert cli.main(arguments) == 0
    shutil.copy(NANO_MODEL, "same.safetensors")
    # The least bit of every second weight, as of a model that was trained on a little.
    content = np.fromfile(NANO_MODEL, np.uint8)
    content[len(content) // 2 :: 4] ^= 1
    content.tofile("other.safetensors")
    parts = ["--vae", str(NANO_VAE), "--text-encoder", str(NANO_TEXT_ENCODER)]
    assert cli.main([*arguments, "--model", "same.safetensors", *parts]) == 0 and len(loads) == 1
    capsys.readouterr()
    assert cli.main([*arguments, "--model", "other.safetensors", *parts]) == 0 and len(loads) == 2
    assert "a-segments has other settings (another model)" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["long", "refine"])
def test_a_folder_that_cannot_be_used_is_known_at_once(
    source: None, loads: list, refused: Any, monkeypatch: Any, command: str
) -> None:
    """Before the model's files are read for their fingerprints, and before the video is."""
    monkeypatch.setattr(commands, "model_settings", lambda *_: pytest.fail("the model was read"))
    arguments = ["long", ONE, *SMALL] if command == "long" else REFINE
    for folder, said in (("file", "file is not a folder"), ("file/x", "file is not a folder"), ("x" * 300, "too long")):
        assert said in refused(*arguments, "--folder", folder)
    with monkeypatch.context() as patch:
        patch.setattr("os.access", lambda *_, **__: False)
        assert "new cannot be written to (" in refused(*arguments, "--folder", "new")
    usage = shutil.disk_usage(".")._replace(free=SPARE_BYTES + 5000)
    monkeypatch.setattr("longcat_core.generate.segment_folder.shutil.disk_usage", lambda _: usage)
    assert "the segments take about 0.0 MB and 16.8 MB must stay free, but new has" in refused(
        *arguments, "--folder", "new"
    )
    assert not loads


# --- refining in a folder --------------------------------------------------------------------------------------------

PIECES = ["--size", "16x32", "--steps", "12", "--piece", "9", "--overlap", "5", "--spatial-only"]
REFINE = ["refine", "clip.mkv", *PIECES, "-o", "out.mkv", "--device", "cpu"]


@pytest.fixture
def source(inputs: None) -> None:
    write_video("clip.mkv", moving_clip(13), 15)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--folder", "file"], ("file is not a folder", "name a folder")),
        (["--folder", "refined.mp4", "-o", "./refined.mp4"], ("are the same; give another name to one",)),
        (["--folder", "theirs"], ("theirs/segment-001 is not a segment", "holiday.jpg")),
        (["--overlap", "0"], ("leave nothing new", "at least 1")),
        (["--prompt", "a \udc80"], ("prompt is not valid UTF-8",)),
        (["--size", "33x48"], ("height 33",)),
        (["--sparsity", "1.5"], ("sparsity is 1.5",)),
        (["--compile", "never"], ("--compile",)),
        (["-o", "clip.mkv"], ("clip.mkv is the input itself",)),
        (["-o", "x.avi"], ("x.avi",)),
    ],
)
def test_bad_input_of_refine(loads: list, source: None, refused: Any, options: list[str], said: tuple) -> None:
    sentence = refused(*REFINE, *options)
    assert all(words in sentence for words in said) and not loads, sentence


def test_refining_doubles_the_rate(source: None, loads: list, capsys: Any) -> None:
    options = ["--steps", "12", "--piece", "9", "--overlap", "5", "--seed", "2", "--device", "cpu"]
    assert cli.main(["refine", "clip.mkv", *options]) == 0 and len(loads) == 1
    frames, fps = read_video("clip-refined.mp4")
    assert frames.shape == (26, 32, 64, 3) and fps == 30
    assert "26 frames of 32x64 at 30 fps, seed 2" in capsys.readouterr().out


@pytest.mark.parametrize("suffix", [".mp4", ".webp"])
def test_refining_keeps_time_and_sound_at_any_size(inputs: None, loads: list, capsys: Any, suffix: str) -> None:
    times = [0.0, 0.1, 0.2, 0.5, 0.6]
    write_clip(Path("odd.mkv"), moving_clip(5, 17, 31), times=times, sound="flac")
    options = ["--steps", "12", "--spatial-only", "--device", "cpu", "-o", f"out{suffix}"]
    assert cli.main(["refine", "odd.mkv", *options]) == 0 and len(loads) == 1
    out, err = capsys.readouterr()
    assert f"out{suffix}: 7 frames of 32x64 at 10 fps" in out
    assert "odd.mkv: its frames have different durations; they are taken by their time, at 10 per second" in err
    assert "the video of 17x31 is scaled to 32x64, because the model takes multiples of 16" in err
    assert ("the sound of odd.mkv is left out, because .webp holds none" in err) == (suffix == ".webp")
    if suffix == ".mp4":
        assert [codec for codec, _ in beeps(Path("out.mp4"))] == ["flac"]


@pytest.mark.parametrize("sparsity", ["0", "0.5"])
def test_refining_goes_on_from_its_folder(source: None, loads: list, capsys: Any, sparsity: str) -> None:
    arguments = [*REFINE, "--sparsity", sparsity, "--folder", "kept"]
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
        (["--prompt", "a"], "prompt empty there, a now"),
        (["--piece", "13"], "another source"),
        (["--sparsity", "0.5"], "block-sparse none there, sparsity 0.5, chunk 4x4x4 now"),
        (["--fp8"], "fp8 none there, on now"),
    ],
)
def test_other_settings_of_refining_begin_a_new_take(
    loads: list, source: None, capsys: Any, options: list[str], said: str
) -> None:
    arguments = [*REFINE, "--folder", "kept"]
    assert cli.main(arguments) == 0
    video, _ = read_video("out.mkv")
    assert cli.main([*arguments, *options]) == 0 and len(loads) == 2
    out = capsys.readouterr().out
    assert f"a new take begins in kept/take-002, because kept has other settings ({said})" in out
    assert "piece 1: finished and saved in kept/take-002" in out
    assert cli.main(arguments) == 0 and len(loads) == 2 and np.array_equal(read_video("out.mkv")[0], video)


def test_another_source_in_the_middle_and_back(loads: list, source: None, capsys: Any) -> None:
    arguments = [*REFINE, "--folder", "kept"]
    assert cli.main(arguments) == 0
    clip = moving_clip(13)
    clip[-1] ^= 255
    for frames, wanted in ((clip, "finished and saved in kept/segment-002-v2"), (moving_clip(13), "already in kept")):
        capsys.readouterr()
        write_video("clip.mkv", frames, 15)
        assert cli.main(arguments) == 0
        assert capsys.readouterr().out.splitlines()[:2] == ["piece 1: already in kept", f"piece 2: {wanted}"]
    assert len(loads) == 2
