"""One bar for a task, its estimate and its words."""

from __future__ import annotations

from typing import Any

import pytest

from longcat_core.generate.progress import (
    COMPILING,
    DECODING,
    ENCODING,
    FIRST_STEP,
    LOADING,
    LOADING_TEXT,
    STEPS,
    Part,
    Progress,
    average_step,
    duration,
)


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Task:
    """A `Progress` on a clock, and all that it showed."""

    def __init__(self, *parts: Part, **options: Any) -> None:
        self.clock, self.bars, self.words = Clock(), [], []
        self.progress = Progress(parts, self._shown, clock=self.clock, **options)

    def _shown(self, progress: Progress) -> None:
        self.bars.append((progress.done, progress.total))
        self.words.append(progress.words)

    def steps(self, seconds: float, count: int, first: float | None = None) -> None:
        for i in range(count):
            self.clock.now += seconds if i or first is None else first
            self.progress.step(i + 1)

    def phase(self, name: str, seconds: float) -> None:
        self.progress.phase(name)
        self.clock.now += seconds


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.0, "0.001 s"), (0.042, "0.042 s"), (3.14, "3.1 s"), (9.96, "10 s"), (45.4, "45 s"), (99.4, "99 s"),
        (99.6, "1 min 40 s"), (160, "2 min 40 s"), (180, "3 min"), (594, "9 min 50 s"), (596, "10 min"),
        (840, "14 min"), (3599, "1 h"), (7500, "2 h 5 min"), (35999, "10 h"), (111600, "31 h"),
    ],
)  # fmt: skip
def test_durations_in_words(seconds, words):
    assert duration(seconds) == words


def test_a_step_is_a_median_in_which_cached_steps_have_their_share():
    assert average_step([3.0, 3.1, 3.2]) == 3.1
    assert average_step([3.0] * 19 + [60.0]) == 3.0, "one slow step does not count"
    assert average_step([3.0, 0.02] * 20) == pytest.approx(1.51)
    assert average_step([3.0, 0.02, 0.02] * 15) == pytest.approx(1.0133, abs=1e-3)
    # Only the latest steps tell the seconds.
    assert average_step([2.0] * 40 + [3.0] * 20) == 3.0


def test_one_bar_and_words_for_segments_and_all_that_happens_in_them():
    task = Task(*[Part(4)] * 4, what="segment")
    task.progress.finish(reused=True)
    task.phase(LOADING, 30)
    task.phase(ENCODING, 5)
    task.progress.phase("")
    task.progress.phase(COMPILING)
    task.steps(3.0, 4, first=60)
    task.phase(DECODING, 7)
    task.progress.finish()
    assert task.words == [
        "segment 2 of 4, step 1 of 4",
        "segment 2 of 4, loading the model",
        "segment 2 of 4, encoding",
        "segment 2 of 4, step 1 of 4",
        "segment 2 of 4, step 1 of 4, compiling, once",
        # The first step compiled: it tells nothing of the others.
        "segment 2 of 4, step 2 of 4",
        "segment 2 of 4, step 3 of 4, 3 s each, about 30 s left",
        "segment 2 of 4, step 4 of 4, 3 s each, about 27 s left",
        "segment 2 of 4, step 4 of 4, 3 s each, about 24 s left",
        "segment 2 of 4, decoding, about 24 s left",
        # Decoding is known from now on: two segments of 4 * 3 + 7 s.
        "segment 3 of 4, step 1 of 4, 3 s each, about 38 s left",
    ]
    task.phase(ENCODING, 5)
    task.steps(3.0, 4)
    assert task.words[-1] == "segment 3 of 4, step 4 of 4, 3 s each, about 31 s left", "7 s, and 5 + 4 * 3 + 7 s"
    task.phase(DECODING, 7)
    task.progress.finish()
    task.progress.finish(reused=True)
    values = [done for done, _ in task.bars]
    assert values == sorted(values) and {total for _, total in task.bars} == {20}
    assert task.bars[0] == (5, 20) and task.bars[-1] == (20, 20)
    assert task.progress.summary() == "4 segments, 2 already there, 8 steps of 3 s, 2 min 20 s in all"


def test_segments_that_are_there_already_are_neither_estimated_nor_measured():
    task = Task(*[Part(10)] * 3, what="segment")
    for _ in range(3):
        task.clock.now += 20
        task.progress.finish(reused=True)
    assert task.bars == [(11, 33), (22, 33), (33, 33)] and task.progress.left() is None
    assert task.progress.summary() == "3 segments already there"


def test_parts_of_another_kind_are_estimated_by_their_own_steps_once_these_are_known():
    task = Task(Part(3, "A"), Part(3, "B"), Part(3, "A"), closing=False, what="run")
    task.steps(2.0, 3)
    task.progress.finish()
    assert task.progress.left() == 12
    task.steps(5.0, 3)
    assert task.progress.left() == 6
    task.progress.finish()
    assert task.progress.left() == 6 and task.bars[-1] == (6, 9)


def test_compiling_in_the_middle_does_not_count():
    task = Task(Part(6), closing=False)
    task.steps(1.0, 3)
    task.phase(COMPILING, 50)
    task.progress.step(4)
    assert task.progress.each() == 1 and task.words[-1] == "step 5 of 6, 1 s each, about 2 s left"


def test_several_steps_at_a_time():
    """As a decoder gives frames."""
    task = Task(Part(13), closing=False, unit="frame")
    for done in (1, 5, 9):
        task.clock.now += 2.0
        task.progress.step(done)
    assert task.words[-1] == "frame 10 of 13, 0.5 s each, about 2 s left"
    assert task.progress.summary() == "9 frames of 0.5 s, 6 s in all"


def test_another_number_of_steps_than_planned_and_more_than_planned():
    task = Task(Part(50), closing=False)
    task.progress.step(1, 2)
    task.progress.step(2, 2)
    assert task.bars[-1] == (2, 2)
    task.progress.finish()
    # Callers that go on after the last part change nothing.
    task.progress.step(3)
    task.progress.finish()
    assert task.bars[-1] == (2, 2)


def test_weights_are_counted_in_bytes_until_something_else_begins():
    task = Task(Part(4), Part(4), what="video")
    task.progress.load(LOADING_TEXT, 0, 11_400_000_000)
    task.progress.load(LOADING, 300, 2_500)
    assert task.progress.loaded == (300, 2_500)
    task.phase(ENCODING, 1)
    assert task.progress.loaded is None
    assert task.words == [
        "video 1 of 2, loading the text encoder, 0.0 of 11.4 GB",
        "video 1 of 2, loading the model, 0.3 of 2.5 kB",
        "video 1 of 2, encoding",
    ]


def test_stages_have_names():
    task = Task(Part(2))
    stages = []
    for happens in (
        lambda: task.phase(ENCODING, 1),
        lambda: task.progress.phase(""),
        lambda: task.progress.phase(COMPILING),
        lambda: task.steps(1.0, 2),
        lambda: task.phase(DECODING, 1),
        lambda: task.progress.decoded(1),
        lambda: task.progress.decoded(44),
        task.progress.finish,
    ):
        happens()
        stages.append(task.progress.stage)
    assert stages == [ENCODING, *[FIRST_STEP] * 2, STEPS, *[DECODING] * 3, ""]
    assert task.words[-3:-1] == ["decoding, 1 frame", "decoding, 45 frames"]


def test_words_of_what_ended():
    task = Task(Part(50), closing=False)
    assert task.progress.stopped("stopped") == "stopped at step 1 of 50"
    task.steps(3.1, 11)
    assert task.progress.stopped("interrupted") == "interrupted at step 12 of 50"
    assert task.progress.summary() == "11 steps of 3.1 s, 34 s in all"
    parts = Task(Part(2), Part(2), what="segment")
    parts.progress.finish()
    parts.progress.finish()
    assert parts.progress.stopped("interrupted") == "interrupted at segment 2 of 2"
    work = Task()
    work.phase(ENCODING, 2.5)
    assert work.words == ["encoding"] and work.progress.summary() == "encoding took 2.5 s"
