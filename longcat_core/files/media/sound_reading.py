"""Read the sound of a file as samples: what FFmpeg reads, through PyAV."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...errors import LongCatError, check_path
from .opening import decoding, opened, opened_container, package
from .packets import is_cover
from .samples import Sound
from .sound import DECODERS, codec_of
from .wholeness import LAST_BYTES, is_cut_short

REMEDY = "a .wav, .flac, .mp3 or .mp4"
MAX_SECONDS = 2 * 3600
# Seconds by which times may be off before silence is put in between, or before a file counts as cut short.
TOLERANCE = 0.1
# Containers that declare no duration, which FFmpeg then guesses by the size of the file; nor do some .mp3.
_GUESSED = ("aac", "ac3", "eac3", "amr", "mpegts", "mpeg", "mpegvideo")
_DECLARES = (b"Xing", b"Info", b"VBRI")


def read_sound(path: str | Path) -> Sound:
    """The first sound track of a file of the lists in `opening`, whole; of a video from its first picture on.

    Where a track has gaps, or begins after the first picture, there is silence. Raises LongCatError for a file that
    cannot be read, has no sound track, is cut short, or lasts more than two hours.
    """
    check_path("the path of the sound", path)
    path = Path(path)
    with opened(path, "sound") as file, decoding(path, "sound", REMEDY):
        if is_cut_short(file):
            raise _cut_short(path, LAST_BYTES)
        head = file.read(4096)
        file.seek(0)
        with opened_container(file, DECODERS) as container:
            if not container.streams.audio:
                raise LongCatError(f"{path} has no sound track; give {REMEDY} with sound")
            stream = container.streams.audio[0]
            if stream.codec_context.name not in DECODERS:
                raise LongCatError(f"the sound of {path} is coded as {codec_of(stream)}, which is not read; give AAC")
            pictures = next((other for other in container.streams.video if not is_cover(other)), None)
            begin = None if pictures is None else (pictures.start_time or 0) * pictures.time_base
            guessed = container.format.name in _GUESSED
            guessed |= container.format.name == "mp3" and not any(mark in head for mark in _DECLARES)
            declared = None if guessed else _declared(container, stream, begin)
            if declared is not None and declared > MAX_SECONDS:
                raise _too_long(path)
            frames = _frames(path, container, stream)
            first = next(frames, None)
            if first is None:
                raise LongCatError(f"{path} holds no sound that can be decoded; give {REMEDY} with sound")
            # The track may declare half of it, as some in HE-AAC do.
            rate = first.rate
            parts = list(_placed(path, chain([first], frames), begin))
            length = sum(part.shape[1] for part in parts)
            if not length:
                raise LongCatError(f"the sound of {path} ends before its first picture; give {REMEDY} with sound")
            if begin is None and declared is not None and length / rate < declared - TOLERANCE:
                raise _cut_short(path, f"{float(declared) - length / rate:.2f} s are missing")
            # Codecs that work in blocks fill up the last one.
            filled = declared is not None and 0 < length / rate - declared < TOLERANCE
            samples = torch.cat(parts, dim=1)[:, : round(declared * rate) if filled and declared else length]
            if not samples.isfinite().all():
                raise LongCatError(f"{path} has samples that are not finite; write it again")
            return Sound(samples, rate)


def _cut_short(path: Path, missing: str) -> LongCatError:
    return LongCatError(f"{path} is cut short, {missing}; get the whole file")


def _too_long(path: Path) -> LongCatError:
    return LongCatError(f"the sound of {path} lasts more than {MAX_SECONDS // 3600} hours; cut it")


def _declared(container: Any, stream: Any, begin: Fraction | None) -> Fraction | None:
    """The seconds from `begin`, or from its start, on after which the track ends by what the container says, or None.

    Of a track without pictures the container may say it instead.
    """
    if stream.duration:
        start = (stream.start_time or 0) * stream.time_base
        return start - (start if begin is None else begin) + stream.duration * stream.time_base
    return Fraction(container.duration, 1_000_000) if container.duration and begin is None else None


class _Frame(NamedTuple):
    """time: in seconds, or None where the file has none. samples: [channels, N] fp32."""

    time: Fraction | None
    samples: Tensor
    rate: int


def _frames(path: Path, container: Any, stream: Any) -> Iterator[_Frame]:
    """What the track decodes to."""
    error, started, damaged = package("av").error, False, False
    kind: tuple[int, int] | None = None
    converter = package("av.audio.resampler").AudioResampler("flt")
    for packet in container.demux(stream):
        # The one without content comes last.
        damaged = packet.is_corrupt if packet.size else damaged
        try:
            frames = packet.decode()
        except (error.InvalidDataError, error.ArgumentError) as fault:
            # A recording may start within a packet.
            if not started:
                continue
            raise LongCatError(f"{path} is cut short or damaged, it cannot be decoded to its end; get it again") from (
                fault
            )
        for frame in frames:
            started, time = True, None if frame.pts is None else frame.pts * frame.time_base
            kind = kind or (frame.sample_rate, frame.layout.nb_channels)
            if kind != (frame.sample_rate, frame.layout.nb_channels):
                raise LongCatError(f"the sound of {path} changes its rate or its channels; cut it there")
            for part in converter.resample(frame):
                # Packed, because PyAV reads beyond the planes of a frame that has one for each of 8 channels or more.
                packed = torch.from_numpy(part.to_ndarray()).view(-1, part.layout.nb_channels)
                yield _Frame(time, packed.T, part.sample_rate)
    if damaged:
        raise _cut_short(path, LAST_BYTES)


def _placed(path: Path, frames: Iterable[_Frame], begin: Fraction | None) -> Iterator[Tensor]:
    """The samples from the moment `begin`, or from the first ones on, one part after another, with silence in gaps."""
    # Samples from the beginning up to here; fewer than none while the beginning is ahead.
    filled: int | None = None
    checked = 0
    for time, samples, rate in frames:
        if filled is None:
            begin = begin if begin is not None else time or Fraction(0)
            filled = min(0, round(((time or begin) - begin) * rate))
        at = filled if time is None or begin is None else round((time - begin) * rate)
        if at > MAX_SECONDS * rate:
            raise _too_long(path)
        if at > checked:
            _check_memory(path, len(samples) * at)
            checked = at + at // 4
        if at - filled > (TOLERANCE * rate if filled else 0):
            yield samples.new_zeros(len(samples), at - max(0, filled))
            filled = at
        yield samples[:, max(0, -filled) :]
        filled += samples.shape[1]


def _check_memory(path: Path, samples: int) -> None:
    # The parts, all of them together, and a copy for whoever mixes them.
    needed, there = 3 * 4 * samples, package("psutil").virtual_memory().available
    if needed > there:
        raise LongCatError(
            f"the sound of {path} takes {needed / 1e9:,.1f} GB of memory or more and {there / 1e9:,.1f} GB are free; "
            "cut it, or give it with fewer channels"
        )
