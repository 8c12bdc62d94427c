"""The second stage: a finished video to 720p and twice the frame rate, in five more evaluations of the network.

This follows the public pipeline. Frames are resized (bilinear, corners aligned), doubled in time (linear), encoded,
mixed half and half with noise, and denoised from timestep 500 without guidance by the network with `refinement_lora`
merged. Frames are repeated at both ends so that the latent frames fill the chunks of block-sparse attention, four
frames each; the repeated frames are cut from the result. A long video is refined in pieces, each conditioned on the
refined end of the previous one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import LongCatError, check_type, plain_fields
from ..optimize.block_sparse import BlockSparse
from ..optimize.plan import Work
from ..sampling.buckets import nearest_bucket
from ..sampling.conditioning import TEMPORAL_FACTOR, latent_frames, latent_shape, seeded_noise, to_pixels, video_frames
from ..sampling.sampler import Step
from ..sampling.schedules import make_schedule
from .engine import Engine, check_finite
from .inputs import check_callback, check_path, check_whole
from .options import MAX_FPS, MAX_SEED
from .request import Defaults, check_number, check_seed, check_side, check_text
from .segments import Segment, SegmentFolder, Settings, checksum

# Latent frames are padded to a multiple of this.
GROUP = 4
DIVISOR = 64


@dataclass(frozen=True)
class RefineRequest:
    """How to refine a video.

    prompt: the video's own, or "", as the released model refines long videos. doubled: double the frame rate too.
    height, width: pixels, multiples of 16; None: the 720p size nearest in shape, or twice the size for models that are
    not trained for 720p. steps: of the base schedule, of which the part below timestep 500 runs. piece: frames of the
    given video refined at a time. overlap: how many frames the next piece is conditioned on. fps: of the given video.
    block_sparse: settings of block-sparse attention, with which the released model refines; None: full attention.
    """

    prompt: str = ""
    seed: int = 0
    doubled: bool = True
    height: int | None = None
    width: int | None = None
    steps: int = 50
    piece: int = 93
    overlap: int = 13
    fps: float = 15
    block_sparse: BlockSparse | None = None

    def __post_init__(self) -> None:
        plain_fields(self)

    def size(self, video: np.ndarray, defaults: Defaults) -> tuple[int, int]:
        """(height, width) in pixels of the refined video."""
        if self.height is not None and self.width is not None:
            return self.height, self.width
        _, height, width, _ = video.shape
        return target_size(height, width, defaults.bucketed)

    def work(self, video: np.ndarray, defaults: Defaults) -> Work:
        """The memory-relevant sizes of sampling the largest piece."""
        parts, factor = pieces(len(video), self.piece, self.overlap), 2 if self.doubled else 1
        given = factor * self.overlap if len(parts) > 1 else 0
        padding = Padding.of(factor * max(stop - start for start, stop in parts), given)
        shape = latent_shape(padding.total, *self.size(video, defaults))
        return Work((1, *shape), False, padding.given_latents)

    def seed_of(self, number: int) -> int:
        return (self.seed + number) % (MAX_SEED + 1)

    def settings(self, video: np.ndarray, number: int, defaults: Defaults) -> Settings:
        """Everything that decides a piece's frames, except the model and the previous piece."""
        start, stop = pieces(len(video), self.piece, self.overlap)[number]
        height, width = self.size(video, defaults)
        return {
            "prompt": self.prompt,
            "height": height,
            "width": width,
            "doubled": self.doubled,
            "seed": self.seed_of(number),
            "steps": self.steps,
            "piece": self.piece,
            "overlap": self.overlap,
            "block_sparse": None if self.block_sparse is None else asdict(self.block_sparse),
            "source": checksum(video[start:stop]),
        }

    def check(self) -> None:
        """Raise LongCatError for values that do not fit any video."""
        check_text("prompt", self.prompt)
        for name, value in (("steps", self.steps), ("piece", self.piece), ("overlap", self.overlap)):
            check_whole(name, value)
        check_type("doubled", self.doubled, bool, "True or False")
        if self.block_sparse is not None:
            check_type("block_sparse", self.block_sparse, BlockSparse, "a BlockSparse or None")
        make_schedule("refine", self.steps)
        check_number("fps", self.fps, 1.0, MAX_FPS)
        check_seed(self.seed)
        for name, side in (("height", self.height), ("width", self.width)):
            if side is not None:
                check_side(name, side)
        if (self.height is None) != (self.width is None):
            raise LongCatError("only one of height and width is given; give both or neither")
        if self.overlap < 1 or self.piece <= self.overlap:
            raise LongCatError(
                f"pieces of {self.piece} frames that share {self.overlap} leave nothing new; give an overlap of at "
                "least 1 and longer pieces"
            )


@dataclass(frozen=True)
class Padding:
    """How many frames are repeated before and after `frames`, of which the first `given` are refined already."""

    front: int
    back: int
    given: int
    frames: int

    @classmethod
    def of(cls, frames: int, given: int = 0) -> Padding:
        """The padding of a piece of `frames` frames."""
        known = _whole_groups(1 + math.ceil((given - 1) / TEMPORAL_FACTOR)) if given else 0
        front = video_frames(known) - given if given else 0
        # The first latent stands for one frame; with given frames it belongs to them.
        single = 0 if given else 1
        noisy = single + math.ceil((frames - given - single) / TEMPORAL_FACTOR)
        back = video_frames(known + _whole_groups(noisy)) - front - frames
        return cls(front, back, given, frames)

    @property
    def known(self) -> Padding:
        """The padding of the given frames alone."""
        return Padding(self.front, 0, self.given, self.given)

    @property
    def total(self) -> int:
        return self.front + self.frames + self.back

    @property
    def given_latents(self) -> int:
        return latent_frames(self.front + self.given) if self.given else 0

    def pad(self, video: Tensor) -> Tensor:
        """[1, 3, frames, H, W] to [1, 3, total, H, W]."""
        first, last = video[:, :, :1], video[:, :, -1:]
        ends = first.expand(-1, -1, self.front, -1, -1), last.expand(-1, -1, self.back, -1, -1)
        return torch.cat((ends[0], video, ends[1]), dim=2)


def _whole_groups(latents: int) -> int:
    return math.ceil(latents / GROUP) * GROUP


def enlarge(frames: np.ndarray, height: int, width: int, count: int) -> Tensor:
    """uint8 [F, H, W, 3] -> [1, 3, count, height, width] fp32 in -1..1, bilinear in space and linear in time.

    Corners are aligned: the first and last frames and the outermost pixels keep their values.
    """
    video = to_pixels(torch.from_numpy(np.ascontiguousarray(frames)))[0].transpose(0, 1)
    video = F.interpolate(video, size=(height, width), mode="bilinear", align_corners=True)
    if count != len(frames):
        places = torch.linspace(0, len(frames) - 1, count, dtype=torch.float64)
        below = places.floor().long().clamp(max=max(0, len(frames) - 2))
        share = (places - below).float().view(-1, 1, 1, 1)
        above = (below + 1).clamp(max=len(frames) - 1)
        video = torch.lerp(video[below], video[above], share)
    return video.transpose(0, 1)[None]


def pieces(frames: int, piece: int, overlap: int) -> list[tuple[int, int]]:
    """First frame and end (exclusive) of every piece; each piece but the first starts `overlap` frames earlier."""
    found, start = [], 0
    while True:
        found.append((start, min(start + piece, frames)))
        if found[-1][1] == frames:
            return found
        start += piece - overlap


def target_size(height: int, width: int, bucketed: bool) -> tuple[int, int]:
    """(height, width) in pixels that a video of this size is refined to."""
    if bucketed:
        return nearest_bucket(height, width, "720p", DIVISOR)
    return 2 * height, 2 * width


@dataclass(frozen=True)
class Piece:
    """One refined piece.

    number: from 0. frames: uint8 [f, height, width, 3]. skip: leading frames that the previous piece has too. latents:
    [1, C, T, h, w] fp32, with the padding at both ends.
    """

    number: int
    of: int
    frames: np.ndarray
    skip: int
    latents: Tensor


def check_video(video: np.ndarray) -> None:
    """Raise LongCatError unless `video` is uint8 [F, H, W, 3]."""
    check_type("the video to refine", video, np.ndarray, "uint8 frames [F, H, W, 3]")
    if video.ndim != 4 or video.shape[3] != 3 or video.dtype != np.uint8 or not video.size:
        raise LongCatError(f"the video to refine is {video.dtype} {list(video.shape)}; give uint8 frames [F, H, W, 3]")


def refine(
    engine: Engine,
    video: np.ndarray,
    request: RefineRequest,
    callback: Callable[[int, int, Step], None] | None = None,
) -> Iterator[np.ndarray]:
    """Yield the refined frames of `video`, uint8 [F, H, W, 3], piece by piece: uint8 [f, height, width, 3].

    callback: called after each step with the piece's number, the number of pieces, and the step. On one machine the
    same request gives the same frames bit for bit. Raises LongCatError for input that does not fit.
    """
    check_type("the engine", engine, Engine, "a Pipeline")
    check_type("the request", request, RefineRequest, "a RefineRequest")
    check_callback(callback)
    request.check()
    check_video(video)
    before: np.ndarray | None = None
    for number in range(len(pieces(len(video), request.piece, request.overlap))):
        piece = refine_piece(engine, video, request, number, before, callback)
        before = piece.frames
        yield before[piece.skip :]


def refine_piece(
    engine: Engine,
    video: np.ndarray,
    request: RefineRequest,
    number: int,
    before: np.ndarray | None,
    callback: Callable[[int, int, Step], None] | None = None,
) -> Piece:
    """Refine one piece of a checked request. before: the previous piece's refined frames, None for the first."""
    parts = pieces(len(video), request.piece, request.overlap)
    start, stop = parts[number]
    size = request.size(video, engine.defaults)
    factor = 2 if request.doubled else 1
    count = factor * (stop - start)
    given = factor * request.overlap if number else 0
    padding = Padding.of(count, given)
    pixels = padding.pad(enlarge(video[start:stop], *size, count))
    clean = engine.encode(pixels)
    del pixels
    noise = seeded_noise(tuple(clean.shape), request.seed_of(number))
    known = None
    if given and before is not None:
        last = to_pixels(torch.from_numpy(before[-given:].copy()))
        known = engine.encode(padding.known.pad(last))
    latents = engine.denoise(
        noise,
        make_schedule("refine", request.steps),
        request.prompt,
        clean=clean,
        cond_latents=known,
        block_sparse=request.block_sparse,
        callback=None if callback is None else lambda step: callback(number, len(parts), step),
    )
    check_finite(latents)
    frames = engine.decode(latents)[padding.front : padding.front + count]
    return Piece(number, len(parts), frames, given, latents.cpu())


def refine_in_folder(
    load: Callable[[], Engine],
    defaults: Defaults,
    video: np.ndarray,
    request: RefineRequest,
    folder: SegmentFolder,
    model: Settings,
    callback: Callable[[int, int, Step], None] | None = None,
) -> Iterator[tuple[int, int, bool]]:
    """Like `refine`, but keep finished pieces in a folder of `piece_folder` and reuse those whose source is unchanged.

    load: called before the first piece that has to be made. model: JSON values about the model that decide the result
    too. Yields the piece's number, its leading frames that the previous piece has too, and whether it was reused.
    """
    request.check()
    check_video(video)
    parts = pieces(len(video), request.piece, request.overlap)
    settings = [request.settings(video, number, defaults) | model for number in range(len(parts))]
    factor = 2 if request.doubled else 1
    height, width = request.size(video, defaults)
    engine = cache(load)

    def make(number: int, before: Segment | None) -> tuple[np.ndarray, Tensor, Settings]:
        known = None if before is None else before.frames
        piece = refine_piece(engine(), video, request, number, known, callback)
        return piece.frames, piece.latents, {}

    room = [4 * factor * (stop - start) * height * width for start, stop in parts]
    for number, _, reused in folder.fill(settings, make, fps=factor * request.fps, room=room):
        yield number, factor * request.overlap if number else 0, reused


def piece_folder(path: Any) -> SegmentFolder:
    """The folder of a video's refined pieces; other source frames regenerate a piece."""
    check_path("the folder of pieces", path)
    return SegmentFolder(path, changing=("source",))
