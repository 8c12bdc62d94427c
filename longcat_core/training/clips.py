"""A folder of clips and pictures with captions, to train on: found and checked, then encoded one by one.

Frames are taken by their time, at the rate that the model was trained at.
"""

from __future__ import annotations

import mimetypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import LongCatError, listed
from ..files.fingerprints import PREFIX, as_then, fingerprint, remember
from ..files.media import count_pictures, open_video, read_image, read_video, resize_and_crop
from ..files.regular import read_text
from ..generate.options import FPS
from ..generate.request import check_text
from ..generate.segments import checksum
from ..generate.text import TextEncoder
from ..generate.vae import VideoVAE
from ..sampling.conditioning import to_pixels

CLIPS = (".mp4", ".mkv", ".webm", ".mov", ".m4v", ".avi", ".gif", ".webp", ".ts", ".mts", ".m2ts", ".mpg", ".mpeg",
         ".vob", ".wmv", ".asf", ".flv", ".f4v", ".ogv", ".3gp", ".3g2", ".mxf", ".nut", ".y4m", ".apng")  # fmt: skip
PICTURES = (".png", ".jpg", ".jpeg", ".jfif", ".bmp", ".tif", ".tiff", ".avif", ".jp2", ".tga", ".ppm")
# Kinds of files that are media by their name but are not read.
_UNREAD = ("image/", "video/", "audio/")
_SHOWN = 10

# Done, of how many.
Report = Callable[[int, int], None]


@dataclass(frozen=True)
class Clip:
    """A file with its caption; `frames` of it are used, 1 of a picture. note: how they were taken, or ""."""

    path: Path
    caption: str
    frames: int
    note: str = ""

    def read(self) -> np.ndarray:
        """Its frames from the first on, FPS a second: uint8 [F, H, W, 3]."""
        if self.frames == 1 and self.path.suffix.lower() in PICTURES:
            return read_image(self.path)[None]
        return read_video(self.path, first=self.frames, fps=FPS if self.frames > 1 else None)[0]


@dataclass(frozen=True)
class Sample:
    """latents [C, T, H/8, W/8] fp32, normalized; context [L, D] fp32: the caption's L tokens. On the CPU."""

    latents: Tensor
    context: Tensor


def find_clips(folder: Path, frames: int) -> list[Clip]:
    """The clips of a folder, sorted by name, each read once up to `frames` frames at the model's rate.

    Raises LongCatError for a folder without clips, a clip that is unreadable or has fewer frames (one: a picture), and
    a caption (the .txt of the same name) that is missing, empty or no text.
    """
    if not folder.is_dir():
        raise LongCatError(f"{folder} is not a folder; give one with clips and a .txt of the same name beside each")
    files = [
        path
        for path in sorted(folder.iterdir())
        if path.suffix.lower() in CLIPS + PICTURES and not path.name.startswith(".") and path.is_file()
    ]
    if not files:
        raise LongCatError(
            f"{folder} holds no clips; put some there ({' '.join(CLIPS)}, pictures: {' '.join(PICTURES)})"
        )
    # All captions, before any clip is decoded.
    captions = [_caption(path) for path in files]
    short: list[str] = []
    clips = [_checked(path, caption, frames, short) for path, caption in zip(files, captions, strict=True)]
    if short:
        raise LongCatError(
            f"clips in {folder} are shorter than --frames {frames}, {frames / FPS:.2f} s at {FPS:g} fps "
            f"({listed(short, _SHOWN)}); give fewer frames or take them out"
        )
    return clips


def _checked(path: Path, caption: str, frames: int, short: list[str]) -> Clip:
    """The clip, whose frames are decoded once; if they are too few, that is added to `short`."""
    if path.suffix.lower() in PICTURES and (count := count_pictures(path)) == 1:
        read_image(path)
        return Clip(path, caption, 1)
    if path.suffix.lower() in (".tif", ".tiff"):
        raise LongCatError(f"{path} has {count} pages, of which one would be used; save them as pictures of their own")
    with open_video(path) as reader:
        if reader.frames == 1:
            return Clip(path, caption, len(list(reader)))
        reader.take_at(FPS)
        found = sum(1 for _ in islice(reader.shown(), frames))
        if found < frames:
            short.append(f"{path.name} has {found}")
        return Clip(path, caption, found, reader.note)


def notes(folder: Path, clips: Sequence[Clip]) -> list[str]:
    """Sentences on what was done to the clips of a folder, and on what was not used."""
    said = [clip.note for clip in clips if clip.note]
    more = [f"{len(said) - _SHOWN} more clips are taken by their time"] if len(said) > _SHOWN else []
    return [sentence for sentence in (left_out(folder, clips), *said[:_SHOWN], *more) if sentence]


def left_out(folder: Path, clips: Sequence[Clip]) -> str:
    """A sentence that names the media, the captions and the folders in a folder that `find_clips` did not use; "" if
    it used all."""
    used = {clip.path.name for clip in clips} | {clip.path.with_suffix(".txt").name for clip in clips}
    others = [path for path in sorted(folder.iterdir()) if path.name not in used and not path.name.startswith(".")]
    captions = {path.stem for path in others if path.suffix.lower() == ".txt"}

    def matters(path: Path) -> bool:
        kind = mimetypes.guess_type(path.name)[0] or ""
        media = kind.startswith(_UNREAD) or path.suffix.lower() in CLIPS + PICTURES
        return path.is_dir() or path.stem in captions or media

    names = [path.name + "/" * path.is_dir() for path in others if matters(path)]
    return f"not used from {folder}: {listed(names, _SHOWN)}; clips are {' '.join(CLIPS + PICTURES)}" if names else ""


def _caption(path: Path) -> str:
    file = path.with_suffix(".txt")
    if not (file.exists() or file.is_symlink()):
        raise LongCatError(f"{path} has no caption; write what it shows into {file.name} beside it")
    caption = " ".join(read_text(file, "caption").split())
    check_text(f"caption {file}", caption)
    if not caption:
        raise LongCatError(f"{file} is empty; write what {path.name} shows into it")
    return caption


def clips_fingerprint(clips: Sequence[Clip]) -> str:
    """Tells these clips and captions from others, like `fingerprint` of a checkpoint."""

    def digest(kind: Callable[[str], object]) -> str:
        # Earlier versions took frames of any rate and color as they are stored.
        shown = [" as shown" * bool(clip.note) for clip in clips]
        words = [f"{c.path.name} {kind(fingerprint(c.path))} {c.caption}" for c in clips]
        return checksum("\n".join(map("".join, zip(words, shown, strict=True))))[:16]

    return remember(PREFIX + digest(str), lambda: digest(as_then))


def encode_clips(clips: Sequence[Clip], vae: VideoVAE, height: int, width: int, report: Report) -> list[Tensor]:
    """Latents [C, T, H/8, W/8] fp32 of every clip, scaled to cover height x width and cropped, on the CPU."""
    latents = []
    for clip in clips:
        frames = resize_and_crop(clip.read(), height, width)
        latents.append(vae.encode(to_pixels(torch.from_numpy(frames.copy())))[0].cpu())
        report(len(latents), len(clips))
    return latents


def encode_captions(captions: Sequence[str], encoder: TextEncoder) -> list[Tensor]:
    """Embeddings [L, D] fp32 of every caption, without padding, on the CPU."""
    encoded = []
    for caption in captions:
        context, mask = encoder.encode([caption])
        encoded.append(context[0, : int(mask.sum())].cpu())
    return encoded
