"""The `longcat` command. A command's module is imported when the command runs, so that --help answers at once."""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from types import FrameType
from typing import Any, NamedTuple

from .. import __version__
from ..errors import LongCatError, printable
from ..files.atomic import reason
from ..generate.options import DTYPES
from ..generate.progress import CHECKING, STARTING
from ..generate.progress import Progress as Task
from ..parallel.torchrun import torchrun_rank, torchrun_size
from .console import Progress, Stream, given, number, path, size, standard_streams, whole, words
from .options import Parser, add_options
from .outputs import Outputs

BAD_INPUT, INTERRUPTED, BROKEN_PIPE = 2, 130, 141


class Command(NamedTuple):
    """One command.

    run: module and function that take the parsed arguments and return the exit code. printed: whether what it prints is
    its result; the others write files, and are right even where their words cannot be read. bar: whether it shows its
    progress in `args.bar`, which is there before the command's module is imported, since that takes seconds.
    """

    run: str
    summary: str
    # Of each positional argument: its name, the name that --help shows, its help, and more settings of argparse.
    positionals: tuple[tuple[str, str, str, dict[str, Any]], ...] = ()
    printed: bool = False
    bar: bool = False


PROMPT = "what the video shows"
PATH: dict[str, Any] = {"type": path}
# Arguments that models read; others of kind text are names.
PROMPTS = {"prompt", "negative_prompt", "prompts"}
COMMANDS = {
    "generate": Command(
        "many.generate", "Generate a video from a prompt, with the bundled model by default.",
        (("prompt", "PROMPT", PROMPT, {"nargs": "?"}),), bar=True,
    ),
    "long": Command(
        "generate.long", "Generate a long video segment by segment; run it again to resume.",
        (("prompts", "PROMPT", f"{PROMPT}: one prompt for all segments, or one for each", {"nargs": "*"}),),
        bar=True,
    ),
    "avatar": Command(
        "avatar.avatar", "Generate a person who speaks, segment by segment; run it again to resume.",
        (("prompts", "PROMPT", f"{PROMPT}: one prompt for all segments, or one for each", {"nargs": "*"}),),
        bar=True,
    ),
    "refine": Command(
        "generate.refine", "Double a finished video's resolution and frame rate: the second stage.",
        (("video", "VIDEO", "the finished video", PATH),), bar=True,
    ),
    "compare": Command(
        "compare.compare", "Show what options cost: PSNR and SSIM at the same seed, and the noise floor.",
        (("prompts", "PROMPT", f"{PROMPT}; each prompt makes a video", {"nargs": "*"}),), bar=True,
    ),
    "calibrate": Command(
        "calibrate.calibrate", "Find how sparse the attention of each head may be, for --sparse.",
        (("model", "MODEL", "LongCat-Video's folder, its dit folder, or a checkpoint of any published form (default: "
          "LongCat-nano)", {"nargs": "?", "type": given}),), bar=True,
    ),
    "train-lora": Command(
        "train.train_lora", "Train a LoRA on a folder of clips and captions.",
        (("folder", "FOLDER", "clips and pictures, a .txt caption beside each", PATH),), bar=True,
    ),
    "convert": Command(
        "convert.convert", "Write a checkpoint of any form as bf16, ComfyUI fp8 or INT8.",
        (("source", "SRC", "a checkpoint of any form: file or folder", PATH),
         ("destination", "DST", "the .safetensors file to write", PATH)),
    ),
    "verify": Command(
        "bench.verify", "Run the golden cases of a folder through this code and print a table.",
        (("directory", "DIR", "folder of golden data", PATH),), printed=True,
    ),
    "plan": Command(
        "bench.plan", "Show what goes where with less GPU memory, for the released model.",
        (("memory", "GIB", "free GPU memory (default: 48 to 8)", {"type": number, "nargs": "*"}),), printed=True,
    ),
    "backends": Command("bench.backends", "List the kernels of attention, dense and sparse, and why one cannot run.",
                        printed=True),
    "test-gpus": Command("gpus.test_gpus", "Compare several GPUs with one on a tiny model, and measure their links.",
                         printed=True),
    "score-nano": Command("nano.score", "Measure how well the bundled model follows fresh prompts.",
                          printed=True, bar=True),
    "lesson-nano": Command(
        "nano.lesson", "Write clips that teach the bundled model pink, for train-lora.",
        (("folder", "DIR", "a new folder", PATH),),
    ),
    "bench": Command(
        "bench.bench", "Measure the network: what each optimization is worth, memory, kernels, exactness."
    ),
    "train-nano": Command("nano.train", "Train the bundled model from scratch."),
}  # fmt: skip


def main(argv: Sequence[str] | None = None, watch: Callable[[Task], None] | None = None) -> int:
    """Run one command and return its exit code: 0, 1 (a check failed), 2 (bad input), 130 (interrupted) or 141 (broken
    pipe). watch: called with the progress of a command that has a bar, whenever it changes.

    Of the processes of torchrun, the one of rank 0 runs the command, and the others serve it.
    """
    if torchrun_rank():
        return _serve()
    try:
        return _main(argv, watch)
    finally:
        if torchrun_size():
            from ..parallel.start import release

            release()


def _serve() -> int:
    from ..parallel.worker import join

    join()
    return 0


def _main(argv: Sequence[str] | None, watch: Callable[[Task], None] | None) -> int:
    argv = joined(sys.argv[1:] if argv is None else argv)
    with standard_streams() as out:
        try:
            with _ended_by_signals(), Outputs() as outputs:
                args = build_parser(argv).parse_args(argv)
                args.outputs, args.argv = outputs, argv
                has_bar = COMMANDS[args.command].bar
                if has_bar:
                    args.bar = outputs.enter_context(Progress(watch))
                    args.bar.task.phase(STARTING)
                for name in PROMPTS & vars(args).keys():
                    setattr(args, name, words(getattr(args, name)))
                module, function = args.run.split(".")
                run = getattr(import_module(f".{module}", __package__), function)
                if has_bar:
                    args.bar.task.phase(CHECKING)
                code: int = run(args)
            return _printed(out, code) if COMMANDS[args.command].printed else code
        except SystemExit as ended:
            # After --help and --version.
            if code := _printed(out, 0):
                return code
            raise ended
        except LongCatError as error:
            return _fail(str(error))
        except BrokenPipeError:
            return BROKEN_PIPE
        except OSError as error:
            return _fail(
                f"{error.filename or 'the system'}: {error.strerror or error}; check the path and its permissions"
            )
        except (MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            return _fail("out of memory; give a smaller size or fewer frames, or choose another --device or --dtype")
        except KeyboardInterrupt:
            print("longcat: interrupted; no unfinished file is left", file=sys.stderr)
            return INTERRUPTED


def build_parser(argv: Sequence[str] | None = None) -> Parser:
    """The parser of a command line. Making the options of all commands takes 0.1 s, so only the command that `argv`
    names gets its own. None: all commands, except that those of train-nano, which import torch, must be named."""
    called = None if argv is None else next((word for word in argv if not word.startswith("-")), "")
    parser = Parser(
        prog="longcat", description="LongCat-Video: text, image and continuation to video.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"longcat {__version__}")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        sub = subparsers.add_parser(name, help=command.summary, description=command.summary, allow_abbrev=False)
        sub.set_defaults(run=command.run, command=name)
        if called not in (None, name):
            continue
        for positional, shown, text, settings in command.positionals:
            sub.add_argument(positional, metavar=shown, help=text, **settings)
        add_options(sub, name)
        if name == "bench":
            from ..benchmark.options import add_arguments

            def of_generate(part: argparse.ArgumentParser) -> None:
                add_options(part, "generate", without=("output", "contact_sheet", "prompts_file"))

            add_arguments(sub, size=size, whole=whole, number=number, dtypes=DTYPES, generate=of_generate)
        if name == "train-nano" == called:
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
def _ended_by_signals() -> Iterator[None]:
    """Treat SIGTERM and SIGHUP as Ctrl-C, so that they too leave no temporary file."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # Windows has no SIGHUP. Under nohup it is ignored, and stays so.
    names = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    caught = [name for name in names if signal.getsignal(name) == signal.SIG_DFL]

    ended = False

    def interrupt(name: int, frame: FrameType | None) -> None:
        nonlocal ended
        ended = True
        # A shell that ends sends a second one, which must not end the tidying up.
        for other in caught:
            signal.signal(other, signal.SIG_IGN)
        signal.default_int_handler(name, frame)

    for name in caught:
        signal.signal(name, interrupt)
    try:
        yield
    finally:
        # Once one came, the process ends; a second one may still be under way and would change its exit code.
        for name in () if ended else caught:
            signal.signal(name, signal.SIG_DFL)


def _printed(out: Stream, code: int) -> int:
    """`code`, or that of an error if what was printed is the result and did not arrive."""
    out.flush()
    if out.lost is None:
        return code
    # The reader has seen enough.
    if isinstance(out.lost, BrokenPipeError):
        return BROKEN_PIPE
    return _fail(f"the result could not be printed ({reason(out.lost)}); send stdout to another place")


def _fail(sentence: str) -> int:
    print(f"longcat: error: {printable(' '.join(sentence.split()))}", file=sys.stderr)
    return BAD_INPUT


def _is_out_of_memory(error: BaseException) -> bool:
    # torch.OutOfMemoryError by name, so as not to import torch; its CPU allocator raises a plain RuntimeError.
    return (
        isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "allocate memory" in str(error)
    )


if __name__ == "__main__":
    sys.exit(main())
