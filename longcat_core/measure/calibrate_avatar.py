"""What a calibration of an avatar samples: a first segment of each prompt, and the one that continues it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from torch import Tensor

from ..generate.audio import Embeddings
from ..generate.avatar import AvatarRequest, make_segment
from ..generate.pipeline import Pipeline
from ..generate.segments import Segment
from ..sampling.sampler import Step
from .calibrate import Measured, PipelineSubject, Recipe, Stepped, Videos, check_calibration

# Sampled where no prompt is given.
SPEAKING = (
    "A woman in a red coat speaks to the camera in a quiet street at dusk, lanterns glow behind her",
    "A man with gray hair sits at a desk and explains something to the camera, daylight falls through a window",
)
# A second segment sees a reference frame and conditioning frames, as all later ones do.
SEGMENTS = 2


def shortened(request: AvatarRequest) -> AvatarRequest:
    """A filled request with no more segments than a calibration samples."""
    prompts = request.prompts[:SEGMENTS]
    return replace(request, prompts=prompts, segments=len(prompts))


def segments_of(requests: Sequence[AvatarRequest]) -> list[tuple[AvatarRequest, int]]:
    """What is sampled, in this order: each filled request with the number of a segment."""
    return [(request, number) for request in requests for number in range(request.count)]


def videos_of(requests: Sequence[AvatarRequest]) -> Videos:
    """The segments of filled requests, which differ only in their prompts."""
    found = Videos.of([request.filled_first for request, _ in segments_of(requests)])
    return replace(found, prompts=tuple(request.prompts[0] for request in requests))


def check_segments(requests: Sequence[AvatarRequest], recipe: Recipe, patch: Sequence[int]) -> Measured:
    """`check_calibration` of filled requests, whose second segment has fewer frames of noise."""
    videos = videos_of(requests)
    measured, _ = check_calibration(videos, recipe, patch)
    if requests[0].count > 1:
        check_calibration(replace(videos, given=requests[0].overlap), recipe, patch)
    return measured


class AvatarSubject(PipelineSubject):
    """A loaded avatar, which samples a segment for each video."""

    def __init__(self, pipeline: Pipeline, requests: Sequence[AvatarRequest], embeddings: Embeddings) -> None:
        """embeddings: what the network hears, from `AvatarRequest.embed`."""
        self.segments, self.embeddings = segments_of(requests), embeddings
        super().__init__(pipeline, [request.filled_first for request, _ in self.segments])
        # The latest first segment.
        self.before: tuple[np.ndarray, Tensor] | None = None

    def video(self, number: int, stepped: Stepped) -> np.ndarray:
        request, segment = self.segments[number]
        # A request decides for itself, in place of the network.
        first = replace(request.filled_first, sparse=self.network.sparse)
        before, reference = None, None
        if segment and self.before is not None:
            frames, latents = self.before
            before, reference = Segment(frames, latents, ""), latents[:, :, :1]

        def after(step: Step) -> None:
            stepped(step.index, step.total)

        request = replace(request, first=first)
        frames, latents = make_segment(self.pipeline, request, segment, self.embeddings, before, reference, after)
        if not segment:
            self.before = frames, latents
        return frames
