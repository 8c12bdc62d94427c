"""Checkpoint files to a loaded network: found, checked whole by their headers, then read tensor by tensor."""

from __future__ import annotations

import json
from collections.abc import Container, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import CheckpointError, LongCatError
from ..model.config import ModelConfig, Optimizations
from ..model.transformer import LongCatTransformer
from ..optimize.kernels import quantise_rows
from ..optimize.quantization import Fp8Linear, Policy, check_sizes
from .formats import Format, detect
from .safetensors_io import read_header, read_metadata

CONFIG_KEY = "config"
_SHOWN = 5


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's tensors by name, without its data.

    where: tensor name (prefix stripped) -> file. shapes: tensor name -> shape. config: from config.json or the file's
    metadata, else inferred from shapes.
    """

    source: str
    form: Format
    prefix: str
    where: dict[str, Path]
    shapes: dict[str, tuple[int, ...]]
    config: ModelConfig


def _stored_name(names: Container[str], module: str, parameter: str) -> str | None:
    """The stored tensor behind a module's parameter: itself, or its quantised form."""
    for suffix in (parameter, f"{parameter}_int8"):
        if f"{module}.{suffix}" in names:
            return f"{module}.{suffix}"
    return None


def _files(path: Path) -> list[Path]:
    """The safetensors files of a checkpoint: one file, or a folder's shards (its index tells, if there is one)."""
    if path.is_file():
        return [path]
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; give a safetensors file or LongCat-Video's dit folder")
    folder = path / "dit" if (path / "dit").is_dir() else path
    indices = sorted(folder.glob("*.safetensors.index.json"))
    if len(indices) > 1:
        raise CheckpointError(
            f"{folder} has {len(indices)} index files ({indices[0].name}, ...); keep one model a folder"
        )
    if indices:
        try:
            weight_map = json.loads(indices[0].read_text(encoding="utf-8"))["weight_map"]
            shards = sorted({str(shard) for shard in weight_map.values()})
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{indices[0]} is no readable index ({error}); download it again") from error
        files = []
        for shard in shards:
            if Path(shard).name != shard:
                raise CheckpointError(f"{indices[0]} names {shard!r} outside its folder; download the checkpoint again")
            if not (folder / shard).is_file():
                raise CheckpointError(
                    f"{indices[0].name} names {shard}, which is missing in {folder}; download it again"
                )
            files.append(folder / shard)
        return files
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(
            f"{folder} holds no .safetensors file; give a safetensors file or LongCat-Video's dit folder"
        )
    return files


def _config_beside(path: Path) -> ModelConfig | None:
    folder = path if path.is_dir() else None
    if folder is None:
        return None
    for candidate in (folder / "dit" / "config.json", folder / "config.json"):
        if candidate.is_file():
            return ModelConfig.from_json(candidate)
    return None


def infer_config(form: Format, shapes: dict[str, tuple[int, ...]], source: str) -> ModelConfig:
    """Read every size off the tensors' shapes; what shapes cannot tell is as in the released model."""
    table = dict(form.modules(1))

    def shape(module: str, parameter: str = "weight") -> tuple[int, ...]:
        name = _stored_name(shapes, table[module][0], parameter)
        if name is not None:
            return shapes[name]
        raise CheckpointError(f"{source} lacks tensor {table[module][0]}.{parameter}; download it again")

    patch = shape("patch_embed")
    head_dim = shape("blocks.0.attn.q_norm")[0]
    marker = form.block_prefix.split("{i}")[0]
    depth = 1 + max(int(name.removeprefix(marker).split(".")[0]) for name in shapes if name.startswith(marker))
    patch_size = tuple(patch[2:])
    return ModelConfig(
        in_channels=patch[1],
        out_channels=shape("final_layer.linear")[0] // (patch_size[0] * patch_size[1] * patch_size[2]),
        hidden_size=patch[0],
        depth=depth,
        num_heads=patch[0] // head_dim,
        caption_channels=shape("text_embed.0")[1],
        ffn_hidden=shape("blocks.0.ffn.down")[1],
        adaln_dim=shape("time_embed.0")[0],
        frequency_dim=shape("time_embed.0")[1],
        patch_size=patch_size,
    )


def open_checkpoint(path: str | Path, config: ModelConfig | None = None) -> Checkpoint:
    """Look at a checkpoint's headers: which form it is, which tensors it has, how the network is shaped.

    path: a safetensors file, a folder of shards, or a folder that holds them in `dit`. Raises CheckpointError.
    """
    path = Path(path)
    where: dict[str, Path] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    metadata: dict[str, str] = {}
    for file in _files(path):
        for name, (_, shape) in read_header(file).items():
            if name in where:
                raise CheckpointError(f"tensor {name} stands in both {where[name].name} and {file.name}; keep one")
            where[name], shapes[name] = file, tuple(shape)
        metadata |= read_metadata(file)
    form, prefix = detect(where, str(path))
    where = {name.removeprefix(prefix): file for name, file in where.items() if name.startswith(prefix)}
    shapes = {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}
    if config is None:
        config = _config_beside(path)
    if config is None:
        config = infer_config(form, shapes, str(path))
        stored = metadata.get(CONFIG_KEY)
        if stored:
            try:
                zero_pad = bool(json.loads(stored).get("text_tokens_zero_pad", config.text_tokens_zero_pad))
            except (ValueError, AttributeError) as error:
                raise CheckpointError(f"{path} has unreadable config metadata ({error}); download it again") from error
            config = ModelConfig(**{**config.to_dict(), "text_tokens_zero_pad": zero_pad})
    return Checkpoint(str(path), form, prefix, where, shapes, config)


def _check(checkpoint: Checkpoint, model: LongCatTransformer) -> list[tuple[str, list[str]]]:
    """Pairs of (parameter of the network, stored tensors that make it up); raises on anything that does not fit."""
    table = dict(checkpoint.form.modules(checkpoint.config.depth))
    pairs, used, missing, wrong = [], set(), [], []
    for name, parameter in model.state_dict().items():
        module, _, kind = name.rpartition(".")
        stored = []
        rows = 0
        for source in table[module]:
            tensor = _stored_name(checkpoint.where, source, kind)
            if tensor is None:
                missing.append(f"{source}.{kind}")
                continue
            stored.append(tensor)
            used.add(tensor)
            if tensor.endswith("_int8"):
                scale = f"{source}.{kind}_scale"
                used.add(scale)
                if scale not in checkpoint.where:
                    missing.append(scale)
            shape = checkpoint.shapes[tensor]
            rows += shape[0] if shape else 0
            want = (parameter.shape[0] // len(table[module]), *parameter.shape[1:])
            if shape != want:
                wrong.append(f"{tensor} has shape {list(shape)}, the network wants {list(want)}")
        pairs.append((name, stored))
    extra = sorted(set(checkpoint.where) - used)
    for problem, names, remedy in (
        ("lacks", missing, "download it again"),
        ("does not fit", wrong, "check that its config.json belongs to it"),
        ("holds unknown tensors", extra, "check that it is a LongCat-Video transformer"),
    ):
        if names:
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            raise CheckpointError(f"{checkpoint.source} {problem}: {'; '.join(names[:_SHOWN])}{more}; {remedy}")
    return pairs


def _read(checkpoint: Checkpoint, stored: list[str], handles: dict[Path, safe_open]) -> Iterator[Tensor]:
    for name in stored:
        tensor = handles[checkpoint.where[name]].get_tensor(checkpoint.prefix + name)
        if name.endswith("_int8"):
            scale_name = name.removesuffix("_int8") + "_scale"
            scale = handles[checkpoint.where[scale_name]].get_tensor(checkpoint.prefix + scale_name)
            # Official INT8: one scale per output row.
            tensor = tensor.float() * scale.float().view(-1, *[1] * (tensor.ndim - 1))
        yield tensor


def load_transformer(
    path: str | Path,
    *,
    dtype: torch.dtype | None = torch.float32,
    device: torch.device | str = "cpu",
    optimizations: Optimizations | None = None,
    config: ModelConfig | None = None,
    fp8: Policy | None = None,
) -> LongCatTransformer:
    """A network with the weights at `path`, in eval mode, every parameter in `dtype` on `device`.

    fp8: which layers become 8-bit ones as they arrive, so that the whole never lies on the device in 16 bits.
    All headers are checked against the network before any weight is read: a missing, extra or wrongly shaped tensor
    is named in a CheckpointError. One tensor at a time is held besides the network itself.
    """
    checkpoint = open_checkpoint(path, config)
    with torch.device("meta"):
        model = LongCatTransformer(checkpoint.config, optimizations, dtype=dtype)
    pairs = _check(checkpoint, model)
    handles = {file: safe_open(file, framework="pt") for file in set(checkpoint.where.values())}
    parameters = dict(model.named_parameters())
    eight_bit = set() if fp8 is None else set(fp8.names(checkpoint.config.depth))
    for name in eight_bit:
        check_sizes(*parameters[f"{name}.weight"].shape)
    state = {}
    for name, stored in pairs:
        target = torch.empty(parameters[name].shape, dtype=dtype, device=device)
        row = 0
        for tensor in _read(checkpoint, stored, handles):
            target[row : row + len(tensor)] = tensor.to(device=device, dtype=dtype)
            row += len(tensor)
        layer, _, kind = name.rpartition(".")
        if layer in eight_bit and kind == "weight":
            state[name], state[f"{layer}.weight_scale"] = quantise_rows(target)
        else:
            state[name] = target
    for name in eight_bit:
        parent, _, child = name.rpartition(".")
        weight, scale = (state.pop(f"{name}.{kind}") for kind in ("weight", "weight_scale"))
        new = Fp8Linear(weight, scale, state.pop(f"{name}.bias", None), dtype)
        setattr(model.get_submodule(parent), child, new)
        state |= new.state_dict(prefix=f"{name}.")
    model.load_state_dict(state, assign=True)
    model.set_optimizations(model.optimizations)
    return model.eval().requires_grad_(False)


def read_parameter(checkpoint: Checkpoint, name: str) -> Tensor:
    """One parameter of the network off the disk, as it is stored: fused of its parts, INT8 multiplied out to fp32.

    Raises CheckpointError where the files are not there any more.
    """
    module, _, kind = name.rpartition(".")
    sources = dict(checkpoint.form.modules(checkpoint.config.depth))[module]
    stored = [_stored_name(checkpoint.where, source, kind) for source in sources]
    try:
        handles = {checkpoint.where[tensor]: safe_open(checkpoint.where[tensor], framework="pt") for tensor in stored}
        parts = list(_read(checkpoint, stored, handles))
    except (OSError, KeyError, SafetensorError) as error:
        raise CheckpointError(f"{checkpoint.source} cannot be read again ({error}); put the file back") from error
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def official_state(model: LongCatTransformer, form: Format) -> dict[str, Tensor]:
    """The network's weights under the names of `form`, fused weights split into the rows that the form keeps apart."""
    table = dict(form.modules(model.config.depth))
    state = {}
    for name, parameter in model.state_dict().items():
        module, _, kind = name.rpartition(".")
        for source, part in zip(table[module], parameter.chunk(len(table[module])), strict=True):
            state[f"{source}.{kind}"] = part.detach().contiguous()
    return state


def require_finite(model: LongCatTransformer, source: str) -> None:
    """Raise CheckpointError if a weight is NaN or infinite; reads every weight once."""
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise LongCatError(f"{source} has NaN or infinite values in {name}; download it again")
