"""The files of audio encoders, wav2vec2 and Whisper, by transformers' names under any prefix; sizes by their shapes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, is_whole
from ..files.records import read_record
from ..files.tensor_files import HeldTensors
from .formats import Format, Table
from .reader import Watch
from .stored import Stored, json_metadata
from .whole import open_whole, read_whole

WAV2VEC2, WHISPER = "wav2vec2", "whisper"
REMEDY = "give chinese-wav2vec2-base for LongCat-Video-Avatar 1.0, or whisper-large-v3 for 1.5"
# The folders of the official roots.
FOLDERS = ("chinese-wav2vec2-base", "whisper-large-v3")
# Beside other precisions of the same model.
MODEL_FILE = "model.safetensors"
# The metadata of a single file that may say how many heads there are, as an object with this key.
METADATA, HEADS = "config", "heads"
# Channels of a head of every published encoder of these kinds.
HEAD_CHANNELS = 64
CONVOLUTIONS = 7
# What a checkpoint for training has besides.
BESIDE = ("masked_spec_embed",)


def _same(modules: tuple[str, ...]) -> Table:
    return {module: (module,) for module in modules}


_ATTENTION = tuple(f"{{}}.{part}_proj" for part in ("q", "k", "v", "out"))
_POSITIONS = "encoder.pos_conv_embed.conv"
# How the normed weight of the convolution is stored: its module, its magnitude, its direction.
_NORMED = ((_POSITIONS, "weight_g", "weight_v"), (f"{_POSITIONS}.parametrizations.weight", "original0", "original1"))
_FEATURES = "feature_extractor.conv_layers"
_FORMS = (
    Format(
        WAV2VEC2,
        (f"{_FEATURES}.0.conv.", "feature_projection.projection.", "encoder.layers.0.attention."),
        _same(
            (
                *(f"{_FEATURES}.{i}.conv" for i in range(CONVOLUTIONS)),
                f"{_FEATURES}.0.layer_norm",
                "feature_projection.layer_norm",
                "feature_projection.projection",
                *(module for module, *_ in _NORMED),
                "encoder.layer_norm",
            )
        ),
        _same(
            (
                *(part.format("attention") for part in _ATTENTION),
                "layer_norm",
                "feed_forward.intermediate_dense",
                "feed_forward.output_dense",
                "final_layer_norm",
            )
        ),
        "encoder.layers.{i}.",
        "encoder.layers.{i}.",
        "wav2vec2 or Whisper encoder",
    ),
    Format(
        WHISPER,
        ("conv1.", "conv2.", "embed_positions.", "layers.0.self_attn."),
        _same(("conv1", "conv2", "embed_positions", "layer_norm")),
        _same(
            (*(part.format("self_attn") for part in _ATTENTION), "self_attn_layer_norm", "fc1", "fc2",
             "final_layer_norm")
        ),
        "layers.{i}.",
        "layers.{i}.",
        "wav2vec2 or Whisper encoder",
    ),
)  # fmt: skip


@dataclass(frozen=True)
class AudioEncoderFiles(Stored):
    """An opened audio encoder. kind: WAV2VEC2 or WHISPER. heads: of each layer."""

    kind: str
    heads: int

    def shape(self, name: str, sides: int) -> tuple[int, ...]:
        """Of a tensor with this many sides, each at least 1. Raises CheckpointError."""
        shape = self.shapes.get(name, ())
        if len(shape) != sides or not all(shape):
            has = f"has shape {list(shape)} in '{name}'" if name in self.shapes else f"lacks '{name}'"
            raise CheckpointError(f"{self.source} {has}, so it is not a whole {self.kind} encoder; {REMEDY}")
        return shape

    @property
    def position_weight(self) -> str:
        """The tensor that has the shape of the weight of wav2vec2's position convolution."""
        names = [f"{module}.{direction}" for module, _, direction in _NORMED]
        return next((name for name in names if name in self.where), f"{_POSITIONS}.weight")

    def state(
        self, parameters: Mapping[str, Tensor], device: torch.device | str = "cpu", watch: Watch | None = None
    ) -> dict[str, Tensor]:
        """The network's parameters, which lie on the meta device, in their dtypes on `device`; see `read_whole`.

        The normed weight of wav2vec2's convolution is multiplied out.
        """
        wanted, weight = dict(parameters), f"{_POSITIONS}.weight"
        normed = next((parts for parts in _NORMED if f"{parts[0]}.{parts[1]}" in self.where), None)
        if weight in wanted and normed is not None:
            direction = wanted.pop(weight)
            module, *kinds = normed
            shapes = ((1, 1, direction.shape[2]), direction.shape)
            for kind, shape in zip(kinds, shapes, strict=True):
                wanted[f"{module}.{kind}"] = direction.new_empty(shape)
        state = read_whole(self, wanted, device, watch)
        if weight not in wanted and normed is not None:
            module, *kinds = normed
            magnitude, values = (state.pop(f"{module}.{kind}") for kind in kinds)
            # Its norm at each tap of the kernel is stored by itself (arXiv 1602.07868).
            state[weight] = magnitude * values / torch.linalg.vector_norm(values, dim=(0, 1), keepdim=True)
        return state


def open_audio_encoder(
    path: Path, config: Path | None = None, tensors: Mapping[str, Tensor] | None = None
) -> AudioEncoderFiles:
    """Parse the headers of an audio encoder: a file, its folder, or the official root that holds the folder.

    config: its config.json where that is not in the folder. tensors: what another program has read of it; then `path`
    is what sentences name. Raises CheckpointError for anything but a wav2vec2 of base form or a Whisper.
    """
    path = next((path / name for name in FOLDERS if (path / name).is_dir()), path)
    config = config or (path / "config.json" if (path / "config.json").exists() else None)
    weights = path / MODEL_FILE if (path / MODEL_FILE).exists() else path
    files = None if tensors is None else {weights: HeldTensors(tensors)}
    stored = open_whole(weights, _FORMS, REMEDY, BESIDE, files)
    kind = stored.form.name
    opened = AudioEncoderFiles(**vars(stored), kind=kind, heads=0)
    width = opened.shape("encoder.layer_norm.weight" if kind == WAV2VEC2 else "layer_norm.weight", 1)[0]
    found: dict[str, Any] = {}
    for file in opened.files.values():
        found |= json_metadata(file.metadata, METADATA, opened.source)
    heads = found.get(HEADS) or _heads(config, opened, width) or width // HEAD_CHANNELS
    if not is_whole(heads) or heads < 1 or width % heads:
        raise CheckpointError(
            f"{opened.source} has {width} channels, which {heads} heads do not divide; give its folder with its own "
            "config.json"
        )
    return replace(opened, heads=heads)


@dataclass(frozen=True)
class Config:
    """What is read of an audio encoder's config.json."""

    model_type: str
    hidden_size: int | None = None
    num_attention_heads: int | None = None
    do_stable_layer_norm: bool = False
    feat_extract_norm: str = "group"
    d_model: int | None = None
    encoder_attention_heads: int | None = None


def _heads(config: Path | None, opened: AudioEncoderFiles, width: int) -> int | None:
    """The heads that a config.json says. Raises CheckpointError for one of another model."""
    if config is None:
        return None
    found = read_record(config, Config, "an audio encoder config", "download it again", error=CheckpointError)
    if found.model_type != opened.kind or (found.hidden_size or found.d_model or width) != width:
        raise CheckpointError(
            f"{config} describes a {found.model_type} of {found.hidden_size or found.d_model} channels, the files "
            f"beside it hold a {opened.kind} of {width}; download it again"
        )
    if found.do_stable_layer_norm or found.feat_extract_norm != "group":
        raise CheckpointError(f"{config} describes a wav2vec2 with layers of another order; {REMEDY}")
    return found.num_attention_heads or found.encoder_attention_heads
