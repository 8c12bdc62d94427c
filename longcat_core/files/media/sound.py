"""Sound beside the pictures of a video: that of a file, copied where the container can hold it, or samples, coded."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ...errors import LongCatError
from .opening import decoding, opened, opened_container, package
from .packets import is_cover
from .samples import Sound

# FFmpeg's names of what players expect in an .mp4; Matroska holds any sound.
IN_MP4 = ("aac", "mp3", "ac3", "eac3", "opus", "flac", "alac")
# Of what is decoded where it cannot be copied.
DECODERS = (
    "aac", "aac_latm", "mp1float", "mp2", "mp2float", "mp3", "mp3float", "ac3", "eac3", "dca", "opus", "libopus",
    "vorbis", "flac", "alac", "wavpack", "tta", "truehd", "mlp", "wmav1", "wmav2", "wmapro", "amrnb", "amrwb",
    "libopencore_amrnb", "libopencore_amrwb", "nellymoser", "speex", "gsm", "adpcm_ms", "adpcm_ima_wav", "adpcm_ima_qt",
    "adpcm_swf", "pcm_alaw", "pcm_mulaw", "pcm_bluray", "pcm_dvd", "pcm_u8", "pcm_s8", "pcm_s16le", "pcm_s16be",
    "pcm_s24le", "pcm_s24be", "pcm_s32le", "pcm_s32be", "pcm_f32le", "pcm_f32be", "pcm_f64le", "pcm_f64be",
)  # fmt: skip
# Of what is coded: samples per second, and layouts by their number of channels.
RATE = 48000
LAYOUTS = {1: "mono", 2: "stereo", 6: "5.1", 8: "7.1"}
FORMS = {".mp4": "mp4", ".mkv": "matroska"}
BITS = 96_000  # a second of a channel, as AAC
# Seconds of samples that are coded at a time.
PIECE = 0.25


class Tracks:
    """The sound tracks of a container `source`, added to the container `target`; `write` puts their packets there."""

    def __init__(self, source: Any, target: Any) -> None:
        self._target = target
        pictures = next(stream for stream in source.streams.video if not is_cover(stream))
        # Seconds at which the first picture is shown, and from which the sound of the target starts.
        self._begin = (pictures.start_time or 0) * pictures.time_base
        self._tracks = {stream.index: self._track(stream) for stream in source.streams.audio}
        self._packets = source.demux(*source.streams.audio)
        self._next = next(self._packets, None)

    def _track(self, stream: Any) -> _Copied | _Coded:
        if self._target.format.name == "matroska" or codec_of(stream) in IN_MP4:
            # Matroska lacks a few old codecs.
            with suppress(ValueError):
                return _Copied(stream, self._target, self._begin)
        return _Coded(stream, self._target, self._begin)

    @property
    def coded(self) -> list[str]:
        """The codecs of the tracks that are not copied."""
        return sorted({track.codec for track in self._tracks.values() if isinstance(track, _Coded)})

    def write(self, until: float = math.inf) -> None:
        """Write the packets before the moment `until`, in seconds from the first picture on, or all that are left."""
        while (packet := self._next) is not None:
            if packet.dts is not None and packet.dts * packet.time_base - self._begin >= until:
                return
            self._target.mux(self._tracks[packet.stream.index].take(packet))
            self._next = next(self._packets, None)


class _Copied:
    def __init__(self, stream: Any, target: Any, begin: Any) -> None:
        self._out = target.add_stream_from_template(stream)
        self._begin = begin

    def take(self, packet: Any) -> list[Any]:
        """What to write for a packet: itself, unless it is over before the first picture."""
        if not packet.size or packet.pts is None or packet.dts is None:
            return []
        shift = round(self._begin / packet.time_base)
        packet.pts, packet.dts = packet.pts - shift, packet.dts - shift
        packet.stream = self._out
        return [packet] if packet.pts + (packet.duration or 1) > 0 else []


class _Coded:
    def __init__(self, stream: Any, target: Any, begin: Any) -> None:
        self.codec = codec_of(stream)
        if stream.codec_context.name not in DECODERS:
            raise LongCatError(f"its sound is coded as {self.codec}, which is not read")
        layout = LAYOUTS.get(stream.codec_context.layout.nb_channels, "stereo")
        self._out = target.add_stream("aac", rate=RATE, layout=layout)
        self._resampler = package("av.audio.resampler").AudioResampler("fltp", layout, RATE)
        self._begin = begin

    def take(self, packet: Any) -> list[Any]:
        """What to write for a packet; the one without content ends the track."""
        done: list[Any] = []
        for frame in packet.decode():
            if frame.pts is not None:
                frame.pts -= round(self._begin / frame.time_base)
            if frame.pts is None or frame.pts + frame.samples / frame.sample_rate / frame.time_base > 0:
                done += self._encoded(frame)
        return done if packet.size else [*done, *self._encoded(None), *self._out.encode(None)]

    def _encoded(self, frame: Any) -> list[Any]:
        return [packet for part in self._resampler.resample(frame) for packet in self._out.encode(part)]


class Samples:
    """A track of the samples of `sound` in the container `target`, as AAC in .mp4 and as FLAC of 24 bits in .mkv."""

    def __init__(self, sound: Sound, target: Any) -> None:
        lossless = target.format.name == "matroska"
        sound = sound if lossless else sound.resampled(RATE)
        values = sound.samples.numpy()
        self._layout = LAYOUTS.get(len(values), "mono")
        # Several channels whose places are unknown are mixed.
        self._samples = values if len(values) in LAYOUTS else values.mean(0, keepdims=True)
        self._rate, self._at, self._target = sound.rate, 0, target
        self._out = target.add_stream("flac" if lossless else "aac", rate=sound.rate, layout=self._layout)
        form = self._out.codec_context.format = "s32" if lossless else "fltp"
        self._out.bit_rate = BITS * len(self._samples)
        self._resampler = package("av.audio.resampler").AudioResampler(form, self._layout, sound.rate)

    def write(self, until: float = math.inf) -> None:
        """Write what is heard before the moment `until` in seconds, or all that is left."""
        frames, count = package("av").AudioFrame, round(PIECE * self._rate)
        while self._at < self._samples.shape[1] and self._at < until * self._rate:
            piece = self._samples[:, self._at : self._at + count].clip(-1, 1)
            # Packed, because PyAV takes no 8 planes.
            frame = frames.from_ndarray(piece.T.reshape(1, -1), format="flt", layout=self._layout)
            frame.sample_rate, frame.pts = self._rate, self._at
            self._at += piece.shape[1]
            self._write(frame)
        if until == math.inf:
            self._write(None)
            self._target.mux(self._out.encode(None))

    def _write(self, frame: Any) -> None:
        for part in self._resampler.resample(frame):
            self._target.mux(self._out.encode(part))


def codec_of(stream: Any) -> str:
    """FFmpeg's name of a stream's codec, whichever decoder reads it."""
    return str(stream.codec_context.codec.canonical_name)


@contextmanager
def sound_of(sound: Path | Sound, target: Any) -> Iterator[Tracks | Samples]:
    """The sound of a file, or samples, to be written into a container by and by."""
    if isinstance(sound, Sound):
        yield Samples(sound, target)
        return
    with opened(sound, "video") as file, opened_container(file, DECODERS) as source:
        yield Tracks(source, target)


class _Nowhere:
    """A file that forgets what is written into it."""

    def __init__(self) -> None:
        self.at = self.end = 0

    def write(self, data: bytes) -> int:
        self.at += len(data)
        self.end = max(self.end, self.at)
        return len(data)

    def seek(self, offset: int, whence: int = 0) -> int:
        self.at = offset + (0, self.at, self.end)[whence]
        return self.at

    def tell(self) -> int:
        return self.at


def check_sound(path: Path, suffix: str) -> tuple[Path | None, str]:
    """Try to put the sound of `path` into a video that ends in `suffix`.

    Returns the path, or None if that cannot be done, and a sentence on sound that does not stay as it is, or "".
    """
    if suffix not in FORMS:
        return None, f"the sound of {path} is left out, because {suffix} holds none; write .mp4 or .mkv"
    try:
        nowhere = package("av").open(_Nowhere(), "w", format=FORMS[suffix])
        with decoding(path, "sound", "AAC"), nowhere as target, sound_of(path, target) as sound:
            sound.write()
    except LongCatError as error:
        return None, f"the sound is left out: {error}"
    if not isinstance(sound, Tracks) or not sound.coded:
        return path, ""
    return path, f"the sound of {path} is coded as AAC, because {suffix} does not hold {', '.join(sound.coded)}"
