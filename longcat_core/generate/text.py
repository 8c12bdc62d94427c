"""Prompts to text embeddings, on transformers' UMT5EncoderModel and SentencePiece."""

from __future__ import annotations

import contextlib
import html
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import CheckpointError, LongCatError
from ..files.safetensors_io import SafetensorsFile, check_tensors
from ..optimize.streaming import BlockStream
from . import umt5

if TYPE_CHECKING:
    from transformers import UMT5EncoderModel

PAD, EOS = 0, 1
MAX_LENGTH = 512
# Cannot be inferred from shapes; the same in every published UMT5.
FIXED_CONFIG = {
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

    def __init__(self, model: UMT5EncoderModel, tokenize: Tokenize) -> None:
        self.model = model.eval()
        self.tokenize = tokenize
        self._stream: BlockStream | None = None

    @property
    def dtype(self) -> torch.dtype:
        return self.model.shared.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.model.shared.weight.device if self._stream is None else self._stream.device

    @property
    def nbytes(self) -> int:
        """Bytes of all weights."""
        return sum(parameter.nbytes for parameter in self.model.parameters())

    def stream(self, device: str | torch.device) -> None:
        """Run on `device` from now on and keep the weights in CPU memory, where they must already be."""
        encoder = self.model.encoder
        encoder.final_layer_norm.to(device)
        self._stream = stream = BlockStream(encoder.block, device, range(len(encoder.block)))
        for i, block in enumerate(encoder.block):
            runs: list[contextlib.AbstractContextManager] = []

            def begin(*_: object, i: int = i, runs: list = runs) -> None:
                runs.append(stream.running(i))
                runs[-1].__enter__()

            def end(*_: object, runs: list = runs) -> None:
                if runs:
                    runs.pop().__exit__(None, None, None)

            block.register_forward_pre_hook(begin)
            # Called after an error too; otherwise the block would stay on the device.
            block.register_forward_hook(end, always_call=True)

    @property
    def channels(self) -> int:
        """Length of an embedding, which the transformer's `caption_channels` must equal."""
        return self.model.config.d_model

    def to(self, device: str | torch.device) -> TextEncoder:
        """Move in place; returns self. Not allowed once the encoder streams."""
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

    @torch.no_grad()
    def encode(self, prompts: list[str], max_length: int = MAX_LENGTH) -> tuple[Tensor, Tensor]:
        """Embeddings [B, max_length, D] fp32, zero where padded, and mask [B, max_length] int64 (1: token or EOS).

        Computed in the encoder's dtype. An empty prompt becomes EOS alone. Raises LongCatError for an empty list.
        """
        ids, mask = self.tokens(prompts, max_length)
        # Padding is masked out of attention, so columns that are padding in every row need not be computed.
        used, mask = int(mask.sum(1).max()), mask.to(self.device)
        # Look up where the table is: it holds a fifth of all weights and need not move.
        looked_up = self.model.shared(ids[:, :used].to(self.model.shared.weight.device)).to(self.device)
        hidden = self.model(inputs_embeds=looked_up, attention_mask=mask[:, :used]).last_hidden_state.float()
        if self._stream is not None:
            self._stream.rest()
        embeds = hidden.new_zeros(*ids.shape, hidden.shape[-1])
        embeds[:, :used] = hidden * mask[:, :used, None]
        return embeds, mask


def clean_prompt(text: str) -> str:
    """Repair mojibake (ftfy), unescape HTML twice, collapse whitespace, as LongCat-Video's own pipeline does."""
    try:
        import ftfy
    except ImportError as error:
        raise _missing("ftfy", error) from error
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return re.sub(r"\s+", " ", text).strip()


def load_text_encoder(
    path: str | Path, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> TextEncoder:
    """A UMT5 encoder from one .safetensors or from the official folders `text_encoder/` and `tokenizer/`.

    The single file has Hugging Face T5 names and the SentencePiece model as uint8 tensor `spiece_model`; ComfyUI's
    scaled fp8 is dequantized. For the folder form, `path` is `text_encoder/` or its parent. Raises CheckpointError for
    files that are unreadable, incomplete or not a UMT5 encoder, LongCatError without transformers and sentencepiece.
    """
    path = Path(path)
    folder = path / "text_encoder" if (path / "text_encoder").is_dir() else path
    files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else [path]
    if not files:
        raise CheckpointError(f"{folder} holds no .safetensors file; give the text encoder's own folder or file")
    opened = [SafetensorsFile(file) for file in files]
    shapes = {name: shape for file in opened for name, (_, shape) in file.header.items()}
    tokenize = _folder_tokenizer(folder) if folder.is_dir() else _embedded_tokenizer(opened[0])
    config = umt5.config_from_state(shapes, str(path)) | FIXED_CONFIG
    if (folder / "config.json").is_file():
        config |= _read_config(folder / "config.json")
    model = _meta_model(config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    expected.pop(umt5.TIED_EMBEDDING, None)
    check_tensors(path, {name: shapes[name] for name in umt5.weight_names(shapes)}, expected, "UMT5 encoder")

    state = {}
    for file in opened:
        scales = file.tensors([name for name in file.header if name.endswith(umt5.FP8_SCALE)])
        for name, tensor in file.tensors(umt5.weight_names(file.header)).items():
            # Like transformers itself: the output of the feed-forward overflows fp16.
            kept = torch.float32 if dtype == torch.float16 and name.endswith(".wo.weight") else dtype
            # `copy`: a tensor that needs no cast would otherwise stay a view of the file, which may be replaced later.
            state[name] = umt5.dequantize(name, tensor, scales).to(device, kept, copy=True)
    model.load_state_dict(state | {umt5.TIED_EMBEDDING: state[umt5.EMBEDDING]}, assign=True)
    model.encoder.set_input_embeddings(model.shared)
    return TextEncoder(model.requires_grad_(False), tokenize)


def _missing(package: str, error: ImportError) -> LongCatError:
    return LongCatError(f"text needs the {package} package ({error}); run: pip install 'longcat-video[headless]'")


def _meta_model(config: dict) -> UMT5EncoderModel:
    try:
        from transformers import UMT5Config, UMT5EncoderModel
    except ImportError as error:
        raise _missing("transformers", error) from error
    with torch.device("meta"):
        return UMT5EncoderModel(UMT5Config(**config))


def _read_config(file: Path) -> dict:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        kind = config["model_type"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"cannot read {file} as a text encoder config ({error!r}); download it again") from error
    if kind != "umt5":
        raise CheckpointError(f"{file} describes a text encoder of type '{kind}'; LongCat-Video needs umt5")
    return {key: config[key] for key in ("layer_norm_epsilon", "relative_attention_max_distance") if key in config}


def _sentencepiece(proto: bytes, source: Path) -> Tokenize:
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError as error:
        raise _missing("sentencepiece", error) from error
    try:
        processor = SentencePieceProcessor(model_proto=proto)
    except RuntimeError as error:
        raise CheckpointError(f"the SentencePiece model in {source} is corrupt; download it again") from error
    if processor.eos_id() != EOS:
        raise CheckpointError(f"the SentencePiece model in {source} has EOS id {processor.eos_id()}, UMT5's is {EOS}")
    return processor.encode


def _embedded_tokenizer(file: SafetensorsFile) -> Tokenize:
    path, header = file.path, file.header
    if umt5.SPIECE not in header:
        # Before blaming the vocabulary, check whether the file is an encoder at all.
        umt5.config_from_state({name: shape for name, (_, shape) in header.items()}, str(path))
        raise CheckpointError(
            f"{path} carries no SentencePiece model (tensor '{umt5.SPIECE}'); use ComfyUI's umt5_xxl file or the "
            "official text_encoder and tokenizer folders"
        )
    proto = file.tensors([umt5.SPIECE])[umt5.SPIECE]
    return _sentencepiece(proto.to(torch.uint8).numpy().tobytes(), path)


def _folder_tokenizer(folder: Path) -> Tokenize:
    """From `spiece.model`, else `tokenizer.json`, in `tokenizer/` beside the folder or in the folder itself."""
    places = (folder.parent / "tokenizer", folder)
    for place in places:
        if (place / "spiece.model").is_file():
            return _sentencepiece((place / "spiece.model").read_bytes(), place / "spiece.model")
    for place in places:
        if (place / "tokenizer.json").is_file():
            return _tokenizer_json(place / "tokenizer.json")
    raise CheckpointError(
        f"{places[0]} holds neither spiece.model nor tokenizer.json; download the tokenizer folder too"
    )


def _tokenizer_json(file: Path) -> Tokenize:
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise _missing("tokenizers", error) from error
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the package raises Exception itself, nothing narrower
        raise CheckpointError(f"cannot read {file} as a tokenizer ({error}); download it again") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return lambda text: tokenizer.encode(text, add_special_tokens=False).ids
