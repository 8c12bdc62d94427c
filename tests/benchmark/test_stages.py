"""A run by stages adds up, from the marks of its progress bar."""

from __future__ import annotations

import time

import pytest

from longcat_core.benchmark import stages
from longcat_core.generate.progress import (
    DECODING,
    ENCODING,
    FIRST_STEP,
    LOADING,
    LOADING_TEXT,
    SAVING,
    STARTING,
    STEPS,
    WRITING,
    Part,
    Progress,
)


def test_what_a_run_waits_for_adds_up_and_the_rest_stands_beside_it(monkeypatch):
    now, settled = 100.0, 0

    def settle() -> None:
        nonlocal settled
        settled += 1

    monkeypatch.setattr(time, "monotonic", lambda: now)
    monkeypatch.setattr(stages, "_settle", settle)
    clock = stages.StageClock(97.0)
    task = Progress([Part(3)], clock)
    happens = (
        (3.0, lambda: task.load(LOADING_TEXT, 0, 10)),
        (1.0, lambda: task.load(LOADING_TEXT, 10, 10)),
        (0.5, lambda: task.phase(ENCODING)),
        # Half of it was read while the text encoder worked.
        (1.0, lambda: task.load(LOADING, 15 * 10**9, 30 * 10**9)),
        (4.0, lambda: task.phase(ENCODING)),
        (0.25, lambda: task.phase("")),
        (7.0, lambda: task.step(1)),
        (2.0, lambda: task.step(2)),
        (2.0, lambda: task.step(3)),
        (0.0, lambda: task.phase(DECODING)),
        (0.5, lambda: task.decoded(1)),
        (1.5, lambda: task.decoded(92)),
        (0.0, task.finish),
        (0.0, lambda: task.phase(SAVING)),
        (0.25, lambda: task.worked_beside(WRITING, 1.75)),
    )
    now = 97.0
    for seconds, happen in happens:
        now += seconds
        happen()
    row = clock.row(now)
    assert {stage["name"]: stage["s"] for stage in row["stages"]} == {
        STARTING: 3.0, LOADING_TEXT: 1.5, ENCODING: 1.25, LOADING: 4.0, FIRST_STEP: 7.0, STEPS: 4.0, DECODING: 2.0,
        SAVING: 0.25,
    }  # fmt: skip
    assert row["wall_s"] == 23.0 == now - 97.0 and row["first_frames_s"] == 0.5
    # Of the first step, 5 s more than a later one takes are not sampling.
    assert (row["steps"], row["step_s"], row["sampling_s"], row["less_sampling_s"]) == (3, 2.0, 6.0, 17.0)
    assert row["beside"] == [
        {"name": WRITING, "s": 1.75},
        {"name": LOADING, "s": None, "what": "15.0 of 30.0 GB came before"},
    ]
    assert settled == 10, "once for each stage and each step"


def test_a_single_step_is_all_the_sampling_there_is():
    row = stages.row({FIRST_STEP: 3.0, DECODING: 1.0}, [], [], None)
    assert (row["sampling_s"], row["less_sampling_s"]) == (3.0, pytest.approx(1.0))
