"""What tests of long video and of refining in a folder share: a model, and what was made by it."""

from __future__ import annotations

import pytest
from torch import Tensor

from longcat_core.generate import engine as engine_module
from longcat_core.generate.pipeline import Pipeline
from longcat_core.generate.request import MAX_SEED

from ..support.tiny import SEED, tiny_pipeline


@pytest.fixture(scope="module")
def tiny() -> Pipeline:
    return tiny_pipeline()


@pytest.fixture
def made(monkeypatch) -> list[int]:
    """Numbers of the segments and pieces that were generated or refined, in order; known by their seeds."""
    numbers, seeded = [], engine_module.seeded_noise

    def spy(shape: tuple[int, ...], seed: int) -> Tensor:
        numbers.append((seed - SEED) % (MAX_SEED + 1))
        return seeded(shape, seed)

    monkeypatch.setattr(engine_module, "seeded_noise", spy)
    monkeypatch.setattr("longcat_core.generate.refine.seeded_noise", spy)
    return numbers
