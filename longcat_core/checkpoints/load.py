"""Load a network from checkpoint files: find them, check all headers, then read tensor by tensor."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, LongCatError
from ..files.records import read_record
from ..files.weight_files import open_weights
from ..model.config import AudioConfig, ModelConfig
from ..model.transformer import LongCatTransformer
from ..optimize.attention import import_ahead
from ..optimize.optimized import OptimizedTransformer
from ..optimize.quantization import Fp8Linear, Policy, check_sizes
from ..optimize.streaming import Offloaded, late
from ..optimize.switches import Optimizations
from .formats import MAX_BLOCKS, Format, detect, for_network
from .lora import Lora, LoraStack, OpenedLora
from .reader import Reader, Watch, require_finite
from .stored import Stored, collect, json_metadata, match_parameters, stored_part

CONFIG_KEY = "config"
Shape = tuple[int, ...]
# Folder of the transformer in a folder of all parts: LongCat-Video's own, that of Diffusers and FastVideo, and those of
# LongCat-Video-Avatar 1.5 and 1.0.
FOLDERS = ("dit", "transformer", "base_model", "avatar_single", "avatar_multi")


@dataclass(frozen=True)
class Checkpoint(Stored):
    """An opened transformer. config: from config.json or the file's metadata, else inferred from shapes."""

    config: ModelConfig


def count_blocks(form: Format, names: Iterable[str]) -> int:
    """How many blocks the file has, by the numbers in its names.

    A number beyond twice their count does not count: a name of a few bytes must not stand for a network of any size.
    """
    marker = form.block_prefix.split("{i}")[0]
    texts = {name.removeprefix(marker).split(".")[0] for name in names if name.startswith(marker)}
    numbers = {int(text) for text in texts if text.isascii() and text.isdigit() and len(text) < 7}
    return 1 + max((number for number in numbers if number < 2 * len(numbers)), default=-1)


def infer_config(form: Format, shapes: dict[str, Shape], source: str) -> ModelConfig:
    """Sizes from the tensors' shapes; settings that shapes do not show are the released model's.

    Raises CheckpointError for a tensor that is missing or cannot be what its name says.
    """
    table = dict(form.modules(1))

    def shape(module: str, sides: int) -> Shape:
        part = stored_part(shapes, table[module][0], "weight")
        if part is None:
            raise CheckpointError(f"{source} lacks tensor {table[module][0]}.weight; download it again")
        if len(shapes[part.name]) != sides:
            raise CheckpointError(
                f"{source} has {part.name} of shape {list(shapes[part.name])}, which should be {sides}-dimensional; "
                "download it again"
            )
        return shapes[part.name]

    hidden, channels, time, height, width = shape("patch_embed", 5)
    (head_dim,) = shape("blocks.0.attn.q_norm", 1)
    try:
        return ModelConfig(
            in_channels=channels,
            out_channels=shape("final_layer.linear", 2)[0] // max(1, time * height * width),
            hidden_size=hidden,
            depth=count_blocks(form, shapes),
            num_heads=hidden // max(1, head_dim),
            caption_channels=shape("text_embed.0", 2)[1],
            # By rows, which packed formats leave as they are.
            ffn_hidden=shape("blocks.0.ffn.gate_up", 2)[0],
            adaln_dim=shape("time_embed.0", 2)[0],
            frequency_dim=shape("time_embed.0", 2)[1],
            patch_size=(time, height, width),
        )
    except CheckpointError:
        raise
    except LongCatError as error:
        raise CheckpointError(f"{source} has tensors of shapes that no network has ({error})") from error


# What an avatar of version 1.5 hears has this many groups of any Whisper's channels; 1.0 hears layers of wav2vec2 base.
_WHISPER_GROUPS, _WAV2VEC2_CHANNELS = AudioConfig.groups, 768


def infer_audio(form: Format, shapes: Mapping[str, Shape], source: str, hint: AudioConfig | None) -> AudioConfig | None:
    """Sizes of what an avatar's network hears with, from the tensors' shapes; None for a form without audio.

    hint: supplies what shapes do not show, the encoder's groups of channels and the positions of speakers. Raises
    CheckpointError for shapes that no such network has.
    """
    if "audio_embed.first" not in form.outer:
        return None
    known = hint or AudioConfig()

    def shape(module: str) -> Shape:
        part = stored_part(shapes, form.outer[module][0], "weight")
        if part is None:
            raise CheckpointError(f"{source} lacks tensor {form.outer[module][0]}.weight; download it again")
        return shapes[part.name]

    norm = form.block["audio_attn.source_norm"][0]
    try:
        (hidden, first), (_, later), (out, _), (width,) = (
            shape(f"audio_embed.{name}") for name in ("first", "later", "out", "norm")
        )
        entry, odd = divmod(later - first, known.frames - 1)
        groups, channels = known.groups, known.channels
        if groups * channels != entry:
            channels = _WAV2VEC2_CHANNELS if entry % _WHISPER_GROUPS else entry // _WHISPER_GROUPS
            groups = 0 if entry % channels else entry // channels
        if odd or min(entry, width) < 1 or first % entry or out % width or not groups:
            raise LongCatError(f"{first} and {later} columns for audio, {out} rows for tokens of {width} channels")
        sizes = {"window": first // entry, "groups": groups, "channels": channels, "hidden": hidden, "width": width}
        prenorm = any(f".{norm}." in name for name in shapes)
        return replace(known, **sizes, tokens=out // width, prenorm=prenorm)
    except CheckpointError:
        raise
    except (LongCatError, ValueError) as error:
        raise CheckpointError(f"{source} has tensors of shapes that no avatar has ({error})") from error


def with_zero_pad(config: ModelConfig, metadata: Mapping[str, str], source: str | Path) -> ModelConfig:
    """The config with what a file's metadata adds to the shapes. Raises CheckpointError for other kinds of metadata."""
    found = json_metadata(metadata, CONFIG_KEY, source).get("text_tokens_zero_pad", config.text_tokens_zero_pad)
    if not isinstance(found, bool):
        raise CheckpointError(f"{source} has unreadable {CONFIG_KEY} metadata ({found!r} as a flag); download it again")
    return replace(config, text_tokens_zero_pad=found)


def described_config(form: Format, shapes: dict[str, Shape], metadata: Mapping[str, str], source: str) -> ModelConfig:
    """Sizes from the tensors' shapes, and from a file's metadata what shapes do not show. Raises CheckpointError."""
    config = with_zero_pad(infer_config(form, shapes, source), metadata, source)
    audio = json_metadata(metadata, CONFIG_KEY, source).get("audio")
    hint = ModelConfig.from_dict({"audio": audio}).audio if audio else None
    return replace(config, audio=infer_audio(form, shapes, source, hint))


def read_config(path: Path) -> ModelConfig:
    """Read an official `dit/config.json`. Raises CheckpointError for a file that does not hold such a config."""
    remedy = "give a folder with the model's own config.json"
    values = read_record(path, dict[str, Any], "a readable model config", remedy, error=CheckpointError)
    try:
        return ModelConfig.from_dict(values)
    except LongCatError as error:
        raise CheckpointError(f"{path}: {error}; {remedy}") from error


def open_checkpoint(path: str | Path, config: ModelConfig | None = None, left: Collection[str] = ()) -> Checkpoint:
    """Parse the headers of a checkpoint, each once: its form, its tensors, the shape of its network.

    path: a safetensors or GGUF file, a folder of shards, or a folder that holds them in `dit`. left: formats of
    quantized layers that are left to somebody else. Raises CheckpointError.
    """
    path = Path(path)
    folders = [path / name for name in FOLDERS if (path / name).is_dir()]
    if len(folders) > 1:
        raise CheckpointError(f"{path} holds {folders[0].name} and {folders[1].name}; give one of the two folders")
    files = open_weights(folders[0] if folders else path, "give a safetensors file or LongCat-Video's dit folder")
    form, prefix = detect([name for opened in files.values() for name in opened.header], str(path))
    stored, metadata = collect(path, files, form, prefix, left)
    beside = (folder / "config.json" for folder in (*folders, path))
    config = config or next((read_config(file) for file in beside if file.exists()), None)
    if config is None:
        config = described_config(form, stored.shapes, metadata, str(path))
    else:
        config = replace(config, audio=infer_audio(form, stored.shapes, str(path), config.audio))
    blocks = count_blocks(form, stored.where)
    if blocks > MAX_BLOCKS:
        raise CheckpointError(f"{path} has {blocks} blocks, more than any {form.model}; give another file")
    if config.depth > 2 * blocks:
        raise CheckpointError(
            f"{path} has {blocks} blocks, its config {config.depth}; check that its config.json belongs to it"
        )
    checkpoint = Checkpoint(**(vars(stored) | {"depth": config.depth}), config=config)
    return checkpoint.fitted(empty_parameters(config)) if checkpoint.packed else checkpoint


def without_audio(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint itself. Raises CheckpointError for an avatar, where videos without audio are generated."""
    if checkpoint.config.audio is not None:
        raise CheckpointError(
            f"{checkpoint.source} holds LongCat-Video-Avatar, not a LongCat-Video transformer; give the dit folder of "
            "LongCat-Video or a single file of its transformer, or use longcat avatar, or longcat calibrate --audio"
        )
    return checkpoint


def with_audio(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint itself. Raises CheckpointError unless it is an avatar's."""
    if checkpoint.config.audio is None:
        raise CheckpointError(
            f"{checkpoint.source} holds LongCat-Video, which does not hear audio; give LongCat-Video-Avatar, or use "
            "longcat generate"
        )
    return checkpoint


def empty_parameters(config: ModelConfig) -> dict[str, Tensor]:
    """The network's parameters by name, on the meta device."""
    with torch.device("meta"):
        return LongCatTransformer(config).state_dict()


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
    watch: Watch | None = None,
) -> OptimizedTransformer:
    """A network with the weights of `source`, in eval mode, every parameter in `dtype` on `device`.

    source: an opened checkpoint, or the path of one. streamed: blocks whose weights are kept in CPU memory
    (`optimize.streaming`); they are converted on the device. fp8: layers to quantize to 8 bits one by one, so that the
    device never holds the whole network in 16 bits; weights stored as e4m3 keep their numbers and scales. lora: added
    to each weight before it is quantized. watch: called after every piece that is read, with the bytes so far and those
    of all; what it raises ends the load.

    All headers are checked against the network before any weight is read. Raises CheckpointError for a missing, extra
    or wrongly shaped tensor, and for a weight with NaN or infinity. Besides the network, one tensor at a time
    is held, and on the device the block that goes to CPU memory next.
    """
    if isinstance(source, Checkpoint):
        checkpoint = source if config is None else replace(source, config=config, depth=config.depth)
    else:
        checkpoint = open_checkpoint(source, config)
    with torch.device("meta"):
        model = OptimizedTransformer(checkpoint.config, optimizations, dtype=dtype)
    parameters = dict(model.named_parameters())
    parts = match_parameters(checkpoint, parameters)
    reader = Reader(checkpoint, device)
    import_ahead(device, model.optimizations.attention)
    stack = LoraStack(lora, {name: parameter.shape for name, parameter in parameters.items()})
    audio = checkpoint.config.audio is not None
    eight_bit = set() if fp8 is None else set(fp8.names(checkpoint.config.depth, audio))
    for name in eight_bit:
        check_sizes(*parameters[f"{name}.weight"].shape)
    state, extremes, buffers = {}, {}, {}
    # The last parameter of each block that waits in CPU memory.
    ends = {[name for name in parameters if name.startswith(f"blocks.{i}.")][-1]: i for i in streamed}
    with reader.ahead((part for name in parameters for part in parts[name]), watch):
        for name, parameter in parameters.items():
            layer, _, kind = name.rpartition(".")
            small = kind == "weight" and layer in eight_bit
            weight = reader.weight(name, parts[name], stack, parameter.dtype, device, small)
            extremes[name], state[name] = weight.extremes(), weight.values
            if weight.scale is not None:
                state[f"{layer}.weight_scale"] = weight.scale
                parent, _, child = layer.rpartition(".")
                new = Fp8Linear(weight.values, weight.scale, parameters.get(f"{layer}.bias"), dtype)
                setattr(model.get_submodule(parent), child, new)
            # Release it before the next weight is read.
            del weight
            if (i := ends.get(name)) is not None:
                buffers[i] = _offloaded(model.blocks[i], state, f"blocks.{i}.")
    require_finite(extremes, checkpoint.source, dtype, device)
    model.load_state_dict(state, assign=True)
    model.set_optimizations(model.optimizations)
    model.eval().requires_grad_(False)
    if streamed:
        model.stream_blocks(device, streamed, buffers=buffers)
    return model


def _offloaded(block: nn.Module, state: dict[str, Tensor], prefix: str) -> Tensor:
    """Copy the weights of a block in `state` straight to the memory where they wait, and put them from there into
    `state`. Returns the memory."""
    names = [name for name in state if name.startswith(prefix)]
    block.load_state_dict({name.removeprefix(prefix): state.pop(name) for name in names}, assign=True)
    buffer = Offloaded(block, late).buffer
    state |= block.state_dict(prefix=prefix)
    return buffer


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
    form = for_network(form, model.config.audio is not None)
    table = dict(form.modules(model.config.depth))
    state = {}
    for name, parameter in model.state_dict().items():
        module, _, kind = name.rpartition(".")
        for source, part in zip(table[module], parameter.chunk(len(table[module])), strict=True):
            state[f"{source}.{kind}"] = part.detach().contiguous()
    return state
