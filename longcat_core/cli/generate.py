"""The `longcat` commands that make videos: their options and what they do. PyTorch is imported when one runs."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import LongCatError
from .console import DTYPES, device_of, dtype_of, lora, note, notes_from_warnings, number, progress, size, whole

if TYPE_CHECKING:
    import numpy as np
    import torch

    from ..generate.opened import OpenedModel

KV_CACHE = ("exact", "official", "off")
HAND_OFFS = ("frames", "latents")
LORA_MODES = ("merged", "runtime")
OUTPUT = "longcat.mp4"
LONG_OUTPUT = "longcat-long.mp4"


def add_generate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", metavar="PROMPT", help="what the video shows")
    group = add_what(parser)
    group.add_argument("--frames", type=whole, metavar="N", help="4k+1 (default: 33, real model 93)")
    add_sampling(parser)
    add_model(parser)
    group = _add_output(parser, f"default: {OUTPUT}, or the next free name")
    group.add_argument("--contact-sheet", type=Path, metavar="FILE", help="also write a .png of frames and prompt")
    group.add_argument("--fps", type=number, default=15.0, metavar="X", help="frames per second (default: 15)")


def add_long(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "prompts", nargs="*", metavar="PROMPT", help="what the video shows: one for all segments, or one for each"
    )
    group = add_what(parser)
    group.add_argument("--prompts-file", type=Path, metavar="FILE", help="prompts from a text file, one a line")
    group.add_argument(
        "--segments", type=whole, metavar="N", help="default: as many as prompts; the last prompt serves all beyond it"
    )
    group.add_argument("--frames", type=whole, metavar="N", help="of a segment, 4k+1 (default: 33, real model 93)")
    group.add_argument(
        "--overlap",
        type=whole,
        default=13,
        metavar="N",
        help="frames of a segment's end that the next begins with, 4k+1 (default: %(default)s)",
    )
    group.add_argument(
        "--hand-off",
        choices=HAND_OFFS,
        default=HAND_OFFS[0],
        help="what the next segment is given: frames, decoded and encoded anew (default), or their latents as they are",
    )
    add_sampling(parser)
    add_model(parser)
    group = _add_output(parser, f"default: {LONG_OUTPUT}")
    group.add_argument(
        "--folder",
        type=Path,
        metavar="DIR",
        help="keeps the finished segments; the same command goes on from them (default: FILE's name and -segments)",
    )
    group.add_argument("--fps", type=number, default=15.0, metavar="X", help="frames per second (default: 15)")


def add_what(parser: argparse.ArgumentParser) -> Any:
    group = parser.add_argument_group("what is generated")
    group.add_argument(
        "--negative-prompt", metavar="TEXT", help="what it should not show (default: the model card's list)"
    )
    group.add_argument("--size", type=size, metavar="HxW", help="height x width in pixels, multiples of 16")
    group.add_argument("--height", type=whole, metavar="N", help="default: 64, real model 480")
    group.add_argument("--width", type=whole, metavar="N", help="default: 96, real model 832")
    group.add_argument("--seed", type=whole, default=0, metavar="N", help="default: %(default)s")
    group.add_argument("--image", type=Path, metavar="FILE", help="begin with this picture")
    group.add_argument("--video", type=Path, metavar="FILE", help="continue this clip")
    group.add_argument(
        "--cond-frames",
        type=whole,
        default=13,
        metavar="N",
        help="frames of the clip's end, 4k+1 (default: %(default)s)",
    )
    return group


def add_sampling(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sampling")
    group.add_argument("--steps", type=whole, metavar="N", help="default: 50, distilled 16")
    group.add_argument("--guidance", type=number, metavar="X", help="CFG scale, 1 is off (default: 4, distilled 1)")
    group.add_argument("--schedule", metavar="NAME", help="base, distilled or enhance_hf (default: by task)")
    group.add_argument("--distilled", action="store_true", help="short for --schedule distilled: 16 steps, guidance 1")
    group.add_argument(
        "--kv-cache",
        choices=KV_CACHE,
        default="exact",
        help="given frames once (exact; official: and left out of guidance's sums), or anew in each step (off)",
    )
    group.add_argument(
        "--step-cache",
        type=number,
        default=0.0,
        metavar="X",
        help="leave out steps whose output can be foretold: 0.03 to 0.12; faster, lossy (default: 0, none)",
    )


def _add_output(parser: argparse.ArgumentParser, default: str) -> Any:
    group = parser.add_argument_group("output")
    suffixes = ".mp4, .mkv (lossless), .webp or .gif"
    group.add_argument("-o", "--output", type=Path, metavar="FILE", help=f"{suffixes} ({default})")
    return group


def add_model(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model (default: the embedded LongCat-nano)")
    group.add_argument("--model", metavar="PATH", help="LongCat-Video's folder, its dit folder, or a file of any form")
    group.add_argument("--vae", metavar="PATH", help="VAE folder or file (default: vae/ in the model's folder)")
    group.add_argument(
        "--text-encoder",
        metavar="PATH",
        help="folder or file (default: text_encoder/ and tokenizer/ in the model's folder)",
    )
    group.add_argument(
        "--lora",
        type=lora,
        action="append",
        metavar="FILE[:STRENGTH]",
        help="a LoRA of any form; may be given several times (default strength: 1)",
    )
    group.add_argument(
        "--lora-mode",
        choices=LORA_MODES,
        default=LORA_MODES[0],
        help="merged into the weights (default), or at run time beside them: slower, and --fp8 keeps the base's own "
        "numbers",
    )
    group.add_argument("--dtype", choices=DTYPES, default="auto", help="auto: bfloat16 on a GPU, float32 on a CPU")
    group.add_argument("--fp8", action="store_true", help="large layers in 8 bits: faster, half the memory, lossy")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    group.add_argument("--attention", default="auto", metavar="NAME", help="see longcat backends")
    group.add_argument(
        "--compile",
        choices=("auto", "off", "blocks"),
        default="auto",
        help="torch.compile of the transformer blocks: slower first step, faster others (auto: large models on a GPU "
        "where own kernels do not run)",
    )
    group = parser.add_argument_group("memory (default: as little of this as the GPU's free memory asks for)")
    group.add_argument("--memory", type=number, metavar="GIB", help="use at most so much of the GPU's")
    group.add_argument("--stream-blocks", type=whole, default=0, metavar="N", help="blocks that wait in CPU memory")
    group.add_argument("--stream-text-encoder", action="store_true", help="the text encoder waits in CPU memory")
    group.add_argument("--split-guidance", action="store_true", help="its halves one after the other")
    group.add_argument("--offload-kv-cache", action="store_true", help="given frames' keys wait in CPU memory")
    group.add_argument("--tiled-vae", action="store_true", help="the VAE works on tiles; seams may be seen")


def add_refine(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("video", type=Path, metavar="VIDEO", help="the finished video")
    group = parser.add_argument_group("what is made of it")
    group.add_argument("--prompt", default="", metavar="TEXT", help="the video's own (default: none)")
    group.add_argument("--size", type=size, metavar="HxW", help="pixels, multiples of 16 (default: nearest 720p size)")
    group.add_argument(
        "--sparsity", type=number, metavar="X", help="of block-sparse attention; 0: none (default: 0.9375, nano 0)"
    )
    group.add_argument("--spatial-only", action="store_true", help="keep the frame rate; otherwise it is doubled")
    group.add_argument("--seed", type=whole, default=0, metavar="N", help="default: %(default)s")
    group.add_argument("--steps", type=whole, default=50, metavar="N", help="of which 5 are run (default: %(default)s)")
    group.add_argument("--piece", type=whole, default=93, metavar="N", help="frames at a time (default: %(default)s)")
    group.add_argument("--overlap", type=whole, default=13, metavar="N", help="of pieces (default: %(default)s)")
    add_model(parser)
    group = _add_output(parser, "default: VIDEO-refined.mp4")
    group.add_argument(
        "--folder", type=Path, metavar="DIR", help="keeps the finished pieces; the same command goes on from them"
    )


def generate(args: argparse.Namespace) -> int:
    """`longcat generate`: everything is checked before a model is loaded, and files appear whole or not at all."""
    from ..files.media import check_output, contact_sheet, estimate_bytes, write_video
    from ..generate.pipeline import ModelPaths
    from ..generate.request import work_of

    paths = ModelPaths.of(args.model, args.vae, args.text_encoder)
    request = request_of(args, args.prompt).filled(paths.defaults)
    output = args.output or free_name(Path(OUTPUT))
    _check_distinct(output, args.image, args.video)
    check_output(output, estimate_bytes(output, request.frames, request.height, request.width))
    if args.contact_sheet is not None:
        _check_distinct(args.contact_sheet, args.image, args.video, option="--contact-sheet")
        check_output(args.contact_sheet, 1 << 22, sheet=True)
    device, model = machine_of(args, paths)
    for sentence in request.notes():
        note(sentence)

    started = time.monotonic()
    with notes_from_warnings():
        pipeline = load_models(args, model, device, work_of(request))
        with progress() as bar:
            generation = pipeline.generate(request, bar)
    write_video(output, generation.frames, request.fps)
    if args.contact_sheet is not None:
        contact_sheet(args.contact_sheet, generation.frames, request.prompt, fps=request.fps)
    print(
        f"{output}: {request.frames} frames of {request.height}x{request.width} at {request.fps:g} fps, "
        f"seed {request.seed}, in {time.monotonic() - started:.1f} s"
    )
    return 0


def long(args: argparse.Namespace) -> int:
    """`longcat long`: segment by segment, each kept in a folder, from which the same command goes on."""
    from dataclasses import replace

    from ..files.media import check_output, estimate_bytes, write_video
    from ..generate.long_video import LongVideoRequest, long_video, new_frames, segment_folder, spread_prompts
    from ..generate.pipeline import ModelPaths
    from ..generate.request import work_of

    paths = ModelPaths.of(args.model, args.vae, args.text_encoder)
    prompts = spread_prompts(prompts_of(args), args.segments)
    request = LongVideoRequest(
        request_of(args, prompts[0]), prompts, args.overlap, _schedule(args), args.hand_off
    ).filled(paths.defaults)
    output = args.output or Path(LONG_OUTPUT)
    folder = segment_folder(args.folder or output.with_name(f"{output.stem}-segments"))
    if args.output is None and output.exists() and not folder.path.exists():
        raise LongCatError(f"{output} exists, and not from this command; name another file with --output")
    _check_distinct(output, args.image, args.video)
    first = request.first
    check_output(output, estimate_bytes(output, request.total_frames, first.height, first.width))
    device, model = machine_of(args, paths)
    request = replace(request, model=_model_settings(args, paths, device))
    for sentence in first.notes():
        note(sentence)

    started = time.monotonic()
    finished = []
    with notes_from_warnings(), progress() as bar:

        def callback(number: int, of: int, step: Any) -> None:
            bar(step, f"segment {number + 1}/{of}")

        work = work_of(first, request.overlap)
        for segment in long_video(lambda: load_models(args, model, device, work), request, folder, callback):
            finished.append(segment)
            bar.say(segment.told(folder.path))
    write_video(output, new_frames(folder, finished), first.fps)
    print(
        f"{output}: {request.total_frames} frames of {first.height}x{first.width} at {first.fps:g} fps, "
        f"{len(finished)} segments, seed {first.seed}, in {time.monotonic() - started:.1f} s"
    )
    return 0


def refine(args: argparse.Namespace) -> int:
    """`longcat refine`: like `generate`, piece by piece."""
    from ..files.media import check_output, estimate_bytes, read_video, write_video
    from ..generate.pipeline import ModelPaths
    from ..generate.refine import RefineRequest, check_video, piece_folder, refine, refine_in_folder
    from ..optimize.block_sparse import BlockSparse

    paths = ModelPaths.of(args.model, args.vae, args.text_encoder)
    height, width = args.size or (None, None)
    sparse = BlockSparse() if args.sparsity is None else BlockSparse(args.sparsity)
    if args.sparsity == 0 or (args.sparsity is None and paths.is_nano):
        sparse = None
    video, fps = read_video(args.video)
    request = RefineRequest(
        args.prompt,
        args.seed,
        not args.spatial_only,
        height,
        width,
        args.steps,
        args.piece,
        args.overlap,
        fps,
        sparse,
    )
    request.check()
    check_video(video)
    output = args.output or free_name(args.video.with_name(f"{args.video.stem}-refined.mp4"))
    folder = None if args.folder is None else piece_folder(args.folder)
    _check_distinct(output, args.video)
    rate = 2 if request.doubled else 1
    height, width = request.size(video, paths.defaults)
    check_output(output, estimate_bytes(output, rate * len(video), height, width))
    device, model = machine_of(args, paths)
    if args.lora is None and not paths.is_nano:
        note("without --lora the model was not trained to refine; give refinement_lora.safetensors")

    count, started = 0, time.monotonic()
    with notes_from_warnings(), progress() as bar:

        def callback(number: int, of: int, step: Any) -> None:
            bar(step, f"piece {number + 1}/{of}")

        def load() -> Any:
            return load_models(args, model, device, request.work(video, paths.defaults))

        def clips() -> Iterator[np.ndarray]:
            nonlocal count
            for clip in refine(load(), video, request, callback) if folder is None else kept():
                count += len(clip)
                yield clip

        def kept() -> Iterator[np.ndarray]:
            # All of them first: a piece that fails must not leave an encoder waiting.
            settings = _model_settings(args, paths, device)
            done, pieces = [], (video, request, folder, settings, callback)
            for number, skip, reused in refine_in_folder(load, paths.defaults, *pieces):
                done.append((number, skip))
                bar.say(f"piece {number + 1}: {'is in' if reused else 'finished, kept in'} {folder.path}")
            for number, skip in done:
                yield folder.frames(number, skip)

        write_video(output, clips(), rate * fps)
    print(
        f"{output}: {count} frames of {height}x{width} at {rate * fps:g} fps, seed {request.seed}, "
        f"in {time.monotonic() - started:.1f} s"
    )
    return 0


def request_of(args: argparse.Namespace, prompt: str) -> Any:
    """What the options of `add_what` and `add_sampling` ask for, not yet filled in."""
    from ..generate.request import GenerateRequest

    height, width = _sides(args)
    return GenerateRequest(
        prompt,
        negative_prompt=args.negative_prompt,
        height=height,
        width=width,
        frames=args.frames,
        steps=args.steps,
        guidance_scale=args.guidance,
        seed=args.seed,
        schedule=_schedule(args),
        image=args.image,
        video=args.video,
        num_cond_frames=args.cond_frames,
        kv_cache=args.kv_cache,
        step_cache=args.step_cache,
        fps=args.fps,
    )


def prompts_of(args: argparse.Namespace) -> list[str]:
    if args.prompts_file is None:
        return args.prompts
    if args.prompts:
        raise LongCatError("prompts are given and --prompts-file too; give one or the other")
    try:
        lines = args.prompts_file.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise LongCatError(f"{args.prompts_file} is no text in UTF-8; save it as such, one prompt a line") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise LongCatError(f"{args.prompts_file} holds no prompts; write one a line")
    return prompts


def _model_settings(args: argparse.Namespace, paths: Any, device: torch.device) -> dict[str, Any]:
    """What of the model and its options decides the result."""
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
    # Folders made before there was a choice have no word for it.
    return found if args.lora is None or args.lora_mode == LORA_MODES[0] else found | {"lora_mode": args.lora_mode}


def load_models(args: argparse.Namespace, model: OpenedModel, device: torch.device, work: Any) -> Any:
    """The opened model, loaded as the options of `add_model` say, with room for `work`."""
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
    if pipeline.told:
        note(pipeline.told)
    return pipeline


def machine_of(args: argparse.Namespace, paths: Any) -> tuple[torch.device, OpenedModel]:
    """The device and the opened model, once its files, its LoRAs, the attention and the memory limit are checked."""
    from ..generate.opened import open_model

    model = open_model(paths, args.lora, args.attention)
    device = device_of(args.device)
    check_memory(args, device)
    return device, model


def check_memory(args: argparse.Namespace, device: torch.device) -> None:
    """Raise LongCatError for a limit or a plan that cannot be, and set the limit."""
    import torch

    from ..optimize.plan import GIB, limit_memory

    if args.stream_blocks < 0:
        raise LongCatError(f"--stream-blocks {args.stream_blocks} is less than none; give 0 or more")
    if args.memory is None:
        return
    if device.type != "cuda":
        raise LongCatError(f"--memory limits a GPU's memory, and this runs on the {device.type}; leave it out")
    total = torch.cuda.get_device_properties(device).total_memory
    if not 0 < args.memory <= total / GIB:
        raise LongCatError(f"--memory {args.memory:g} is out of range; the GPU has {total / GIB:.1f} GiB")
    limit_memory(device, int(args.memory * GIB))


def load_pipeline(model: OpenedModel, **options: Any) -> Any:
    """Load the models: the one place where `generate` becomes heavy."""
    from ..generate.pipeline import Pipeline

    return Pipeline.load(model, **options)


def _sides(args: argparse.Namespace) -> tuple[int | None, int | None]:
    if args.size is None:
        return args.height, args.width
    if args.height is not None or args.width is not None:
        raise LongCatError("--size is given beside --height or --width; give one or the other")
    return args.size


def _schedule(args: argparse.Namespace) -> str | None:
    if args.distilled and args.schedule not in (None, "distilled"):
        raise LongCatError(f"--distilled and --schedule {args.schedule} exclude each other; give one of them")
    return "distilled" if args.distilled else args.schedule


def compile_mode(args: argparse.Namespace, device: torch.device, paths: Any) -> str:
    from ..optimize.compilation import why_not
    from ..optimize.kernels import elementwise as kernels

    mode = args.compile
    if mode == "auto":
        # Nano is done before its blocks would be compiled, and own kernels leave next to nothing to be gained.
        own = not kernels.missing() and dtype_of(args.dtype, device) in kernels.HALF
        return "off" if paths.is_nano or device.type != "cuda" or own or why_not(device) else "blocks"
    if mode == "blocks" and (reason := why_not(device)):
        raise LongCatError(f"--compile blocks does not work here: {reason}; leave it out, or use --compile off")
    return mode


def _check_distinct(output: Path, *sources: Path | None, option: str = "--output") -> None:
    if any(source is not None and output.resolve() == source.resolve() for source in sources):
        raise LongCatError(f"output {output} is the input itself; give another name to {option}")


def free_name(path: Path) -> Path:
    """`path`, or with a number where that exists: a default name must not overwrite what one did not name."""
    number = 1
    candidate = path
    while candidate.exists():
        number += 1
        candidate = path.with_stem(f"{path.stem}-{number}")
    return candidate


# Name -> options, what runs, and a line of help.
TASKS = {
    "generate": (add_generate, generate, "Generate a video from a prompt, with the embedded model by default."),
    "long": (add_long, long, "Generate a long video segment by segment; run again, it goes on where it was."),
    "refine": (add_refine, refine, "Make a finished video larger and its frame rate double: the second stage."),
}
