from __future__ import annotations

import itertools
import json
from functools import partial
from pathlib import Path

import pytest
import torch

from longcat_core.nano.mini import recipe
from longcat_core.nano.mini.clock import Clock

# Every look at the clock: with the real one the number of runs would depend on the machine.
SECONDS = 0.35


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict]]:
    """A tiny mini whose runs of training each end as soon as they may, and the clock's file after every run."""
    pytest.importorskip("sentencepiece", minversion="0.2.3")
    folder, clocks = tmp_path_factory.mktemp("mini"), []
    time = itertools.count(0.0, SECONDS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipe, "Clock", partial(Clock, now=lambda: next(time)))
        for _ in range(30):
            done = recipe.train_mini(folder, size="mini-tiny", minutes=0.2, stop_after=0.0, device=torch.device("cpu"))
            clocks.append(json.loads((folder / "state" / "clock.json").read_text()))
            if done:
                return folder, clocks
    raise AssertionError(f"not finished after {len(clocks)} runs: {clocks[-1]}")
