"""Skip steps: where the network's output can be predicted from the last two outputs, it is not computed.

How fast the output changes is measured during sampling, from this model on this video, without coefficients from
elsewhere: between the last two computed steps, the output changed by a certain amount per change of the latents. At
that rate, each later change of the latents stands for a change of the output. These changes, relative to the output,
add up over the skipped steps; once their sum reaches the threshold, the next step is computed. (The rate of change is
EasyCache's idea, arXiv 2507.02860.)

The prediction is the last output plus half of what a line through the last two would add. Reusing the last output
alone equals a longer Euler step and is no better than taking fewer steps; the full line overshoots.
"""

from __future__ import annotations

from torch import Tensor

# Share of the steps, at the front, that are always computed: the scene is decided there. The last step is too.
WARM_UP = 0.1
# How much of the line through the last two outputs is added. Chosen between 0 and 1 on the embedded model.
SLOPE = 0.5
TINY = 1e-12


class StepCache:
    """Predicts outputs of one sampling run.

    threshold: relative change of the output that may accumulate before a step is computed; 0 computes every step.
    num_cond: number of clean conditioning frames at the front of the latents; they do not count.
    """

    def __init__(self, threshold: float, steps: int, num_cond: int = 0) -> None:
        self.threshold, self.num_cond = threshold, num_cond
        self.first, self.last = max(2, round(WARM_UP * steps)), steps - 1
        # Change of the output per change of the latents.
        self.rate: float | None = None
        self.accumulated = 0.0
        # Latents at the last computed step, and at the last step, computed or predicted.
        self.computed: Tensor | None = None
        self.before: Tensor | None = None
        # The network's last two outputs, each with its sigma.
        self.out: tuple[Tensor, float] | None = None
        self.earlier: tuple[Tensor, float] | None = None

    def find(self, step: int, latents: Tensor, sigma: float) -> Tensor | None:
        """The predicted output at this step (counted from 0), or None if the step must be computed.

        latents: [B, C, T, H, W] before the step.
        """
        if self.rate is None or self.before is None or self.out is None or self.earlier is None:
            return None
        out, at = self.out
        self.accumulated += self.rate * self._change(latents, self.before) / max(self._size(out), TINY)
        self.before = latents
        if step < self.first or step >= self.last or self.accumulated >= self.threshold:
            return None
        earlier, then = self.earlier
        return out + (out - earlier) * (SLOPE * (sigma - at) / (at - then))

    def keep(self, latents: Tensor, out: Tensor, sigma: float) -> None:
        """Record the network's output at these latents and this sigma: [B, C, T, H, W]; with guidance, both halves."""
        if self.threshold <= 0:
            return
        if self.computed is not None and self.out is not None:
            self.rate = self._change(out, self.out[0]) / max(self._change(latents, self.computed), TINY)
        self.computed = self.before = latents
        self.earlier, self.out, self.accumulated = self.out, (out, sigma), 0.0

    def keep_last(self, parts: int) -> None:
        """Go on with the last of `parts` parts of the recorded outputs, that of the prompt alone."""
        before, out, earlier = self.rate, self.out, self.earlier
        self.out, self.earlier = (pair and (pair[0].chunk(parts)[-1].clone(), pair[1]) for pair in (out, earlier))
        if before is None or out is None or earlier is None or self.out is None or self.earlier is None:
            return
        # The changes of the latents are the same for all parts.
        both, one = self._change(out[0], earlier[0]), self._change(self.out[0], self.earlier[0])
        self.rate = before * one / max(both, TINY)

    def _change(self, now: Tensor, before: Tensor) -> float:
        return self._size(now - before)

    def _size(self, values: Tensor) -> float:
        return float(values[:, :, self.num_cond :].abs().mean())
