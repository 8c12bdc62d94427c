"""The vocabulary that llama.cpp writes into a GGUF file, as the SentencePiece model that it was made from.

Fields of the model: https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto
"""

from __future__ import annotations

import struct
from typing import Any

from ..errors import CheckpointError
from ..files.tensor_files import GgufFile

# By the name that the file gives: SentencePiece's number of the kind of model.
MODELS = {"t5": 1, "llama": 2}
# Numbers of the special tokens in UMT5's vocabulary.
UNKNOWN, PAD, EOS = 2, 0, 1


def spiece_of(file: GgufFile) -> bytes | None:
    """The SentencePiece model of a file's tokens; None for a file without tokens. Raises CheckpointError."""
    tokens, scores, kinds = (file.values(f"tokenizer.ggml.{name}") for name in ("tokens", "scores", "token_type"))
    if not tokens:
        return None
    model = file.metadata.get("tokenizer.ggml.model", "")
    if model not in MODELS:
        raise CheckpointError(
            f"{file.path} has a vocabulary of kind '{model}', not UMT5's; use the safetensors form of umt5_xxl"
        )
    charsmap = file.values("tokenizer.ggml.precompiled_charsmap")
    whole = len(tokens) == len(scores) == len(kinds) and all(isinstance(value, int) for value in charsmap)
    if not whole or not all(
        isinstance(token, str) and isinstance(score, float) and isinstance(kind, int) and 1 <= kind <= 6
        for token, score, kind in zip(tokens, scores, kinds, strict=True)
    ):
        raise CheckpointError(
            f"{file.path} has a vocabulary without a score and a type for each token; download it again"
        )
    pieces = (
        _field(1, _field(1, token.encode()) + _key(2, 5) + struct.pack("<f", score) + _number(3, kind))
        for token, score, kind in zip(tokens, scores, kinds, strict=True)
    )
    trainer = _number(3, MODELS[model]) + _number(4, len(tokens)) + _number(40, UNKNOWN)
    # -1, for a vocabulary without a begin of sentence, takes all 64 bits.
    trainer += _number(41, (1 << 64) - 1) + _number(42, EOS) + _number(43, PAD)
    normalizer = _field(2, bytes(value & 255 for value in charsmap)) + b"".join(
        _number(number, file.flag(f"tokenizer.ggml.{name}", True))
        for number, name in ((3, "add_space_prefix"), (4, "remove_extra_whitespaces"))
    )
    return b"".join(pieces) + _field(2, trainer) + _field(3, normalizer)


def _varint(value: int) -> bytes:
    found = bytearray()
    while value > 127:
        found.append(value & 127 | 128)
        value >>= 7
    return bytes(found) + bytes([value])


def _key(number: int, kind: int) -> bytes:
    return _varint(number << 3 | kind)


def _number(number: int, value: Any) -> bytes:
    return _key(number, 0) + _varint(int(value))


def _field(number: int, content: bytes) -> bytes:
    return _key(number, 2) + _varint(len(content)) + content
