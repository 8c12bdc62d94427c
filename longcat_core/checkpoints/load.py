"""Load a network from checkpoint files: find them, check all headers, then read tensor by tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..files.weight_files import open_weights
from ..model.config import ModelConfig
from ..optimize.attention import import_ahead
from ..optimize.execution import OptimizedTransformer
from ..optimize.quantization import Fp8Linear, Policy, check_sizes
from ..optimize.switches import Optimizations
from .formats import Format, detect
from .lora import Lora, LoraStack, OpenedLora
from .reader import Reader, require_finite
from .stored import Stored, collect, json_metadata, match_parameters, stored_part

CONFIG_KEY = "config"
# Folder of the transformer in a folder of all parts: LongCat-Video's own, and that of Diffusers and FastVideo.
FOLDERS = ("dit", "transformer")


@dataclass(frozen=True)
class Checkpoint(Stored):
    """An opened transformer. config: from config.json or the file's metadata, else inferred from shapes."""

    config: ModelConfig


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
    folder = next((path / name for name in FOLDERS if (path / name).is_dir()), path)
    files = open_weights(folder, "give a safetensors file or LongCat-Video's dit folder")
    form, prefix = detect([name for opened in files.values() for name in opened.header], str(path))
    stored, metadata = collect(path, files, form, prefix)
    beside = (path / folder / "config.json" for folder in (*FOLDERS, ""))
    config = config or next((ModelConfig.from_json(file) for file in beside if file.is_file()), None)
    if config is None:
        config = infer_config(form, stored.shapes, str(path))
        settings = json_metadata(metadata, CONFIG_KEY, path)
        zero_pad = bool(settings.get("text_tokens_zero_pad", config.text_tokens_zero_pad))
        config = ModelConfig(**{**config.to_dict(), "text_tokens_zero_pad": zero_pad})
    return Checkpoint(**(vars(stored) | {"depth": config.depth}), config=config)


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
    require_finite(extremes, checkpoint.source, dtype)
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
