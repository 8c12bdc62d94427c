"""What a cell's video is worth: right, wrong, or refused with a sentence that was expected."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from longcat_core.measure.fidelity import PEAK
from longcat_core.nano.scorer import score
from longcat_core.nano.world import Actor, Scene

from .cells import T2V, Cell
from .fleet import Seen
from .graphs import FPS
from .limits import limit, refusal

RIGHT, WRONG, REFUSED, SKIPPED = "right", "wrong", "refused", "skipped"
SHOWN = Scene("gray", (Actor("circle", "red", "right"),))
# The shape is left out: nano rounds corners (docs/nano.md).
SCORED = ("background", "0.color", "0.motion")


@dataclass(frozen=True)
class Verdict:
    """verdict: RIGHT, WRONG, REFUSED or SKIPPED. said: what was seen, or the sentence. psnr in dB, against limit."""

    verdict: str
    said: str = ""
    psnr: float | None = None
    limit: float | None = None


def psnr(video: np.ndarray, reference: np.ndarray) -> float:
    """PSNR in dB of uint8 videos of one shape, over all frames; infinite for equal ones."""
    error = np.square(video.astype(np.float64) - reference).mean()
    return math.inf if error == 0 else 10 * math.log10(PEAK**2 / error)


def judge(cell: Cell, seen: Seen, reference: Seen) -> Verdict:
    """Compare what a cell gave with the CPU's video of the same prompt."""
    if seen.status != "success":
        expected = refusal(cell)
        if seen.status in ("error", "refused") and expected and expected in seen.said:
            return Verdict(REFUSED, seen.said)
        at = f" at node {seen.node}" if seen.node else ""
        return Verdict(WRONG, f"{seen.status}{at}: {seen.said}")
    if refusal(cell):
        return Verdict(WRONG, f"ran, where a refusal with '{refusal(cell)}' was expected")
    if reference.status != "success":
        return Verdict(WRONG, f"the CPU's own run ended with {reference.status}: {reference.said}")
    video, wanted = seen.frames, reference.frames
    if video.shape != wanted.shape:
        return Verdict(WRONG, f"a video of {list(video.shape)}; the CPU's has {list(wanted.shape)}")
    least, found = limit(cell), psnr(video, wanted)
    if found < least:
        return Verdict(WRONG, f"{found:.1f} dB from the CPU's video, {least:g} are the least", found, least)
    if cell.task == T2V:
        right, expected = score(video, SHOWN, FPS), score(wanted, SHOWN, FPS)
        lost = [name for name in SCORED if expected[name] and not right[name]]
        if lost:
            return Verdict(
                WRONG, f"the scorer does not find {', '.join(lost)}, which the CPU's video has", found, least
            )
    return Verdict(RIGHT, "", found, least)
