"""What a LongCat-Video-Avatar hears with: wav2vec2 in version 1.0, the encoder of Whisper in version 1.5."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checkpoints.audio_encoders import CONVOLUTIONS, WAV2VEC2, AudioEncoderFiles, open_audio_encoder
from ...checkpoints.reader import Watch
from ...errors import CheckpointError, LongCatError, check_path, check_type
from ...model.config import AudioConfig
from .filters import butterworth_low_pass, filtered
from .speech import RATE
from .wav2vec2 import Wav2Vec2, Wav2Vec2Config, normalized
from .whisper import WhisperConfig, WhisperEncoder, log_mel

# Version 1.0 hears a noise floor of this level in dB, and nothing above this frequency in Hz.
NOISE, HIGHEST = -45.0, 3000.0
# Version 1.5 hears groups of states: the mean of each quarter, and the last state.
QUARTERS = 4
SEEDS = 1 << 63  # that a generator tells apart
NAMES = {"1.0": "wav2vec2", "1.5": "Whisper"}


class AudioEncoder(ABC):
    """Speech to embeddings. model: the network, in fp32.

    version: of LongCat-Video-Avatar. fps: its video frames per second; rate: embeddings per second, of which each is
    `groups` vectors of `channels` numbers.
    """

    version: str
    fps: int
    rate: int
    groups: int
    channels: int

    def __init__(self, model: nn.Module, source: str) -> None:
        self.model, self.source = model.eval().requires_grad_(False), source

    @property
    def stride(self) -> int:
        """Embeddings for each video frame."""
        return self.rate // self.fps

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def nbytes(self) -> int:
        """Bytes of all weights."""
        return sum(parameter.nbytes for parameter in self.model.parameters())

    def to(self, device: str | torch.device) -> AudioEncoder:
        """Move in place; returns self."""
        self.model.to(device)
        return self

    def check(self, config: AudioConfig | None) -> None:
        """Raise LongCatError unless the network of this config takes such embeddings."""
        if config is None:
            raise LongCatError("the model does not hear audio; give LongCat-Video-Avatar")
        if (config.groups, config.channels) != (self.groups, self.channels):
            wanted = "chinese-wav2vec2-base" if config.groups != QUARTERS + 1 else "whisper-large-v3"
            raise LongCatError(
                f"{self.source} makes embeddings of {self.groups} x {self.channels} numbers ({NAMES[self.version]}), "
                f"the model takes {config.groups} x {config.channels}; give the audio encoder of its version, {wanted}"
            )

    @torch.no_grad()
    def embed(self, wave: Tensor, *, seed: int = 0, noise: Tensor | None = None) -> Tensor:
        """Embeddings [frames, groups, channels] fp32 on the CPU of a sound [N] fp64 at 16 kHz, made by `speech`.

        seed: of the noise floor that version 1.0 hears; noise [N]: that noise instead, of mean 0 and variance 1.
        Raises LongCatError for a sound too short for an embedding, and for embeddings that are not finite.
        """
        check_type("a sound", wave, Tensor, "a tensor [N] at 16 kHz, as Voices.speakers has them")
        # In the order of the public code, whose products may fall just under a whole number.
        frames = int(len(wave) / RATE * self.rate)
        if frames < 1:
            raise LongCatError(f"the sound lasts {len(wave) / RATE:.3f} s, too short for an embedding; give more")
        if noise is None:
            generator = torch.Generator().manual_seed(seed % SEEDS)
            noise = torch.randn(len(wave), generator=generator, dtype=torch.float64)
        embeddings = self._embed(wave.double().cpu(), frames, noise).float().cpu()
        if not embeddings.isfinite().all():
            raise LongCatError(
                f"{self.source} makes embeddings that are not finite; check the sound, or download the encoder again"
            )
        return embeddings

    @abstractmethod
    def _embed(self, wave: Tensor, frames: int, noise: Tensor) -> Tensor:
        """`embed`, unchecked, on the network's device."""


class Wav2Vec2Encoder(AudioEncoder):
    version, fps, rate = "1.0", 16, 32
    model: Wav2Vec2

    @property
    def groups(self) -> int:  # type: ignore[override]
        return self.model.config.layers

    @property
    def channels(self) -> int:  # type: ignore[override]
        return self.model.config.width

    def _embed(self, wave: Tensor, frames: int, noise: Tensor) -> Tensor:
        heard = normalized(with_noise_floor(wave, noise)).to(self.device)
        return torch.stack(list(self.model(heard[None], frames)), dim=2)[0]


class WhisperAudioEncoder(AudioEncoder):
    version, fps, rate = "1.5", 25, 25
    model: WhisperEncoder

    groups = QUARTERS + 1

    @property
    def channels(self) -> int:  # type: ignore[override]
        return self.model.config.width

    def _embed(self, wave: Tensor, frames: int, noise: Tensor) -> Tensor:
        config, states = self.model.config, 2 * frames
        chunks = math.ceil(states / config.positions)
        wave = F.pad(wave, (0, max(0, chunks * config.chunk - len(wave))))
        parts = [self._chunk(part) for part in wave[: chunks * config.chunk].split(config.chunk)]
        joined = torch.cat(parts, dim=2)[..., :states]
        return F.interpolate(joined, frames, mode="linear", align_corners=True).permute(2, 0, 1)

    def _chunk(self, wave: Tensor) -> Tensor:
        """The groups of states of one chunk, [groups, channels, positions]."""
        each = self.model.config.layers // QUARTERS
        groups: list[Tensor] = []
        for i, state in enumerate(self.model(log_mel(wave, self.model.config.mels).to(self.device)[None])):
            if i % each == 0:
                groups.append(state)
            else:
                groups[-1] = groups[-1] + state
        return torch.cat([*(group / each for group in groups[:-1]), groups[-1]]).transpose(1, 2)


def with_noise_floor(wave: Tensor, noise: Tensor) -> Tensor:
    """What version 1.0 hears of a sound [N] fp64 at 16 kHz: with this noise of variance 1 at -45 dB, and muffled."""
    return filtered(wave + noise.double() * 10 ** (NOISE / 20), butterworth_low_pass(HIGHEST, RATE))


def load_audio_encoder(
    path: str | Path,
    *,
    device: str | torch.device = "cpu",
    opened: AudioEncoderFiles | None = None,
    watch: Watch | None = None,
) -> AudioEncoder:
    """An audio encoder from its file or folder, or from the official folder of LongCat-Video-Avatar.

    Tensors tell wav2vec2 from Whisper; of a whole Whisper only its encoder is read. A file without a
    config.json has heads of 64 channels. opened: what `open_audio_encoder` gave for it. watch: called after every piece
    that is read, with the bytes so far and those of all. Raises CheckpointError for files that are unreadable or
    incomplete, and for other models.
    """
    check_path("the path of the audio encoder", path)
    opened = open_audio_encoder(Path(path)) if opened is None else opened
    encoder = empty_audio_encoder(opened)
    encoder.model.load_state_dict(opened.state(encoder.model.state_dict(), device, watch), assign=True)
    return encoder


def empty_audio_encoder(opened: AudioEncoderFiles) -> AudioEncoder:
    """An opened audio encoder without its weights, on the meta device: its sizes, for checks."""
    kind, network = (Wav2Vec2Encoder, _wav2vec2) if opened.kind == WAV2VEC2 else (WhisperAudioEncoder, _whisper)
    with torch.device("meta"):
        return kind(network(opened), opened.source)


def audio_encoder_of(tensors: Mapping[str, Tensor], source: str = "the audio encoder") -> AudioEncoder:
    """An audio encoder from the tensors that another program has read, in a copy of its own. Raises as the loader."""
    return load_audio_encoder("", opened=open_audio_encoder(Path(source), tensors=tensors))


def _wav2vec2(opened: AudioEncoderFiles) -> nn.Module:
    hidden, width = opened.shape("encoder.layers.0.feed_forward.intermediate_dense.weight", 2)
    _, share, kernel = opened.shape(opened.position_weight, 3)
    convolutions = [opened.shape(f"feature_extractor.conv_layers.{i}.conv.weight", 3)[0] for i in range(CONVOLUTIONS)]
    config = Wav2Vec2Config(width, opened.depth, opened.heads, hidden, tuple(convolutions), kernel, width // share)
    if width % share:
        raise CheckpointError(
            f"{opened.source} has a position convolution of {share} of {width} channels; get it again"
        )
    return Wav2Vec2(config)


def _whisper(opened: AudioEncoderFiles) -> nn.Module:
    width, mels, _ = opened.shape("conv1.weight", 3)
    positions, _ = opened.shape("embed_positions.weight", 2)
    hidden, _ = opened.shape("layers.0.fc1.weight", 2)
    if opened.depth % QUARTERS:
        raise CheckpointError(
            f"{opened.source} has {opened.depth} layers, which do not make four equal groups; give whisper-large-v3"
        )
    return WhisperEncoder(WhisperConfig(mels, width, opened.depth, opened.heads, hidden, positions))
