"""From a command's model and memory options to loaded models. PyTorch is imported when a function runs."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from ..errors import LongCatError
from ..generate.options import LORA_MODES
from .console import device_of, dtype_of, note

if TYPE_CHECKING:
    import torch

    from ..generate.opened import OpenedModel
    from ..optimize.switches import CompileMode


def machine_of(args: argparse.Namespace, paths: Any) -> tuple[torch.device, OpenedModel]:
    """The device and the opened model, once its files, its LoRAs, the attention and the memory limit are checked."""
    from ..generate.opened import open_model

    model = open_model(paths, args.lora, args.attention)
    device = device_of(args.device)
    check_memory(args, device)
    return device, model


def check_memory(args: argparse.Namespace, device: torch.device) -> None:
    """Raise LongCatError for a memory limit or a plan that is out of range, else set the limit."""
    import torch

    from ..optimize.plan import GIB, limit_memory

    if args.stream_blocks < 0:
        raise LongCatError(f"--stream-blocks {args.stream_blocks} is out of range; give 0 or more")
    if args.memory is None:
        return
    if device.type != "cuda":
        raise LongCatError(f"--memory limits a GPU's memory, and this runs on the {device.type}; leave it out")
    total = torch.cuda.get_device_properties(device).total_memory
    if not 0 < args.memory <= total / GIB:
        raise LongCatError(f"--memory {args.memory:g} is out of range; the GPU has {total / GIB:.1f} GiB")
    limit_memory(device, int(args.memory * GIB))


def compile_mode(args: argparse.Namespace, device: torch.device, paths: Any) -> CompileMode:
    """`off` or `blocks`, what `auto` means here. Raises LongCatError if blocks cannot be compiled here."""
    from ..optimize.compilation import why_not
    from ..optimize.kernels import elementwise as kernels

    mode = args.compile
    if mode == "auto":
        # Nano finishes before its blocks would be compiled, and with our own kernels there is little left to gain.
        own = kernels.takes(dtype_of(args.dtype, device))
        return "off" if paths.is_nano or device.type != "cuda" or own or why_not(device) else "blocks"
    if mode == "blocks" and (reason := why_not(device)):
        raise LongCatError(f"--compile blocks does not work here: {reason}; leave it out, or use --compile off")
    return mode


def load_models(args: argparse.Namespace, model: OpenedModel, device: torch.device, work: Any) -> Any:
    """Load the opened model as the options ask, with enough memory left for `work`."""
    from ..optimize.plan import GIB, Plan
    from ..optimize.switches import Optimizations

    pipeline = load_pipeline(
        model,
        dtype=dtype_of(args.dtype, device),
        device=device,
        optimizations=Optimizations(attention=args.attention, compile=compile_mode(args, device, model.paths)),
        fp8=args.fp8,
        lora_mode=args.lora_mode,
        work=work,
        least=Plan(args.stream_blocks, args.split_guidance, args.offload_kv_cache, args.stream_text_encoder),
        memory=None if args.memory is None else int(args.memory * GIB),
    )
    pipeline.vae.tiling = args.tiled_vae
    if pipeline.plan_note:
        note(pipeline.plan_note)
    return pipeline


def load_pipeline(model: OpenedModel, **options: Any) -> Any:
    """`Pipeline.load`: from here on a command is heavy."""
    from ..generate.pipeline import Pipeline

    return Pipeline.load(model, **options)


def model_settings(args: argparse.Namespace, paths: Any, device: torch.device) -> dict[str, Any]:
    """The model and those of its options that decide the result, as a folder of segments records them."""
    from ..files.safetensors_io import fingerprint

    found = paths.fingerprints() | {
        "lora": None
        if args.lora is None
        else "+".join(fingerprint(path) + ("" if strength == 1 else f":{strength:g}") for path, strength in args.lora),
        "dtype": str(dtype_of(args.dtype, device)).removeprefix("torch."),
        "fp8": args.fp8,
        "attention": args.attention,
        "compile": compile_mode(args, device, paths),
        "device": device.type,
    }
    # Folders made before --lora-mode existed do not have this key.
    return found if args.lora is None or args.lora_mode == LORA_MODES[0] else found | {"lora_mode": args.lora_mode}
