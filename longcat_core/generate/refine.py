"""The second stage: a finished video to 720p and twice the frame rate, in five more evaluations of the network.

This follows the public pipeline. Frames are resized (bilinear, corners aligned), doubled in time (linear), encoded,
mixed half and half with noise, and denoised from timestep 500 without guidance by the network with `refinement_lora`
merged. Frames are repeated at both ends so that the latent frames fill the chunks of block-sparse attention, four
frames each; the repeated frames are cut from the result. A long video is refined in pieces, each conditioned on the
refined end of the previous one.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import LongCatError, check_path, check_type, plain_fields
from ..optimize.block_sparse import BlockSparse
from ..optimize.plan import Work
from ..sampling.buckets import nearest_bucket
from ..sampling.conditioning import TEMPORAL_FACTOR, latent_frames, latent_shape, seeded_noise, to_pixels, video_frames
from ..sampling.sampler import Step, check_finite
from ..sampling.schedules import make_schedule
from .engine import Engine
from .footage import Footage
from .inputs import check_callback, check_whole
from .options import FPS, LOSSY_CHANGES, MAX_FPS, MAX_SEED, MAX_SIDE, SIDE_MULTIPLE
from .request import Defaults, check_number, check_seed, check_side, check_text
from .segment_folder import SegmentFolder
from .segments import Segment, checksum, seed_settings
from .takes import LOSSY, Settings, lossy_settings

# Latent frames are padded to a multiple of this.
GROUP = 4
DIVISOR = 64
# Changes of shape from this factor on are mentioned in a note.
VISIBLE = 1.1

# Frames, uint8 [F, H, W, 3], or the path of a file, or the footage that was made of either.
Video = np.ndarray | str | os.PathLike[str] | Footage


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
    fps: float = FPS
    block_sparse: BlockSparse | None = None

    def __post_init__(self) -> None:
        plain_fields(self)

    @property
    def factor(self) -> int:
        """By which the frame rate is multiplied."""
        return 2 if self.doubled else 1

    def size(self, video: Video, defaults: Defaults) -> tuple[int, int]:
        """(height, width) in pixels of the refined video."""
        if self.height is not None and self.width is not None:
            return self.height, self.width
        footage = footage_of(video)
        return target_size(footage.height, footage.width, defaults.bucketed)

    def notes(self, video: Video, defaults: Defaults) -> list[str]:
        """What reading and scaling do to the video that its user may not expect."""
        footage = footage_of(video)
        asked = self.height is not None or defaults.bucketed
        note = size_note((footage.height, footage.width), self.size(footage, defaults), asked)
        return [sentence for sentence in (footage.note, note) if sentence]

    def pieces(self, video: Video) -> list[tuple[int, int]]:
        """First frame and end (exclusive) of every piece."""
        return pieces(footage_of(video).frames, self.piece, self.overlap)

    def work(self, video: Video, defaults: Defaults) -> Work:
        """The memory-relevant sizes of sampling the largest piece."""
        parts = self.pieces(video)
        given = self.factor * self.overlap if len(parts) > 1 else 0
        padding = Padding.of(self.factor * max(stop - start for start, stop in parts), given)
        shape = latent_shape(padding.total, *self.size(video, defaults))
        density = 1.0 if self.block_sparse is None else 1.0 - (self.block_sparse.sparsity or 0.0)
        return Work((1, *shape), False, padding.given_latents, density=density)

    def seed_of(self, number: int) -> int:
        return (self.seed + number) % (MAX_SEED + 1)

    def settings(self, video: Video, defaults: Defaults) -> list[Settings]:
        """Everything that decides the frames of each piece, except the model and the previous piece."""
        footage = footage_of(video)
        height, width = self.size(footage, defaults)
        lossy = lossy_settings(block_sparse=self.block_sparse)
        return [
            {
                "prompt": self.prompt,
                "height": height,
                "width": width,
                "doubled": self.doubled,
                **seed_settings(self.seed_of(number)),
                "steps": self.steps,
                "piece": self.piece,
                "overlap": self.overlap,
                "source": checksum(np.stack(frames)),
                LOSSY: lossy,
            }
            for number, frames in enumerate(footage.parts(self.pieces(footage)))
        ]

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


def enlarge(frames: Sequence[np.ndarray] | np.ndarray, height: int, width: int, count: int) -> Tensor:
    """uint8 [F, H, W, 3] -> [1, 3, count, height, width] fp32 in -1..1, bilinear in space and linear in time.

    Corners are aligned: the first and last frames and the outermost pixels keep their values. Frame by frame, because
    all frames of the given size may take more memory than the result.
    """

    @lru_cache(maxsize=2)
    def enlarged(index: int) -> Tensor:
        pixels = to_pixels(torch.from_numpy(np.ascontiguousarray(frames[index])[None]))[0].transpose(0, 1)
        return F.interpolate(pixels, size=(height, width), mode="bilinear", align_corners=True)[0]

    video = torch.empty((count, 3, height, width), memory_format=torch.channels_last)
    places = torch.linspace(0, len(frames) - 1, count, dtype=torch.float64)
    below = places.floor().long().clamp(max=max(0, len(frames) - 2))
    for number, index in enumerate(below.tolist()):
        share = (places[number] - index).float()
        above = enlarged(min(index + 1, len(frames) - 1)) if share else enlarged(index)
        video[number] = torch.lerp(enlarged(index), above, share)
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
    """(height, width) in pixels that a video of this size is refined to: twice the size, or the 720p size nearest in
    shape if `bucketed`.

    Twice the size is less for sides beyond MAX_SIDE, and each side becomes the nearest multiple of SIDE_MULTIPLE.
    """
    if bucketed:
        return nearest_bucket(height, width, "720p", DIVISOR)
    factor = min(2.0, MAX_SIDE / max(height, width))
    tall, wide = (max(1, math.floor(factor * side / SIDE_MULTIPLE + 0.5)) for side in (height, width))
    return SIDE_MULTIPLE * tall, SIDE_MULTIPLE * wide


def size_note(given: tuple[int, int], refined: tuple[int, int], asked: bool) -> str:
    """A sentence on a video of (height, width) pixels whose shape changes visibly, or that is not refined to twice its
    size although no other size was asked for; "" for any other video."""
    change = refined[0] / refined[1] * given[1] / given[0]
    words = " is scaled to ".join(f"{height}x{width}" for height, width in (given, refined))
    if not 1 / VISIBLE < change < VISIBLE:
        percent = 100 * (max(change, 1 / change) - 1)
        return f"the video of {words}, which changes its shape by {percent:.0f} %; crop it or give another size"
    if not asked and refined != (2 * given[0], 2 * given[1]):
        return f"the video of {words}, because the model takes multiples of {SIDE_MULTIPLE} up to {MAX_SIDE}"
    return ""


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


def footage_of(video: Video) -> Footage:
    """The frames to refine. Raises LongCatError for what `Footage.of` does not take."""
    return Footage.of(video, "the video to refine")


def refine(
    engine: Engine,
    video: Video,
    request: RefineRequest,
    callback: Callable[[int, int, Step], None] | None = None,
) -> Iterator[np.ndarray]:
    """Yield the refined frames of `video` piece by piece: uint8 [f, height, width, 3].

    video: uint8 [F, H, W, 3], or a file, of which one piece is held at a time. callback: called after each step with
    the piece's number, the number of pieces, and the step. On one machine with one number of threads
    the same request gives the same frames bit for bit. Raises LongCatError for input that does not fit.
    """
    check_type("the engine", engine, Engine, "a Pipeline")
    check_type("the request", request, RefineRequest, "a RefineRequest")
    check_callback(callback)
    request.check()
    footage = footage_of(video)
    parts, size = request.pieces(footage), request.size(footage, engine.defaults)
    before: np.ndarray | None = None
    for number, frames in enumerate(footage.parts(parts)):
        piece = refine_piece(engine, frames, request, size, number, len(parts), before, callback)
        before = piece.frames
        yield before[piece.skip :]


def refine_piece(
    engine: Engine,
    frames: list[np.ndarray],
    request: RefineRequest,
    size: tuple[int, int],
    number: int,
    of: int,
    before: np.ndarray | None,
    callback: Callable[[int, int, Step], None] | None = None,
) -> Piece:
    """Refine one piece of a checked request to `size`, height and width.

    frames: the piece's own, each uint8 [H, W, 3]; emptied. before: the previous piece's refined frames, None for the
    first.
    """
    count = request.factor * len(frames)
    given = request.factor * request.overlap if number else 0
    padding = Padding.of(count, given)
    pixels = padding.pad(enlarge(frames, *size, count))
    # Not needed while the network runs.
    frames.clear()
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
        callback=None if callback is None else lambda step: callback(number, of, step),
    )
    check_finite(latents)
    refined = engine.decode(latents)[padding.front : padding.front + count]
    return Piece(number, of, refined, given, latents.cpu())


def refine_in_folder(
    load: Callable[[], Engine],
    defaults: Defaults,
    video: Video,
    request: RefineRequest,
    folder: SegmentFolder,
    model: Settings,
    callback: Callable[[int, int, Step], None] | None = None,
    lossy: dict[str, str] | None = None,
) -> Iterator[tuple[int, int, bool]]:
    """Like `refine`, but keep finished pieces in a folder of `piece_folder` and reuse those whose source is unchanged.

    load: called before the first piece that has to be made. model, lossy: about the model, as for `LongVideoRequest`.
    Yields the piece's number, its leading frames that the previous piece has too, and whether it was reused.
    """
    request.check()
    footage = footage_of(video)
    parts, factor = request.pieces(footage), request.factor
    height, width = request.size(footage, defaults)
    room = [4 * factor * (stop - start) * height * width for start, stop in parts]
    # Before all frames are read for the settings.
    folder.check_place(sum(room) // 2)
    settings = [piece | model | {LOSSY: piece[LOSSY] | (lossy or {})} for piece in request.settings(footage, defaults)]
    engine, given = cache(load), enumerate(footage.parts(parts))

    def after(number: int, of: int, step: Step) -> None:
        # What cannot be kept is not computed to its end.
        folder.take.check_there()
        if callback is not None:
            callback(number, of, step)

    def make(number: int, before: Segment | None) -> tuple[np.ndarray, Tensor, Settings]:
        frames = next(frames for part, frames in given if part == number)
        known = None if before is None else before.frames
        piece = refine_piece(engine(), frames, request, (height, width), number, len(parts), known, after)
        return piece.frames, piece.latents, {}

    for number, _, reused in folder.fill(settings, make, fps=factor * request.fps, room=room):
        yield number, factor * request.overlap if number else 0, reused


def piece_folder(
    path: Any, lossy_change: str = LOSSY_CHANGES[0], say: Callable[[str], None] | None = None
) -> SegmentFolder:
    """The folder of a video's refined pieces. Another first piece begins a new take in it; see `SegmentFolder`."""
    check_path("the folder of pieces", path)
    return SegmentFolder(path, lossy_change=lossy_change, say=say)
