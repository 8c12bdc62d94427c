"""Load a network from checkpoint files: find them, check all headers, then read tensor by tensor."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..files.read_ahead import ReadAhead
from ..files.tensor_files import TensorFile, is_gguf, open_file
from ..model.config import ModelConfig
from ..optimize.attention import import_ahead
from ..optimize.execution import OptimizedTransformer
from ..optimize.kernels.elementwise import quantize_rows
from ..optimize.quantization import Fp8Linear, Policy, check_sizes
from ..optimize.switches import Optimizations
from .formats import BESIDE, MARKERS, QUANT_FORMATS, STORED_WEIGHTS, Format, detect
from .lora import Lora, LoraStack, OpenedLora

CONFIG_KEY = "config"
# Folder of the transformer in a folder of all parts: LongCat-Video's own, and that of Diffusers and FastVideo.
FOLDERS = ("dit", "transformer")
# Numbers that are converted at a time, which a loader holds besides the network and one stored tensor.
PIECE = 1 << 22
# Pieces that are prefetched.
AHEAD = 6
_SHOWN = 5
QUANT_METADATA = "_quantization_metadata"


@dataclass(frozen=True)
class Part:
    """A stored tensor that supplies rows of a parameter. scale: name of the tensor that multiplies it, or None."""

    name: str
    scale: str | None = None


@dataclass(frozen=True)
class Stored:
    """The tensors of any model in its opened files: a transformer, a text encoder or a VAE. `Reader` reads the numbers.

    where: tensor name (prefix stripped) -> file. shapes, dtypes: as stored, GGUF's quantized tensors as fp32.
    quantized: modules that the file's metadata describes -> their format. depth: blocks that the form repeats.
    """

    source: str
    form: Format
    prefix: str
    where: dict[str, Path]
    files: dict[Path, TensorFile]
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]
    quantized: dict[str, dict]
    depth: int

    def parts(self, name: str) -> list[Part]:
        """The stored tensors of a parameter of the network, in the order of its rows. KeyError if one is missing."""
        module, _, kind = name.rpartition(".")
        sources = dict(self.form.modules(self.depth))[module]
        found = []
        for source in sources:
            part = stored_part(self.where, source, kind)
            if part is None:
                raise KeyError(f"{source}.{kind}")
            found.append(part)
        return found


@dataclass(frozen=True)
class Checkpoint(Stored):
    """An opened transformer. config: from config.json or the file's metadata, else inferred from shapes."""

    config: ModelConfig


def stored_part(names: Mapping[str, object], module: str, parameter: str) -> Part | None:
    """How a parameter of `module`, by its name in the file, is stored in tensors `names`; None if it is missing."""
    for suffix, scale in STORED_WEIGHTS if parameter == "weight" else ((parameter, None),):
        if f"{module}.{suffix}" in names and (scale is None or f"{module}.{scale}" in names):
            return Part(f"{module}.{suffix}", None if scale is None else f"{module}.{scale}")
    # Quantized without its scale, which `match_parameters` reports.
    return Part(f"{module}.weight_int8", f"{module}.weight_scale") if f"{module}.weight_int8" in names else None


def _files(path: Path) -> list[Path]:
    """The files of a checkpoint: one file, or the shards of a folder, by its index if it has one."""
    if path.is_file():
        return [path]
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; give a safetensors file or LongCat-Video's dit folder")
    folder = next((path / name for name in FOLDERS if (path / name).is_dir()), path)
    indices = sorted(folder.glob("*.safetensors.index.json"))
    if len(indices) > 1:
        raise CheckpointError(
            f"{folder} has {len(indices)} index files ({indices[0].name}, ...); keep one model in each folder"
        )
    if indices:
        try:
            weight_map = json.loads(indices[0].read_text(encoding="utf-8"))["weight_map"]
            shards = sorted({str(shard) for shard in weight_map.values()})
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{indices[0]} is not a readable index ({error}); download it again") from error
        for shard in shards:
            if Path(shard).name != shard:
                raise CheckpointError(f"{indices[0]} names {shard!r} outside its folder; download the checkpoint again")
            if not (folder / shard).is_file():
                raise CheckpointError(
                    f"{indices[0].name} names {shard}, which is missing in {folder}; download it again"
                )
        return [folder / shard for shard in shards]
    files = sorted(folder.glob("*.safetensors")) or sorted(f for f in folder.iterdir() if f.is_file() and is_gguf(f))
    if not files:
        raise CheckpointError(
            f"{folder} holds no .safetensors file; give a safetensors file or LongCat-Video's dit folder"
        )
    return files


def infer_config(form: Format, shapes: dict[str, tuple[int, ...]], source: str) -> ModelConfig:
    """Sizes from the tensors' shapes; settings that shapes do not show are the released model's."""
    table = dict(form.modules(1))

    def shape(module: str, parameter: str = "weight") -> tuple[int, ...]:
        part = stored_part(shapes, table[module][0], parameter)
        if part is not None:
            return shapes[part.name]
        raise CheckpointError(f"{source} lacks tensor {table[module][0]}.{parameter}; download it again")

    patch = shape("patch_embed")
    head_dim = shape("blocks.0.attn.q_norm")[0]
    marker = form.block_prefix.split("{i}")[0]
    depth = 1 + max(int(name.removeprefix(marker).split(".")[0]) for name in shapes if name.startswith(marker))
    time, height, width = patch[2:]
    return ModelConfig(
        in_channels=patch[1],
        out_channels=shape("final_layer.linear")[0] // (time * height * width),
        hidden_size=patch[0],
        depth=depth,
        num_heads=patch[0] // head_dim,
        caption_channels=shape("text_embed.0")[1],
        ffn_hidden=shape("blocks.0.ffn.down")[1],
        adaln_dim=shape("time_embed.0")[0],
        frequency_dim=shape("time_embed.0")[1],
        patch_size=(time, height, width),
    )


def open_checkpoint(path: str | Path, config: ModelConfig | None = None) -> Checkpoint:
    """Parse the headers of a checkpoint, each once: its form, its tensors, the shape of its network.

    path: a safetensors or GGUF file, a folder of shards, or a folder that holds them in `dit`. Raises CheckpointError.
    """
    path = Path(path)
    files = {file: open_file(file) for file in _files(path)}
    form, prefix = detect([name for opened in files.values() for name in opened.header], str(path))
    stored, metadata = collect(path, files, form, prefix)
    beside = (path / folder / "config.json" for folder in (*FOLDERS, ""))
    config = config or next((ModelConfig.from_json(file) for file in beside if file.is_file()), None)
    if config is None:
        config = infer_config(form, stored.shapes, str(path))
        settings = _json_metadata(metadata, CONFIG_KEY, path)
        zero_pad = bool(settings.get("text_tokens_zero_pad", config.text_tokens_zero_pad))
        config = ModelConfig(**{**config.to_dict(), "text_tokens_zero_pad": zero_pad})
    return Checkpoint(**(vars(stored) | {"depth": config.depth}), config=config)


def collect(path: Path, files: Mapping[Path, TensorFile], form: Format, prefix: str) -> tuple[Stored, dict[str, str]]:
    """The tensors of opened files whose names begin with `prefix`, and the files' metadata.

    Raises CheckpointError for a tensor that two files hold.
    """
    where: dict[str, Path] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    dtypes: dict[str, torch.dtype] = {}
    metadata: dict[str, str] = {}
    for file, opened in files.items():
        for whole, (dtype, shape) in opened.header.items():
            if not whole.startswith(prefix):
                continue
            name = whole.removeprefix(prefix)
            if name in where:
                raise CheckpointError(f"tensor {name} is in both {where[name].name} and {file.name}; keep one")
            where[name], shapes[name], dtypes[name] = file, shape, dtype
        metadata |= opened.metadata
    layers = dict(_json_metadata(metadata, QUANT_METADATA, path).get("layers") or {})
    quantized = {str(layer).removeprefix(prefix): conf for layer, conf in layers.items() if isinstance(conf, dict)}
    return Stored(str(path), form, prefix, where, dict(files), shapes, dtypes, quantized, 0), metadata


def _json_metadata(metadata: dict[str, str], key: str, path: Path) -> dict:
    try:
        return dict(json.loads(metadata.get(key) or "{}"))
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path} has unreadable {key} metadata ({error}); download it again") from error


def match_parameters(
    checkpoint: Stored, parameters: Mapping[str, Tensor], allow_unknown: bool = False
) -> dict[str, list[Part]]:
    """Parameter of the network -> the stored tensors that make it up, found by headers alone.

    Raises CheckpointError for tensors that are missing, of a wrong shape, quantized without a scale, or unknown unless
    `allow_unknown`.
    """
    table = dict(checkpoint.form.modules(checkpoint.depth))
    stored, used = checkpoint.where, set()
    # In a file with scales, an 8-bit weight without one is incomplete.
    scaled = any(name in MARKERS or name.endswith((".scale_weight", ".weight_scale")) for name in stored)
    found: dict[str, list[Part]] = {}
    missing, wrong = [], []
    for name, parameter in parameters.items():
        module, _, kind = name.rpartition(".")
        found[name] = []
        for source in table[module]:
            part = stored_part(stored, source, kind)
            if part is None:
                missing.append(f"{source}.{kind}")
                continue
            found[name].append(part)
            used |= {part.name, *(f"{source}.{suffix}" for suffix in BESIDE if kind == "weight")}
            shape, dtype = checkpoint.shapes[part.name], checkpoint.dtypes[part.name]
            want = (parameter.shape[0] // len(table[module]), *parameter.shape[1:])
            if shape != want:
                wrong.append(f"{part.name} has shape {list(shape)}, the network wants {list(want)}")
            if part.scale is not None:
                used.add(part.scale)
                if part.scale not in stored:
                    missing.append(part.scale)
                elif math.prod(scales := checkpoint.shapes[part.scale]) not in (1, want[0]):
                    wrong.append(
                        f"{part.scale} has shape {list(scales)}, the network wants one number, or one for each row"
                    )
            elif not dtype.is_floating_point or (scaled and dtype.itemsize == 1 and len(shape) == 2):
                missing.append(f"{source}.{'scale_weight' if dtype.is_floating_point else 'weight_scale'}")
    extra = [] if allow_unknown else sorted(set(stored) - used - set(MARKERS))
    for problem, names, remedy in (
        ("lacks", missing, "download it again"),
        ("does not fit", wrong, "check that its config.json belongs to it"),
        ("holds unknown tensors", extra, f"check that it is a {checkpoint.form.model}"),
    ):
        if names:
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            raise CheckpointError(f"{checkpoint.source} {problem}: {'; '.join(names[:_SHOWN])}{more}; {remedy}")
    return found


class Weight(NamedTuple):
    """A parameter as the network holds it. scale: [rows, 1] fp32, which multiplies the values of 8-bit layers."""

    values: Tensor
    scale: Tensor | None = None

    def extremes(self) -> Tensor:
        """Smallest and largest value, or scale, [2] fp32 on the weight's device; NaN where any number is."""
        if self.scale is None:
            return torch.stack(self.values.aminmax()).float()
        # e4m3 has no infinity, and one NaN of each sign.
        bad = (self.values.view(torch.uint8) & 0x7F == 0x7F).any()
        return torch.stack(self.scale.masked_fill(bad, torch.nan).aminmax())


class Reader:
    """Reads the numbers of a checkpoint. Raises CheckpointError if its files can no longer be read."""

    def __init__(self, checkpoint: Stored) -> None:
        self.checkpoint = checkpoint
        self._ahead: ReadAhead | None = None

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows of a stored tensor on the CPU, in the stored dtype."""
        if self._ahead is not None and (found := self._ahead.take((name, start, stop))) is not None:
            return found
        return self._file(name).rows(self.checkpoint.prefix + name, start, stop)

    @contextmanager
    def ahead(self, parts: Iterable[Part]) -> Iterator[None]:
        """Inside the `with` block, threads prefetch the `pieces` of these parts, which must be read in this order. A
        piece is valid until the next one is read."""

        def job(part: Part, cut: tuple[int, int]) -> Callable[[Tensor], Tensor]:
            name = self.checkpoint.prefix + part.name
            return lambda buffer: self._file(part.name).rows(name, *cut, buffer)

        jobs = (((part.name, *cut), job(part, cut)) for part in parts for cut in self._cuts(part))
        self._ahead = ReadAhead(jobs, AHEAD, 4 * PIECE)
        try:
            yield
        finally:
            self._ahead.close()
            self._ahead = None

    def _cuts(self, part: Part) -> Iterator[tuple[int, int]]:
        """(first row, row after the last) of each piece of a stored tensor."""
        shape = self.checkpoint.shapes[part.name]
        rows = shape[0] if shape else 1
        count = max(1, PIECE * rows // max(1, math.prod(shape)))
        return ((start, min(start + count, rows)) for start in range(0, rows, count))

    def _file(self, name: str) -> TensorFile:
        return self.checkpoint.files[self.checkpoint.where[name]]

    def check_formats(self) -> None:
        """Raise CheckpointError for a layer in a quantized format other than numbers times scales."""
        formats = dict(self.checkpoint.quantized)
        for name in self.checkpoint.where:
            if name.endswith(".comfy_quant"):
                try:
                    formats[name.removesuffix(".comfy_quant")] = dict(json.loads(self.rows(name).numpy().tobytes()))
                except (ValueError, TypeError) as error:
                    raise CheckpointError(
                        f"{self.checkpoint.source} has an unreadable {name}; download it again"
                    ) from error
        for layer, conf in formats.items():
            kind, more = conf.get("format"), conf.get("params")
            rotated = conf.get("convrot") or (isinstance(more, dict) and more.get("convrot"))
            if kind not in QUANT_FORMATS or rotated:
                raise CheckpointError(
                    f"{self.checkpoint.source} stores {layer} as {kind}{' with rotation' if rotated else ''}, which is "
                    f"not supported; give a file in bf16, GGUF or {', '.join(QUANT_FORMATS)}"
                )

    def pieces(self, part: Part, device: torch.device | str = "cpu") -> Iterator[tuple[int, Tensor]]:
        """(first row, rows) of each piece of a part, as stored, or dequantized to fp32 on `device` by its scale."""
        scale = self.scale(part)
        scale = None if scale is None else scale.to(device)
        for start, stop in self._cuts(part):
            rows = self.rows(part.name, start, stop)
            if scale is not None:
                factor = scale if scale.numel() == 1 else scale[start:stop]
                rows = rows.to(device).float() * factor.view(-1, *[1] * (rows.ndim - 1))
            yield start, rows

    def scale(self, part: Part) -> Tensor | None:
        """The scale of a part, fp32, one number or [rows]; None for plain numbers."""
        return None if part.scale is None else self.rows(part.scale).float().flatten()

    def into(self, target: Tensor, parts: list[Part]) -> Tensor:
        """Fill a parameter [rows, ..] with its parts, in the target's dtype and on its device; returns `target`."""
        first = 0
        for part in parts:
            for start, rows in self.pieces(part, target.device):
                target[first + start : first + start + len(rows)].copy_(rows)
                # Release them before the next rows are read.
                del rows
            first += self.checkpoint.shapes[part.name][0]
        return target

    def e4m3(self, parts: list[Part], device: torch.device | str) -> tuple[Tensor, Tensor] | None:
        """The stored numbers [rows, columns] of a parameter and its scales [rows, 1] fp32, if all of it is e4m3."""
        if any(self.checkpoint.dtypes[part.name] != torch.float8_e4m3fn for part in parts):
            return None
        scales = []
        for part in parts:
            scale = self.scale(part)
            scale = torch.ones(1) if scale is None else scale
            scales.append(scale.expand(self.checkpoint.shapes[part.name][0]))
        values = torch.empty(self._shape(parts), dtype=torch.float8_e4m3fn, device=device)
        self.into(values, [Part(part.name) for part in parts])
        return values, torch.cat(scales)[:, None].to(device)

    def _shape(self, parts: list[Part]) -> tuple[int, ...]:
        shapes = [self.checkpoint.shapes[part.name] for part in parts]
        return sum(shape[0] for shape in shapes), *shapes[0][1:]

    def weight(
        self,
        name: str,
        parts: list[Part],
        stack: LoraStack,
        dtype: torch.dtype,
        device: torch.device | str,
        eight_bit: bool,
    ) -> Weight:
        """Parameter `name` of the network with the LoRAs of `stack`, in `dtype`, or quantized for an 8-bit layer.

        Weights stored as e4m3 keep their numbers and scales in an 8-bit layer unless a LoRA changes them.
        """
        changed = name in stack
        if eight_bit and not changed and (stored := self.e4m3(parts, device)) is not None:
            return Weight(*stored)
        # fp32 where a LoRA is added, so that the sum is rounded, not its terms.
        target = torch.empty(self._shape(parts), dtype=torch.float32 if changed else dtype, device=device)
        self.into(target, parts)
        if changed:
            target = stack.add(name, target).to(dtype)
        return Weight(*quantize_rows(target)) if eight_bit else Weight(target)


def load_transformer(
    source: str | Path | Checkpoint,
    *,
    dtype: torch.dtype | None = torch.float32,
    device: torch.device | str = "cpu",
    optimizations: Optimizations | None = None,
    config: ModelConfig | None = None,
    fp8: Policy | None = None,
    lora: Sequence[Lora | OpenedLora] = (),
    streamed: Sequence[int] = (),
) -> OptimizedTransformer:
    """A network with the weights of `source`, in eval mode, every parameter in `dtype` on `device`.

    source: an opened checkpoint, or the path of one. streamed: blocks whose weights are kept in CPU memory
    (`optimize.streaming`); they are converted on the device. fp8: layers to quantize to 8 bits one by one, so that the
    device never holds the whole network in 16 bits; weights stored as e4m3 keep their numbers and scales. lora: added
    to each weight before it is quantized.

    All headers are checked against the network before any weight is read. Raises CheckpointError for a missing, extra
    or wrongly shaped tensor, and for a weight with NaN or infinity. Besides the network, one tensor at a time is held.
    """
    if isinstance(source, Checkpoint):
        checkpoint = source if config is None else replace(source, config=config, depth=config.depth)
    else:
        checkpoint = open_checkpoint(source, config)
    with torch.device("meta"):
        model = OptimizedTransformer(checkpoint.config, optimizations, dtype=dtype)
    parameters = dict(model.named_parameters())
    parts = match_parameters(checkpoint, parameters)
    reader = Reader(checkpoint)
    reader.check_formats()
    import_ahead(device, model.optimizations.attention)
    stack = LoraStack(lora, {name: parameter.shape for name, parameter in parameters.items()})
    eight_bit = set() if fp8 is None else set(fp8.names(checkpoint.config.depth))
    for name in eight_bit:
        check_sizes(*parameters[f"{name}.weight"].shape)
    state, extremes = {}, {}
    waiting = tuple(f"blocks.{i}." for i in streamed)
    with reader.ahead(part for name in parameters for part in parts[name]):
        for name, parameter in parameters.items():
            layer, _, kind = name.rpartition(".")
            small = kind == "weight" and layer in eight_bit
            weight = reader.weight(name, parts[name], stack, parameter.dtype, device, small)
            extremes[name] = weight.extremes()
            home = "cpu" if name.startswith(waiting) else device
            state[name] = weight.values.to(home)
            if weight.scale is not None:
                state[f"{layer}.weight_scale"] = weight.scale.to(home)
            # Release it before the next weight is read.
            del weight
    _require_finite(extremes, checkpoint.source, dtype)
    for name in eight_bit:
        parent, _, child = name.rpartition(".")
        values, scale = (state.pop(f"{name}.{kind}") for kind in ("weight", "weight_scale"))
        new = Fp8Linear(values, scale, state.pop(f"{name}.bias", None), dtype)
        setattr(model.get_submodule(parent), child, new)
        state |= new.state_dict(prefix=f"{name}.")
    model.load_state_dict(state, assign=True)
    model.set_optimizations(model.optimizations)
    model.eval().requires_grad_(False)
    if streamed:
        # It would keep the weights of each block a second time.
        state.clear()
        model.stream_blocks(device, streamed)
    return model


def _require_finite(extremes: dict[str, Tensor], source: str, dtype: torch.dtype | None) -> None:
    """Raise CheckpointError for the first parameter with a non-finite extreme; this waits for the device once."""
    finite = torch.stack(list(extremes.values())).isfinite().all(1).tolist()
    for name, fine in zip(extremes, finite, strict=True):
        if not fine:
            remedy = "load it as bfloat16 or float32" if dtype == torch.float16 else "download it again"
            raise CheckpointError(f"{source} has NaN or infinite values in {name}; {remedy}")


def read_parameter(checkpoint: Checkpoint, name: str) -> Tensor:
    """One parameter of the network: its parts joined, as stored, or dequantized to fp32.

    Raises CheckpointError if the files are gone.
    """
    try:
        parts, reader = checkpoint.parts(name), Reader(checkpoint)
        whole = [torch.cat([rows for _, rows in reader.pieces(part)]) for part in parts]
    except (CheckpointError, OSError, KeyError) as error:
        raise CheckpointError(f"{checkpoint.source} cannot be read again ({error}); put the file back") from error
    return whole[0] if len(whole) == 1 else torch.cat(whole)


def official_state(model: OptimizedTransformer, form: Format) -> dict[str, Tensor]:
    """The network's weights under the names of `form`; fused weights are split as the form stores them."""
    table = dict(form.modules(model.config.depth))
    state = {}
    for name, parameter in model.state_dict().items():
        module, _, kind = name.rpartition(".")
        for source, part in zip(table[module], parameter.chunk(len(table[module])), strict=True):
            state[f"{source}.{kind}"] = part.detach().contiguous()
    return state
