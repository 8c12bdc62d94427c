"""Sparse attention as a part of a request: what is refused and noted, and that it reaches the network."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from longcat_core.errors import LongCatError
from longcat_core.generate.pipeline import Pipeline
from longcat_core.generate.request import NANO, GenerateRequest
from longcat_core.optimize.sparse import passes
from longcat_core.optimize.sparse.settings import Densities, Sparse

from ..support.tiny import PromptText, golden_pipeline
from .test_calibration import calibration_of

# 5x16x16 tokens.
REQUEST = GenerateRequest("x", "y", height=256, width=256, frames=17, steps=3)
SPARSE = Sparse(0.2, dense_steps=0.3)


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    pipeline = golden_pipeline(None)
    pipeline.text_encoder = PromptText()
    return pipeline


def test_it_changes_the_video_and_nothing_else_of_the_pipeline(pipeline):
    dense = pipeline.generate(REQUEST).latents
    sparse = pipeline.generate(replace(REQUEST, sparse=SPARSE)).latents
    assert not torch.equal(sparse, dense) and pipeline.model.sparse is None
    assert torch.equal(pipeline.generate(REQUEST).latents, dense)
    # All steps are among the first ones.
    all_dense = replace(REQUEST, sparse=replace(SPARSE, dense_steps=1.0))
    assert torch.equal(pipeline.generate(all_dense).latents, dense)


def test_a_calibration_brings_its_densities(pipeline, monkeypatch):
    found = calibration_of(pipeline.model)
    seen = []
    make = passes.SparsePass
    monkeypatch.setattr(passes, "SparsePass", lambda settings, *more: seen.append(settings) or make(settings, *more))
    pipeline.generate(replace(REQUEST, sparse=found, sparse_kernel="plain"))
    assert set(seen) == {found.sparse(kernel="plain")} and len(seen) == 2, "the first of three steps is dense"


def test_a_calibration_of_other_weights_is_refused(pipeline):
    found = calibration_of(pipeline.model)
    marks = tuple(tuple(2 * mark + 1 for mark in row) for row in found.model.marks)
    other = replace(found, model=replace(found.model, marks=marks))
    with pytest.raises(LongCatError, match="the calibration is of other weights than this model's"):
        pipeline.generate(replace(REQUEST, sparse=other))
    fits_none = Sparse(densities=Densities((1.0,), (((0.5,),),)))
    with pytest.raises(LongCatError, match="densities are for 1 layers of 1 heads"):
        pipeline.generate(replace(REQUEST, sparse=fits_none))
    assert pipeline.model.sparse is None


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"sparse": 0.15}, "sparse attention cannot be of type float; give a Sparse"),
        ({"sparse_kernel": "fast"}, "sparse kernel is 'fast'; choose one of auto"),
        (
            {"sparse": Sparse(densities=Densities((1.0,), (((0.1, 0.2),),))), "sparse_kernel": "sol"},
            "'sol' takes one density for all heads",
        ),
    ],
)
def test_requests_refuse(changes, sentence):
    with pytest.raises(LongCatError, match=sentence):
        replace(REQUEST, **changes).filled(NANO)


def test_notes(pipeline):
    def notes(**changes) -> list[str]:
        return replace(REQUEST, **changes).filled(NANO).notes()

    assert notes() == []
    (said,) = notes(sparse=Sparse())
    assert said.startswith("the density of sparse attention, 0.15, is not calibrated for this model; longcat calibrate")
    found = calibration_of(pipeline.model)
    assert notes(sparse=found) == []
    said = notes(sparse=found, negative_prompt="", schedule="distilled", guidance_scale=1.0)
    assert said == ["the calibration was measured with the base schedule, and this run's is distilled"]
