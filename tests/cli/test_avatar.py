"""`longcat avatar`: bad input is one sentence before a model is loaded; runs end with the sound and go on."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from longcat_core.cli import main as cli
from longcat_core.cli import models as commands
from longcat_core.errors import CheckpointError
from longcat_core.files.media import Sound, read_sound, read_video, write_video
from longcat_core.generate.paths import NANO_TEXT_ENCODER, NANO_VAE, ModelPaths
from longcat_core.generate.pipeline import Pipeline

from ..generate.test_avatar import DATA, PROMPT, SIZE, pipeline, sounds
from ..measure.test_calibrate_avatar import quick

QUICK = ["--size", "64x96", "--frames", "25", "--overlap", "5", "--device", "cpu", "--steps", "1", "--schedule", "base",
         "--guidance", "1", "--audio-guidance", "1"]  # fmt: skip
PARTS = ["--vae", str(NANO_VAE), "--text-encoder", str(NANO_TEXT_ENCODER)]
MODEL = ["--model", "avatar", *PARTS]


def avatar_folder(path: Path, version: str = "v1_5", transformer: str = "base_model") -> Path:
    """A folder of LongCat-Video-Avatar with the golden model."""
    kind, name = ("whisper", "whisper-large-v3") if version == "v1_5" else ("wav2vec2", "chinese-wav2vec2-base")
    for inner, file, config in ((transformer, "dit", "config"), (name, kind, f"{kind}_config")):
        (path / inner).mkdir(parents=True)
        shutil.copy(DATA / version / f"{file}.safetensors", path / inner / "model.safetensors")
        shutil.copy(DATA / version / f"{config}.json", path / inner / "config.json")
    return path


def sound(path: str, seconds: float = 1.53, loud: float = 1.0) -> None:
    """Write a golden voice, as the sound of a video."""
    voice = sounds("1.5", 1)[0].cut(seconds)
    samples = Sound(loud * voice.samples, voice.rate)
    write_video(path, np.zeros((1, 16, 16, 3), np.uint8), 1 / seconds, samples)


@pytest.fixture
def inputs(folder: Path) -> None:
    """Files that some commands name."""
    avatar_folder(Path("avatar"))
    sound("one.mkv")
    sound("two.mkv", 0.5)
    Image.new("RGB", SIZE[::-1], (90, 90, 90)).save("face.png")
    halves = np.zeros((2, *SIZE), np.uint8)
    halves[0, :, :40] = halves[1, :, 56:] = 255
    for name, half in zip(("left.png", "right.png"), halves, strict=True):
        Image.fromarray(half).save(name)
    Image.new("L", (5, 5), 255).save("small.png")


@pytest.fixture
def loads(inputs: None, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The golden model is loaded instead; how, and how often."""
    loaded: list[dict[str, Any]] = []
    monkeypatch.setattr(commands, "load_pipeline", lambda model, **options: loaded.append(options) or pipeline("1.5"))
    return loaded


ONE, TWO, IMAGE = ["--audio", "one.mkv"], ["--audio", "one.mkv", "--audio", "two.mkv"], ["--image", "face.png"]
# What requests refuse is tested in tests/generate; here are the rules of the command, and a row for each of the others.
BAD: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "no sound": ([PROMPT, *MODEL], ("--audio",)),
    "no model": ([PROMPT, *ONE, "--base", "base"], ("the base is given without a model; give --model too",)),
    "no file of sound": ([PROMPT, *MODEL, "--audio", "none.wav"], ("none.wav",)),
    "file without sound": ([PROMPT, *MODEL, "--audio", "face.png"], ("face.png",)),
    "silence": ([PROMPT, *MODEL, "--audio", "silent.mkv"], ("the sound is silent",)),
    "too short": ([PROMPT, *MODEL, "--audio", "short.mkv"], ("give at least 400 ms",)),
    "no prompt": ([*ONE, *MODEL], ("prompt is empty",)),
    "three sounds": ([PROMPT, *MODEL, *TWO, *ONE], ("3 voices are more than the 2",)),
    "two without an image": ([PROMPT, *MODEL, *TWO], ("give an image",)),
    "box without an image": ([PROMPT, *MODEL, *TWO, "--box", "0,0,9,9"], ("--box", "give --image")),
    "who and box": ([PROMPT, *MODEL, *TWO, *IMAGE, "--who", "left", "--box", "0,0,9,9"], ("--who and --box exclude",)),
    "not a box": ([PROMPT, *MODEL, *TWO, *IMAGE, "--box", "0.1,0,9,9"], ("--box 0.1,0,9,9 is not a box", "y0,x0")),
    "one box": ([PROMPT, *MODEL, *TWO, *IMAGE, "--box", "0,0,9,9"], ("--box is given once and tells people apart",)),
    "box outside": ([PROMPT, *MODEL, *TWO, *IMAGE, "--box", "0,0,64,97"], ("--box 0,0,64,97", "64x96 pixels")),
    "mask of another size": (
        [PROMPT, *MODEL, *TWO, *IMAGE, "--mask", "left.png", "--mask", "small.png"],
        ("the mask of person 2 is [5, 5]",),
    ),
    "steps": ([PROMPT, *MODEL, *ONE, "--distilled", "--steps", "9"], ("exactly 8 steps",)),
    "output is the sound": ([PROMPT, *MODEL, *ONE, *QUICK, "-o", "one.mkv"], ("one.mkv is the input itself",)),
    "LongCat-Video's model": (
        [PROMPT, "--model", "base", *PARTS, "--audio-encoder", "avatar", *ONE],
        ("does not hear audio", "longcat generate"),
    ),
    "LongCat-Video's model alone": ([PROMPT, "--model", "base", *ONE], ("does not hear audio", "longcat generate")),
    "LongCat-Video's model with its parts": ([PROMPT, "--model", "base", *PARTS, *ONE], ("does not hear audio",)),
    "audio encoder of another version": (
        [PROMPT, *MODEL, "--audio-encoder", "older", *ONE],
        ("(wav2vec2)", "give the audio encoder of its version, whisper-large-v3"),
    ),
    "no calibration": ([PROMPT, *MODEL, *ONE, "--sparse", "none.json"], ("--sparse none.json is neither",)),
    "no audio encoder": ([PROMPT, "--model", "avatar/base_model", *PARTS, *ONE], ("has no audio encoder",)),
    "no base": ([PROMPT, "--model", "avatar", *ONE], ("has no folder vae", "--base")),
}


@pytest.fixture
def rare(inputs: None) -> None:
    """Inputs of few commands."""
    sound("silent.mkv", loud=0.0)
    sound("short.mkv", 0.3)
    avatar_folder(Path("older"), "v1_0")
    Path("base").mkdir()
    for name in ("config.json", "dit.safetensors"):
        shutil.copy(DATA.parent / "golden" / name, Path("base", name))


@pytest.mark.usefixtures("rare")
@pytest.mark.parametrize("name", BAD)
def test_bad_input_of_avatar(refused: Any, name: str) -> None:
    arguments, said = BAD[name]
    sentence = refused("avatar", *arguments)
    assert all(words in sentence for words in said), sentence


@pytest.mark.usefixtures("inputs")
def test_other_commands_name_this_one(refused: Any) -> None:
    for model in (["avatar/base_model", *PARTS], ["avatar/base_model"], ["avatar"]):
        assert "or use longcat avatar" in refused("generate", PROMPT, "--model", *model)
        assert "or longcat calibrate --audio" in refused("calibrate", *model)


# --- runs ------------------------------------------------------------------------------------------------------------


def test_a_run_ends_with_the_sound_and_goes_on(loads: list, capsys: Any) -> None:
    arguments = ["avatar", PROMPT, *MODEL, *ONE, *QUICK, "-o", "a.mkv"]
    assert cli.main(arguments) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[-1].startswith("a.mkv: 39 frames of 64x96 at 25 fps, 1.53 s of sound, 2 segments, seed 0, in ")
    frames, fps = read_video("a.mkv")
    assert len(frames) == 39 and fps == 25
    heard = read_sound("a.mkv")
    # The untouched sound, as loud as it was, until the last frame ends.
    wanted = read_sound("one.mkv").resampled(heard.rate).samples
    assert heard.seconds == pytest.approx(39 / 25, abs=2e-3)
    count = wanted.shape[1]
    assert torch.equal(heard.samples[:, :count], wanted) and not heard.samples[:, count:].any()
    shutil.rmtree("a-segments/segment-002")
    assert cli.main(arguments) == 0 and len(loads) == 2
    assert "segment 1 of 2: already in a-segments" in capsys.readouterr().out
    assert np.array_equal(read_video("a.mkv")[0], frames)
    assert cli.main(arguments) == 0 and len(loads) == 2
    sound("one.mkv", loud=0.5)
    assert cli.main(arguments) == 0 and len(loads) == 3
    said = "".join(capsys.readouterr())
    assert "a new take begins in a-segments/take-002" in said and "sound" in said


@pytest.mark.parametrize(
    ("options", "speakers"),
    [
        (["--audio", "two.mkv"], 2),
        (["--audio", "two.mkv", "--mode", "add", "--who", "right"], 2),
        (["--who", "right"], 2),
        (["--mask", "left.png", "--mask", "right.png"], 2),
        (["--box", "6,4,57,43", "--box", "6,52,57,91", "--box", "0,44,20,52"], 3),
    ],
)
def test_two_people(loads: list, capsys: Any, options: list[str], speakers: int) -> None:
    assert cli.main(["avatar", PROMPT, *MODEL, *ONE, *IMAGE, *options, *QUICK, "--segments", "1", "-o", "a.mp4"]) == 0
    assert "a.mp4: 25 frames" in capsys.readouterr().out and loads[0]["work"].speakers == speakers


def test_lossy_options_make_a_take_of_their_own(loads: list, capsys: Any) -> None:
    arguments = ["avatar", PROMPT, *MODEL, *ONE, *QUICK, "--segments", "1", "-o", "a.mp4"]
    assert cli.main([*arguments, "--sparse", "0.3", "--sparse-kernel", "plain", "--step-cache", "0.05"]) == 0
    said = capsys.readouterr().err
    assert "sparse attention: density 0.3, kernel plain" in said
    assert cli.main(arguments) == 0
    assert "a-segments/take-002" in "".join(capsys.readouterr())


CALIBRATE = ["calibrate", "avatar", *PARTS, *ONE]
BAD_CALIBRATION: dict[str, tuple[list[str], str]] = {
    "tokens": ([*CALIBRATE, "--size", "64x96", "--frames", "17"], "too few for sparse attention"),
    "tokens behind given frames": (
        ["calibrate", "avatar", *PARTS, "--audio", "long.mkv", "--size", "128x128", "--frames", "65"],
        "have 832 tokens to generate",
    ),
    "image without a prompt": ([*CALIBRATE, *IMAGE], "needs a prompt of its own"),
    "schedule": ([*CALIBRATE, "--schedule", "enhance_hf"], "calibrate an avatar with base, or with --distilled"),
    "cache": ([*CALIBRATE, "--kv-cache", "official"], "--kv-cache official is not for avatars"),
    "clip": ([*CALIBRATE, "--prompt", PROMPT, "--video", "one.mkv"], "starts from one image, not from a clip"),
    "LongCat-Video": (["calibrate", "base", *PARTS, *ONE, "--audio-encoder", "avatar"], "does not hear audio"),
    "no model": (["calibrate", *ONE, "--base", "base"], "the base is given without a model"),
}


@pytest.mark.usefixtures("rare")
@pytest.mark.parametrize("name", BAD_CALIBRATION)
def test_bad_input_of_calibrate(refused: Any, name: str) -> None:
    sound("long.mkv", 3.0)
    arguments, said = BAD_CALIBRATION[name]
    assert said in refused(*arguments)


def test_a_calibration_of_an_avatar_is_accepted_and_refused_elsewhere(
    loads: list, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commands, "load_pipeline", lambda model, **options: quick())
    size = ["--size", "128x128", "--frames", "65", "--steps", "2", "--guidance", "1", "--audio-guidance", "1"]
    arguments = [*CALIBRATE, *size, "--dense-steps", "0.5", "--no-video", "--prompt", PROMPT, "-o", "found.json"]
    assert cli.main(arguments) == 0
    out, _ = capsys.readouterr()
    assert "found.json: budget 0.1, one prompt" in out
    made = ["avatar", PROMPT, *MODEL, *ONE, *size, "--segments", "1", "--sparse", "found.json", "-o", "a.mp4"]
    assert cli.main(made) == 0
    shutil.copy(DATA.parent / "golden" / "dit.safetensors", "other.safetensors")
    given = ["--model", "other.safetensors", *PARTS, "--sparse", "found.json"]
    assert cli.main(["generate", PROMPT, *given]) == cli.BAD_INPUT
    assert "found.json is of " in capsys.readouterr().err


def test_a_format_without_sound_is_named(loads: list, capsys: Any) -> None:
    assert cli.main(["avatar", PROMPT, *MODEL, *ONE, *QUICK, "--segments", "1", "-o", "a.webp"]) == 0
    assert "the sound is left out, because .webp holds none; write .mp4 or .mkv" in capsys.readouterr().err


def test_parts_are_found_in_the_folders_of_both_versions(folder: Path) -> None:
    newer = avatar_folder(Path("LongCat-Video-Avatar-1.5"))
    older = avatar_folder(Path("older"), "v1_0", "avatar_single")
    (older / "avatar_multi").mkdir()
    with pytest.raises(CheckpointError, match="has no folder vae; give LongCat-Video's folder as --base, or use --vae"):
        ModelPaths.of_avatar(newer)
    for name in ("LongCat-Video/vae", "LongCat-Video/text_encoder", "other/vae", "other/text_encoder"):
        Path(name).mkdir(parents=True)
    found = ModelPaths.of_avatar(newer)
    base = Path("LongCat-Video").absolute()
    assert (found.model, found.vae, found.text_encoder) == (newer / "base_model", base / "vae", base)
    assert found.audio_encoder == newer
    several = ModelPaths.of_avatar(older, base="other", people=2)
    assert (several.model, several.vae) == (older / "avatar_multi", Path("other", "vae"))
    assert ModelPaths.of_avatar(older).model == older / "avatar_single"


def test_without_a_model_the_nano_avatar_speaks(folder: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "load_pipeline", Pipeline.load)
    sound("one.mkv", 0.5)
    arguments = ["--audio", "one.mkv", "--device", "cpu", "--steps", "2", "-o", "a.mp4"]
    assert cli.main(["avatar", "a red circle face talks on a blue background", *arguments]) == 0
    assert "a.mp4: 13 frames of 64x96 at 25 fps" in capsys.readouterr().out
