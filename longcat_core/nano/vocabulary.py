"""LongCat-nano's vocabulary and text encoder: trained here, readable by anything that reads UMT5."""

from __future__ import annotations

import io
import string
import tempfile
from collections.abc import Sequence
from contextlib import chdir
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..checkpoints.umt5 import SPIECE
from ..errors import LongCatError
from ..files.safetensors_io import write_safetensors
from ..generate.text import EOS, FIXED_CONFIG, PAD

if TYPE_CHECKING:
    from transformers import UMT5EncoderModel

SIZE = 384
UNKNOWN = 2
# Earlier versions end the process over a required character that the corpus lacks.
TRAINER = (0, 2, 3)
# SentencePiece's own case folding is a table of 240 kB; captions need only ASCII, plain quotes and spaces.
SIGNS = {"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2013": "-", "\u2014": "-"}
FOLDING = {upper: upper.lower() for upper in string.ascii_uppercase} | SIGNS | dict.fromkeys("\t\n\r\u00a0", " ")
CHARACTERS = "".join(sorted(set(string.printable) - set(string.whitespace) - set(string.ascii_uppercase)))


def train_vocabulary(corpus: Sequence[str], size: int = SIZE) -> bytes:
    """A SentencePiece model (serialized proto) of at most `size` pieces: pad 0, EOS 1, unknown 2, lower-casing.

    Byte-pair encoding rather than unigram: the unigram trainer seeds from substrings that two different words share,
    so a small corpus's most frequent words fall apart. Every printable ASCII character is a piece. Same corpus, same
    bytes.
    """
    from sentencepiece import SentencePieceTrainer, __version__

    if size < len(CHARACTERS) + 4:
        raise LongCatError(f"a vocabulary needs at least {len(CHARACTERS) + 4} pieces, got {size}")
    if not any(line.strip() for line in corpus):
        raise LongCatError("the corpus for the vocabulary is empty")
    if tuple(int(part) for part in __version__.split(".")[:3]) < TRAINER:
        raise LongCatError(f"sentencepiece {__version__} cannot train a vocabulary; install 0.2.3 or newer")
    proto = io.BytesIO()
    # The model keeps the path of its rules, which must not differ from run to run: one relative to the folder.
    with tempfile.TemporaryDirectory() as folder, chdir(folder):
        rules = Path("folding.tsv")
        rules.write_text("".join(f"{ord(a):X}\t{ord(b):X}\n" for a, b in FOLDING.items()), encoding="ascii")
        SentencePieceTrainer.train(
            sentence_iterator=iter(corpus),
            model_writer=proto,
            model_type="bpe",
            vocab_size=size,
            hard_vocab_limit=False,
            pad_id=PAD,
            eos_id=EOS,
            unk_id=UNKNOWN,
            bos_id=-1,
            required_chars=CHARACTERS,
            character_coverage=1.0,
            normalization_rule_tsv=str(rules),
            num_threads=1,
            shuffle_input_sentence=False,
            minloglevel=2,
        )
    return proto.getvalue()


def new_text_encoder(
    vocab: bytes, d_model: int = 128, d_ff: int = 256, num_layers: int = 2, num_heads: int = 4, d_kv: int = 32
) -> UMT5EncoderModel:
    """A fresh fp32 UMT5 encoder for the vocabulary, its weights drawn from PyTorch's global generator."""
    from sentencepiece import SentencePieceProcessor
    from transformers import UMT5Config, UMT5EncoderModel

    config = UMT5Config(
        vocab_size=SentencePieceProcessor(model_proto=vocab).get_piece_size(),
        d_model=d_model,
        d_ff=d_ff,
        num_layers=num_layers,
        num_heads=num_heads,
        d_kv=d_kv,
        **FIXED_CONFIG,
    )
    return UMT5EncoderModel(config)


def save_text_encoder(
    path: str | Path, model: UMT5EncoderModel, vocab: bytes, dtype: torch.dtype = torch.bfloat16
) -> None:
    """Write the single-file form: Hugging Face T5 names and the vocabulary as uint8 tensor `spiece_model`."""
    # Without the tied copy of the embedding.
    tensors = {name: parameter.detach().to(dtype) for name, parameter in model.named_parameters()}
    tensors[SPIECE] = torch.frombuffer(bytearray(vocab), dtype=torch.uint8)
    write_safetensors(path, tensors)
