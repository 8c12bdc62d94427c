"""Reading and writing safetensors files, with an error that a person can act on for everything that goes wrong.

The header is parsed here rather than by the safetensors package, because its errors name neither the file nor the
remedy; the tensors themselves are read and written by the package.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import secrets
import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format itself
# What a fingerprint reads of a file.
SAMPLE_HEAD, SAMPLES, SAMPLE_BYTES = 1 << 20, 64, 4096
PICKLE_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".pkl", ".pickle")
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
# What people have under the name of a checkpoint, by the first bytes of the file.
FOREIGN_STARTS = (
    (b"version https://git-lfs", "is a Git LFS pointer, not the weights; run `git lfs pull` or download the file"),
    (b"PK\x03\x04", "is a PyTorch pickle, which can run code when it is loaded; convert it to .safetensors"),
    (b"\x80\x02", "is a Python pickle, which can run code when it is loaded; convert it to .safetensors"),
    (b"GGUF", "is a GGUF file, which only a LongCat-Video transformer may be; use the .safetensors form"),
    (b"<", "is a web page, not the weights; the download failed, so fetch the file again"),
)

Header = dict[str, tuple[torch.dtype, tuple[int, ...]]]


def read_header(path: str | Path) -> Header:
    """Name -> (dtype, shape) of every tensor in the file, without reading any of them.

    Raises CheckpointError for a path that is missing, a folder, empty, truncated, corrupt, a pickle or another format.
    """
    header, _ = _parse_header(Path(path))
    return {name: _entry(Path(path), name, value) for name, value in header.items()}


def read_metadata(path: str | Path) -> dict[str, str]:
    """The free-form string metadata of the file, {} if there is none. Errors as in `read_header`."""
    return _parse_header(Path(path))[1]


def read_places(path: str | Path) -> dict[str, int]:
    """Name -> where the tensor's first byte is in the file. Errors as in `read_header`."""
    path = Path(path)
    header, _ = _parse_header(path)
    with open(path, "rb") as file:
        data = 8 + struct.unpack("<Q", file.read(8))[0]
    return {name: data + int(value["data_offsets"][0]) for name, value in header.items()}


def read_tensors(
    path: str | Path, device: str | torch.device = "cpu", names: Iterable[str] | None = None
) -> dict[str, Tensor]:
    """All tensors of the file (or those in `names`) as stored, on `device`; CPU tensors are memory-mapped.

    Raises CheckpointError as `read_header` does, and for a name that the file lacks.
    """
    from safetensors import SafetensorError, safe_open

    header = read_header(path)
    wanted = list(header) if names is None else list(names)
    for name in wanted:
        if name not in header:
            raise CheckpointError(f"{path} has no tensor '{name}'.")
    try:
        with safe_open(str(path), framework="pt", device=str(device)) as file:
            return {name: file.get_tensor(name) for name in wanted}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); download it again.") from error


def write_safetensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write `tensors` (any device, any strides) to `path`: whole or not at all, with ordinary file permissions.

    Raises CheckpointError where the file cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path = Path(path)
    temporary = _temporary(path)
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        # The package writes files that only their owner can read: keep the mode that the system gives a new file.
        with open(temporary, "xb") as file:
            mode = os.fstat(file.fileno()).st_mode & 0o777
        save_file(plain, temporary, dict(metadata) if metadata else None)
        os.chmod(temporary, mode)
        os.replace(temporary, path)
    except (SafetensorError, OSError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"Cannot write {path}: {reason}.") from error
    finally:
        temporary.unlink(missing_ok=True)


def stream_safetensors(
    path: str | Path,
    header: Header,
    tensors: Iterable[tuple[str, Tensor]],
    metadata: Mapping[str, str] | None = None,
    check: Callable[[Path], None] = lambda path: None,
) -> None:
    """`write_safetensors` for more than memory holds: `tensors` come one by one, in any order, as `header` announces.

    check: called with the finished file before it takes its name; what it raises leaves `path` as it was. Raises
    CheckpointError where the file cannot be written.
    """
    path = Path(path)
    kinds = {dtype: name for name, dtype in DTYPES.items()}
    entries, end = {}, 0
    # Wide numbers first, so that every tensor begins at a multiple of its numbers' size.
    for name, (dtype, shape) in sorted(header.items(), key=lambda item: -item[1][0].itemsize):
        size = math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": kinds[dtype], "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps({"__metadata__": dict(metadata or {}), **entries}).encode()
    text += b" " * (-len(text) % 8)
    temporary = _temporary(path)
    waiting = set(entries)
    try:
        with open(temporary, "xb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + end)
            for name, tensor in tensors:
                if (tensor.dtype, tuple(tensor.shape)) != header[name] or name not in waiting:
                    raise ValueError(f"{name} comes as {tensor.dtype} {tuple(tensor.shape)}, announced: {header[name]}")
                waiting.remove(name)
                file.seek(8 + len(text) + entries[name]["data_offsets"][0])
                file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        if waiting:
            raise ValueError(f"{sorted(waiting)[0]} was announced and did not come")
        check(temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise CheckpointError(f"Cannot write {path}: {error.strerror or error}.") from error
    finally:
        temporary.unlink(missing_ok=True)


def _temporary(path: Path) -> Path:
    # Not the process's number: in a container it is the same in every run, and a killed one leaves its file behind.
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


def fingerprint(path: str | Path) -> str:
    """Sixteen hexadecimal digits that tell checkpoints apart: a file's, or that of all weights in a folder.

    Sizes, headers and samples throughout the weights are looked at, not every byte, so that 83 GB take no minute.
    """
    path = Path(path)
    total = hashlib.sha256()
    for file in [path] if path.is_file() else sorted([*path.rglob("*.safetensors"), *path.rglob("*.gguf")]):
        size = file.stat().st_size
        total.update(f"{size}:".encode())
        with open(file, "rb") as stream:
            total.update(stream.read(SAMPLE_HEAD))
            for part in range(SAMPLES):
                stream.seek(size * part // SAMPLES)
                total.update(stream.read(SAMPLE_BYTES))
    return total.hexdigest()[:16]


def check_tensors(
    source: str | Path, found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], what: str
) -> None:
    """Raise CheckpointError naming the first tensors that are missing from, extra in, or wrongly shaped in `source`.

    `found` and `expected` map names to shapes; `what` says what the file should be, e.g. "Wan 2.1 VAE".
    """
    missing = sorted(set(expected) - set(found))
    extra = sorted(set(found) - set(expected))
    wrong = [name for name in sorted(expected) if name in found and tuple(found[name]) != tuple(expected[name])]
    faults = []
    if missing:
        faults.append(f"{_first(missing)} missing")
    if extra:
        faults.append(f"{_first(extra)} not expected")
    if wrong:
        name = wrong[0]
        faults.append(f"{_first(wrong)} misshapen ({name}: {list(found[name])} instead of {list(expected[name])})")
    if faults:
        raise CheckpointError(f"{source} is not a whole {what}: {'; '.join(faults)}.")


def _first(names: list[str]) -> str:
    shown = ", ".join(f"'{name}'" for name in names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def _parse_header(path: Path) -> tuple[dict[str, dict], dict[str, str]]:
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder; name a .safetensors file.")
    if not path.exists():
        raise CheckpointError(f"{path} does not exist.")
    if path.suffix.lower() in PICKLE_SUFFIXES:
        raise CheckpointError(
            f"{path} is a pickle by its ending, which can run code when it is loaded; convert it to .safetensors."
        )
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            start = file.read(64)
            if not start:
                raise CheckpointError(f"{path} is empty; download it again.")
            for magic, sentence in FOREIGN_STARTS:
                # A header may by chance be 60 ("<") bytes long: then real JSON follows the eight length bytes.
                if start.startswith(magic) and start[8:9] != b"{":
                    raise CheckpointError(f"{path} {sentence}.")
            length = struct.unpack("<Q", start[:8])[0] if len(start) >= 8 else MAX_HEADER_BYTES + 1
            if length > MAX_HEADER_BYTES or start[8:9] not in (b"{", b""):
                raise CheckpointError(f"{path} is not a safetensors file.")
            file.seek(8)
            text = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
    if len(text) < length:
        raise CheckpointError(
            f"{path} is truncated ({size:,} bytes, its header alone takes {8 + length:,}); download it again."
        )
    try:
        header = json.loads(text)
        metadata = header.pop("__metadata__", None) or {}
        end = 8 + length + max((int(value["data_offsets"][1]) for value in header.values()), default=0)
    except (ValueError, TypeError, AttributeError, KeyError, IndexError) as error:
        raise CheckpointError(f"{path} has a corrupt safetensors header; download it again.") from error
    if size != end:
        state = "truncated" if size < end else "corrupt"
        raise CheckpointError(f"{path} is {state} ({size:,} bytes instead of {end:,}); download it again.")
    return header, metadata


def _entry(path: Path, name: str, value: dict) -> tuple[torch.dtype, tuple[int, ...]]:
    try:
        kind, shape = value["dtype"], tuple(int(side) for side in value["shape"])
        length = int(value["data_offsets"][1]) - int(value["data_offsets"][0])
    except (ValueError, TypeError, KeyError, IndexError) as error:
        raise CheckpointError(f"{path} has a corrupt entry for '{name}'; download it again.") from error
    if kind not in DTYPES:
        raise CheckpointError(f"{path} stores '{name}' as {kind}, which is not supported.")
    if length != math.prod(shape) * DTYPES[kind].itemsize:
        raise CheckpointError(f"{path} has a corrupt entry for '{name}'; download it again.")
    return DTYPES[kind], shape
