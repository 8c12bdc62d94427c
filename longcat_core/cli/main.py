"""The `longcat` command. A command's module is imported when the command runs, so that --help answers at once."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from .. import __version__
from ..errors import LongCatError
from ..generate.options import DTYPES
from .console import number, size, whole
from .options import Parser, add_options

BAD_INPUT, INTERRUPTED, BROKEN_PIPE = 2, 130, 141


class Command(NamedTuple):
    """One command. run: module and function that take the parsed arguments and return the exit code."""

    run: str
    summary: str
    # Of each positional argument: its name, the name that --help shows, its help, and more settings of argparse.
    positionals: tuple[tuple[str, str, str, dict[str, Any]], ...] = ()


PROMPT = "what the video shows"
PATH: dict[str, Any] = {"type": Path}
COMMANDS = {
    "generate": Command(
        "generate.generate", "Generate a video from a prompt, with the bundled model by default.",
        (("prompt", "PROMPT", PROMPT, {}),),
    ),
    "long": Command(
        "generate.long", "Generate a long video segment by segment; run it again to resume.",
        (("prompts", "PROMPT", f"{PROMPT}: one prompt for all segments, or one for each", {"nargs": "*"}),),
    ),
    "refine": Command(
        "generate.refine", "Double a finished video's resolution and frame rate: the second stage.",
        (("video", "VIDEO", "the finished video", PATH),),
    ),
    "compare": Command(
        "compare.compare", "Show what options cost: PSNR and SSIM at the same seed, and the noise floor.",
        (("prompts", "PROMPT", f"{PROMPT}; each prompt makes a video", {"nargs": "*"}),),
    ),
    "train-lora": Command(
        "train.train_lora", "Train a LoRA on a folder of clips and captions.",
        (("folder", "FOLDER", "clips and pictures, a .txt caption beside each", PATH),),
    ),
    "convert": Command(
        "convert.convert", "Write a checkpoint of any form as bf16, ComfyUI fp8 or INT8.",
        (("source", "SRC", "a checkpoint of any form: file or folder", PATH),
         ("destination", "DST", "the .safetensors file to write", PATH)),
    ),
    "verify": Command(
        "bench.verify", "Run the golden cases of a folder through this code and print a table.",
        (("directory", "DIR", "folder of golden data", PATH),),
    ),
    "plan": Command(
        "bench.plan", "Show what goes where with less GPU memory, for the released model.",
        (("memory", "GIB", "free GPU memory (default: 48 to 8)", {"type": number, "nargs": "*"}),),
    ),
    "backends": Command("bench.backends", "List the attention backends, and why one cannot be used."),
    "score-nano": Command("nano.score", "Measure how well the bundled model follows fresh prompts."),
    "lesson-nano": Command(
        "nano.lesson", "Write clips that teach the bundled model pink, for train-lora.",
        (("folder", "DIR", "a new folder", PATH),),
    ),
    "bench": Command(
        "bench.bench", "Measure the network: what each optimization is worth, memory, kernels, exactness."
    ),
    "train-nano": Command("nano.train", "Train the bundled model from scratch."),
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 1 (a check failed), 2 (bad input), 130 (interrupted) or 141 (broken
    pipe)."""
    argv = joined(sys.argv[1:] if argv is None else argv)
    try:
        with _termination_as_interrupt():
            args = build_parser(argv).parse_args(argv)
            module, function = args.run.split(".")
            code: int = getattr(import_module(f".{module}", __package__), function)(args)
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
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        sub = subparsers.add_parser(name, help=command.summary, description=command.summary, allow_abbrev=False)
        sub.set_defaults(run=command.run)
        for positional, shown, text, settings in command.positionals:
            sub.add_argument(positional, metavar=shown, help=text, **settings)
        add_options(sub, name)
        if name == "bench":
            from ..benchmark.options import add_arguments

            add_arguments(sub, size=size, whole=whole, number=number, dtypes=DTYPES)
        if name == "train-nano" and argv[:1] == [name]:
            from ..nano.train import add_arguments as add_training_arguments

            add_training_arguments(sub)
    return parser


def joined(argv: Sequence[str]) -> list[str]:
    """`--versus --fp8` as `--versus=--fp8`: argparse would take the value for an option."""
    words, found = iter(argv), []
    for word in words:
        value = next(words, None) if word == "--versus" else None
        found.append(word if value is None else f"{word}={value}")
    return found


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
