"""The shape of the network, read from a checkpoint's config."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ..errors import LongCatError

# Larger than any network's side, and small enough for products of sides to be counted.
LARGEST = 1 << 20


def _is_size(value: object, largest: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= largest


def swiglu_hidden(hidden_size: int, mlp_ratio: float, multiple_of: int = 256) -> int:
    """Width of the gated FFN: two thirds of `mlp_ratio * hidden_size`, rounded up to a multiple of 256."""
    hidden = int(2 * int(hidden_size * mlp_ratio) / 3)
    return multiple_of * ((hidden + multiple_of - 1) // multiple_of)


@dataclass(frozen=True)
class AudioConfig:
    """Shape of what the avatar network adds to hear audio. The defaults are LongCat-Video-Avatar 1.5.

    Every video frame has a window of embeddings, [window, groups, channels]; `frames` video frames make a latent frame,
    which hears `tokens` tokens of `width` channels. prenorm: whether blocks norm these tokens. class_range and
    class_interval: the RoPE positions that tell several speakers apart.
    """

    window: int = 5
    groups: int = 5
    channels: int = 1280
    hidden: int = 512
    width: int = 768
    tokens: int = 32
    frames: int = 4
    prenorm: bool = False
    class_range: int = 24
    class_interval: int = 4

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not (isinstance(value, bool) if field.type == "bool" else _is_size(value, LARGEST)):
                raise LongCatError(f"model config: audio {field.name} is {value!r}; give the model's own config")
        if self.window % 2 == 0 or self.frames < 2:
            raise LongCatError(
                f"model config: audio windows of {self.window} for {self.frames} frames; the window must be odd, and a "
                "latent frame has at least 2 frames"
            )

    @property
    def entries(self) -> tuple[int, int]:
        """Window entries that make up the first latent frame, which is one video frame, and each later one."""
        return self.window, self.window + self.frames - 1


# Our names of the keys of an official config.
_AUDIO_NAMES = {
    "audio_window": "window",
    "audio_block": "groups",
    "audio_channel": "channels",
    "intermediate_dim": "hidden",
    "output_dim": "width",
    "context_tokens": "tokens",
    "vae_scale": "frames",
    "audio_prenorm": "prenorm",
    "class_range": "class_range",
    "class_interval": "class_interval",
}


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a LongCat-Video transformer. The defaults are the released 13.58 B model.

    Channels count features, not bytes; `patch_size` is (frames, rows, columns) of latents per token. audio: None for a
    network that hears nothing; LongCat-Video-Avatar has it.
    """

    in_channels: int = 16
    out_channels: int = 16
    hidden_size: int = 4096
    depth: int = 48
    num_heads: int = 32
    caption_channels: int = 4096
    ffn_hidden: int = 11008
    adaln_dim: int = 512
    frequency_dim: int = 256
    patch_size: tuple[int, int, int] = (1, 2, 2)
    text_tokens_zero_pad: bool = True
    audio: AudioConfig | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type == "int" and not _is_size(value, LARGEST):
                raise LongCatError(f"model config: {field.name} is {value!r}; it must be a whole number from 1 to 2^20")
        if not isinstance(self.text_tokens_zero_pad, bool):
            raise LongCatError(
                f"model config: text_tokens_zero_pad is {self.text_tokens_zero_pad!r}, not true or false"
            )
        if self.hidden_size % self.num_heads:
            raise LongCatError(f"model config: {self.num_heads} heads do not divide hidden_size {self.hidden_size}")
        if self.head_dim % 8:
            # An even share of channels for each of the three axes of RoPE needs it.
            raise LongCatError(f"model config: head dim {self.head_dim} must be a multiple of 8 for 3-D RoPE")
        size = self.patch_size
        if not isinstance(size, tuple) or len(size) != 3 or not all(_is_size(n, 256) for n in size) or size[0] != 1:
            raise LongCatError(f"model config: patch_size {size} must be 1 frame and whole numbers of rows and columns")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelConfig:
        """Read the keys of an official `dit/config.json`, and no others. Raises LongCatError for a wrong value."""
        names = {
            "adaln_tembed_dim": "adaln_dim",
            "frequency_embedding_size": "frequency_dim",
            # FastVideo's word.
            "num_attention_heads": "num_heads",
        }
        known = {f.name for f in fields(cls)}
        kwargs = {names.get(k, k): v for k, v in values.items() if names.get(k, k) in known}
        if "patch_size" in kwargs:
            size = kwargs["patch_size"]
            kwargs["patch_size"] = tuple(size) if isinstance(size, list) else size
        # Ours, or the keys of an official config.
        audio = values.get("audio") or {ours: values[key] for key, ours in _AUDIO_NAMES.items() if key in values}
        if audio and not isinstance(audio, Mapping):
            raise LongCatError(f"model config: audio is {audio!r}; give the model's own config")
        known = {f.name for f in fields(AudioConfig)}
        kwargs["audio"] = AudioConfig(**{k: v for k, v in audio.items() if k in known}) if audio else None
        if "ffn_hidden" not in kwargs:
            hidden, ratio = kwargs.get("hidden_size", cls.hidden_size), values.get("mlp_ratio", 4)
            if not _is_size(hidden, LARGEST) or not isinstance(ratio, int | float) or not 0 < ratio <= LARGEST:
                raise LongCatError(f"model config: hidden_size {hidden!r} and mlp_ratio {ratio!r} give no hidden size")
            kwargs["ffn_hidden"] = swiglu_hidden(hidden, ratio)
        return cls(**kwargs)

    @classmethod
    def from_json(cls, path: Path) -> ModelConfig:
        """`from_dict` of a file of our own; `checkpoints.load.read_config` reads other people's."""
        return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))

    def to_dict(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value is not None}
