"""What `longcat bench avatar` measures within a limit in 16 bits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from longcat_core.benchmark import variants, workload
from longcat_core.benchmark.parts import avatar, cards
from longcat_core.measure import results
from longcat_core.measure.clock import Budget
from longcat_core.model.config import AudioConfig, ModelConfig
from longcat_core.optimize.plan import Plan, Weights, Work, choose_plan

from ..support.tiny import tiny_config

CPU = torch.device("cpu")
OUTSIDE = Plan(offload_kv_cache=True)


def test_the_kv_cache_of_a_continuation_lies_in_cpu_memory_within_a_limit(tmp_path, monkeypatch):
    model = workload.random_model(replace(tiny_config(depth=3), audio=avatar.SMALL), CPU, torch.float32)
    report = results.ResultsFile("avatar", tmp_path, CPU, {})
    size = workload.Size(32, 48, 17, 1)
    bench = variants.Bench(model, size, CPU, 1, Budget(None), report=report, fp8=False, say=lambda sentence: None)
    made = [(cards.Limit("no limit"), Plan()), (cards.Limit("36 GiB", 1 << 60, avatar.ROOM_GIB), OUTSIDE)]
    monkeypatch.setattr(cards, "plans", lambda *args: made)
    filled, fill = [], type(model).fill_kv_cache
    monkeypatch.setattr(
        type(model),
        "fill_kv_cache",
        lambda self, given, *to, **rest: (filled.append(to), fill(self, given, *to, **rest))[1],
    )
    avatar.run(bench)
    rows = {row["name"]: row for row in report.rows}
    without, row = rows["continuation, exact"], rows["continuation, exact, 36 GiB"]
    assert row["status"] == "ok" and row["plan"] == "the KV cache in CPU memory"
    assert row["ratio"] == pytest.approx(row["ms"] / without["ms"]) and row["cache_gib"] == without["cache_gib"]
    assert "continuation, exact, no limit" not in rows and filled[-1] == ("cpu",)


def test_the_limit_leaves_the_released_avatar_whole_and_its_kv_cache_outside():
    config = replace(ModelConfig(), audio=AudioConfig())
    weights, work = Weights.of(config, torch.bfloat16), Work((1, 16, 25, 60, 104), False, 5)
    room = int(avatar.ROOM_GIB * 2**30)
    plan, needed = choose_plan(config, weights, work, 2, free=room, own=True)
    assert plan == OUTSIDE and needed < 35 * 2**30
