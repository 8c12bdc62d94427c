"""The kept videos of the CPU are those of today's prompts and weights, and a run computes none of them again."""

from __future__ import annotations

import numpy as np
import pytest

from longcat_core.generate.pipeline import Pipeline
from longcat_core.generate.request import GenerateRequest

from . import jobs, matrix, references, stock
from .cells import LONGCAT, MODES, NONE, T2V, Cell
from .fleet import Seen
from .graphs import FRAMES, SCENE, SEED, SIZE, STEPS
from .jobs import Job
from .limits import PACKAGES
from .references import References
from .verdicts import one_color, psnr

PLAIN = jobs.of_cell(Cell("bf16", LONGCAT, MODES[0], NONE, T2V), 0)
VIDEO = np.random.default_rng(0).integers(0, 256, (5, 16, 24, 3), np.uint8)


class Server:
    """Stands in for a ComfyUI on the CPU: counts what it is asked for."""

    def __init__(self) -> None:
        self.asked: list = []

    def run(self, prompts) -> Seen:
        self.asked.append(prompts)
        return Seen("success", frames=VIDEO)


@pytest.fixture(scope="module")
def work() -> list[Job]:
    return matrix.plan(MODES, PACKAGES, first=False)


@pytest.fixture(scope="module")
def kept() -> dict[str, np.ndarray]:
    return references.read()[0]


def test_each_row_has_a_video_that_is_not_stale(work):
    found = sorted(references.stale(work, references.read()[1]))
    assert not found, f"run python -m tests.gpu --references: stale are {found}"


def test_no_video_is_kept_that_no_row_has(work, kept):
    assert kept.keys() == {references.name(job) for job in work}


def test_every_video_shows_something(kept):
    assert not [name for name, video in kept.items() if one_color(video)]


def test_a_kept_video_is_what_the_core_gives(kept):
    request = GenerateRequest(SCENE, "", frames=FRAMES, steps=STEPS[T2V], guidance_scale=4.0, seed=SEED, **SIZE)
    found = np.asarray(Pipeline.load().generate(request).frames)
    assert psnr(found, kept[references.name(PLAIN)]) > 40


def test_videos_come_back_as_they_were(tmp_path):
    other = VIDEO[:3]
    references.write({"a": VIDEO, "b / c": other}, {"a": "1", "b / c": "2"}, tmp_path / "kept.safetensors")
    videos, fingerprints = references.read(tmp_path / "kept.safetensors")
    assert (videos["a"] == VIDEO).all() and (videos["b / c"] == other).all()
    assert fingerprints == {"a": "1", "b / c": "2"}
    assert references.read(tmp_path / "none.safetensors") == ({}, {})


def test_what_is_kept_is_not_computed(tmp_path):
    path, server, name = tmp_path / "kept.safetensors", Server(), references.name(PLAIN)
    references.write({name: VIDEO}, {name: references.fingerprint(PLAIN.reference)}, path)
    other = jobs.of_stock(next(iter(stock.ROWS)), MODES[0])
    found = References([PLAIN, other, PLAIN], [server], path)
    try:
        assert (found.of(PLAIN).result().frames == VIDEO).all() and found.of(other).result().status == "success"
        assert server.asked == [other.reference] and found.count == "1 of 1"
    finally:
        found.stop()


def test_a_stale_video_is_computed_once(tmp_path):
    path, server, name = tmp_path / "kept.safetensors", Server(), references.name(PLAIN)
    references.write({name: VIDEO[::-1]}, {name: "stale"}, path)
    found = References([PLAIN, PLAIN], [server], path)
    try:
        assert (found.of(PLAIN).result().frames == VIDEO).all() and server.asked == [PLAIN.reference]
    finally:
        found.stop()


def test_another_prompt_or_other_weights_make_it_stale(monkeypatch):
    known = references.fingerprint(PLAIN.reference)
    assert known == references.fingerprint(PLAIN.reference)
    assert known != references.fingerprint(jobs.of_stock("CFGZeroStar", MODES[0]).reference)
    monkeypatch.setattr(references, "weights", lambda: "others")
    assert known != references.fingerprint(PLAIN.reference)
