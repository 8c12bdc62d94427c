"""The search for densities: it follows the structure of attention, keeps its budget and leaves the videos alone."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from longcat_core.errors import LongCatError
from longcat_core.generate.calibration import Calibration
from longcat_core.generate.progress import Progress
from longcat_core.generate.request import NANO, FilledRequest, GenerateRequest
from longcat_core.measure.calibrate import (
    DENSE_FROM,
    Measured,
    PipelineSubject,
    Recipe,
    Search,
    Videos,
    attention_cost,
    check_calibration,
    choose,
    expected_speed_up,
    token_order,
    video_psnr,
)
from longcat_core.measure.calibration_report import text
from longcat_core.measure.probe import LADDER, Price, Probe, price, probing
from longcat_core.optimize.sparse.settings import BLOCK, Sparse

from ..support.quick import quick_pipeline
from ..support.tiny import moving_clip

RECIPE = Recipe(samples=3 * BLOCK, query_block=BLOCK, ranges=2, video=False)


def request(**changes: object) -> FilledRequest:
    """Of 1,088 tokens: 17 latent frames of 8x8."""
    settings = {"prompt": "a red circle", "height": 128, "width": 128, "frames": 65, "steps": 5} | changes
    return GenerateRequest(**settings).filled(NANO)  # type: ignore[arg-type]


SHORT = (0.1, 0.2, 0.4)


def chosen(
    errors: Sequence[Sequence[float]], ladder: Sequence[float] = LADDER, budget: float = 0.1
) -> tuple[float, ...]:
    """The densities of one layer whose heads have these errors at the densities of a ladder."""
    ((row,),) = choose(torch.tensor([[errors]]).square(), ladder, budget)
    return row


# --- structure -------------------------------------------------------------------------------------------------------

BLOCKS = 40


def structured() -> tuple[list[str], Tensor, Tensor, Tensor]:
    """Heads of known structure [N, H, D]: each looks where its name says."""
    generator = torch.Generator().manual_seed(3)
    tokens, dim = BLOCKS * BLOCK, 64
    values = torch.randn(tokens, dim, generator=generator)
    # A direction for each block, orthogonal to the others.
    codes = torch.linalg.qr(torch.randn(dim, dim, generator=generator)).Q[:BLOCKS].repeat_interleave(BLOCK, 0)
    directed = 100 * codes
    far = codes.roll(BLOCK * BLOCKS // 2, 0)
    # One key in each block that every query looks for, hidden in the block's mean.
    needles = torch.zeros(tokens, dim)
    needles[::BLOCK, 0] = 1
    ahead = torch.zeros(tokens, dim)
    ahead[:, 0] = 100
    # Keys of a block differ, so that their mean does not stand for them.
    uneven = codes * 2 * torch.rand(tokens, 1, generator=generator)
    heads = {
        "own block": (directed, codes),
        "uniform": (torch.zeros(tokens, dim), codes),
        "one far block": (100 * far, codes),
        "half of the blocks": (sum(100 * codes.roll(BLOCK * i, 0) for i in range(BLOCKS // 2)), uneven),
        "a needle in every block": (ahead, needles),
    }
    q, k = (torch.stack([pair[i] for pair in heads.values()], dim=1) for i in range(2))
    return list(heads), q, k, values[:, None].expand_as(k)


def alone(found: Price) -> list[float]:
    """The density of each head as the only one of a layer, at a budget of 0.1."""
    worst = (found.error / found.size[:, None]).sqrt()
    return [chosen([row])[0] for row in worst.tolist()]


def test_densities_follow_what_heads_look_at() -> None:
    names, q, k, v = structured()
    densities = alone(price(q.unflatten(0, (-1, BLOCK)), k, v, LADDER, sink=0, query_block=BLOCK, tail=True))
    dense = dict(zip(names, densities, strict=True))
    # One block of 40 is 0.025; 0.03 is the first step of the ladder that keeps it, and 0.01 keeps one block too.
    assert dense["own block"] <= 0.03 and dense["one far block"] <= 0.03
    assert dense["uniform"] == LADDER[0], "the pooled tail is exact there"
    assert 0.4 <= dense["half of the blocks"] <= 0.55
    assert dense["a needle in every block"] == 1.0


def test_without_a_tail_a_uniform_head_needs_every_block() -> None:
    names, q, k, v = structured()
    densities = alone(price(q.unflatten(0, (-1, BLOCK)), k, v, LADDER, sink=0, query_block=BLOCK, tail=False))
    assert densities[names.index("uniform")] == 1.0
    assert densities[names.index("own block")] <= 0.03


# --- choosing --------------------------------------------------------------------------------------------------------


def test_the_lowest_density_that_keeps_the_budget_is_taken() -> None:
    assert chosen([[0.3, 0.09, 0.01]], SHORT) == (0.2,)
    assert chosen([[0.05, 0.2, 0.01]], SHORT) == (0.4,), "an error that comes back does not count as kept"
    assert chosen([[0.3, 0.1, 0.01]], SHORT, budget=0.31) == (0.1,)
    assert chosen([[0.0, 0.0, 0.0]], SHORT) == (0.1,)


@pytest.mark.parametrize("budget", [0.02, 0.05, 0.1, 0.2])
def test_heads_and_layers_share_the_budget(budget: float) -> None:
    """No other densities have a lower mean and an error as small; a head that counts more gets more."""
    weights = torch.tensor([[1.0, 0.1], [0.3, 0.3]])
    errors = torch.rand(1, 2, 2, 4, generator=torch.Generator().manual_seed(0)).cumprod(-1)
    squares = (errors * weights[..., None]).square()
    ladder = (0.05, 0.1, 0.2, 0.3)
    (found,) = choose(squares, ladder, budget)
    steps, every = torch.tensor([*ladder, 1.0]), torch.nn.functional.pad(squares[0], (0, 1)).flatten(0, 1)
    at = torch.tensor([[*ladder, 1.0].index(density) for row in found for density in row])
    spent = every.gather(-1, at[:, None]).sum()
    assert spent / 2 <= budget**2
    for other in map(torch.tensor, itertools.product(range(5), repeat=4)):
        if every.gather(-1, other[:, None]).sum() <= spent:
            assert steps[other].sum() >= steps[at].sum() - 1e-6


def test_a_layer_that_needs_nearly_everything_is_dense() -> None:
    assert chosen([[0.3, 0.2, 0.2]] * 2 + [[0.0, 0.0, 0.0]], SHORT) == (1.0, 1.0, 1.0)
    assert chosen([[0.3, 0.2, 0.2]] + [[0.0, 0.0, 0.0]] * 2, SHORT) == (1.0, 0.1, 0.1)
    assert attention_cost([[DENSE_FROM]]) == pytest.approx(1.0) == attention_cost([[1.0]])


def test_the_expected_speed_up_counts_dense_steps_and_the_rest_of_a_step() -> None:
    measured = Measured.of(10, Recipe(dense_steps=0.2, ranges=1))
    none = (((1.0,),),)
    assert expected_speed_up(none, measured, 0.7) == pytest.approx(1.0)
    # Eight of ten steps, in which 0.7 of the time shrinks to 0.7 * (1.4 * 0.1 + 0.05).
    assert expected_speed_up((((0.1,),),), measured, 0.7) == pytest.approx(10 / (2 + 8 * (0.3 + 0.7 * 0.19)))


@pytest.mark.parametrize(
    ("steps", "recipe", "ends", "at"),
    [
        (10, Recipe(), (0.4, 0.7, 1.0), {2: 0, 3: 0, 4: 1, 6: 1, 7: 2, 9: 2}),
        (4, Recipe(), (0.5, 0.75, 1.0), {1: 0, 2: 1, 3: 2}),
        (2, Recipe(), (1.0,), {1: 0}),
        (5, Recipe(dense_steps=0.0, ranges=1, probes=3), (1.0,), {0: 0, 2: 0, 4: 0}),
    ],
)
def test_steps_of_every_range_are_measured(
    steps: int, recipe: Recipe, ends: tuple[float, ...], at: dict[int, int]
) -> None:
    found = Measured.of(steps, recipe)
    assert (found.ends, found.at) == (ends, at)
    assert all(step / steps >= recipe.dense_steps for step in found.at)


@pytest.mark.parametrize(
    ("changes", "recipe", "said"),
    [
        ({}, Recipe(budget=0.0), "a budget of 0 is out of range; give 0.001 to 1"),
        ({}, Recipe(dense_steps=1.2), "a share of dense steps of 1.2 is out of range"),
        ({}, Recipe(dense_steps=1.0), "leaves none of 5 to calibrate"),
        ({"frames": 33}, Recipe(), "have 576 tokens to generate, too few for sparse attention"),
        ({"given": moving_clip(17), "num_cond_frames": 17}, Recipe(), "too few for sparse attention"),
    ],
)
def test_what_cannot_be_calibrated_is_refused(changes: dict[str, object], recipe: Recipe, said: str) -> None:
    with pytest.raises(LongCatError, match=said):
        check_calibration(Videos.of([request(**changes)]), recipe)


def test_a_ladder_has_one_density_for_each_number_of_blocks() -> None:
    """Of 17 blocks, densities below 0.09 all keep one; the file must not promise that a hundredth is enough."""
    _, recipe = check_calibration(Videos.of([request()]), Recipe())
    counts = [max(1, round(density * 17)) for density in recipe.ladder]
    assert len(set(counts)) == len(counts) and recipe.ladder[0] == 0.07


# --- whole runs ------------------------------------------------------------------------------------------------------


def search(requests: Sequence[FilledRequest], recipe: Recipe = RECIPE, **options: Any) -> tuple[Search, Calibration]:
    """A search that has run, and what it found. options: pipeline, lora."""
    videos, pipeline = Videos.of(requests), options.pop("pipeline", None) or quick_pipeline()
    made = Search(videos, recipe, Progress(Search.parts(videos, recipe)))
    return made, made.run(PipelineSubject(pipeline, requests), **options)


def test_a_search_is_deterministic_and_measures_what_it_says() -> None:
    both = [request(), request(prompt="a blue square")]
    runs, found = zip(*(search(both, lora=["step.safetensors"]) for _ in range(2)), strict=True)
    assert found[0].densities == found[1].densities and found[0].curve == found[1].curve
    assert runs[0].probe.squares.equal(runs[1].probe.squares)
    # Two prompts, two steps in each range, and both halves of guidance in every pass.
    assert runs[0].probe.seen == [4, 4] and runs[0].probe.count.tolist() == [[8, 8]] * 2
    assert found[0].ends == (0.6, 1.0) and found[0].prompts == ("a red circle", "a blue square")
    assert found[0].settings.lora == ("step.safetensors",) and found[0].video is None
    assert [point.density for point in found[0].curve] == list(runs[0].recipe.ladder)
    medians = [point.median for point in found[0].curve]
    assert medians == sorted(medians, reverse=True) and 0 < medians[-1] < medians[0] < 1
    other, _ = search([replace(both[0], seed=5)])
    assert not other.probe.squares.equal(runs[0].probe.squares)


def test_measuring_leaves_the_video_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline, frames = quick_pipeline(), []
    exact, execution = pipeline.generate(request()).frames, pipeline.model.execution
    video = PipelineSubject.video
    monkeypatch.setattr(PipelineSubject, "video", lambda *args: frames.append(video(*args)) or frames[-1])
    search([request()], pipeline=pipeline)
    assert np.array_equal(frames[0], exact)
    assert pipeline.model.execution is execution


@pytest.mark.parametrize("given", [1, 5])
def test_conditioning_frames_are_part_of_the_keys(given: int) -> None:
    """With a cache or without, the same noise tokens look at the same keys."""
    clip = moving_clip(given)
    one = request(given=clip, num_cond_frames=given, frames=73)
    errors = []
    for kv_cache in ("exact", "off"):
        run, _ = search([replace(one, kv_cache=kv_cache)])
        errors.append(run.probe.mean_squares().sqrt())
    torch.testing.assert_close(*errors, rtol=1e-3, atol=1e-4)
    single, _ = search([request()])
    assert (single.probe.mean_squares().sqrt()[..., 0] - errors[0][..., 0]).abs().max() > 1e-3


def test_halves_of_guidance_may_run_one_after_the_other() -> None:
    pipeline = quick_pipeline()
    pipeline.model.set_optimizations(replace(pipeline.model.optimizations, split_guidance=True))
    (whole, _), (split, _) = search([request()]), search([request()], pipeline=pipeline)
    assert split.probe.seen == [2 * count for count in whole.probe.seen]
    # Other query blocks are measured, so the errors agree about as well as samples do.
    both = (run.probe.mean_squares().sqrt().mean() for run in (split, whole))
    torch.testing.assert_close(*both, rtol=0.2, atol=0)


def test_psnr_is_of_generated_frames() -> None:
    one = moving_clip(3)
    other = one.copy()
    other[0] += 9
    assert video_psnr(other, one, given=1) == math.inf
    other[1] ^= 1
    assert video_psnr(other, one, given=1) == pytest.approx(10 * math.log10(255**2 / 0.5))


@pytest.mark.parametrize("cond", [0, 2])
def test_prices_are_those_of_a_sparse_pass(cond: int) -> None:
    """In the first layer, whose inputs are the same, a sparse pass is as far from a dense one as the probe says."""
    model = quick_pipeline().model
    depth, heads, frames = model.config.depth, model.config.num_heads, 17 + cond
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 16, frames, 16, 16, generator=generator)
    # Sharper than a random network's, so that there is something to lose.
    model.blocks[0].attn.q_norm.weight.mul_(6)
    words, t = torch.randn(1, 5, model.config.caption_channels, generator=generator), torch.full((1, frames), 700.0)
    t[:, :cond] = 0
    inputs: list[Tensor] = []

    def keep(_: object, given: tuple[Tensor]) -> None:
        # The probe asks the layer about rows of its own.
        inputs.extend(rows for rows in given if rows.ndim == 3)

    model.blocks[0].attn.proj.register_forward_pre_hook(keep)
    _, recipe = check_calibration(Videos.of([request()]), Recipe())
    probe = Probe(1, depth, heads, BLOCK, True, recipe.ladder, 17, 0, token_order)
    probe.range = 0
    with torch.no_grad(), probing(model, probe):
        model(x, t, words, num_cond_latents=cond)
    for at in (0, 2):
        model.sparse = Sparse(recipe.ladder[at], dense_steps=0, query_block=BLOCK)
        with torch.no_grad():
            model(x, t, words, num_cond_latents=cond)
        dense, sparse = (rows.unflatten(-1, (heads, -1))[0, 64 * cond :] for rows in (inputs[0], inputs.pop()))
        order = token_order((17, 8, 8), torch.device("cpu"))
        weight = model.blocks[0].attn.proj.weight.unflatten(1, (heads, -1))
        errors = torch.einsum("nhd,chd->nhc", sparse - dense[order], weight).square().sum((0, 2)).sqrt()
        errors /= torch.einsum("nhd,chd->nc", dense, weight).square().sum().sqrt()
        torch.testing.assert_close(errors, probe.squares[0, 0, :, at].sqrt(), rtol=1e-3, atol=1e-5)
        assert errors.min() > 0.02


def test_a_whole_run_checks_its_result() -> None:
    pipeline = quick_pipeline()
    run, found = search([request(steps=6)], replace(RECIPE, video=True, budget=0.2), pipeline=pipeline)
    assert found.video is not None and found.video.psnr is not None and 30 < found.video.psnr < 80
    assert found.video.floor == "attention sdpa-math" and found.video.sparse_s > 0
    assert run.progress.done == run.progress.total == 3 * (6 + 1)
    assert pipeline.model.sparse is None and pipeline.model.optimizations.attention == "auto"
    assert "a whole video against the exact one: " in text(found)
