"""The cases of a golden folder of LongCat-Video-Avatar about sound: from samples to the windows of segments."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ..generate.audio.encoder import with_noise_floor
from ..generate.audio.speech import RATE, leveled, padded
from ..generate.audio.voices import seconds_of
from ..generate.audio.wav2vec2 import normalized
from ..generate.audio.whisper import log_mel
from ..sampling.avatar import audio_windows
from .golden import Case, Golden, Pair

VOICES = ("one", "two")
# Its logarithm is steep near the floor.
MEL_TOLERANCE = 1e-4
# Voice one again and again, across the border of two chunks of Whisper's; from which embedding on it is compared.
LONG_SECONDS, LONG_FROM = 31.3, 720


def _frames(golden: Golden) -> tuple[int, int]:
    """Video frames of a segment, and of those that it has in common with the one before."""
    return golden.read("audio")["one.segment0"].shape[1], len(golden.read("generate")["at2v.frames"])


def _padded(golden: Golden, voice: str) -> Tensor:
    wave = golden.read("audio")[f"{voice}.wave"].double()
    return padded(wave, seconds_of(2, golden.audio_encoder.fps, *_frames(golden)))


def _samples(golden: Golden, voice: str) -> Pair:
    return torch.tensor(len(_padded(golden, voice))), golden.read("audio")[f"{voice}.samples"]


def _heard(golden: Golden, voice: str) -> Tensor:
    return leveled(_padded(golden, voice))


def _noisy(golden: Golden) -> Tensor:
    return with_noise_floor(_heard(golden, "one"), golden.read("audio")["one.noise"])


def _mel(golden: Golden) -> Tensor:
    config, wave = golden.audio_encoder.model.config, _heard(golden, "one")
    return log_mel(F.pad(wave, (0, config.chunk - len(wave))), config.mels)


def _hidden(golden: Golden) -> Pair:
    wanted = golden.read("audio")["one.hidden"]
    states = torch.cat(list(golden.audio_encoder.model(_mel(golden)[None])))
    return states[:, : wanted.shape[1]], wanted


def _embedded(golden: Golden, voice: str) -> Pair:
    data = golden.read("audio")
    return golden.audio_encoder.embed(_heard(golden, voice), noise=data.get(f"{voice}.noise")), data[f"{voice}.emb"]


def _long(golden: Golden) -> Pair:
    data, samples = golden.read("audio"), int(LONG_SECONDS * RATE)
    wave = data["one.wave"].double()
    wave = wave.repeat(samples // len(wave) + 1)[:samples]
    return golden.audio_encoder.embed(leveled(wave))[LONG_FROM:], data["long.emb"]


def _windows(golden: Golden, voice: str, segment: int) -> Pair:
    data, stride = golden.read("audio"), golden.audio_encoder.stride
    frames, overlap = _frames(golden)
    windows = audio_windows(data[f"{voice}.emb"], segment * stride * (frames - overlap), frames, stride)
    return windows, data[f"{voice}.segment{segment}"]


def audio_cases(golden: Golden) -> Iterator[Case]:
    """Every case of an avatar's folder about sound."""
    for voice in VOICES:
        yield Case(f"{voice}.samples", partial(_samples, voice=voice))
    yield Case("one.loud", lambda g: (_heard(g, "one"), g.read("audio")["one.loud"]))
    if golden.version == "1.0":
        yield Case("one.pre", lambda g: (_noisy(g), g.read("audio")["one.pre"]))
        yield Case("one.input", lambda g: (normalized(_noisy(g)), g.read("audio")["one.input"]))
    else:
        yield Case("one.mel", lambda g: (_mel(g)[:, :256], g.read("audio")["one.mel"]), MEL_TOLERANCE)
        yield Case("one.mel_end", lambda g: (_mel(g)[:, -1], g.read("audio")["one.mel_end"]), MEL_TOLERANCE)
        yield Case("one.hidden", _hidden)
        yield Case("long.emb", _long)
    for voice in VOICES:
        yield Case(f"{voice}.emb", partial(_embedded, voice=voice))
        for segment in range(2):
            yield Case(f"{voice}.segment{segment}", partial(_windows, voice=voice, segment=segment))
