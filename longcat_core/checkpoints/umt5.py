"""The UMT5 encoder's forms as tables of names, its sizes by the shapes of its tensors, and its SentencePiece model."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..files.tensor_files import GgufFile, TensorFile
from .formats import Format
from .formats import times_scale as dequantise  # the name by which scripts import it
from .gguf_vocabulary import spiece_of
from .reader import Watch
from .stored import Stored, stored_part
from .whole import open_whole, read_each

__all__ = ["NORM", "SHARED", "SPIECE", "Umt5", "dequantise", "open_umt5"]

SPIECE = "spiece_model"  # the SentencePiece model itself, as bytes
# What files hold besides the encoder: its vocabulary, the tied copy of the embedding, and ComfyUI's scale for logits.
BESIDE = (SPIECE, "encoder.embed_tokens.weight", "logit_scale")
REMEDY = "choose umt5_xxl, or longcat_nano_umt5 for the test model"

SHARED, NORM = "shared", "encoder.final_layer_norm"
# The modules of a block by transformers' names, then by Wan's and llama.cpp's.
_BLOCK = {
    "layer.0.layer_norm": ("norm1", "attn_norm"),
    "layer.0.SelfAttention.q": ("attn.q", "attn_q"),
    "layer.0.SelfAttention.k": ("attn.k", "attn_k"),
    "layer.0.SelfAttention.v": ("attn.v", "attn_v"),
    "layer.0.SelfAttention.o": ("attn.o", "attn_o"),
    "layer.0.SelfAttention.relative_attention_bias": ("pos_embedding.embedding", "attn_rel_b"),
    "layer.1.layer_norm": ("norm2", "ffn_norm"),
    "layer.1.DenseReluDense.wi_0": ("ffn.gate.0", "ffn_gate"),
    "layer.1.DenseReluDense.wi_1": ("ffn.fc1", "ffn_up"),
    "layer.1.DenseReluDense.wo": ("ffn.fc2", "ffn_down"),
}


def _format(name: str, embedding: str, norm: str, block_prefix: str, column: int | None = None) -> Format:
    """A form with these names; column: of the table above, None for transformers' own."""
    block = {module: (module if column is None else names[column],) for module, names in _BLOCK.items()}
    return Format(
        name,
        (f"{embedding}.", block_prefix.format(i=0)),
        {SHARED: (embedding,), NORM: (norm,)},
        block,
        block_prefix,
        "encoder.block.{i}.",
        "UMT5 encoder",
    )


TRANSFORMERS = _format("transformers", "shared", "encoder.final_layer_norm", "encoder.block.{i}.")
FORMS = (
    TRANSFORMERS,
    # The encoder's stack alone, or a file in which the embedding has its tied name only.
    _format("transformers' stack", "embed_tokens", "final_layer_norm", "block.{i}."),
    _format("Wan", "token_embedding", "norm", "blocks.{i}.", 0),
    _format("llama.cpp", "token_embd", "enc.output_norm", "enc.blk.{i}.", 1),
)


@dataclass(frozen=True)
class Umt5(Stored):
    """An opened UMT5 encoder. sizes: UMT5Config's, by the shapes of the tensors. spiece: file and name of the tensor
    that is the SentencePiece model, or None."""

    sizes: dict[str, int]
    spiece: tuple[Path, str] | None

    def vocabulary(self) -> bytes | None:
        """The SentencePiece model that the files carry, or None. Raises CheckpointError for one that is not bytes."""
        if self.spiece is None:
            found = (spiece_of(file) for file in self.files.values() if isinstance(file, GgufFile))
            return next((vocabulary for vocabulary in found if vocabulary is not None), None)
        file, name = self.spiece
        stored = self.files[file].rows(name)
        if stored.ndim != 1:
            raise CheckpointError(
                f"{file} has a SentencePiece model ('{name}') of shape {list(stored.shape)}, not one row of bytes; "
                "download it again"
            )
        # A cast of the whole file to 16 bits keeps bytes as they are.
        values = stored.to(torch.uint8)
        if not torch.equal(values.double(), stored.double()):
            raise CheckpointError(f"{file} has a SentencePiece model ('{name}') that is not bytes; download it again")
        return values.numpy().tobytes()

    def weights(
        self,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        watch: Watch | None = None,
        tokens: Tensor | None = None,
    ) -> Generator[tuple[str, Tensor]]:
        """All weights with transformers' names, without the tied copy of the embedding, as `read_each` reads them: the
        embedding, the last norm, then block by block. tokens: the embedding's rows that are wanted; None: all."""
        rows, width, inner = (
            self.sizes["vocab_size"],
            self.sizes["d_model"],
            self.sizes["d_kv"] * self.sizes["num_heads"],
        )
        into, out, norm = (inner, width), (width, inner), (width,)
        gate, down = (self.sizes["d_ff"], width), (width, self.sizes["d_ff"])
        bias = (self.sizes["relative_attention_num_buckets"], self.sizes["num_heads"])
        block = dict(zip(_BLOCK, (norm, into, into, into, out, bias, norm, gate, gate, down), strict=True))
        shapes = {SHARED: (rows, width), NORM: norm}
        shapes |= {f"encoder.block.{i}.{name}": shape for i in range(self.depth) for name, shape in block.items()}
        # Like transformers itself: the output of the feed-forward overflows fp16.
        wide = torch.float32 if dtype == torch.float16 else dtype
        parameters = {
            f"{module}.weight": torch.empty(shape, dtype=wide if module.endswith(".wo") else dtype, device="meta")
            for module, shape in shapes.items()
        }
        return read_each(self, parameters, device, watch, {} if tokens is None else {f"{SHARED}.weight": tokens})


def open_umt5(path: Path, files: Mapping[Path, TensorFile] | None = None) -> Umt5:
    """Parse the headers of a UMT5 encoder in any form: a file, or a folder with its files.

    files: the opened files, unless they are to be found at `path`. Raises CheckpointError for anything but a UMT5
    encoder with a gated feed-forward.
    """
    stored = open_whole(path, FORMS, REMEDY, BESIDE, files)
    spiece = next(
        (
            (file, name)
            for file, opened in stored.files.items()
            for name in opened.header
            if name.rpartition(".")[2] == SPIECE
        ),
        None,
    )
    return Umt5(**vars(stored), sizes=_sizes(stored), spiece=spiece)


def _sizes(stored: Stored) -> dict[str, int]:
    table: Mapping[str, tuple[str, ...]] = dict(stored.form.modules(min(stored.depth, 2)))
    source, block = stored.source, "encoder.block.{}.layer.{}.".format

    def sides(module: str) -> tuple[int, int]:
        part = stored_part(stored.where, table[module][0], "weight") if module in table else None
        shape = () if part is None else stored.shapes[part.name]
        if len(shape) != 2 or not all(shape):
            name = table.get(module, (module,))[0]
            raise CheckpointError(f"{source} is not a UMT5 encoder: it has no matrix '{name}.weight'; {REMEDY}")
        return shape[0], shape[1]

    vocab_size, d_model = sides(SHARED)
    buckets, num_heads = sides(block(0, 0) + "SelfAttention.relative_attention_bias")
    inner, _ = sides(block(0, 0) + "SelfAttention.q")
    d_ff, _ = sides(block(0, 1) + "DenseReluDense.wi_0")
    # T5 1.1 has the same names, but one position bias for all blocks.
    bias = table.get(block(1, 0) + "SelfAttention.relative_attention_bias")
    if bias is not None and stored_part(stored.where, bias[0], "weight") is None:
        raise CheckpointError(f"{source} is a T5 encoder, not UMT5, which has a position bias in every block; {REMEDY}")
    if inner % num_heads:
        raise CheckpointError(
            f"{source} has {num_heads} heads, which do not divide its {inner} attention channels; {REMEDY}"
        )
    return {
        "vocab_size": vocab_size,
        "d_model": d_model,
        "d_kv": inner // num_heads,
        "d_ff": d_ff,
        "num_layers": stored.depth,
        "num_heads": num_heads,
        "relative_attention_num_buckets": buckets,
    }
