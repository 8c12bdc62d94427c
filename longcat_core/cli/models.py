"""From a command's model and memory options to loaded models."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..checkpoints.lora import open_loras
from ..errors import LongCatError
from ..generate import inputs
from ..generate.calibration import Calibration, check_fits, read_calibration
from ..generate.loading import OnLoad
from ..generate.opened import OpenedModel, open_model
from ..generate.options import LORA_MODES
from ..generate.paths import ModelPaths
from ..generate.pipeline import Pipeline
from ..generate.request import GenerateRequest
from ..generate.speed_fit import Loaded, fit_loading
from ..generate.speeds import EXACT
from ..generate.takes import LORA_MODE, lossy_settings
from ..generate.text_cache import cache_folder
from ..optimize import compilation
from ..optimize.kernels import elementwise
from ..optimize.plan import GIB, Plan, Work, limit_memory
from ..optimize.requirement import Inputs
from ..optimize.sparse.choose import check_sparse
from ..optimize.sparse.settings import Sparse
from ..optimize.switches import CompileMode, Optimizations
from ..parallel.devices import Gpus, devices_of
from ..parallel.group import end_current
from .console import note


def paths_of(args: argparse.Namespace) -> ModelPaths:
    """Where the models are that the options name."""
    return ModelPaths.of(args.model, args.vae, args.text_encoder)


def device_of(name: str) -> torch.device:
    """The device; `auto` is a GPU if PyTorch sees one. Raises LongCatError for one that cannot be used."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return inputs.device_of(name)


def gpus_of(args: argparse.Namespace) -> Gpus:
    """What --gpus says, as `devices_of` takes it; 1 for a command without it."""
    given: Any = getattr(args, "gpus", 1)
    return int(given) if isinstance(given, str) and given.isdecimal() else given


def lossy_switches_of(args: argparse.Namespace) -> Optimizations:
    """The switches of the network that an option sets and that change its result."""
    return Optimizations(attention=args.attention, exchange=getattr(args, "exchange", "exact"))


def dtype_of(name: str, device: torch.device) -> torch.dtype:
    """The dtype; `auto` is bfloat16 on a GPU and float32 on a CPU."""
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" else "float32"
    return inputs.dtype_of(name)


def avatar_of(args: argparse.Namespace, people: int) -> OpenedModel:
    """The opened avatar that the options name, its LoRAs and its audio encoder checked. people: in the video."""
    paths = ModelPaths.of_avatar(args.model, args.vae, args.text_encoder, args.audio_encoder, args.base, people)
    model = open_model(paths, args.lora, args.attention)
    _ = model.audio_encoder
    return model


def machine_of(args: argparse.Namespace, paths: ModelPaths | OpenedModel) -> tuple[torch.device, OpenedModel]:
    """The device and the opened model, once its files, its LoRAs and what the machine has to offer are checked."""
    model = paths if isinstance(paths, OpenedModel) else open_model(paths, args.lora, args.attention)
    paths = model.paths
    check_sparse(getattr(args, "sparse_kernel", "auto"))
    device = device_of(args.device)
    devices_of(gpus_of(args), device)
    check_memory(args, device)
    compile_mode(args, device, paths)
    return device, model


def with_speed(
    args: argparse.Namespace, given: Collection[str], schedule: str, device: torch.device, model: OpenedModel
) -> tuple[argparse.Namespace, Loaded | None]:
    """The options with what --speed makes of --fp8 and --attention, and how the model is loaded then; unchanged and
    None without a speed. given: the options that the user gave, which keep their values."""
    if args.speed in (None, EXACT):
        return args, None
    config = model.checkpoint.config
    inputs = Inputs(device, dtype_of(args.dtype, device), config.head_dim, False)
    own = args.attention if "--attention" in given else None
    loaded = fit_loading(args.speed, schedule, inputs, config, args.fp8 or None, own)
    return argparse.Namespace(**{**vars(args), "fp8": loaded.fp8, "attention": loaded.attention}), loaded


def sparse_of(args: argparse.Namespace) -> Sparse | Calibration | None:
    """What --sparse asks for: a density or a calibration file. Raises LongCatError for anything else."""
    if args.sparse is None:
        return None
    try:
        density = float(args.sparse)
    except ValueError:
        if not Path(args.sparse).exists():
            raise LongCatError(
                f"--sparse {args.sparse} is neither a density from 0 to 1 nor a file; give 0.15, or what longcat "
                "calibrate wrote"
            ) from None
        return read_calibration(args.sparse)
    return Sparse(density)


def check_sparse_fits(args: argparse.Namespace, request: GenerateRequest, model: OpenedModel) -> None:
    """Raise LongCatError if a request's calibration is of other weights than the opened model."""
    if isinstance(request.sparse, Calibration):
        check_fits(request.sparse, model.checkpoint, args.sparse)


def check_memory(args: argparse.Namespace, device: torch.device) -> None:
    """Raise LongCatError for a memory limit or a plan that is out of range; otherwise set the limit."""
    for name, count in (("stream", args.stream_blocks), ("shard", getattr(args, "shard_blocks", 0))):
        if count < 0:
            raise LongCatError(f"--{name}-blocks {count} is out of range; give 0 or more")
    if args.memory is None:
        return
    if device.type != "cuda":
        raise LongCatError(f"--memory limits a GPU's memory, and this runs on the {device.type}; leave it out")
    total = torch.cuda.get_device_properties(device).total_memory
    if not 0 < args.memory <= total / GIB:
        raise LongCatError(f"--memory {args.memory:g} is out of range; the GPU has {total / GIB:.1f} GiB")
    limit_memory(device, int(args.memory * GIB))


def compile_mode(args: argparse.Namespace, device: torch.device, paths: ModelPaths) -> CompileMode:
    """`off` or `blocks`, what `auto` means here. Raises LongCatError if blocks cannot be compiled here."""
    mode: CompileMode = args.compile
    if args.compile == "auto":
        # Nano finishes before its blocks would be compiled, and with our own kernels there is little left to gain.
        own = elementwise.takes(dtype_of(args.dtype, device))
        eager = paths.is_nano or device.type != "cuda" or own or compilation.why_not(device)
        return "off" if eager else "blocks"
    if mode == "blocks" and (reason := compilation.why_not(device)):
        raise LongCatError(f"--compile blocks does not work here: {reason}; leave it out, or use --compile off")
    return mode


def load_models(
    args: argparse.Namespace,
    model: OpenedModel,
    device: torch.device,
    work: Work,
    prompts: Sequence[str] = (),
    on_load: OnLoad | None = None,
) -> Pipeline:
    """Load the opened model as the options ask, with enough memory left for `work`.

    prompts: all that are to come, for commands that have --no-text-cache. on_load: see `Pipeline.load`.
    """
    args.outputs.callback(end_current)
    cached = not getattr(args, "no_text_cache", True)
    pipeline = load_pipeline(
        model,
        dtype=dtype_of(args.dtype, device),
        device=device,
        optimizations=replace(lossy_switches_of(args), compile=compile_mode(args, device, model.paths)),
        fp8=args.fp8,
        lora_mode=args.lora_mode,
        work=work,
        least=Plan(
            args.stream_blocks,
            args.split_guidance,
            # A command that is given no frames has no such cache.
            getattr(args, "offload_kv_cache", False),
            args.stream_text_encoder,
            getattr(args, "shard_blocks", 0),
        ),
        memory=None if args.memory is None else int(args.memory * GIB),
        text_cache=cache_folder() if cached else None,
        prompts=prompts,
        on_load=on_load,
        gpus=gpus_of(args),
    )
    pipeline.vae.tiling = args.tiled_vae
    if pipeline.plan_note:
        note(pipeline.plan_note)
    return pipeline


# From here on a command is heavy; tests put a small model here.
load_pipeline = Pipeline.load


def model_settings(
    args: argparse.Namespace, paths: ModelPaths, device: torch.device
) -> tuple[dict[str, Any], dict[str, str]]:
    """The model, as a folder of segments records it, and the lossy options that it runs with, in words."""
    lora = None
    if args.lora is not None:
        opened = open_loras(args.lora)
        lora = "+".join(one.fingerprint + ("" if one.strength == 1 else f":{one.strength:g}") for one in opened)
    lossy = lossy_settings(
        precision=str(dtype_of(args.dtype, device)).removeprefix("torch."),
        switches=lossy_switches_of(args),
        eight_bit=args.fp8,
    )
    if lora is not None and args.lora_mode != LORA_MODES[0]:
        lossy[LORA_MODE] = args.lora_mode
    return paths.fingerprints() | {"lora": lora, "device": device.type}, lossy
