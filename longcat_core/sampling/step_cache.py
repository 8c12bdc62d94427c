"""Steps that are not computed: where the network's output can be foretold from the last two, it is.

How much its output changes is learnt as the sampling goes, from this model on this video, with no coefficients from
elsewhere: between the last two computed steps, the output changed by so much for so much change of the latents. At
that rate, what the latents have changed since is a change of the output; it is added up over the steps that are not
computed, relative to the output itself, and once it reaches the threshold the next step is computed. (The rate of
change is EasyCache's idea, arXiv 2507.02860.)

What stands in for an output is the last one and half of what a line through the last two adds. To take the last one as
it is would be the same as a longer Euler step, and no better than fewer steps; the whole line overshoots.
"""

from __future__ import annotations

from torch import Tensor

# Share of the steps, at the front, that are always computed: the scene is decided there. The last one is as well.
WARM_UP = 0.1
# Of the line through the last two outputs. Measured on the embedded model, between 0 and 1.
SLOPE = 0.5
TINY = 1e-12


class StepCache:
    """Of one sampling. threshold: relative change of the output that may add up, 0 computes every step; given: so many
    latent frames at the front are given ones, which do not count.
    """

    def __init__(self, threshold: float, steps: int, given: int = 0) -> None:
        self.threshold, self.given = threshold, given
        self.first, self.last = max(2, round(WARM_UP * steps)), steps - 1
        # Change of the output for a change of the latents.
        self.rate: float | None = None
        self.added = 0.0
        # Latents at the last computed step, and at the last step whatever.
        self.kept: Tensor | None = None
        self.before: Tensor | None = None
        # What the network returned at the last step computed and the one before, with their sigmas.
        self.out: tuple[Tensor, float] | None = None
        self.earlier: tuple[Tensor, float] | None = None

    def find(self, step: int, latents: Tensor, sigma: float) -> Tensor | None:
        """What stands in for the output at this step (counted from 0), or None if it is to be computed.

        latents: [B, C, T, H, W] before the step.
        """
        if self.rate is None:
            return None
        out, at = self.out
        self.added += self.rate * self._change(latents, self.before) / max(self._size(out), TINY)
        self.before = latents
        if step < self.first or step >= self.last or self.added >= self.threshold:
            return None
        earlier, then = self.earlier
        return out + (out - earlier) * (SLOPE * (sigma - at) / (at - then))

    def keep(self, latents: Tensor, out: Tensor, sigma: float) -> None:
        """What the network returned for these latents, at this sigma: [B, C, T, H, W], with guidance both halves."""
        if self.threshold <= 0:
            return
        if self.kept is not None:
            self.rate = self._change(out, self.out[0]) / max(self._change(latents, self.kept), TINY)
        self.kept = self.before = latents
        self.earlier, self.out, self.added = self.out, (out, sigma), 0.0

    def _change(self, now: Tensor, before: Tensor) -> float:
        return self._size(now - before)

    def _size(self, values: Tensor) -> float:
        return float(values[:, :, self.given :].abs().mean())
