"""Prompts to text embeddings, by a UMT5 encoder and SentencePiece."""

from __future__ import annotations

import contextlib
import html
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from ..checkpoints.reader import Watch
from ..checkpoints.umt5 import SPIECE, Umt5, open_umt5
from ..errors import CheckpointError, LongCatError
from ..files.records import FiniteFloat, read_record
from ..files.regular import read_bytes, read_text
from .umt5 import Umt5Config, Umt5Encoder

PAD, EOS = 0, 1
MAX_LENGTH = 512
# Rows that an embedding may have beyond its vocabulary; UMT5-XXL has 384.
SPARE_ROWS = 1024
MAX_CONFIG_BYTES, MAX_DISTANCE = 1_000_000, 1 << 20
# Cannot be inferred from shapes; the same in every published UMT5.
FIXED_CONFIG: dict[str, object] = {
    "feed_forward_proj": "gated-gelu",
    "layer_norm_epsilon": 1e-6,
    "relative_attention_max_distance": 128,
    "dropout_rate": 0.0,
    "pad_token_id": PAD,
    "eos_token_id": EOS,
}

Tokenize = Callable[[str], list[int]]


class TextEncoder:
    """A UMT5 encoder with its tokenizer: `tokenize` turns cleaned text into ids, without EOS."""

    def __init__(self, model: Umt5Encoder, tokenize: Tokenize) -> None:
        self.model = model.eval()
        self.tokenize = tokenize

    @property
    def dtype(self) -> torch.dtype:
        return self.model.shared.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.model.shared.weight.device

    @property
    def nbytes(self) -> int:
        """Bytes of all weights."""
        return sum(parameter.nbytes for parameter in self.model.parameters())

    @property
    def channels(self) -> int:
        """Length of an embedding, which the transformer's `caption_channels` must equal."""
        return self.model.config.d_model

    def to(self, device: str | torch.device) -> TextEncoder:
        """Move in place; returns self."""
        self.model.to(device=device)
        return self

    def tokens(self, prompts: list[str], max_length: int = MAX_LENGTH) -> tuple[Tensor, Tensor]:
        """Ids and mask, both [B, max_length] int64 on the CPU: truncated to max_length with EOS last, padded with 0."""
        if max_length < 1:
            raise LongCatError(f"max_length must be at least 1 token, got {max_length}")
        if isinstance(prompts, str) or not prompts:
            raise LongCatError("the text encoder takes a list of at least one prompt")
        ids = torch.full((len(prompts), max_length), PAD, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            tokens = [*self.tokenize(clean_prompt(prompt))[: max_length - 1], EOS]
            ids[row, : len(tokens)] = torch.tensor(tokens)
            mask[row, : len(tokens)] = 1
        return ids, mask

    def encode(self, prompts: list[str], max_length: int = MAX_LENGTH) -> tuple[Tensor, Tensor]:
        """Embeddings [B, max_length, D] fp32, zero where padded, and mask [B, max_length] int64 (1: token or EOS).

        Computed in the encoder's dtype. An empty prompt becomes EOS alone. Raises LongCatError for an empty list, and
        for embeddings that are not finite.
        """
        return self.encode_each([prompts], max_length)[0]

    @torch.no_grad()
    def encode_each(
        self, batches: Sequence[list[str]], max_length: int = MAX_LENGTH, watch: Watch | None = None
    ) -> list[tuple[Tensor, Tensor]]:
        """`encode` of every batch. watch: called after every piece that a `StreamedTextEncoder` reads."""
        inputs, found = [], []
        for ids, mask in [self.tokens(prompts, max_length) for prompts in batches]:
            # Padding is masked out of attention, so columns that are padding in every row need not be computed.
            used = int(mask.sum(1).max())
            inputs.append((ids[:, :used], mask[:, :used].to(self.device)))
        for (_, mask), hidden in zip(inputs, self._hidden(inputs, watch), strict=True):
            if not hidden[mask.bool()].isfinite().all():
                raise LongCatError(f"the text encoder overflows in {self.dtype}; load it as bfloat16 or float32")
            more = max_length - mask.shape[1]
            found.append((F.pad(hidden.float() * mask[..., None], (0, 0, 0, more)), F.pad(mask, (0, more))))
        return found

    def _hidden(self, inputs: Sequence[tuple[Tensor, Tensor]], watch: Watch | None) -> list[Tensor]:
        """Hidden states [B, N, D] of ids [B, N] on the CPU and masks [B, N]."""
        return [self.model(self.model.shared(ids.to(self.device)), mask) for ids, mask in inputs]


class StreamedTextEncoder(TextEncoder):
    """A text encoder that reads its file for every call and holds a block or two at a time.

    model: on the meta device, for its structure. The results are those of `TextEncoder`.
    """

    def __init__(
        self, model: Umt5Encoder, tokenize: Tokenize, opened: Umt5, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        """Raises CheckpointError for files that do not make up the encoder."""
        super().__init__(model, tokenize)
        self._opened, self._dtype, self._device = opened, dtype, torch.device(device)
        opened.weights(dtype, device)

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    @property
    def device(self) -> torch.device:
        return self._device

    def _hidden(self, inputs: Sequence[tuple[Tensor, Tensor]], watch: Watch | None) -> list[Tensor]:
        encoder = self.model.encoder
        ids = [each.contiguous() for each, _ in inputs]
        rows = torch.cat([each.flatten() for each in ids]).unique()
        with contextlib.closing(self._opened.weights(self.dtype, self.device, watch, rows)) as weights:
            table, norm = (weight for _, weight in islice(weights, 2))
            hidden = [F.embedding(torch.searchsorted(rows, each).to(self.device), table) for each in ids]
            where = [encoder.where(mask) for _, mask in inputs]
            for i, block in enumerate(encoder.block):
                some, prefix = islice(weights, len(list(block.parameters()))), f"encoder.block.{i}."
                state = {name.removeprefix(prefix): weight for name, weight in some}
                hidden = [
                    functional_call(block, state, (x, *given), strict=True)
                    for x, given in zip(hidden, where, strict=True)
                ]
            # Behind the last one it is known whether all are finite.
            next(weights, None)
            return [functional_call(encoder.final_layer_norm, {"weight": norm}, (x,)) for x in hidden]


def clean_prompt(text: str) -> str:
    """Repair mojibake (ftfy), unescape HTML twice, collapse whitespace, as LongCat-Video's own pipeline does."""
    try:
        import ftfy
    except ImportError as error:
        raise _missing("ftfy", error) from error
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return re.sub(r"\s+", " ", text).strip()


def load_text_encoder(
    path: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    opened: Umt5 | None = None,
    watch: Watch | None = None,
    streams: bool = False,
) -> TextEncoder:
    """A UMT5 encoder from one file, or from the official folders `text_encoder/` and `tokenizer/`.

    Names are transformers', Wan's or llama.cpp's, under any prefix; weights may be quantized as a transformer's may
    (`checkpoints.formats`). A single file carries its SentencePiece model as tensor `spiece_model`, or has it beside
    it. For the folder form, `path` is `text_encoder/` or its parent. opened: what `open_umt5` gave for it. watch:
    called after every piece that is read, with the bytes so far and those of all. streams: leave the weights in the
    files; see `StreamedTextEncoder`. Raises CheckpointError for files that are unreadable, incomplete or not a UMT5
    encoder, for a weight that is not finite and for a tokenizer of another model, LongCatError without sentencepiece.
    """
    folder = folder_of(Path(path))
    opened = open_umt5(folder) if opened is None else opened
    settings = _read_config(folder / "config.json", opened) if (folder / "config.json").exists() else {}
    tokenizer = tokenizer_of(opened)
    with torch.device("meta"):
        model = Umt5Encoder(Umt5Config(**opened.sizes, **settings))
    if streams:
        return StreamedTextEncoder(model.requires_grad_(False), tokenizer.encode, opened, dtype, device)
    model.load_state_dict(dict(opened.weights(dtype, device, watch)), assign=True)
    return TextEncoder(model.requires_grad_(False), tokenizer.encode)


def folder_of(path: Path) -> Path:
    """The text encoder's file, or its own folder where `path` is the parent."""
    return path / "text_encoder" if (path / "text_encoder").is_dir() else path


def _missing(package: str, error: ImportError) -> LongCatError:
    return LongCatError(f"text needs the {package} package ({error}); run: pip install 'longcat-video[headless]'")


@dataclass(frozen=True)
class Config:
    """What is read of a text encoder's config.json. Sizes are compared with the files, the rest is used."""

    model_type: str
    vocab_size: int | None = None
    d_model: int | None = None
    d_kv: int | None = None
    d_ff: int | None = None
    num_layers: int | None = None
    num_heads: int | None = None
    relative_attention_num_buckets: int | None = None
    feed_forward_proj: str = str(FIXED_CONFIG["feed_forward_proj"])
    layer_norm_epsilon: FiniteFloat = 1e-6
    relative_attention_max_distance: int = 128


def _read_config(file: Path, opened: Umt5) -> dict[str, Any]:
    """`Umt5Config`'s settings that do not follow from shapes."""
    remedy = "download it again"
    config = read_record(file, Config, "a text encoder config", remedy, MAX_CONFIG_BYTES, CheckpointError)
    if config.model_type != "umt5":
        raise CheckpointError(
            f"{file} describes a text encoder of type '{config.model_type}'; LongCat-Video needs umt5"
        )
    wanted = opened.sizes | {"feed_forward_proj": FIXED_CONFIG["feed_forward_proj"]}
    for name, value in wanted.items():
        if (given := getattr(config, name)) not in (None, value):
            raise CheckpointError(f"{file} has {name} {given}, the files beside it {value}; {remedy}")
    distance, buckets = config.relative_attention_max_distance, opened.sizes["relative_attention_num_buckets"]
    if not (0 < config.layer_norm_epsilon < 1 and buckets <= distance < MAX_DISTANCE):
        raise CheckpointError(
            f"{file} has layer_norm_epsilon {config.layer_norm_epsilon} and relative_attention_max_distance "
            f"{distance}, which no UMT5 encoder has; {remedy}"
        )
    return {"layer_norm_epsilon": config.layer_norm_epsilon, "relative_attention_max_distance": distance}


# --- tokenizers ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tokenizer:
    """encode: cleaned text to ids, without EOS. pieces: ids that it may give are below. source: its file."""

    encode: Tokenize
    pieces: int
    source: Path


def tokenizer_of(opened: Umt5) -> Tokenizer:
    """The tokenizer in a text encoder's files, else beside them. Raises CheckpointError for one of another model."""
    vocabulary, path, rows = opened.vocabulary(), Path(opened.source), opened.sizes["vocab_size"]
    tokenizer = _tokenizer_beside(path) if vocabulary is None else _sentencepiece(vocabulary, path)
    if not tokenizer.pieces <= rows <= tokenizer.pieces + SPARE_ROWS:
        raise CheckpointError(
            f"the tokenizer in {tokenizer.source} has {tokenizer.pieces} pieces, the embedding of {path} has {rows} "
            "rows; give the tokenizer that belongs to the text encoder"
        )
    return tokenizer


def _sentencepiece(proto: bytes, source: Path) -> Tokenizer:
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError as error:
        raise _missing("sentencepiece", error) from error
    try:
        processor = SentencePieceProcessor()
        processor.LoadFromSerializedProto(proto)
        pieces, eos = processor.get_piece_size(), processor.eos_id()
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(f"the SentencePiece model in {source} is corrupt; download it again") from error
    _check_eos(eos, source)
    return Tokenizer(processor.encode, pieces, source)


def _check_eos(eos: int | None, source: Path) -> None:
    if eos != EOS:
        raise CheckpointError(
            f"the tokenizer in {source} has EOS id {eos}, UMT5's is {EOS}; give the tokenizer of the text encoder"
        )


def _places(path: Path) -> list[Path]:
    folder = path if path.is_dir() else path.parent
    # Where LongCat-Video keeps it, beside the files, and where Wan does.
    places = [folder, folder / "tokenizer", folder / "google" / "umt5-xxl"]
    return [folder.parent / "tokenizer", *places] if path.is_dir() else places


def tokenizer_files(path: Path) -> list[Path]:
    """The tokenizers beside a text encoder's file or in and beside its folder; the first one is used."""
    files = (place / name for name in ("spiece.model", "tokenizer.json") for place in _places(path))
    return [file for file in files if file.exists()]


def _tokenizer_beside(path: Path) -> Tokenizer:
    """From `spiece.model`, else `tokenizer.json`, in a folder of the text encoder's file or beside its folder."""
    for file in tokenizer_files(path):
        return _spiece_file(file) if file.name == "spiece.model" else _tokenizer_json(file)
    if path.is_dir():
        raise CheckpointError(
            f"{_places(path)[0]} holds neither spiece.model nor tokenizer.json; download the tokenizer folder too"
        )
    raise CheckpointError(
        f"{path} carries no SentencePiece model (tensor '{SPIECE}'), and no spiece.model lies beside it; download the "
        "tokenizer folder too, or use ComfyUI's umt5_xxl file"
    )


def _spiece_file(file: Path) -> Tokenizer:
    return _sentencepiece(read_bytes(file, "the tokenizer", error=CheckpointError), file)


def _tokenizer_json(file: Path) -> Tokenizer:
    try:
        from tokenizers import Tokenizer as Package
    except ImportError as error:
        raise _missing("tokenizers", error) from error
    text = read_text(file, "the tokenizer", error=CheckpointError)
    try:
        tokenizer = Package.from_str(text)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        # One that has no token for unknown signs fails only when it meets one.
        tokenizer.encode("a \U0010fffd", add_special_tokens=False)
    except Exception as error:  # the package raises Exception itself, nothing narrower
        raise CheckpointError(f"cannot read {file} as a tokenizer ({error}); download it again") from error
    _check_eos(tokenizer.token_to_id("</s>"), file)
    ids = tokenizer.get_vocab(with_added_tokens=True).values()
    return Tokenizer(lambda text: tokenizer.encode(text, add_special_tokens=False).ids, 1 + max(ids), file)
