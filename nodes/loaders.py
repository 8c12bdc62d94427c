"""LongCat Model Loader and LongCat Text Encoder Loader."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.sd
import comfy.text_encoders.wan
import comfy.utils
import folder_paths
import torch
from comfy.model_patcher import ModelPatcher
from comfy.quant_ops import QUANT_ALGOS
from comfy.text_encoders.sd3_clip import t5_xxl_detect
from comfy_api.latest import io

from ..longcat_core.checkpoints import umt5
from ..longcat_core.checkpoints.load import CONFIG_KEY, Checkpoint
from ..longcat_core.checkpoints.quantized import MARKERS, QUANT_METADATA, described_beside
from ..longcat_core.errors import CheckpointError, LongCatError
from ..longcat_core.files.safetensors_io import SafetensorsFile
from ..longcat_core.files.tensor_files import TensorFile, is_gguf, open_file
from ..longcat_core.generate.progress import LOADING, LOADING_TEXT
from ..longcat_core.generate.text import tokenizer_of
from ..longcat_core.generate.warming import network_ahead
from ..longcat_core.optimize.attention import import_ahead
from ..longcat_core.optimize.quantization import Policy
from . import comfy_fp8
from .choices import FP8_ROWWISE, WEIGHT_DTYPES
from .comfy_model import LongCatVideo
from .comfy_weights import StateDict, as_description, correct, meant, open_for_comfyui, runs
from .inputs import LongCatNode
from .progress import working

# Prefixes that ComfyUI's own loader strips from the names in a file.
COMFYUI_PREFIXES = ("", "model.diffusion_model.")
# Width of UMT5-XXL, which ComfyUI's own loader knows.
XXL_WIDTH = 4096


def find(kind: str, name: str) -> Path:
    """The file or folder `name` inside one of ComfyUI's folders of a kind."""
    for root in map(os.path.abspath, folder_paths.get_folder_paths(kind)):
        path = os.path.abspath(os.path.join(root, name))
        # Links are not resolved: a link in the folder may lead out of it, a name may not.
        if path.startswith(os.path.join(root, "")) and os.path.exists(path):
            return Path(path)
    raise CheckpointError(f"{name} is not in ComfyUI's {kind} folders; put it there, then press R to refresh the list")


def load_model(
    path: str, model_options: dict, disable_dynamic: bool = False, checkpoint: Checkpoint | None = None
) -> ModelPatcher:
    """A native MODEL from a folder of shards, GGUF, or a file with a prefix or a dtype that ComfyUI does not know.

    checkpoint: opened from `path`; None when ComfyUI calls this again for an independent copy.
    """
    checkpoint = checkpoint or open_for_comfyui(path)
    state: dict[str, torch.Tensor] = {}
    for file in dict.fromkeys(checkpoint.where.values()):
        state |= _dequantized(file) if is_gguf(file) else _tensors(file)[0]
    state = {name: state[checkpoint.prefix + name] for name in checkpoint.names()}
    # ComfyUI reads descriptions out of metadata only for its own operations.
    state |= {f"{layer}.comfy_quant": as_description(conf) for layer, conf in checkpoint.quantized.items()}
    # What shapes do not show.
    config = {name: checkpoint.config.to_dict().get(name) for name in ("text_tokens_zero_pad", "audio")}
    metadata = {CONFIG_KEY: json.dumps(config)}
    if checkpoint.quantized:
        metadata[QUANT_METADATA] = json.dumps({"layers": checkpoint.quantized})
    options = {"disable_dynamic": True} if disable_dynamic else {}
    patcher = comfy.sd.load_diffusion_model_state_dict(state, model_options, metadata=metadata, **options)
    patcher.cached_patcher_init = (load_model, (path, model_options))
    return patcher


def _foreign(file: TensorFile) -> bool:
    """Whether a file has a dtype that ComfyUI's own reader, which dynamic VRAM uses, fails at: F8_E8M0, of the scales
    that comfy-kitchen gives mxfp8. ComfyUI without that reader takes safetensors', which knows all."""
    known = getattr(comfy.utils, "_TYPES", None)
    return known is not None and any(dtype not in known.values() for dtype, _ in file.header.values())


def _tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file: by ComfyUI's reader, or by the core's where ComfyUI's would fail."""
    file = open_file(path)
    if isinstance(file, SafetensorsFile) and _foreign(file):
        return file.tensors(), file.metadata
    tensors, metadata = comfy.utils.load_torch_file(str(path), safe_load=True, return_metadata=True)
    return tensors, metadata or {}


def _dequantized(path: Path) -> dict[str, torch.Tensor]:
    """A GGUF file's tensors, with its quantized ones as bf16."""
    file, tensors = open_file(path), {}
    for name, (dtype, shape) in file.header.items():
        tensors[name] = file.rows(name)
        if dtype == torch.float32 and len(shape) == 2:
            tensors[name] = tensors[name].to(torch.bfloat16)
    return tensors


def load_rowwise(path: str, disable_dynamic: bool = False, checkpoint: Checkpoint | None = None) -> ModelPatcher:
    """A native MODEL from a file or folder, quantized to fp8 row by row as its weights arrive.

    Arguments as for `load_model`.
    """
    checkpoint = checkpoint or open_for_comfyui(path)
    patcher = load_model(path, {"custom_operations": comfy_fp8.Rowwise}, disable_dynamic, checkpoint)
    if isinstance(patcher.model, LongCatVideo):
        comfy_fp8.remember(patcher.model.diffusion_model, checkpoint)
    patcher.cached_patcher_init = (load_rowwise, (path,))
    return patcher


class ModelLoader(LongCatNode):
    ID = "LongCatModelLoader"

    @classmethod
    def execute(cls, model_name: str, weight_dtype: str) -> io.NodeOutput:
        path = find("diffusion_models", model_name)
        # Reads headers only, and raises an error that says what the file is if it is not LongCat-Video.
        checkpoint = open_for_comfyui(path)
        device, rowwise = comfy.model_management.get_torch_device(), weight_dtype == FP8_ROWWISE
        import_ahead(device)
        dtype, room = WEIGHT_DTYPES.get(weight_dtype), comfy.model_management.get_free_memory(device)
        # Weights in 8 bits are multiplied in bf16.
        computed = torch.bfloat16 if dtype is None or dtype.itemsize == 1 else dtype
        ahead = network_ahead(checkpoint.config, computed, device, Policy() if rowwise else None, room)
        with working(LOADING), ahead:
            if rowwise:
                model = load_rowwise(str(path), checkpoint=checkpoint)
            else:
                options = {} if dtype is None else {"dtype": dtype}
                foreign = checkpoint.prefix not in COMFYUI_PREFIXES or any(map(_foreign, checkpoint.files.values()))
                if path.is_dir() or is_gguf(path) or foreign:
                    model = load_model(str(path), options, checkpoint=checkpoint)
                else:
                    model = comfy.sd.load_diffusion_model(str(path), options)
        if not isinstance(model.model, LongCatVideo):
            raise CheckpointError(f"{model_name} is not a complete LongCat-Video checkpoint; download it again")
        return io.NodeOutput(model)


class TextEncoderLoader(LongCatNode):
    ID = "LongCatTextEncoderLoader"

    @classmethod
    def execute(cls, text_encoder_name: str, device: str) -> io.NodeOutput:
        path = find("text_encoders", text_encoder_name)
        opened = umt5.open_umt5(path)
        sizes = opened.sizes
        if opened.spiece is None:
            raise CheckpointError(
                f"{text_encoder_name} carries no SentencePiece model (tensor '{umt5.SPIECE}'); "
                "use the umt5_xxl file made for ComfyUI"
            )
        # Raises an error for a vocabulary of another model.
        tokenizer_of(opened)
        options = {}
        if device == "cpu":
            cpu = torch.device("cpu")
            options = {"load_device": cpu, "offload_device": cpu}
        with working(LOADING_TEXT):
            if sizes["d_model"] != XXL_WIDTH:
                return io.NodeOutput(_small_clip(path, options))
            if not _known(opened):
                return io.NodeOutput(_xxl_clip(path, options))
            folders = folder_paths.get_folder_paths("embeddings")
            return io.NodeOutput(comfy.sd.load_clip([str(path)], folders, comfy.sd.CLIPType.WAN, options))


class _Target:
    """A text encoder of any size and its tokenizer, as comfy.sd.CLIP takes them."""

    tokenizer = comfy.text_encoders.wan.WanT5Tokenizer

    def __init__(self, made: type, opened: umt5.Umt5) -> None:
        self.made, self.params = made, {}
        names = ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads")
        self.config = {"umt5xxl_model_config": {name: opened.sizes[name] for name in names}}

    def clip(self, model_options: dict[str, Any], **params: Any) -> torch.nn.Module:
        return self.made(model_options=model_options | self.config, **params)


def target_in(state: Mapping[str, torch.Tensor], prefix: str) -> _Target | None:
    """The text encoder of a checkpoint that CheckpointSave wrote, whose names begin with `prefix`; None if there is
    none. Raises CheckpointError for one that is not UMT5."""
    prefix = f"{prefix}umt5xxl.transformer."
    found = {name: tensor for name, tensor in state.items() if name.startswith(prefix)}
    if not found:
        return None
    place = Path("the checkpoint")
    opened = umt5.open_umt5(place, {place: StateDict(found)})
    return _Target(comfy.text_encoders.wan.te(**t5_xxl_detect(found, prefix)), opened)


def _native(opened: umt5.Umt5, described: Mapping[str, dict[str, Any]]) -> bool:
    """Whether ComfyUI runs a text encoder's layers as its file stores them, once they are described rightly.

    described: by `_descriptions`.
    """
    int8 = any(name.endswith(".weight_int8") for name in opened.where)
    if opened.form is not umt5.TRANSFORMERS or opened.prefix or int8 or is_gguf(Path(opened.source)):
        return False
    # Its embeddings take numbers that are stored one by one.
    embedding = opened.packed.get(f"{umt5.SHARED}.weight")
    return embedding is None and all(
        runs(opened, layer, conf) and _as_comfyui_stores(opened, layer, conf["format"])
        for layer, conf in _rightly(opened, described).items()
    )


def _as_comfyui_stores(opened: umt5.Umt5, layer: str, kind: str) -> bool:
    """Whether a layer's weight has the dtype of its format, which ComfyUI converts to, and a column of row scales."""
    header = opened.files[opened.where[f"{layer}.weight"]].header
    _, scale = header.get(f"{layer}.weight_scale", (None, ()))
    rows = kind == "int8_tensorwise" and len(scale) == 1 and scale != (1,)
    return header[f"{layer}.weight"][0] == QUANT_ALGOS[kind]["storage_t"] and not rows


def _rightly(opened: umt5.Umt5, described: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Descriptions of a text encoder's layers as ComfyUI must read them."""
    return {
        layer: meant(conf, opened.dtypes[f"{layer}.weight"], opened.shapes[f"{layer}.weight"])
        for layer, conf in described.items()
    }


def _descriptions(opened: umt5.Umt5) -> dict[str, dict[str, Any]]:
    """Layer -> the description by which ComfyUI reads it by itself; a marker describes those with a scale."""
    marked: dict[str, Any] = {"format": "float8_e4m3fn"} if MARKERS[0] in opened.where else {}
    scaled = [name.removesuffix(".scale_weight") for name in opened.where if name.endswith(".scale_weight")]
    found = dict.fromkeys(scaled, marked) | opened.quantized
    for file in opened.files.values():
        found |= described_beside(file.header, file.rows, opened.source)
    return {layer: conf for layer, conf in found.items() if f"{layer}.weight" in opened.where}


def _known(opened: umt5.Umt5) -> bool:
    """Whether ComfyUI reads a text encoder's file as it is."""
    described = _descriptions(opened)
    own = _native(opened, described) and _rightly(opened, described) == described
    return own and not any(map(_foreign, opened.files.values()))


def _state(opened: umt5.Umt5) -> dict[str, torch.Tensor]:
    """A text encoder's tensors as ComfyUI's classes take them, in bf16 if its file has another form."""
    if _native(opened, _descriptions(opened)):
        state, metadata = _tensors(Path(opened.source))
        state = comfy.utils.convert_old_quants(state, "", metadata=metadata)[0]
        correct(state)
        return state
    vocabulary = bytearray(opened.vocabulary() or b"")
    return dict(opened.weights(torch.bfloat16)) | {umt5.SPIECE: torch.frombuffer(vocabulary, dtype=torch.uint8)}


def _xxl_clip(path: Path, options: dict, disable_dynamic: bool = False) -> comfy.sd.CLIP:
    """A CLIP for UMT5-XXL in a form that ComfyUI's own loader does not know."""
    clip = comfy.sd.load_text_encoder_state_dicts(
        [_state(umt5.open_umt5(path))],
        folder_paths.get_folder_paths("embeddings"),
        comfy.sd.CLIPType.WAN,
        options,
        **({"disable_dynamic": True} if disable_dynamic else {}),
    )
    clip.patcher.cached_patcher_init = (_patcher, (_xxl_clip, path, options))
    return clip


def _small_clip(path: Path, options: dict, disable_dynamic: bool = False) -> comfy.sd.CLIP:
    """A CLIP for a UMT5 whose sizes ComfyUI's own loader does not recognize."""
    opened = umt5.open_umt5(path)
    state = _state(opened)
    quantized = comfy.utils.detect_layer_quantization(state, "")
    # As ComfyUI's own loader has it: most numbers may be packed into bytes.
    dtype = comfy.utils.weight_dtype(state) if quantized is None else state[f"{umt5.NORM}.weight"].dtype
    target = _Target(comfy.text_encoders.wan.te(dtype_t5=dtype, t5_quantization_metadata=quantized), opened)
    dynamic = {"disable_dynamic": True} if disable_dynamic else {}
    try:
        clip = comfy.sd.CLIP(
            target,
            embedding_directory=folder_paths.get_folder_paths("embeddings"),
            tokenizer_data={umt5.SPIECE: state[umt5.SPIECE]},
            parameters=comfy.utils.calculate_parameters(state),
            state_dict=[state],
            model_options=options,
            **dynamic,
        )
    except RuntimeError as error:
        raise LongCatError(f"{path.name} does not load as a UMT5 encoder ({error}); download it again") from error
    clip.patcher.cached_patcher_init = (_patcher, (_small_clip, path, options))
    return clip


def _patcher(make: Callable[..., comfy.sd.CLIP], *args, **kwargs) -> ModelPatcher:
    return make(*args, **kwargs).patcher


NODES = [ModelLoader, TextEncoderLoader]
