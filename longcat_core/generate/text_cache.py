"""Encodings of prompts, kept on disk, so that a prompt that was used before needs no text encoder.

One safetensors file for each prompt, named by a hash: neither names nor files hold the prompt. The folder is bounded,
the entries that were not used for the longest go first, and it may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoints.reader import Watch
from ..checkpoints.umt5 import Umt5, open_umt5
from ..errors import LongCatError
from ..files.fingerprints import fingerprint
from ..files.safetensors_io import SafetensorsFile, write_safetensors
from .segments import checksum
from .text import MAX_LENGTH, TextEncoder, folder_of, load_text_encoder, tokenizer_files

# Part of every key; raise it when the same prompt and weights give other numbers.
VERSION = 1
# A prompt of 100 tokens takes 1.6 MB with UMT5-XXL.
MOST_BYTES = 512 << 20
NAME, CHECKSUM = "embeddings", "sha256"
# Of entries, and of the temporary files that a killed run leaves.
OURS = re.compile(r"([0-9a-f]{64}|\.[0-9a-f]{64}\.[0-9a-f]{8})\.safetensors")
# What computes the numbers, beside the weights.
PACKAGES = ("torch", "sentencepiece", "tokenizers", "ftfy")


def cache_folder() -> Path | None:
    """Where encodings are kept: in the user's folder for caches, which XDG_CACHE_HOME names if it is absolute.

    None for a user without a home, who has no such folder.
    """
    given = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(given):
        base = Path(given)
    else:
        try:
            home = Path.home()
        except RuntimeError:
            return None
        if sys.platform == "win32":
            base = Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local")
        else:
            base = home / ("Library/Caches" if sys.platform == "darwin" else ".cache")
    return base / "longcat-video" / "text"


class TextCache:
    """Encodings by one text encoder, computed on `device` in `dtype`. Whatever fails here is a missing entry.

    folder: shared by all encoders. path: of the text encoder, whose fingerprint is part of every key, with that of its
    tokenizer. most: bytes that the folder may take.
    """

    def __init__(
        self, folder: Path, path: Path, dtype: torch.dtype, device: torch.device, most: int = MOST_BYTES
    ) -> None:
        self.folder, self.most = folder, most
        cpu = [platform.machine(), torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()]
        cuda = device.type == "cuda"
        # Everything that the bits of an encoding depend on.
        self._key = [
            VERSION,
            fingerprint(folder_of(path)),
            [fingerprint(file) for file in tokenizer_files(folder_of(path))],
            str(dtype),
            [torch.cuda.get_device_name(device)] if cuda else [device.type, *cpu],
            torch.get_float32_matmul_precision(),
            [_version(package) for package in PACKAGES],
        ]

    def __contains__(self, prompt: str) -> bool:
        return self.get(prompt) is not None

    def get(self, prompt: str) -> tuple[Tensor, Tensor] | None:
        """What `TextEncoder.encode([prompt])` returned, on the CPU; None if it is not kept."""
        file = self._file(prompt)
        try:
            opened = SafetensorsFile(file)
            kept = opened.tensors([NAME])[NAME]
            os.utime(file)
        except (OSError, LongCatError, KeyError):
            return None
        if kept.ndim != 2 or kept.dtype != torch.float32 or not 0 < len(kept) <= MAX_LENGTH:
            return None
        # A disk may return other bytes than it was given.
        if not kept.isfinite().all() or opened.metadata.get(CHECKSUM) != checksum(kept.numpy()):
            return None
        return padded(kept)

    def put(self, prompt: str, embeddings: Tensor, mask: Tensor) -> None:
        """Keep what `TextEncoder.encode([prompt])` returned. Does nothing where the disk or its permissions refuse."""
        kept = embeddings[0, : int(mask.sum())].cpu().contiguous()
        with suppress(OSError, LongCatError):
            # Other users of the machine need not see what is there.
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_safetensors(self._file(prompt), {NAME: kept}, {CHECKSUM: checksum(kept.numpy())})
            self._drop()

    def _file(self, prompt: str) -> Path:
        key = json.dumps([*self._key, prompt])
        return self.folder / f"{hashlib.sha256(key.encode()).hexdigest()}.safetensors"

    def _drop(self) -> None:
        """Delete the entries that were not used for the longest until the rest is small enough."""
        entries = []
        # Another process may delete at the same time. What else a user keeps there is not counted.
        for file in filter(lambda file: OURS.fullmatch(file.name), self.folder.iterdir()):
            with suppress(OSError):
                status = file.stat()
                entries.append((status.st_mtime_ns, status.st_size, file))
        total = sum(size for _, size, _ in entries)
        for _, size, file in sorted(entries):
            if total <= self.most:
                return
            with suppress(OSError):
                file.unlink()
            total -= size


class CachedTextEncoder:
    """A text encoder that is loaded for prompts that are neither prepared nor kept. Otherwise as `TextEncoder`."""

    def __init__(self, path: Path, dtype: torch.dtype, device: torch.device, cache: TextCache | None = None) -> None:
        """cache: what keeps encodings on disk. Raises CheckpointError as `open_umt5`: the files are there, even if they
        are not read."""
        self.path, self.dtype, self.device, self.cache = path, dtype, device, cache
        self._opened = open_umt5(folder_of(path))
        self._streams = False
        self._loaded: TextEncoder | None = None
        # Of prepared prompts, on the CPU: the embeddings of their tokens alone, [tokens, D].
        self._prepared: dict[str, Tensor] = {}

    @property
    def channels(self) -> int:
        return self._opened.sizes["d_model"]

    @property
    def nbytes(self) -> int:
        return bytes_of(self._opened, self.dtype)

    @property
    def loaded(self) -> TextEncoder:
        """The encoder itself."""
        return self.load()

    def load(self, watch: Watch | None = None) -> TextEncoder:
        """The encoder itself, loaded now if it is not yet. watch: see `load_text_encoder`."""
        if self._loaded is None:
            self._loaded = load_text_encoder(
                self.path,
                dtype=self.dtype,
                device=self.device,
                opened=self._opened,
                watch=watch,
                streams=self._streams,
            )
        return self._loaded

    def release(self) -> None:
        """Free the encoder's memory. It is loaded again for a prompt that is neither prepared nor kept."""
        self._loaded = None

    def stream(self, device: str | torch.device) -> None:
        """Run on `device` from now on and leave the weights in their file; see `StreamedTextEncoder`."""
        self.device, self._streams, self._loaded = torch.device(device), True, None

    def to(self, device: str | torch.device) -> CachedTextEncoder:
        if self._streams:
            self.release()
        self.device, self._streams = torch.device(device), False
        if self._loaded is not None:
            self._loaded.to(device)
        return self

    def tokens(self, prompts: list[str], max_length: int = MAX_LENGTH) -> tuple[Tensor, Tensor]:
        return self.loaded.tokens(prompts, max_length)

    def encode(self, prompts: list[str], max_length: int = MAX_LENGTH) -> tuple[Tensor, Tensor]:
        # Several prompts are computed together, which may round otherwise than one.
        if isinstance(prompts, str) or len(prompts) != 1 or max_length != MAX_LENGTH:
            return self.loaded.encode(prompts, max_length)
        kept = self._kept(prompts[0])
        if kept is not None:
            return kept[0].to(self.device), kept[1].to(self.device)
        embeddings, mask = self.loaded.encode(prompts)
        self._keep(prompts[0], embeddings, mask)
        return embeddings, mask

    def _keep(self, prompt: str, embeddings: Tensor, mask: Tensor) -> None:
        if self.cache is not None:
            self.cache.put(prompt, embeddings, mask)

    def missing(self, prompts: Sequence[str]) -> list[str]:
        """Those of the prompts that only the encoder itself can encode."""
        return [prompt for prompt in dict.fromkeys(prompts) if self._kept(prompt) is None]

    def prepare(
        self, prompts: Sequence[str], check: Callable[[], None] = lambda: None, watch: Watch | None = None
    ) -> None:
        """Encode these prompts now, for `encode`. check: called before each. watch: see `TextEncoder.encode_each`."""
        missing = self.missing(prompts)
        # An encoder that streams reads its file once for all of them.
        for some in filter(None, [missing] if self._streams else [[prompt] for prompt in missing]):
            check()
            pairs = self.loaded.encode_each([[prompt] for prompt in some], watch=watch)
            for prompt, (embeddings, mask) in zip(some, pairs, strict=True):
                self._keep(prompt, embeddings, mask)
                self._prepared[prompt] = embeddings[0, : int(mask.sum())].cpu()

    def _kept(self, prompt: str) -> tuple[Tensor, Tensor] | None:
        if prompt in self._prepared:
            return padded(self._prepared[prompt])
        kept = None if self.cache is None else self.cache.get(prompt)
        return kept if kept is not None and kept[0].shape[-1] == self.channels else None


def padded(embeddings: Tensor) -> tuple[Tensor, Tensor]:
    """Embeddings [tokens, D] as `TextEncoder.encode` returns them: [1, MAX_LENGTH, D], and the mask of tokens."""
    used = len(embeddings)
    out = embeddings.new_zeros(1, MAX_LENGTH, embeddings.shape[1])
    mask = torch.zeros(1, MAX_LENGTH, dtype=torch.int64, device=embeddings.device)
    out[0, :used], mask[0, :used] = embeddings, 1
    return out, mask


def bytes_of(opened: Umt5, dtype: torch.dtype) -> int:
    """Bytes of all weights of a text encoder in `dtype`, by the sizes in its files' headers."""
    sizes = opened.sizes
    width, inner = sizes["d_model"], sizes["d_kv"] * sizes["num_heads"]
    matrices = 4 * width * inner + 3 * width * sizes["d_ff"]
    block = matrices + 2 * width + sizes["relative_attention_num_buckets"] * sizes["num_heads"]
    return dtype.itemsize * (sizes["vocab_size"] * width + width + sizes["num_layers"] * block)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
