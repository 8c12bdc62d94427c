"""A folder of clips and pictures with captions, to train on: found and checked, then encoded one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import LongCatError
from ..files.media import read_image, read_video, resize_and_crop
from ..files.safetensors_io import fingerprint
from ..generate.request import check_text
from ..generate.segments import checksum
from ..generate.text import TextEncoder
from ..generate.vae import VideoVAE
from ..sampling.conditioning import to_pixels

CLIPS = (".mp4", ".mkv", ".webm", ".mov", ".m4v", ".avi", ".gif", ".webp")
PICTURES = (".png", ".jpg", ".jpeg", ".bmp")
_SHOWN = 3

# Done, of how many.
Report = Callable[[int, int], None]


@dataclass(frozen=True)
class Clip:
    """A file with its caption; `frames` of it are used, 1 of a picture."""

    path: Path
    caption: str
    frames: int

    def read(self) -> np.ndarray:
        """Its frames from the first on, uint8 [F, H, W, 3]."""
        if self.path.suffix.lower() in PICTURES:
            return read_image(self.path)[None]
        return read_video(self.path, first=self.frames)[0]


@dataclass(frozen=True)
class Sample:
    """latents [C, T, H/8, W/8] fp32, normalized; context [L, D] fp32: the caption's L tokens. On the CPU."""

    latents: Tensor
    context: Tensor


def find_clips(folder: Path, frames: int) -> list[Clip]:
    """The clips of a folder, sorted by name, each read once up to `frames` frames.

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
    clips, short = [], []
    for path, caption in zip(files, captions, strict=True):
        found = len(Clip(path, caption, frames).read())
        if found not in (1, frames):
            short.append(f"{path.name} has {found}")
        clips.append(Clip(path, caption, found))
    if short:
        more = f" and {len(short) - _SHOWN} more" if len(short) > _SHOWN else ""
        raise LongCatError(
            f"clips in {folder} are shorter than --frames {frames} ({', '.join(short[:_SHOWN])}{more}); give fewer "
            "frames or take them out"
        )
    return clips


def _caption(path: Path) -> str:
    file = path.with_suffix(".txt")
    if not file.is_file():
        raise LongCatError(f"{path} has no caption; write what it shows into {file.name} beside it")
    try:
        caption = " ".join(file.read_text(encoding="utf-8-sig").split())
    except UnicodeDecodeError as error:
        raise LongCatError(f"{file} is not UTF-8 text; save it as such") from error
    check_text(f"caption {file}", caption)
    if not caption:
        raise LongCatError(f"{file} is empty; write what {path.name} shows into it")
    return caption


def clips_fingerprint(clips: Sequence[Clip]) -> str:
    """Tells these clips and captions from others, like `fingerprint` of a checkpoint."""
    return checksum("\n".join(f"{c.path.name} {fingerprint(c.path)} {c.caption}" for c in clips))[:16]


def encode_clips(clips: Sequence[Clip], vae: VideoVAE, height: int, width: int, report: Report) -> list[Tensor]:
    """Latents [C, T, H/8, W/8] fp32 of every clip, scaled to cover height x width and cropped, on the CPU."""
    latents = []
    for clip in clips:
        frames = resize_and_crop(clip.read(), height, width)
        latents.append(vae.encode(to_pixels(torch.from_numpy(frames.copy())))[0].cpu())
        if not latents[-1].isfinite().all():
            raise LongCatError(f"the VAE makes NaN of {clip.path}; use --dtype bfloat16 or float32")
        report(len(latents), len(clips))
    return latents


def encode_captions(captions: Sequence[str], encoder: TextEncoder) -> list[Tensor]:
    """Embeddings [L, D] fp32 of every caption, without padding, on the CPU."""
    encoded = []
    for caption in captions:
        context, mask = encoder.encode([caption])
        encoded.append(context[0, : int(mask.sum())].cpu())
    return encoded
