"""The `longcat` command. Heavy imports wait until a command needs them, so that --help answers at once."""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from . import __version__
from .errors import LongCatError

if TYPE_CHECKING:
    import torch

    from .sampling.sampler import Step

BAD_INPUT, INTERRUPTED = 2, 130
DTYPES = ("auto", "float32", "bfloat16", "float16")
KV_CACHE = ("exact", "official", "off")
OUTPUT = "longcat.mp4"


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as everything else here does."""

    def error(self, message: str) -> NoReturn:
        raise LongCatError(f"{message}; see {self.prog} --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 1 (a check failed), 2 (bad input), 130 (interrupted)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        with _termination_as_interrupt():
            args = build_parser(argv).parse_args(argv)
            return args.run(args)
    except LongCatError as error:
        return _fail(str(error))
    except OSError as error:
        return _fail(f"{error.filename or 'the system'}: {error.strerror or error}; check the path and its permissions")
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        return _fail("out of memory; ask for a smaller size or fewer frames, or choose another --device or --dtype")
    except KeyboardInterrupt:
        print("longcat: interrupted; no unfinished file is left", file=sys.stderr)
        return INTERRUPTED


def build_parser(argv: Sequence[str] = ()) -> Parser:
    """The parser. Options of train-nano are added only when `argv` asks for it: they need torch to be imported."""
    parser = Parser(
        prog="longcat", description="LongCat-Video: text, image and continuation to video.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"longcat {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(name: str, run: Callable[[argparse.Namespace], int], summary: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        sub.set_defaults(run=run)
        return sub

    _add_generate(command("generate", generate, "Generate a video from a prompt, with the embedded model by default."))
    _add_refine(command("refine", refine, "Make a finished video larger and its frame rate double: the second stage."))
    sub = command("verify", verify, "Run the golden cases of a folder through this code and print a table.")
    sub.add_argument("directory", type=Path, metavar="DIR", help="folder of golden data")
    command("backends", backends, "List the attention backends, and why one cannot be used.")
    sub = command("score-nano", score_nano, "Measure how well the embedded model follows fresh prompts.")
    sub.add_argument("--prompts", type=_whole, default=64, metavar="N", help="how many prompts (default: 64)")
    sub.add_argument("--steps", type=_whole, default=50, metavar="N", help="denoising steps (default: 50)")
    sub.add_argument("--guidance", type=_number, default=4.0, metavar="X", help="CFG scale (default: 4)")
    sub = command("bench", bench, "Measure the network: what each optimization is worth, memory, kernels, exactness.")
    _add_bench(sub)
    sub = command("train-nano", train_nano, "Train the embedded model anew.")
    if argv[:1] == ["train-nano"]:
        from .nano.train import add_arguments

        add_arguments(sub)
    return parser


def _add_generate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", metavar="PROMPT", help="what the video shows")
    group = parser.add_argument_group("what is generated")
    group.add_argument(
        "--negative-prompt", metavar="TEXT", help="what it should not show (default: the model card's list)"
    )
    group.add_argument("--size", type=_size, metavar="HxW", help="height x width in pixels, multiples of 16")
    group.add_argument("--height", type=_whole, metavar="N", help="default: 64, real model 480")
    group.add_argument("--width", type=_whole, metavar="N", help="default: 96, real model 832")
    group.add_argument("--frames", type=_whole, metavar="N", help="4k+1 (default: 33, real model 93)")
    group.add_argument("--seed", type=_whole, default=0, metavar="N", help="default: %(default)s")
    group.add_argument("--image", type=Path, metavar="FILE", help="begin with this picture")
    group.add_argument("--video", type=Path, metavar="FILE", help="continue this clip")
    group.add_argument(
        "--cond-frames",
        type=_whole,
        default=13,
        metavar="N",
        help="frames of the clip's end, 4k+1 (default: %(default)s)",
    )
    group = parser.add_argument_group("sampling")
    group.add_argument("--steps", type=_whole, metavar="N", help="default: 50, distilled 16")
    group.add_argument("--guidance", type=_number, metavar="X", help="CFG scale, 1 is off (default: 4, distilled 1)")
    group.add_argument("--schedule", metavar="NAME", help="base, distilled or enhance_hf (default: by task)")
    group.add_argument("--distilled", action="store_true", help="short for --schedule distilled: 16 steps, guidance 1")
    group.add_argument(
        "--kv-cache",
        choices=KV_CACHE,
        default="exact",
        help="given frames once (exact; official: and left out of guidance's sums), or anew in each step (off)",
    )
    _add_model(parser)
    group = parser.add_argument_group("output")
    group.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="FILE",
        help=f".mp4, .webp or .gif (default: {OUTPUT}, or the next free name)",
    )
    group.add_argument("--contact-sheet", type=Path, metavar="FILE", help="also write a .png of frames and prompt")
    group.add_argument("--fps", type=_number, default=15.0, metavar="X", help="frames per second (default: 15)")


def _add_model(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model (default: the embedded LongCat-nano)")
    group.add_argument("--model", metavar="PATH", help="LongCat-Video's folder, its dit folder, or a safetensors file")
    group.add_argument("--vae", metavar="PATH", help="VAE folder or file (default: vae/ in the model's folder)")
    group.add_argument(
        "--text-encoder",
        metavar="PATH",
        help="folder or file (default: text_encoder/ and tokenizer/ in the model's folder)",
    )
    group.add_argument("--lora", type=Path, metavar="FILE", help="an official LoRA, merged into the weights")
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


def _add_refine(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("video", type=Path, metavar="VIDEO", help="the finished video")
    group = parser.add_argument_group("what is made of it")
    group.add_argument("--prompt", default="", metavar="TEXT", help="the video's own (default: none)")
    group.add_argument("--size", type=_size, metavar="HxW", help="pixels, multiples of 16 (default: nearest 720p size)")
    group.add_argument(
        "--sparsity", type=_number, metavar="X", help="of block-sparse attention; 0: none (default: 0.9375, nano 0)"
    )
    group.add_argument("--spatial-only", action="store_true", help="keep the frame rate; otherwise it is doubled")
    group.add_argument("--seed", type=_whole, default=0, metavar="N", help="default: %(default)s")
    group.add_argument(
        "--steps", type=_whole, default=50, metavar="N", help="of which 5 are run (default: %(default)s)"
    )
    group.add_argument("--piece", type=_whole, default=93, metavar="N", help="frames at a time (default: %(default)s)")
    group.add_argument("--overlap", type=_whole, default=13, metavar="N", help="of pieces (default: %(default)s)")
    _add_model(parser)
    group = parser.add_argument_group("output")
    group.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help=".mp4, .webp or .gif (default: VIDEO-720p.mp4)"
    )


def _add_bench(parser: argparse.ArgumentParser) -> None:
    from .benchmark.bench import add_arguments

    add_arguments(parser, size=_size, whole=_whole, number=_number, dtypes=DTYPES)


def generate(args: argparse.Namespace) -> int:
    """`longcat generate`: everything is checked before a model is loaded, and files appear whole or not at all."""
    from .generate.media import check_output, contact_sheet, estimate_bytes, write_video
    from .generate.pipeline import ModelPaths
    from .generate.request import GenerateRequest
    from .model.backends import check as check_attention

    paths = ModelPaths.of(args.model, args.vae, args.text_encoder)
    height, width = _sides(args)
    request = GenerateRequest(
        args.prompt,
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
        fps=args.fps,
    ).filled(paths.defaults)
    output = args.output or _free_name(Path(OUTPUT))
    _check_distinct(output, args.image, args.video)
    check_output(output, estimate_bytes(output, request.frames, request.height, request.width))
    if args.contact_sheet is not None:
        check_output(args.contact_sheet, 1 << 22, sheet=True)
    paths.check()
    check_attention(args.attention)
    device = _device(args.device)
    for note in request.notes():
        _note(note)

    started = time.monotonic()
    with _notes_from_warnings():
        pipeline = _load(args, paths, device)
        with _progress() as callback:
            generation = pipeline.generate(request, callback)
    write_video(output, generation.frames, request.fps)
    if args.contact_sheet is not None:
        contact_sheet(args.contact_sheet, generation.frames, request.prompt, fps=request.fps)
    print(
        f"{output}: {request.frames} frames of {request.height}x{request.width} at {request.fps:g} fps, "
        f"seed {request.seed}, in {time.monotonic() - started:.1f} s"
    )
    return 0


def refine(args: argparse.Namespace) -> int:
    """`longcat refine`: like `generate`, piece by piece."""
    from .generate.media import check_output, estimate_bytes, read_video, write_video
    from .generate.pipeline import ModelPaths
    from .generate.refine import RefineRequest, pieces, refine, target_size
    from .model.backends import check as check_attention
    from .model.block_sparse import BlockSparse

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
    output = args.output or _free_name(args.video.with_name(f"{args.video.stem}-720p.mp4"))
    _check_distinct(output, args.video)
    rate = 2 if request.doubled else 1
    height, width = args.size or target_size(*video.shape[1:3], paths.defaults.bucketed)
    check_output(output, estimate_bytes(output, rate * len(video), height, width))
    paths.check()
    check_attention(args.attention)
    device = _device(args.device)
    if args.lora is None and not paths.is_nano:
        _note("without --lora the model was not trained to refine; give refinement_lora.safetensors")

    started = time.monotonic()
    with _notes_from_warnings():
        pipeline = _load(args, paths, device)
        with _progress(len(pieces(len(video), request.piece, request.overlap))) as callback:
            parts = list(refine(pipeline, video, request, lambda number, of, step: callback(step)))
    import numpy as np

    frames = np.concatenate(parts)
    write_video(output, frames, rate * fps)
    print(
        f"{output}: {len(frames)} frames of {height}x{width} at {rate * fps:g} fps, seed {request.seed}, "
        f"in {time.monotonic() - started:.1f} s"
    )
    return 0


def _load(args: argparse.Namespace, paths: Any, device: torch.device) -> Any:
    """The models as the options of `_add_model` ask for them."""
    from .model.config import Optimizations

    return load_pipeline(
        paths,
        dtype=_dtype(args.dtype, device),
        device=device,
        optimizations=Optimizations(attention=args.attention, compile=_compile(args, device, paths)),
        fp8=args.fp8,
        lora=args.lora,
    )


def load_pipeline(paths: Any, **options: Any) -> Any:
    """Load the models: the one place where `generate` becomes heavy."""
    from .generate.pipeline import Pipeline

    return Pipeline.load(paths, **options)


def verify(args: argparse.Namespace) -> int:
    """`longcat verify`."""
    from .benchmark.verify import run_verify

    return run_verify(args.directory)


def backends(args: argparse.Namespace) -> int:
    """`longcat backends`."""
    from .model.backends import report

    rows = report()
    width = max(len(name) for name, _, _ in rows)
    for name, available, reason in rows:
        print(f"{name:<{width}}  {'yes' if available else 'no ':<3}  {reason}")
    return 0


def bench(args: argparse.Namespace) -> int:
    """`longcat bench`."""
    if args.part == "report":
        from .benchmark.report import write_page

        return write_page(args.folders, args.output)
    from .benchmark.bench import run

    device = _device(args.device)
    return run(args, device, _dtype(args.dtype, device))


def score_nano(args: argparse.Namespace) -> int:
    """`longcat score-nano`."""
    from .benchmark.adherence import run

    return run(args.prompts, args.steps, args.guidance)


def train_nano(args: argparse.Namespace) -> int:
    """`longcat train-nano`."""
    from .nano.train import run

    return run(args) or 0


# --- values of options -----------------------------------------------------------------------------------------------


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is no whole number") from None


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is no number") from None


def _size(text: str) -> tuple[int, int]:
    height, _, width = text.lower().partition("x")
    if not (height.isdecimal() and width.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is no height x width, such as 64x96")
    return _whole(height), _whole(width)


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


def _device(name: str) -> torch.device:
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise LongCatError(f"unknown device {name!r}; choose auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise LongCatError(f"device {name!r} is not supported; choose auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise LongCatError(
            f"device {name!r} is not there, PyTorch sees {torch.cuda.device_count()} GPUs; use --device cpu"
        )
    return device


def _dtype(name: str, device: torch.device) -> torch.dtype:
    import torch

    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, name)


def _compile(args: argparse.Namespace, device: torch.device, paths: Any) -> str:
    from .optimize import kernels
    from .optimize.compilation import why_not

    mode = args.compile
    if mode == "auto":
        # Nano is done before its blocks would be compiled, and own kernels leave next to nothing to be gained.
        own = not kernels.missing() and _dtype(args.dtype, device) in kernels.HALF
        return "off" if paths.is_nano or device.type != "cuda" or own or why_not(device) else "blocks"
    if mode == "blocks" and (reason := why_not(device)):
        raise LongCatError(f"--compile blocks does not work here: {reason}; leave it out, or use --compile off")
    return mode


def _check_distinct(output: Path, *sources: Path | None) -> None:
    if any(source is not None and output.resolve() == source.resolve() for source in sources):
        raise LongCatError(f"output {output} is the input itself; give another name to --output")


def _free_name(path: Path) -> Path:
    """`path`, or with a number where that exists: a default name must not overwrite what one did not name."""
    number = 1
    candidate = path
    while candidate.exists():
        number += 1
        candidate = path.with_stem(f"{path.stem}-{number}")
    return candidate


# --- what is said on the way -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def _progress(pieces: int = 1) -> Iterator[Callable[[Step], None]]:
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise LongCatError("the progress bar needs tqdm; run: pip install 'longcat-video[headless]'") from error

    with tqdm(unit="step", desc="sampling", dynamic_ncols=True) as bar:

        def callback(step: Step) -> None:
            bar.total = pieces * step.total
            bar.update()

        yield callback


@contextlib.contextmanager
def _notes_from_warnings() -> Iterator[None]:
    """Our own warnings as notes of one line; those of libraries are for developers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("always", category=UserWarning, module=r"longcat_core\b")
        warnings.showwarning = lambda message, *_, **__: _note(str(message))
        yield


@contextlib.contextmanager
def _termination_as_interrupt() -> Iterator[None]:
    """SIGTERM takes the way of Ctrl-C, so that it too leaves no temporary file."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _note(sentence: str) -> None:
    print(f"longcat: note: {sentence}", file=sys.stderr)


def _fail(sentence: str) -> int:
    print(f"longcat: error: {' '.join(sentence.split())}", file=sys.stderr)
    return BAD_INPUT


def _is_out_of_memory(error: BaseException) -> bool:
    # torch.OutOfMemoryError by name, so that torch need not be imported; its CPU allocator raises a plain RuntimeError.
    return (
        isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "allocate memory" in str(error)
    )


if __name__ == "__main__":
    sys.exit(main())
