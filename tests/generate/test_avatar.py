"""Whole videos of a person who speaks: equal to the public code's, trimmed to the sound, and resumed where cut off."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from longcat_core.checkpoints.lora import merge_lora
from longcat_core.errors import LongCatError
from longcat_core.files.media import Sound
from longcat_core.generate import avatar
from longcat_core.generate.audio import Embeddings, combine
from longcat_core.generate.avatar import AvatarRequest, avatar_video, make_segment, spoken_frames
from longcat_core.generate.long_video import segment_folder
from longcat_core.generate.pipeline import Pipeline
from longcat_core.generate.request import NANO, RELEASED, GenerateRequest
from longcat_core.generate.speeds import AVATAR, AVATAR_DISTILLED, SETS
from longcat_core.generate.takes import LOSSY
from longcat_core.measure.golden import TOLERANCE, Golden
from longcat_core.optimize.sparse.settings import Sparse
from longcat_core.sampling.avatar import LEFT, RIGHT

DATA = Path(__file__).parents[1] / "data" / "golden-avatar"
GOLDEN = {"1.0": Golden(DATA / "v1_0"), "1.5": Golden(DATA / "v1_5")}
PROMPT, SEED, SIZE, FRAMES, OVERLAP = "a person speaks", 7, (64, 96), 25, 5


class Text:
    """The golden embeddings of the two prompts."""

    def __init__(self, golden: Golden) -> None:
        self.data = golden.read("generate")

    def encode(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        kind = "pos" if prompts[0] == PROMPT else "neg"
        return self.data[f"{kind}.embeds"], self.data[f"{kind}.mask"]


@cache
def pipeline(version: str, lora: bool = False) -> Pipeline:
    golden = GOLDEN[version]
    model = golden.load("dit.safetensors")
    if lora:
        merge_lora(model, golden.folder / "lora.safetensors")
    return Pipeline(
        model, golden.vae, Text(golden), replace(NANO, audio=golden.config.audio, clip_schedule=RELEASED.clip_schedule)
    )


def sounds(version: str, count: int) -> list[Sound]:
    data = GOLDEN[version].read("audio")
    return [Sound(data[f"{name}.wave"][None], 16000) for name in ("one", "two")[:count]]


def request(version: str = "1.5", voices: int = 1, image: bool = True, **changes: Any) -> AvatarRequest:
    """Of the golden sounds, which fill two segments. changes: of the request or of its first segment."""
    golden = GOLDEN[version].read("generate")
    first = GenerateRequest(
        PROMPT, None, *SIZE, FRAMES, 2, seed=SEED, given=golden["image"].numpy()[None] if image else None
    )
    names = vars(first).keys() & changes.keys()
    first = replace(first, **{name: changes.pop(name) for name in names})
    return AvatarRequest(
        first, combine(sounds(version, voices)), **{"prompts": (PROMPT,), "overlap": OVERLAP} | changes
    )


def hear(version: str, people: int) -> Embeddings:
    """The golden embeddings; 1.0's are of a recorded noise floor."""
    golden = GOLDEN[version]
    values = torch.stack([golden.read("audio")[f"{name}.emb"] for name in ("one", "two")[:people]])
    return Embeddings(values, golden.audio_encoder.fps, golden.audio_encoder.stride)


def deviation(given: Tensor, wanted: Tensor) -> float:
    return float((given - wanted).abs().max() / wanted.std(correction=0))


# Run, and the name of its continuation; how many speak, with an image or not, distilled or not, and enhance_hf.
RUNS = {
    "1.0 ai2v": ("ai2v.next.cache1.hf1", 1, True, False, True),
    "1.0 at2v": ("at2v.next", 1, False, False, False),
    "1.0 duo": ("duo.next", 2, True, False, True),
    "1.5 ai2v_distill": ("ai2v_distill.next", 1, True, True, False),
    "1.5 at2v": ("at2v.next", 1, False, False, True),
    "1.5 duo_distill": ("duo_distill.next", 2, True, True, False),
}


@pytest.mark.parametrize("name", RUNS)
def test_the_task_makes_the_golden_video(tmp_path, monkeypatch, name):
    version, run = name.split()
    following, people, image, distilled, enhanced = RUNS[name]
    golden, data = GOLDEN[version], GOLDEN[version].read("generate")
    monkeypatch.setattr(avatar, "seeded_noise", lambda shape, seed: data[f"noise{seed - SEED}"].clone())
    schedule = {"schedule": "distilled"} if distilled else {"schedule": "base", "guidance_scale": 3.0}
    position, skip = golden.read("forward")["avc.cases"][0].tolist()
    asked = replace(
        request(version, people, image, steps=None if distilled else 6, **schedule),
        schedule=None if distilled or enhanced else "base",
        audio_guidance=None if distilled else 4.5,
        reference=position,
        skip=skip,
    )
    engine = pipeline(version, distilled)
    filled = asked.filled(engine.defaults)
    if people > 1:
        masks = golden.read("forward")["duo.masks.source"]
        filled = replace(filled, masks=masks)
    folder = segment_folder(tmp_path / "segments")
    finished = list(avatar_video(lambda: engine, lambda: hear(version, people), filled, folder))
    assert [segment.reused for segment in finished] == [False, False]
    first, second = folder.take.load(0), folder.take.load(1)
    assert deviation(first.latents, data[f"{run}.latents"]) < TOLERANCE
    assert deviation(second.latents, data[f"{following}.latents"]) < TOLERANCE
    # A level on the border of two may be cut to either.
    wrong = first.frames[-OVERLAP:].astype(int) - data[f"{run}.frames"].numpy()
    assert np.abs(wrong).max() <= 1 and np.count_nonzero(wrong) < 1e-4 * wrong.size


def run(asked: AvatarRequest, path: Path, stop: int | None = None) -> tuple[list[np.ndarray], list[int]]:
    """The frames of the segments in the folder, and the numbers of the steps of each that ran. stop: ends the run after
    the first step of this segment."""
    steps = []

    def after(number: int, count: int, step: Any) -> None:
        steps.append(number)
        if number == stop:
            raise KeyboardInterrupt

    engine, heard = pipeline("1.5"), hear("1.5", len(asked.voices.speakers))
    folder = segment_folder(path)
    finished = list(avatar_video(lambda: engine, lambda: heard, asked.filled(engine.defaults), folder, after))
    return [folder.frames(segment.number) for segment in finished], steps


def test_a_run_that_was_cut_off_goes_on_with_the_same_frames(tmp_path):
    # Half as long segments make three of them, so that the reference is not the segment before.
    asked = replace(request(frames=17, steps=1), schedule="base")
    whole, steps = run(asked, tmp_path / "whole")
    assert sorted(set(steps)) == [0, 1, 2]
    with pytest.raises(KeyboardInterrupt):
        run(asked, tmp_path / "cut", stop=2)
    resumed, steps = run(asked, tmp_path / "cut")
    assert set(steps) == {2} and all(np.array_equal(*pair) for pair in zip(whole, resumed, strict=True))
    assert not np.array_equal(whole[1], whole[2])


def test_the_video_ends_with_the_sound(tmp_path):
    engine, folder, asked = pipeline("1.5"), segment_folder(tmp_path), request(steps=1)
    filled = asked.filled(engine.defaults)
    finished = list(avatar_video(lambda: engine, lambda: hear("1.5", 1), filled, folder))
    clips = list(spoken_frames(folder, finished, filled))
    # 1.53 s of 25 frames.
    assert [len(clip) for clip in clips] == [25, 14] and filled.total_frames == 39 and filled.fps == 25
    assert np.array_equal(clips[1], folder.frames(1, skip=OVERLAP)[:14])
    assert filled.track.seconds == 39 / 25
    first = replace(asked, segments=1).filled(engine.defaults)
    assert (first.count, first.total_frames) == (1, 25) and first.settings(0) == filled.settings(0)
    assert replace(filled, segments=1).filled(engine.defaults).count == 1, "the last prompt was only repeated"


def test_another_sound_is_another_take(tmp_path):
    asked = request(steps=1, segments=1)
    run(asked, tmp_path)
    folder = segment_folder(tmp_path)
    quiet = Sound(0.5 * sounds("1.5", 1)[0].samples, 16000)
    other = replace(asked, voices=combine([quiet])).filled(pipeline("1.5").defaults)
    assert folder.check([asked.filled(pipeline("1.5").defaults).settings(0)])[1] == 1
    assert folder.check([other.settings(0)]) == (None, 0)


def test_defaults_follow_the_version_and_the_schedule():
    newer, older = (replace(RELEASED, audio=GOLDEN[version].config.audio) for version in ("1.5", "1.0"))
    image = np.zeros((1, 300, 200, 3), np.uint8)
    first = GenerateRequest(PROMPT, given=image, schedule="distilled")
    asked = AvatarRequest(first, combine(sounds("1.5", 1)), (PROMPT,)).filled(newer)
    # The size is that of the bucket nearest in shape.
    assert (asked.first.height, asked.first.width, asked.first.frames) == (768, 512, 93)
    assert (asked.first.steps, asked.first.guidance_scale, asked.audio_guidance, asked.guided) == (8, 1, 1, False)
    asked = replace(asked, first=GenerateRequest(PROMPT), audio_guidance=None, schedule=None).filled(older)
    assert (asked.fps, asked.first.steps, asked.first.guidance_scale, asked.audio_guidance) == (16, 50, 4, 4)
    assert asked.schedule == "enhance_hf" and asked.first.negative_prompt.startswith("Close-up, Bright tones")
    assert asked.reads() == [PROMPT, asked.first.negative_prompt]


def test_the_work_of_a_later_segment_has_a_reference_frame():
    defaults = pipeline("1.5").defaults
    work = request(voices=2).filled(defaults).work()
    # The reference is one latent and one of the conditioning frames, which 5 frames make two more of.
    assert (work.latents, work.cond_latents, work.speakers) == ((1, 16, 8, 8, 12), 3, 2)
    assert request(segments=1).filled(defaults).work().cond_latents == 1


def test_lossy_options_reach_the_network_and_are_recorded(monkeypatch):
    engine, seen = pipeline("1.5"), []
    asked = request(steps=1, sparse=Sparse(0.3), step_cache=0.05).filled(engine.defaults)
    monkeypatch.setattr(engine, "denoise", lambda *_, **options: seen.append(options) or torch.zeros(1, 16, 7, 8, 12))
    make_segment(engine, asked, 0, hear("1.5", 1))
    assert (seen[0]["sparse"], seen[0]["step_cache"]) == (Sparse(0.3), 0.05)
    assert asked.settings(1)[LOSSY].keys() == {"sparse", "step cache"}
    assert "0.3, was not measured on an avatar" in asked.notes()[0] and len(asked.notes()) == 1


def test_a_word_chooses_by_the_schedule():
    image = np.zeros((1, 300, 200, 3), np.uint8)
    first = GenerateRequest(PROMPT, given=image, schedule="distilled", speed="fastest")
    defaults = replace(RELEASED, audio=GOLDEN["1.5"].config.audio)
    asked = AvatarRequest(first, combine(sounds("1.5", 1)), (PROMPT,)).filled(defaults)
    assert (asked.first.sparse_settings, asked.first.step_cache) == (None, 0.1)
    distilled, base = SETS["fastest"][AVATAR_DISTILLED], SETS["fastest"][AVATAR]
    assert asked.notes()[0].startswith(f"speed fastest sets fp8 and step cache 0.1; {distilled.price.in_words()}")
    asked = replace(asked, first=replace(first, schedule="base"), schedule=None).filled(defaults)
    assert (asked.first.sparse_settings, asked.first.step_cache) == (None, 0.1)
    assert asked.notes()[0].startswith(f"speed fastest sets fp8 and step cache 0.1; {base.price.in_words()}")
    assert base.price.in_words() != distilled.price.in_words()


@pytest.mark.parametrize(("text", "sound", "parts"), [(4.0, 4.0, 2), (3.0, 1.0, 2), (1.0, 3.0, 3), (3.0, 4.0, 3)])
def test_the_work_has_as_many_parts_as_the_sampler_evaluates(text, sound, parts):
    asked = request(audio_guidance=sound)
    asked = replace(asked, first=replace(asked.first, guidance_scale=text))
    assert asked.filled(pipeline("1.5").defaults).work().parts == parts


def test_notes_say_what_masks_share_and_who_is_silent():
    asked = request(voices=2)
    wide = (0.0, 0.0, 1.0, 0.7)
    overlapping = replace(asked, people=(wide, RIGHT)).filled(pipeline("1.5").defaults)
    assert ["persons 1 and 2 overlap" in note for note in overlapping.notes()] == [True]
    listening = replace(asked, voices=combine([sounds("1.5", 1)[0], Sound(torch.zeros(1, 16000), 16000)]))
    assert "silent" in listening.filled(pipeline("1.5").defaults).notes()[0]


def test_silent_people_are_one_more_voice():
    asked = request(voices=2, steps=1, segments=1)
    asked = replace(asked, people=(LEFT, RIGHT, (0.0, 0.45, 0.1, 0.55))).filled(pipeline("1.5").defaults)
    classes = asked.classes()
    assert asked.others and classes is not None and classes.shape == (24, 4)
    embeddings = asked.embed(GOLDEN["1.5"].audio_encoder)
    assert embeddings.values.shape[0] == 3 and asked.work().speakers == 3


CORNER = np.zeros(SIZE)
CORNER[1, 1] = 1
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "clip": ({"given": np.zeros((5, 64, 96, 3), np.uint8), "num_cond_frames": 1}, "starts from one image, not from a"),
    "video": ({"video": Path("a.mp4"), "given": None}, "starts from one image, not from a"),
    "two without an image": ({"voices": 2, "image": False}, "none is given; give an image"),
    "masks without an image": ({"people": (LEFT, RIGHT), "image": False}, "none is given; give an image"),
    "one voice for two": ({"people": (LEFT, RIGHT)}, "give a voice for the second one, or silence"),
    "one box for two": ({"voices": 2, "people": (LEFT,)}, "two people speak and one is named"),
    "box outside": ({"voices": 2, "people": (LEFT, (0.0, 0.9, 1.0, 1.2))}, "the box of person 2 reaches"),
    "mask of another size": ({"voices": 2, "people": (LEFT, np.ones((5, 5)))}, "of person 2 is [5, 5] and the image"),
    "empty mask": ({"voices": 2, "people": (LEFT, np.zeros(SIZE))}, "the mask of person 2 is empty"),
    "no background": ({"voices": 2, "people": ((0.0, 0.0, 1.0, 0.5), (0.0, 0.5, 1.0, 1.0))}, "cover the whole image"),
    "name of a side": ({"voices": 2, "people": ("left", "right")}, "where person 1 is cannot be 'left'; give a box"),
    "box of NaN": ({"voices": 2, "people": (LEFT, (0.0, 0.0, float("nan"), 1.0))}, "where person 2 is cannot be"),
    "box of three": ({"voices": 2, "people": (LEFT, (0.0, 0.0, 1.0))}, "where person 2 is cannot be"),
    "mask without a token": ({"voices": 2, "people": (LEFT, CORNER)}, "the box or mask of person 2 covers no token"),
    "steps of the distilled schedule": ({"schedule": "distilled", "steps": 9}, "has exactly 8 steps"),
    "more segments than sound": ({"segments": 3}, "the sound fills 2 segments, not 3"),
    "more prompts than segments": ({"prompts": (PROMPT,) * 3}, "3 prompts are more than the 2 segments"),
    "no prompt": ({"prompts": ()}, "the prompt is empty"),
    "overlap": ({"overlap": 25}, "leave nothing new"),
    "skip range": ({"skip": -1}, "skip range -1 is out of range"),
    "reference frame": ({"reference": 10**400}, "is out of range; give a number from -2001 to 2001"),
    "audio guidance": ({"audio_guidance": 31.0}, "audio guidance 31.0 is out of range"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_sentence(name):
    changes, said = BAD[name]
    asked = request("1.5", **changes)
    with pytest.raises(LongCatError, match=re.escape(said)) as found:
        asked.filled(pipeline("1.5").defaults)
    assert "\n" not in str(found.value) and not str(found.value).endswith(".")


def test_three_voices_and_a_model_that_does_not_hear_are_refused():
    asked = request()
    with pytest.raises(LongCatError, match="3 voices are more than the 2 of a video"):
        replace(asked, voices=combine(sounds("1.5", 1) * 3)).filled(pipeline("1.5").defaults)
    with pytest.raises(LongCatError, match="does not hear audio; give LongCat-Video-Avatar"):
        asked.filled(NANO)
    with pytest.raises(LongCatError, match="the audio encoder of its version"):
        asked.filled(pipeline("1.5").defaults).embed(GOLDEN["1.0"].audio_encoder)
