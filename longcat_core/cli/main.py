"""The `longcat` command. Heavy modules are imported when a command needs them, so that --help answers at once."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn

from .. import __version__
from ..errors import LongCatError
from ..generate.options import DTYPES
from . import compare as comparing_tasks
from . import convert as checkpoint_tasks
from . import generate as tasks
from . import train as training_tasks
from .console import device_of, dtype_of, number, size, whole
from .options import add_options

BAD_INPUT, INTERRUPTED, BROKEN_PIPE = 2, 130, 141
# Memory of common cards, and the size of the released text encoder's weights in 16 bits.
CARDS_GIB, UMT5_XXL_BYTES = (48, 32, 24, 16, 12, 8), 11_361_820_672
MOST_GIB = 1_000_000


class Parser(argparse.ArgumentParser):
    """Reports errors in one line, as the commands do."""

    def error(self, message: str) -> NoReturn:
        raise LongCatError(f"{message}; see {self.prog} --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 1 (a check failed), 2 (bad input), 130 (interrupted) or 141 (broken
    pipe)."""
    argv = comparing_tasks.joined(sys.argv[1:] if argv is None else argv)
    try:
        with _termination_as_interrupt():
            args = build_parser(argv).parse_args(argv)
            code = args.run(args)
            sys.stdout.flush()
            return code
    except LongCatError as error:
        return _fail(str(error))
    except BrokenPipeError:
        # The reader has seen enough. On exit, the interpreter would write again and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except OSError as error:
        return _fail(f"{error.filename or 'the system'}: {error.strerror or error}; check the path and its permissions")
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        return _fail("out of memory; give a smaller size or fewer frames, or choose another --device or --dtype")
    except KeyboardInterrupt:
        print("longcat: interrupted; no unfinished file is left", file=sys.stderr)
        return INTERRUPTED


def build_parser(argv: Sequence[str] = ()) -> Parser:
    """The parser. train-nano's options are added only if `argv` names it, because they import torch."""
    parser = Parser(
        prog="longcat", description="LongCat-Video: text, image and continuation to video.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"longcat {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(name: str, run: Callable[[argparse.Namespace], int], summary: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        sub.set_defaults(run=run)
        return sub

    listed = tasks.TASKS | comparing_tasks.TASKS | training_tasks.TASKS | checkpoint_tasks.TASKS
    for name, (add, run, summary) in listed.items():
        add(command(name, run, summary))
    sub = command("verify", verify, "Run the golden cases of a folder through this code and print a table.")
    sub.add_argument("directory", type=Path, metavar="DIR", help="folder of golden data")
    sub = command("plan", plan, "Show what goes where with less GPU memory, for the released model.")
    sub.add_argument("memory", type=number, nargs="*", metavar="GIB", help="free GPU memory (default: 48 to 8)")
    add_options(sub, "plan")
    command("backends", backends, "List the attention backends, and why one cannot be used.")
    sub = command("score-nano", score_nano, "Measure how well the bundled model follows fresh prompts.")
    add_options(sub, "score-nano")
    sub = command("lesson-nano", lesson_nano, "Write clips that teach the bundled model pink, for train-lora.")
    sub.add_argument("folder", type=Path, metavar="DIR", help="a new folder")
    add_options(sub, "lesson-nano")
    sub = command("bench", bench, "Measure the network: what each optimization is worth, memory, kernels, exactness.")
    _add_bench(sub)
    sub = command("train-nano", train_nano, "Train the bundled model from scratch.")
    if argv[:1] == ["train-nano"]:
        from ..nano.train import add_arguments

        add_arguments(sub)
    return parser


def _add_bench(parser: argparse.ArgumentParser) -> None:
    from ..benchmark.options import add_arguments

    add_arguments(parser, size=size, whole=whole, number=number, dtypes=DTYPES)


def verify(args: argparse.Namespace) -> int:
    """`longcat verify`."""
    from ..measure.verify import run_verify

    return run_verify(args.directory)


def plan(args: argparse.Namespace) -> int:
    """`longcat plan`."""
    import torch

    from ..generate.request import check_frames, check_side
    from ..measure.results import markdown
    from ..model.config import ModelConfig
    from ..optimize.plan import Work, plan_table
    from ..sampling.conditioning import latent_frames, latent_shape

    for name, side in zip(("height", "width"), args.size, strict=True):
        check_side(name, side)
    check_frames(args.frames)
    given = latent_frames(args.cond_frames) if args.cond_frames else 0
    if given >= latent_frames(args.frames):
        raise LongCatError(
            f"{args.frames} frames leave nothing to generate after {args.cond_frames} conditioning frames; "
            "give more --frames"
        )
    for gib in args.memory:
        if not 0 < gib <= MOST_GIB:
            raise LongCatError(f"{gib:g} GiB of memory are out of range; give a number above 0 and up to {MOST_GIB:g}")
    work = Work((1, *latent_shape(args.frames, *args.size)), not args.no_guidance, given)
    rows = plan_table(args.memory or CARDS_GIB, ModelConfig(), work, torch.bfloat16, UMT5_XXL_BYTES)
    print(markdown(("free", "bf16", "fp8"), rows))
    return 0


def backends(args: argparse.Namespace) -> int:
    """`longcat backends`."""
    import torch

    from ..optimize.attention import Inputs, report

    # The released model's dtype and head size.
    cuda = torch.cuda.is_available()
    rows = report(Inputs(torch.device("cuda"), torch.bfloat16, 128, False) if cuda else None)
    width = max(len(name) for name, _, _ in rows)
    for name, available, reason in rows:
        print(f"{name:<{width}}  {'yes' if available else 'no ':<3}  {reason}")
    return 0


def bench(args: argparse.Namespace) -> int:
    """`longcat bench`."""
    if args.part == "report":
        from ..benchmark.report import write_page

        return write_page(args.folders, args.output)
    from ..benchmark.bench import run

    device = device_of(args.device)
    return run(args, device, dtype_of(args.dtype, device))


def score_nano(args: argparse.Namespace) -> int:
    """`longcat score-nano`."""
    from ..nano.adherence import run

    return run(args.prompts, args.steps, args.guidance, args.lora, args.lesson)


def lesson_nano(args: argparse.Namespace) -> int:
    """`longcat lesson-nano`."""
    from ..nano.lesson import write_lesson

    write_lesson(args.folder, args.clips)
    print(f"{args.folder}: {args.clips} clips with captions")
    return 0


def train_nano(args: argparse.Namespace) -> int:
    """`longcat train-nano`."""
    from ..nano.train import run

    return run(args) or 0


@contextlib.contextmanager
def _termination_as_interrupt() -> Iterator[None]:
    """Treat SIGTERM as Ctrl-C, so that it too leaves no temporary file."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _fail(sentence: str) -> int:
    print(f"longcat: error: {' '.join(sentence.split())}", file=sys.stderr)
    return BAD_INPUT


def _is_out_of_memory(error: BaseException) -> bool:
    # torch.OutOfMemoryError by name, so as not to import torch; its CPU allocator raises a plain RuntimeError.
    return (
        isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "allocate memory" in str(error)
    )


if __name__ == "__main__":
    sys.exit(main())
