"""What a row's video is worth: right, wrong, or refused with a sentence that was expected."""

from __future__ import annotations

import math
from dataclasses import dataclass
from unittest.mock import patch

import numpy as np

from longcat_core.measure.fidelity import PEAK
from longcat_core.nano import scorer
from longcat_core.nano.scorer import Score
from longcat_core.nano.world import Actor, Scene

from ..comfyui.prompts import FPS
from .fleet import Seen
from .jobs import Job

RIGHT, WRONG, REFUSED = "right", "wrong", "refused"
SHOWN = Scene("gray", (Actor("circle", "red", "right"),))
# The shape is left out: nano rounds corners (docs/nano.md).
SCORED = ("background", "0.color", "0.motion")
# A picture of one color is the sign of a network that gave zeros or NaN.
LEAST_SPREAD = 5.0


@dataclass(frozen=True)
class Verdict:
    """verdict: RIGHT, WRONG or REFUSED. said: what was seen, or the sentence. psnr in dB, against the row's limit."""

    verdict: str
    said: str = ""
    psnr: float | None = None


def psnr(video: np.ndarray, reference: np.ndarray) -> float:
    """PSNR in dB of uint8 videos of one shape, over all frames; infinite for equal ones."""
    error = np.square(video.astype(np.float64) - reference).mean()
    return math.inf if error == 0 else 10 * math.log10(PEAK**2 / error)


def one_color(video: np.ndarray) -> bool:
    return bool(video.std() < LEAST_SPREAD)


def clear(reference: np.ndarray) -> Score:
    """What the CPU's video shows clearly: the scorer finds it with half of the scatter that it allows a track. Rounding
    decides of a track near the limit, as block-sparse attention leaves it (3.4 pixels of 4; others 0.4)."""
    with patch.object(scorer, "MAX_SCATTER", scorer.MAX_SCATTER / 2):
        return scorer.score(reference, SHOWN, FPS)


def judge(job: Job, seen: Seen, reference: Seen) -> Verdict:
    """Compare what a row gave with the CPU's video of the same prompt."""
    if seen.status != "success":
        # A server that ended is never what was expected.
        if seen.status in ("error", "refused") and job.refusal and job.refusal in seen.said:
            return Verdict(REFUSED, seen.said)
        at = f" at node {seen.node}" if seen.node else ""
        return Verdict(WRONG, f"{seen.status}{at}: {seen.said}")
    if job.refusal:
        return Verdict(WRONG, f"ran, where a refusal with '{job.refusal}' was expected")
    if reference.status != "success":
        return Verdict(WRONG, f"the CPU's own run ended with {reference.status}: {reference.said}")
    video, wanted = seen.frames, reference.frames
    if video is None or wanted is None:
        return Verdict(WRONG, "gave no video")
    if video.shape != wanted.shape:
        return Verdict(WRONG, f"a video of {list(video.shape)}; the CPU's has {list(wanted.shape)}")
    if one_color(wanted):
        return Verdict(WRONG, "the CPU's own video has one color, so that the row shows nothing")
    if one_color(video):
        return Verdict(WRONG, "a video of one color")
    found = psnr(video, wanted)
    if found < job.limit:
        return Verdict(WRONG, f"{found:.1f} dB from the CPU's video, {job.limit:g} are the least", found)
    if job.scored:
        right, expected = scorer.score(video, SHOWN, FPS), clear(wanted)
        if lost := [name for name in SCORED if expected[name] and not right[name]]:
            return Verdict(WRONG, f"the scorer does not find {', '.join(lost)}, which the CPU's video has", found)
    return Verdict(RIGHT, "", found)
