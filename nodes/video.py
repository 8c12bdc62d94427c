"""VIDEO and IMAGE whose frames lie in the segments of a folder and are read when somebody asks for them.

A long video is never held whole: Save Video gets one frame after another, and an IMAGE is built only where a node
computes with all of its frames. What ComfyUI keeps in its cache is the list of files, so that it does not matter
whether an output was connected when the node ran.
"""

from __future__ import annotations

import logging
import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from fractions import Fraction
from io import BytesIO
from itertools import accumulate, islice
from typing import Any

import numpy as np
import psutil
import torch
from comfy_api.latest import Input, InputImpl, Types
from torch import Tensor
from torch.utils._pytree import tree_map

from ..longcat_core.errors import LongCatError
from ..longcat_core.files.media import Sound, read_sound
from ..longcat_core.files.media.timing import even_picks
from ..longcat_core.files.places import bytes_in_words
from ..longcat_core.generate.footage import Footage
from ..longcat_core.generate.request import check_number
from .images import check_images, to_bytes, to_image
from .sounds import audio_of, part_of, sound_of

# Bytes of a pixel of an IMAGE.
PIXEL_BYTES = 3 * 4
# Nodes that take the frames of an IMAGE one after another.
FRAME_BY_FRAME = ("CreateVideo", "PreviewImage", "SaveImage", "SaveWEBM", "LongCatRefineLongVideo", "LongCatLongVideo",
                  "LongCatVideoContinuation")  # fmt: skip
# What a tensor says of itself without its values.
_SHAPE = {
    *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "layout", "requires_grad",
      "is_cuda", "is_sparse", "is_quantized", "is_meta", "is_mps", "nbytes", "itemsize") if hasattr(Tensor, name)),
    *(getattr(Tensor, name) for name in ("size", "dim", "ndimension", "numel", "nelement", "element_size", "__len__",
      "is_floating_point", "is_complex", "is_inference", "get_device", "__hash__", "is_contiguous")),
    torch.is_floating_point, torch.is_complex, torch.numel,
}  # fmt: skip


class Reel:
    """Frames `start` to `stop` (exclusive) of several footages of one size, one after the other."""

    def __init__(self, parts: Sequence[Footage], start: int = 0, stop: int | None = None) -> None:
        self.parts = tuple(parts)
        self.height, self.width = self.parts[0].height, self.parts[0].width
        self._ends = list(accumulate(part.frames for part in self.parts))
        self.start, self.stop = start, self._ends[-1] if stop is None else stop

    def __len__(self) -> int:
        return self.stop - self.start

    def cut(self, start: int, stop: int) -> Reel:
        """Frames start to stop of these."""
        return Reel(self.parts, self.start + start, self.start + stop)

    def read(self) -> Iterator[np.ndarray]:
        """Each frame, uint8 [H, W, 3]; parts in front of the first one are not opened."""
        number = bisect_right(self._ends, self.start)
        left, skip = len(self), self.start - (self._ends[number - 1] if number else 0)
        for part in self.parts[number:]:
            if left <= 0:
                return
            for frame in islice(part.read(), skip, min(part.frames, skip + left)):
                left -= 1
                yield frame
            skip = 0

    def footage(self, fps: float) -> Footage:
        return Footage(len(self), self.height, self.width, self.read, fps)


class ReelImages(Tensor):
    """An IMAGE [F, H, W, 3], fp32 in 0..1, of a reel. Iterating and slicing along F reads the frames in question;
    anything else that needs values reads all of them, once."""

    reel: Reel
    whole: Tensor | None
    _next: tuple[int, Iterator[np.ndarray]]

    @staticmethod
    def __new__(cls, reel: Reel) -> ReelImages:
        # One number in memory: foreign code that asks for an address finds it rather than nothing.
        blank = torch.full((1, 1, 1, 1), float("nan")).expand(len(reel), reel.height, reel.width, 3)
        return Tensor._make_subclass(cls, blank)

    def __init__(self, reel: Reel) -> None:
        self.reel, self.whole = reel, None
        self._next = 0, iter(())

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if function in _SHAPE:
                return function(*args, **kwargs or {})
            args, kwargs = tree_map(_read, (tuple(args), kwargs or {}))
            return function(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map(_read, (tuple(args), kwargs or {}))
        return function(*args, **kwargs)

    def dense(self) -> Tensor:
        """All frames as a plain tensor, which stays in memory."""
        if self.whole is None:
            images = torch.empty((len(self.reel), self.reel.height, self.reel.width, 3))
            for number, frame in enumerate(self.reel.read()):
                images[number] = to_image(frame)
            self.whole = images
        return self.whole

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.whole) if self.whole is not None else map(to_image, self.reel.read())

    def __getitem__(self, index: Any) -> Tensor:
        first, rest = (index[0], index[1:]) if isinstance(index, tuple) and index else (index, ())
        images: Tensor | None = None
        if self.whole is None and isinstance(first, slice) and first.step in (None, 1):
            start, stop, _ = first.indices(len(self.reel))
            if (start, stop) != (0, len(self.reel)) and start < stop:
                images = ReelImages(self.reel.cut(start, stop))
                return images[(slice(None), *rest)] if rest else images
        elif self.whole is None and isinstance(first, int) and not isinstance(first, bool):
            if not -len(self.reel) <= first < len(self.reel):
                raise IndexError(f"index {first} is out of bounds for {len(self.reel)} frames")
            images = self._frame(first % len(self.reel))
            return images[rest] if rest else images
        return self.dense()[index]

    def _frame(self, number: int) -> Tensor:
        """One frame. Whoever asks for one after the other does not read a file from its start each time."""
        position, frames = self._next
        if not 0 < position <= number:
            position, frames = number, self.reel.cut(number, len(self.reel)).read()
        frame = next(islice(frames, number - position, None))
        self._next = number + 1, frames
        return to_image(frame)

    def __repr__(self) -> str:
        # ComfyUI prints the inputs of a node that fails.
        return f"ReelImages({list(self.shape)}, {'in memory' if self.whole is not None else 'not read yet'})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.dense().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: Any) -> Tensor:
        return self.dense().clone()


def _read(value: Any) -> Any:
    return value.dense() if isinstance(value, ReelImages) else value


class ReelVideo(InputImpl.VideoFromComponents):
    """A VIDEO of a reel. ComfyUI's own code saves it, and takes frame after frame for that. sound: from its start."""

    def __init__(self, reel: Reel, fps: float, sound: Sound | None = None) -> None:
        self.reel, self.fps, self.sound = reel, fps, sound
        rate, audio = Fraction(fps).limit_denominator(1001), None if sound is None else audio_of(sound)
        super().__init__(Types.VideoComponents(images=ReelImages(reel), frame_rate=rate, audio=audio))

    def as_trimmed(
        self, start_time: float | None = None, duration: float | None = None, strict_duration: bool = True
    ) -> ReelVideo | None:
        """The frames that begin within `duration` seconds from `start_time` on; 0: to the end, below 0: from the end.

        None if no frame does, or with strict_duration fewer than asked for.
        """
        total = len(self.reel) / self.fps
        begin = start_time or 0.0
        begin = max(0.0, total + begin) if begin < 0 else begin
        first, last = self._from(begin), self._from(begin + duration) if duration else len(self.reel)
        short = duration and strict_duration and begin + duration > total + 0.5 / self.fps
        if short or first >= min(last, len(self.reel)):
            return None
        last = min(last, len(self.reel))
        sound = self.sound and part_of(self.sound, first / self.fps, (last - first) / self.fps)
        return ReelVideo(self.reel.cut(first, last), self.fps, sound)

    def _from(self, seconds: float) -> int:
        """The first frame that begins at this time or later."""
        return math.ceil(seconds * self.fps - 1e-6)

    def get_stream_source(self) -> BytesIO:
        # ComfyUI 0.8 does not name the format, without which nothing can be written to memory.
        buffer = BytesIO()
        self.save_to(buffer, format=Types.VideoContainer.MP4)
        buffer.seek(0)
        return buffer

    def get_container_format(self) -> str:
        # The base class would encode the whole video to find out.
        return "mov,mp4,m4a,3gp,3g2,mj2"


def footage_of(name: str, video: Tensor | Input.Video) -> Footage:
    """An IMAGE or a VIDEO as footage, with the frame rate of a VIDEO. name: of the input, for errors.

    A VIDEO of a file or of a long node is read frame by frame. Raises LongCatError for what has no frames.
    """
    if isinstance(video, ReelVideo):
        return video.reel.footage(video.fps)
    if isinstance(video, ReelImages):
        return Footage(len(video.reel), video.reel.height, video.reel.width, video.reel.read)
    if isinstance(video, Input.Video):
        source = video.get_stream_source() if isinstance(video, InputImpl.VideoFromFile) else None
        if isinstance(source, str):
            return _trimmed(Footage.of_file(source), video)
        components = video.get_components()
        return _of_images(name, components.images, float(components.frame_rate))
    return _of_images(name, video)


def _of_images(name: str, images: Tensor, fps: float | None = None) -> Footage:
    check_images(name, images)
    # Converted frame by frame: a second copy of a long video may not fit into memory.
    return Footage(len(images), *images.shape[1:3], lambda: (to_bytes(frame[None])[0] for frame in images), fps)


def _trimmed(footage: Footage, video: Input.Video) -> Footage:
    """The part of a file that Trim Video left."""
    # ComfyUI 0.8 does not trim.
    begin, duration = getattr(video, "get_active_trim_window", lambda: (0.0, 0.0))()
    if not begin and not duration:
        return footage
    fps = footage.fps or 1.0
    first = min(math.ceil(begin * fps - 1e-6), footage.frames - 1)
    last = min(math.ceil((begin + duration) * fps - 1e-6), footage.frames) if duration else footage.frames
    return Reel([footage], first, max(first + 1, last)).footage(fps)


def sound_in(video: Tensor | Input.Video, seconds: float) -> Sound | None:
    """The first `seconds` of the sound of a VIDEO. None for an IMAGE, for a mute video, and for a sound that cannot be
    read, which the log mentions."""
    if isinstance(video, ReelVideo) or not isinstance(video, Input.Video):
        return getattr(video, "sound", None)
    source = video.get_stream_source() if isinstance(video, InputImpl.VideoFromFile) else None
    begin = getattr(video, "get_active_trim_window", lambda: (0.0, 0.0))()[0]
    try:
        if isinstance(source, str):
            return part_of(read_sound(source), begin, seconds) if Footage.of_file(source).has_sound else None
        audio = video.get_components().audio
        return None if audio is None else part_of(sound_of("video", audio), 0.0, seconds)
    except LongCatError as error:
        logging.warning("LongCat: the sound of the video is left out, because %s", error)
        return None


def end_of_clip(name: str, video: Tensor | Input.Video, fps: float, rate: float, count: int) -> np.ndarray:
    """The last `count` frames, uint8 [F, H, W, 3], of an IMAGE or a VIDEO, taken by their time at `rate`.

    fps: frames per second of an IMAGE; a VIDEO has its own. Raises LongCatError for a clip that is too short.
    """
    footage = footage_of(name, video)
    fps = footage.fps or fps
    check_number("fps", fps, 0.1, 1000.0)
    taken = even_picks(footage.frames, fps, rate)[-count:]
    if len(taken) < count:
        raise LongCatError(
            f"{name} lasts {footage.frames / fps:.2f} s at {fps:g} fps, and {count} frames to continue from last "
            f"{count / rate:.2f} s at {rate:g} fps; connect a longer clip, correct its fps or continue fewer frames"
        )
    if fps != rate:
        logging.info("LongCat: %s has %g frames per second; they are taken by their time, at %g", name, fps, rate)
    wanted = enumerate(_from(video, footage, taken[0]), taken[0])
    frames = {number: frame for number, frame in wanted if number in taken}
    return np.stack([frames[number] for number in taken])


def _from(video: Tensor | Input.Video, footage: Footage, start: int) -> Iterator[np.ndarray]:
    """The frames of `footage`, which was made of `video`, from `start` on."""
    if isinstance(video, ReelImages | ReelVideo):
        return video.reel.cut(start, len(video.reel)).read()
    if isinstance(video, Tensor):
        return (to_bytes(frame[None])[0] for frame in video[start:])
    return islice(footage.read(), start, None)


def check_fits(hidden: Any, slot: int, frames: int, height: int, width: int) -> None:
    """Raise LongCatError if the IMAGE at output `slot` is connected where all of its frames are held, and they do not
    fit into memory. hidden: of the node that runs, with its id and the prompt."""
    needed = PIXEL_BYTES * frames * height * width
    free = psutil.virtual_memory().available + psutil.swap_memory().free
    if needed > free and any(kind not in FRAME_BY_FRAME for kind in _taking(hidden, slot)):
        raise LongCatError(
            f"images would hold {frames} frames in {bytes_in_words(needed)} of memory, of which {bytes_in_words(free)} "
            "are free; connect the output video instead (to Save Video, for instance), which reads its frames from the "
            "folder one by one, or ask for a shorter or smaller video"
        )


def connected(hidden: Any, slot: int) -> bool:
    """Whether output `slot` of the node that runs goes anywhere."""
    return any(True for _ in _taking(hidden, slot))


def _taking(hidden: Any, slot: int) -> Iterator[str]:
    """The classes of the nodes that an output of this node is connected to."""
    prompt = getattr(hidden, "dynprompt", None)
    for name in prompt.all_node_ids() if prompt is not None else ():
        node = prompt.get_node(name)
        if any(isinstance(value, list) and value == [hidden.unique_id, slot] for value in node["inputs"].values()):
            yield node["class_type"]
