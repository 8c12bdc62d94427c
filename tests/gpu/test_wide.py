"""Latents of the wide network: what is not finite, too far off or over its mode's memory is called wrong."""

from __future__ import annotations

import numpy as np
import pytest

from . import limits
from .cells import BYPASS, HELD, LONGCAT, LORA, NONE, STATIC
from .fleet import SMALL, Seen
from .memory import Meter
from .verdicts import RIGHT, WRONG
from .wide import FORMS, MODES, Row, judge, rows

WANTED = np.random.default_rng(0).normal(size=(1, 16, 2, 4, 6)).astype(np.float32)


def seen(latents: np.ndarray) -> Seen:
    return Seen("success", frames=latents)


@pytest.mark.parametrize("mode", [STATIC, HELD, SMALL])
def test_latents_are_compared(mode):
    row = Row("bf16", LONGCAT, mode, NONE)
    assert judge(row, seen(WANTED * 1.01), WANTED, limits.SAME, None).verdict == RIGHT
    assert "0.2000 off" in judge(row, seen(WANTED * 1.2), WANTED, limits.SAME, None).said
    for bad in (np.where(WANTED > 2, np.nan, WANTED), WANTED * 0, WANTED[:, :, :1], WANTED * 1.2):
        assert judge(row, seen(bad), WANTED, limits.SAME, None).verdict == WRONG
    assert judge(row, Seen("crash", "gone"), WANTED, limits.SAME, None).verdict == WRONG


@pytest.mark.parametrize(
    ("weights", "extra", "rounding", "against_core"),
    [
        ("bf16", NONE, 0.015, True),
        ("fp8 rowwise", NONE, 0.108, True),
        ("UNETLoader fp8_e4m3fn_fast", NONE, 0.104, False),
        ("bf16", LORA, 0.037, False),
        ("bf16", BYPASS, 0.041, True),
    ],
)
def test_limits_lie_between_rounding_and_what_is_lost(weights, extra, rounding, against_core):
    assert rounding < limits.wide_limit(weights, extra, against_core=against_core) < 0.35


def test_a_streamed_lora_that_is_lost_is_wrong():
    row, most = Row("bf16", LONGCAT, SMALL, LORA), limits.wide_limit("bf16", LORA, against_core=False)
    assert judge(row, seen(WANTED * 3.0846), WANTED, most, None).verdict == WRONG
    assert judge(row, seen(WANTED * 1.35), WANTED, most, None).verdict == WRONG
    assert judge(row, seen(WANTED * 1.0305), WANTED, most, None).verdict == RIGHT


def test_a_mode_that_is_held_must_stay_within_its_memory():
    held, free = (Row("bf16", LONGCAT, mode, NONE) for mode in (HELD, STATIC))
    assert judge(held, seen(WANTED), WANTED, limits.SAME, 12.9).verdict == RIGHT
    assert "13.5 GiB at most" in judge(held, seen(WANTED), WANTED, limits.SAME, 14.0).said
    assert judge(free, seen(WANTED), WANTED, limits.SAME, 60.0).verdict == RIGHT


def test_every_form_runs_in_every_mode():
    found = {(row.weights, row.mode) for row in rows(MODES)}
    assert found == {(form, mode) for form in FORMS for mode in MODES}
    assert len({row.name for row in rows(MODES)}) == len(rows(MODES))


def test_the_driver_says_what_each_process_holds():
    meter = Meter()
    for text in ("12, 1024\n13, 500\n", "12, 2048\n13, [N/A]\n", "12, 512\n"):
        meter.take(text)
    assert meter.peak_gib(12) == 2 and meter.peak_gib(13) == 500 / 1024 and meter.peak_gib(14) is None
    meter.reset(12)
    assert meter.peak_gib(12) is None
