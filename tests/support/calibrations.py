"""A calibration for tests, without a search."""

from __future__ import annotations

from typing import Any

from longcat_core.generate.calibration import (
    FORMAT,
    VERSION,
    Calibration,
    Point,
    Settings,
    VideoCheck,
    calibrated,
)


def calibration_of(model: Any) -> Calibration:
    """One in which every density differs."""
    config, ends = model.config, (0.4, 1.0)
    layers = [
        tuple(tuple((1 + heads + config.num_heads * layer + 50 * part) / 200 for heads in range(config.num_heads))
              for layer in range(config.depth))
        for part in range(len(ends))
    ]  # fmt: skip
    return Calibration(
        FORMAT,
        VERSION,
        calibrated(model),
        Settings(0.1, "base", 10, 4.0, 33, 64, 96, 0, 0.2, 64, True, 0),
        ends,
        tuple(layers),
        (Point(0.1, 0.05, 0.2, 0.9),),
        (0.5,) * config.depth,
        1.5,
        VideoCheck(None, 50.0, "attention sdpa-math", 2.0, 1.0, 1.6),
        "2026-11-28",
        {"gpu": "none"},
        ("a red circle", "ein roter Kreis über Blau"),
    )
