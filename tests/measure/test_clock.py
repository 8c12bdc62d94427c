"""Timing calls within a budget."""

from __future__ import annotations

import torch

from longcat_core.measure.clock import Budget, attempt, measure


def test_measuring_counts_calls_and_stops_with_the_budget():
    calls = []
    timing = measure(lambda: calls.append(1), torch.device("cpu"), 3, Budget(None))
    assert len(calls) == 5 and len(timing.times_ms) == 3 and timing.peak_gib is None
    calls.clear()
    timing = measure(lambda: calls.append(1), torch.device("cpu"), 3, Budget(0))
    assert len(calls) == 1 and timing.ms == 1000 * timing.first_s
    assert attempt({"name": "a"}, Budget(0), lambda: calls.append(1))["status"] == "not run" and len(calls) == 1
