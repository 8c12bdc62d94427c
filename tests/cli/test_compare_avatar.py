"""longcat compare --audio: settings of an avatar, each of which continues its own first segment."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from longcat_core.cli import compare as comparing
from longcat_core.cli import main as cli
from longcat_core.cli import models as commands
from longcat_core.cli import subjects
from longcat_core.cli.subjects import Speech
from longcat_core.files.media import open_video, read_video
from longcat_core.generate.paths import NANO_MODEL
from longcat_core.generate.pipeline import Pipeline
from longcat_core.measure.calibrate_avatar import shortened

from ..generate.test_avatar import hear, pipeline, request
from ..support.sounds import sweep, write_sound

PROMPT = "a red circle face talks on a blue background"
# Two segments: 17 frames, and 4 new ones, a single latent frame, of which the sound fills 3.
FRAMES, SECONDS = 17, 0.78
SMALL = ("--steps", "5", "--frames", str(FRAMES))
AUDIO, LONG = ("--audio", "one.wav"), ("--audio", "long.wav")
B = ("--versus", "--step-cache 0.5")


@pytest.fixture
def sounds(folder: Path) -> Path:
    """The working folder with sounds and an image."""
    for name, seconds in (("one.wav", SECONDS), ("long.wav", 3.0), ("short.wav", 0.5)):
        write_sound(Path(name), sweep(seconds, 1), "pcm_s16le")
    Image.fromarray(np.full((64, 96, 3), 90, np.uint8)).save("face.png")
    return folder


@pytest.mark.usefixtures("sounds")
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((*AUDIO, *AUDIO, *B), "2 sounds are given, and one person is compared; give one --audio"),
        (("--audio", "none.wav", *B), "none.wav"),
        (("--audio", "face.png", *B), "face.png"),
        ((*AUDIO, *B, "--fps", "15"), "--fps is not for avatars, whose rate is the model's; leave it out"),
        ((*AUDIO, *B, "--kv-cache", "official"), "--kv-cache official is not for avatars; give exact or off"),
        ((*AUDIO, *B, "--video", "one.wav"), "an avatar starts from one image, not from a clip"),
        ((*AUDIO, *B, "--base", "base"), "the base is given without a model"),
        ((*AUDIO, *B, "--model", str(NANO_MODEL), "--vae", "x", "--text-encoder", "x"), "does not hear audio"),
        ((*AUDIO, *B, "--frames", "13"), "segments of 13 frames that share 13 leave nothing new"),
        ((*AUDIO, *B, "--prompts-file", "one.wav"), "exclude each other"),
        ((*AUDIO, "--versus", "--audio long.wav"), "--versus '--audio long.wav': unrecognized arguments"),
        ((*AUDIO, "--versus", "--distilled --steps 9"), "has exactly 8 steps"),
        ((*AUDIO, "--versus", "--image face.png"), "another image (face.png) than A (None)"),
        ((*AUDIO, "--versus", "--audio-guidance 99"), "audio guidance 99.0 is out of range"),
        ((*AUDIO, "--versus", "--kv-cache official"), "--versus '--kv-cache official': --kv-cache official is not"),
    ],
)
def test_bad_input(refused: Any, options: tuple[str, ...], said: str) -> None:
    assert said in refused("compare", PROMPT, *options)


def test_no_option_of_avatars_is_silently_without_effect(sounds: Path, capsys: Any, monkeypatch: Any) -> None:
    class Loaded(Exception):
        pass

    def load(*_: Any, **__: Any) -> None:
        raise Loaded

    monkeypatch.setattr(commands, "load_pipeline", load)

    def notes(*options: str) -> str:
        with pytest.raises(Loaded):
            cli.main(["compare", PROMPT, *SMALL, *options])
        return capsys.readouterr().err

    assert "--audio-guidance has no effect without --audio" in notes(*B, "--audio-guidance", "2")
    assert "--kv-cache has no effect" in notes("--audio", "short.wav", *B, "--kv-cache", "off")
    assert "the sound fills one segment" in notes("--audio", "short.wav", *B)
    found = notes(*AUDIO, *B, "--kv-cache", "off", "--audio-guidance", "2", "--guidance-until", "0.5")
    assert "no effect" not in found and "fills one segment" not in found
    assert "--cond-frames has no effect" in notes(*AUDIO, *B, "--cond-frames", "5")


def test_each_setting_continues_its_own_first_segment_as_it_does_for_a_user(
    sounds: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commands, "load_pipeline", Pipeline.load)
    versus = (*B, "--versus", "--guidance 2 --audio-guidance 3", "--versus", "--steps 2 --kv-cache off")
    arguments = (PROMPT, *SMALL, *AUDIO, *versus, "--device", "cpu", "--seeds", "2", "--page", "page.md")
    assert cli.main(["compare", *arguments]) == 0
    out, err = capsys.readouterr()
    assert "10 videos" in out and "20 segments" in err
    report = json.loads(Path("longcat-compare/report.json").read_text(encoding="utf-8"))
    rows = {row["name"]: row for row in report["rows"]}
    assert list(rows) == ["A", "B", "C", "D", "noise floor"] and report["inputs"]["joins"] == [FRAMES]
    assert (report["inputs"]["sound"], report["inputs"]["overlap"], report["inputs"]["frames"]) == ("one.wav", 13, 20)
    assert rows["A"]["steps"] == rows["A"]["computed"][0] == 10 and rows["D"]["steps"] == 4
    assert rows["noise floor"]["psnr"] > max(rows[name]["psnr"] for name in "BCD") + 20
    for name, own in (("A", ()), ("B", ("--step-cache", "0.5")), ("C", ("--guidance", "2", "--audio-guidance", "3"))):
        made = ("avatar", PROMPT, *SMALL, *AUDIO, *own, "--seed", "1", "--device", "cpu", "-o", f"{name}.mkv")
        assert cli.main([*made]) == 0
        frames, _ = read_video(f"longcat-compare/{name}-2.mkv")
        assert np.array_equal(frames, read_video(f"{name}.mkv")[0]) and len(frames) == 20
        if name == "A":
            first = frames.astype(float)
            continue
        error = np.square(frames - first).mean(axis=(1, 2, 3))
        each = [10 * np.log10(255**2 / part.mean()) for part in (error[:FRAMES], error[FRAMES:])]
        assert rows[name]["video_psnr"][1] == pytest.approx(10 * np.log10(255**2 / error.mean()))
        others = np.array(rows[name]["frame_psnr"][0])
        before = [-10 * np.log10((10 ** (-part / 10)).mean()) for part in (others[:FRAMES], others[FRAMES:])]
        assert rows[name]["segment_psnr"] == pytest.approx(np.minimum(each, before))
    with open_video(Path("longcat-compare/A-1.mkv"), 25.0) as video:
        assert video.has_sound
    text = Path("page.md").read_text(encoding="utf-8")
    assert "continues its\nown first segment" in text and "begins at frame 17 and sees" in text
    assert "2 segments of 5 steps, guidance 1 by text and 1 by sound" in text and "| of each segment |" in text


def test_what_is_given_is_not_compared(sounds: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "load_pipeline", Pipeline.load)
    options = ("--image", "face.png", *SMALL, "--steps", "2", "--floor", "off", "--device", "cpu")
    assert cli.main(["compare", PROMPT, *AUDIO, *options, *B]) == 0
    (_, row) = json.loads(Path("longcat-compare/report.json").read_text(encoding="utf-8"))["rows"]
    # The image, and in the second segment all frames of the first.
    assert row["first_frame"] == 1 and np.shape(row["frame_psnr"]) == (1, 19) and len(row["segment_psnr"]) == 2
    short = ("--audio", "short.wav", *options, "--output", "short")
    assert cli.main(["compare", PROMPT, *short, *B]) == 0
    report = json.loads(Path("short/report.json").read_text(encoding="utf-8"))
    assert report["inputs"]["frames"] == 13 and "segment_psnr" not in report["rows"][1]
    text = Path("short/report.md").read_text(encoding="utf-8")
    assert "2 steps, guidance 1 by text" in text and comparing.SPOKEN[:20] not in text and "of each" not in text


@pytest.mark.parametrize(("version", "embedded"), [("1.0", [3, 4]), ("1.5", [3])])
def test_the_seed_is_heard_where_it_draws_noise(monkeypatch: Any, version: str, embedded: list[int]) -> None:
    def embeddings(requests: Any, *_: Any) -> list[Any]:
        assert [each.filled_first.seed for each in requests] == embedded
        return [replace(hear(version, 1), stride=each.filled_first.seed) for each in requests]

    monkeypatch.setattr(subjects, "embeddings_of", embeddings)
    made = Speech(shortened(request(version).filled(pipeline(version).defaults)))
    found = made.hear([3, 4], None, torch.device("cpu"), None)  # type: ignore[arg-type]
    assert [found[seed].stride for seed in (3, 4)] == (embedded * 2)[:2]
