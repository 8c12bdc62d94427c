from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from longcat_core.nano.mini.recipe import train_mini


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict]]:
    """A tiny mini whose runs of training each end as soon as they may, and the clock's file after every run."""
    folder, clocks = tmp_path_factory.mktemp("mini"), []
    for _ in range(12):
        finished = train_mini(folder, size="mini-tiny", minutes=0.2, stop_after=0.0, device=torch.device("cpu"))
        clocks.append(json.loads((folder / "state" / "clock.json").read_text()))
        if finished:
            return folder, clocks
    raise AssertionError(f"not finished after {len(clocks)} runs: {clocks[-1]}")
