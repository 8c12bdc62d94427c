"""Skip blocks: the first blocks of the network run at every step, and where they find that little has changed, what all
later blocks add to the tokens is predicted instead of computed.

What some blocks add to the tokens is their residual. It is predicted by a line over the noise levels through those of
the last two computed steps. The first blocks show how well that works at this step: if their prediction is off by less
than the threshold, relative to their residual, the other blocks are skipped. (To decide by the first blocks is the idea
of DBCache, and to predict by a Taylor series that of TaylorSeer, arXiv 2503.06923.)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Share of the blocks, at the front, that always run: 8 of the released model's 48.
FIRST_BLOCKS = 1 / 6
# Share of the steps, at the front, whose blocks all run: the scene is decided there. Those of the last step do too.
WARM_UP = 0.1
# Degree of the polynomial, and the most steps in a row that skip blocks. On the embedded model, at equal work, a
# parabola did better at small thresholds and worse at larger ones, and constants did worse. So did longer rows: what
# follows from predictions drifts away.
ORDER, IN_A_ROW = 1, 2
# The decision looks at about this many tokens of a frame.
PROBED = 128
TINY = 1e-12

# How a pass calls block i; see `model.transformer.Run`, which the sampler's loop does without.
Run = Callable[..., Tensor]


class _Residuals(NamedTuple):
    """Of one computed pass: its noise level, and what blocks added: the first ones to some tokens, [B, T, S', C], and
    the others to all, [B, T, S, C]."""

    sigma: float
    first: Tensor
    others: Tensor


def first_blocks(depth: int) -> int:
    """How many of `depth` blocks always run."""
    return max(1, round(FIRST_BLOCKS * depth))


class ResidualCache:
    """Predicts what the later blocks add to the tokens, in one sampling run or one half of guidance.

    threshold: relative error of the first blocks' prediction from which on all blocks run; 0 always runs them all.
    steps: number of steps of the run. It lies outside the network: `Execution` wraps the way it calls blocks.
    """

    def __init__(self, threshold: float, steps: int) -> None:
        self.threshold = threshold
        self.first, self.last = max(ORDER + 1, round(WARM_UP * steps)), steps - 1
        self.step, self.sigma = 0, 1.0
        # Steps in a row that skipped blocks.
        self.skipped = 0
        # Share of the blocks that ran in the last pass.
        self.ran = 1.0
        # What the kept residuals belong to; others cannot be predicted from them.
        self.kind: tuple | None = None
        # Of the last computed passes, the last one at the end.
        self.kept: list[_Residuals] = []

    def begin(self, step: int, sigma: float) -> None:
        """The next pass belongs to this step, counted from 0, at this noise level."""
        self.step, self.sigma = step, sigma

    def around(self, run: Run, depth: int, layout: type) -> Run:
        """How one pass calls its blocks: all of them through `run`, or the first ones. layout: orders the tokens."""
        first = first_blocks(depth)
        return run if self.threshold <= 0 or first >= depth else _Pass(self, run, first, depth, layout)

    def belongs(self, kind: tuple) -> None:
        """Forget residuals of other tokens than those of this kind."""
        if kind != self.kind:
            self.kind, self.kept = kind, []

    def expects(self, found: Tensor) -> bool:
        """Whether the first blocks' residual, `found`, is close enough to the prediction to skip the other blocks."""
        if len(self.kept) <= ORDER or self.skipped >= IN_A_ROW or not self.first <= self.step < self.last:
            return False
        found = found.float()
        expected = _weighted([kept.first for kept in self.kept], self._weights())
        return float((found - expected).abs().mean() / found.abs().mean().clamp_min(TINY)) < self.threshold

    def add(self, tokens: Tensor) -> Tensor:
        """Tokens [B, T, S, C] with the predicted residual of the later blocks."""
        weights, out = self._weights(), torch.empty_like(tokens)
        # Frame by frame: the sums are fp32.
        for t in range(tokens.shape[1]):
            out[:, t] = tokens[:, t] + _weighted([kept.others[:, t] for kept in self.kept], weights)
        self.skipped += 1
        return out

    def keep(self, first: Tensor, others: Tensor) -> None:
        """Record the residuals of a computed pass; one that is repeated at its noise level replaces the former."""
        before = [kept for kept in self.kept if kept.sigma != self.sigma]
        self.kept = [*before, _Residuals(self.sigma, first, others)][-ORDER - 1 :]
        self.skipped = 0

    def split(self, parts: int) -> list[ResidualCache]:
        """A cache for each of the parts of guidance, from one for all together."""
        found = []
        for part in range(parts):
            cache = ResidualCache(self.threshold, self.last + 1)
            cache.skipped = self.skipped
            if self.kind is not None:
                layout, (batch, *sizes), num_cond = self.kind
                cache.kind = layout, (batch // parts, *sizes), num_cond
                cache.kept = [
                    _Residuals(sigma, *(residual.chunk(parts)[part].clone() for residual in (first, others)))
                    for sigma, first, others in self.kept
                ]
            found.append(cache)
        return found

    def _weights(self) -> list[float]:
        """By which the kept residuals are multiplied so that their sum is the polynomial's value at this noise level
        (Lagrange)."""
        sigmas = [kept.sigma for kept in self.kept]
        return [
            math.prod((self.sigma - other) / (sigma - other) for other in sigmas if other != sigma) for sigma in sigmas
        ]


def _weighted(parts: list[Tensor], weights: list[float]) -> Tensor:
    """The sum of the parts, each times its weight, in fp32."""
    total = parts[0].float() * weights[0]
    for part, weight in zip(parts[1:], weights[1:], strict=True):
        total.add_(part, alpha=weight)
    return total


class _Pass:
    """One pass; what it holds is freed with it, also where it ends in an error."""

    def __init__(self, cache: ResidualCache, run: Run, first: int, depth: int, layout: type) -> None:
        self.cache, self.run, self.first, self.depth, self.layout = cache, run, first, depth, layout
        self.skips = False
        self.start: Tensor | None = None
        self.probe: Tensor | None = None
        # Tokens after the first blocks, until all blocks have run.
        self.tokens: Tensor | None = None

    def __call__(self, i: int, block: Any, x: Tensor, shared: Any) -> Tensor:
        if i >= self.first and self.skips:
            return x if i < self.depth - 1 else self.cache.add(x)
        if i == 0:
            self.cache.belongs((self.layout, tuple(x.shape), shared.groups.clean))
            self.start = _probed(x, shared)
        out = self.run(i, block, x, shared)
        if i == self.first - 1:
            assert self.start is not None, "block 0 ran"
            self.probe = _probed(out, shared) - self.start
            self.skips = self.cache.expects(self.probe)
            self.cache.ran = self.first / self.depth if self.skips else 1.0
            self.tokens = None if self.skips else out
        elif i == self.depth - 1:
            assert self.probe is not None and self.tokens is not None, "the first blocks ran"
            self.cache.keep(self.probe, out - self.tokens)
        return out


def _probed(x: Tensor, shared: Any) -> Tensor:
    """Some of the tokens [B, T, S, C] of noisy frames; clean frames hardly change from step to step."""
    return x[:, shared.groups.clean :, :: max(1, x.shape[2] // PROBED)].clone()


class ResidualCaches:
    """The caches of one sampling run, one for each evaluation of a step."""

    def __init__(self, threshold: float, steps: int, parts: int = 2) -> None:
        """parts: how many evaluations guidance combines."""
        self.threshold, self.steps, self.parts = threshold, steps, parts
        self.caches: list[ResidualCache] = []
        self._both = False

    def options(self, count: int, both: bool, step: int, sigma: float) -> list[dict[str, ResidualCache]]:
        """What each of the `count` evaluations of this step, at this noise level, is given.

        both: they are the parts of guidance, together or one after the other; otherwise the conditional part alone.
        """
        if not self.caches:
            self.caches = [ResidualCache(self.threshold, self.steps) for _ in range(count)]
        elif len(self.caches) == 1 and self._both and (count, both) != (1, True):
            self.caches = self.caches[0].split(self.parts)
        self.caches, self._both = self.caches[-count:], both
        for cache in self.caches:
            cache.begin(step, sigma)
        return [{"residuals": cache} for cache in self.caches]

    @property
    def ran(self) -> float:
        """Share of the blocks that ran in the last step."""
        return sum(cache.ran for cache in self.caches) / len(self.caches)
