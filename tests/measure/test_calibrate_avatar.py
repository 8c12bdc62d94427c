"""Calibrating an avatar: which attentions are measured where a reference frame is there, and whole searches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool3d

from longcat_core.errors import LongCatError
from longcat_core.generate.audio import combine
from longcat_core.generate.avatar import AvatarRequest, make_segment
from longcat_core.generate.calibration import Calibration, check_fits
from longcat_core.generate.pipeline import Pipeline
from longcat_core.generate.progress import Progress
from longcat_core.generate.segments import Segment
from longcat_core.measure.calibrate import Recipe, Search, token_order
from longcat_core.measure.calibrate_avatar import AvatarSubject, check_segments, shortened, videos_of
from longcat_core.measure.probe import looks
from longcat_core.model.kv_cache import Reference
from longcat_core.model.transformer import ReferenceLayout
from longcat_core.optimize.sparse.layout import SparseLayout
from longcat_core.optimize.sparse.settings import BLOCK
from longcat_core.sampling.conditioning import SPATIAL_FACTOR, latent_frames

from ..generate.test_avatar import PROMPT, hear, pipeline, request
from ..support.quick import QuickPipeline
from ..support.sounds import sweep

CPU = torch.device("cpu")
RECIPE = Recipe(samples=2 * BLOCK, query_block=BLOCK, ranges=1, probes=1, video=False, dense_steps=0.5)


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("reference", [Reference(), Reference(10, 0), Reference(30)])
def test_queries_and_keys_are_measured_in_the_order_of_sparse_attention(cached: bool, reference: Reference) -> None:
    """Tokens by their numbers: what each attention has, put in order, is what the sparse layout gives it."""
    frames, rows, columns, given = 17, 3, 5, 5
    start, clean, spatial = (given, 0, rows * columns) if cached else (0, given, rows * columns)
    grid = frames + clean, rows, columns
    groups = ReferenceLayout(reference).groups(clean, start, grid[0])
    assert any(groups.hidden) == (reference == Reference())
    order = token_order((frames, rows, columns), CPU, groups.hidden)
    found = looks(groups, grid[0], spatial, given * spatial, cached, order)
    layout = SparseLayout(grid, clean, CPU, start, reference)
    every = torch.arange((start + grid[0]) * spatial)
    ours = torch.cat((every[: start * spatial], layout.order + start * spatial))
    for number, (own, seen) in enumerate(groups.reads(grid[0], spatial, cached), 1):
        assert (number in found) == (own.start >= clean * spatial)
        if number in found:
            look, queries = found[number], every[start * spatial :]
            assert torch.equal(queries[own][look.queries], ours[start * spatial :][own])
            assert torch.equal(every[seen][look.keys], ours[seen])
            assert look.sink == -(-(given * spatial - seen.start) // BLOCK)
    assert sum(look.share for look in found.values()) == pytest.approx(1)


class Quick(Pipeline):
    """The golden avatar with a VAE that costs nothing."""

    def encode(self, pixels: Tensor) -> Tensor:
        sizes = latent_frames(pixels.shape[2]), *(side // SPATIAL_FACTOR for side in pixels.shape[3:])
        return adaptive_avg_pool3d(pixels, sizes).repeat(1, 6, 1, 1, 1)[:, :16]

    def decode_frames(self, latents: Tensor, truncated: bool = False) -> Iterator[np.ndarray]:
        yield QuickPipeline.decode(self, latents)  # type: ignore[arg-type]


def quick() -> Quick:
    golden = pipeline("1.5")
    return Quick(golden.model, golden.vae, golden.text_encoder, golden.defaults)


def spoken(**changes: object) -> AvatarRequest:
    """Two segments, whose second one has 1,088 tokens behind a reference and four conditioning frames."""
    sized = request(height=128, width=128, frames=81, steps=2, schedule="base", overlap=13, guidance_scale=1.0)
    voices = combine([sweep(5.0, 1)])
    changed = replace(sized, voices=voices, schedule="base", audio_guidance=1.0, **changes)  # type: ignore[arg-type]
    return shortened(changed.filled(pipeline("1.5").defaults))


def search(requests: Sequence[AvatarRequest], recipe: Recipe = RECIPE) -> tuple[Search, Calibration]:
    videos = videos_of(requests)
    made = Search(videos, recipe, Progress(Search.parts(videos, recipe)))
    return made, made.run(AvatarSubject(quick(), requests, hear("1.5", 1)))


def test_both_segments_are_measured_and_left_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    made, video, frames = spoken(), AvatarSubject.video, []
    monkeypatch.setattr(AvatarSubject, "video", lambda *args: frames.append(video(*args)) or frames[-1])
    run, found = search([made])
    assert made.count == 2 and len(frames) == 2 and run.probe.seen == [2]
    # A pass of each segment, and in the second one three attentions that count as one.
    torch.testing.assert_close(run.probe.count, torch.full_like(run.probe.count, 2.0))
    assert 0 < found.density < 1 and found.prompts == (PROMPT,) and found.settings.given == 1
    engine, heard = quick(), hear("1.5", 1)
    first, latents = make_segment(engine, made, 0, heard)
    second, _ = make_segment(engine, made, 1, heard, Segment(first, latents, ""), latents[:, :, :1])
    assert np.array_equal(frames[0], first) and np.array_equal(frames[1], second)
    check_fits(found, engine.model)


def test_a_second_segment_that_is_too_short_is_refused() -> None:
    made = spoken(overlap=21)
    check_segments([replace(made, prompts=made.prompts[:1])], RECIPE, (1, 2, 2))
    with pytest.raises(LongCatError, match="have 960 tokens to generate, too few for sparse attention"):
        check_segments([made], RECIPE, (1, 2, 2))
