"""What the `longcat` commands share: option values, notes and the progress bar. Imports nothing heavy."""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from ..errors import printable
from ..generate import progress as core

if TYPE_CHECKING:
    from ..sampling.sampler import Step

# --- values of options -----------------------------------------------------------------------------------------------


def given(text: str) -> str:
    """A text that is not empty, as an unset variable of a shell script would be: no path is the folder one is in."""
    if not text.strip():
        raise argparse.ArgumentTypeError("it is empty; give a value, or leave it out")
    return text


def path(text: str) -> Path:
    """A path."""
    return Path(given(text))


def whole(text: str) -> int:
    """A whole number."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"cannot read {text[:40]!r} as a whole number") from None


def number(text: str) -> float:
    """A number."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"cannot read {text[:40]!r} as a number") from None


def size(text: str) -> tuple[int, int]:
    """HEIGHTxWIDTH in pixels."""
    height, _, width = text.lower().partition("x")
    if not (height.isdecimal() and width.isdecimal()):
        raise argparse.ArgumentTypeError(f"cannot read {text[:40]!r} as height x width, such as 64x96")
    return whole(height), whole(width)


def lora(text: str) -> tuple[Path, float]:
    """FILE, at strength 1, or FILE:STRENGTH."""
    name, colon, strength = given(text).rpartition(":")
    if name and colon and not Path(text).exists():
        with contextlib.suppress(ValueError):
            return Path(name), float(strength)
    return Path(text), 1.0


def words(given: Any) -> Any:
    """Prompts as they were typed: where the locale is plain ASCII, their UTF-8 arrives as single bytes."""
    if isinstance(given, list):
        return [words(text) for text in given]
    with contextlib.suppress(UnicodeError, TypeError):
        return os.fsencode(given).decode()
    return given


# --- output while a command runs -------------------------------------------------------------------------------------


# Characters of a line on stdout, which may be a row of a table.
LINE = 2000


class Stream:
    """A standard stream that never ends the work: what cannot be written is left out.

    stream: the original, None if it is closed. escaped: whether control characters, which file names and files could
    bring in, are shown as escapes; tqdm's bars need theirs. lost: why nothing can be written any more, None while it
    can. Characters that the terminal's encoding lacks are shown as escapes.
    """

    def __init__(self, stream: TextIO | None, *, escaped: bool) -> None:
        self.stream, self.escaped = stream, escaped
        self.lost: Exception | None = OSError(errno.EBADF, "it is closed") if stream is None else None

    def write(self, text: str) -> int:
        shown = "\n".join(printable(line, LINE) for line in text.split("\n")) if self.escaped else text
        encoding = getattr(self.stream, "encoding", None) or "utf-8"
        self._try("write", shown.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def flush(self) -> None:
        self._try("flush")

    def isatty(self) -> bool:
        return self.stream is not None and self.stream.isatty()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def _try(self, method: str, *args: str) -> None:
        if self.lost is not None:
            return
        try:
            getattr(self.stream, method)(*args)
        except (OSError, ValueError) as error:
            self.lost = error
            with contextlib.suppress(OSError, ValueError):
                # For what is left in buffers: on exit, the interpreter would write again and complain.
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())


@contextlib.contextmanager
def standard_streams() -> Iterator[Stream]:
    """Make sys.stdout and sys.stderr a `Stream` while the block runs, and return that of stdout."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # Otherwise the next file that is opened would get its number, and libraries would log into it.
            os.open(os.devnull, os.O_RDWR)
    out, err = Stream(sys.stdout, escaped=True), Stream(sys.stderr, escaped=False)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            yield out
        finally:
            out.flush()
            err.flush()


class Progress:
    """A bar on stderr for a whole task, with the words of `generate.progress`; `say` prints sentences above it, on
    stdout. A context manager that leaves the bar with what the task took, or with where an error ended it.

    watch: called with the task whenever it changes. options: tqdm's.
    """

    def __init__(self, watch: Callable[[core.Progress], None] | None = None, **options: Any) -> None:
        from tqdm import tqdm

        shown = {"bar_format": "{percentage:3.0f}% |{bar:20}| {desc}", "dynamic_ncols": True, "miniters": 1}
        # Without a delay tqdm draws a bar before it has words.
        shown["delay"] = 1e-9
        self.make = lambda: tqdm(**shown | options)
        self.watch = watch
        self.bar: Any = None
        self.task = core.Progress(show=self._show)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        self.close(error)

    def plan(self, parts: Sequence[core.Part], **options: Any) -> core.Progress:
        """Begin a task of these parts; options: those of `generate.progress.Progress`."""
        self.task = core.Progress(parts, self._show, **options)
        return self.task

    def __call__(self, step: Step) -> None:
        """The callback of a sampling run."""
        self.task.step(step.index + 1, step.total)

    def count(self, done: int, of: int, label: str, unit: str = "step") -> None:
        """Show `done` of `of` pieces of work; the first call may find some already done."""
        if (self.task.total, self.task.unit) != (of, unit) or done <= self.task.done:
            self.plan([core.Part(of)], unit=unit, closing=False).index = max(0, done - 1)
        self.task.label = label
        self.task.step(done)

    def say(self, sentence: str) -> None:
        print(sentence, flush=True) if self.bar is None else self.bar.write(printable(sentence))

    def close(self, error: BaseException | None = None) -> None:
        """End the bar; of a task that has no parts, such as starting, nothing stays."""
        if self.bar is None:
            return
        if self.task.parts:
            how = "interrupted" if isinstance(error, KeyboardInterrupt) else "stopped"
            self.bar.set_description_str(
                printable(self.task.summary() if error is None else self.task.stopped(how)), refresh=False
            )
        else:
            self.bar.leave = False
        self.bar.close()

    def _show(self, task: core.Progress) -> None:
        if self.watch is not None:
            self.watch(task)
        if self.bar is None:
            if not (task.ran or sys.stderr.isatty()):
                # In a log, an error before the first step is the only line.
                return
            self.bar = self.make()
        if task.frames and not sys.stderr.isatty():
            # In a log, frames would fill lines.
            return
        # While weights are loaded the bar is theirs.
        done, total = (task.done, task.total) if task.loaded is None else task.loaded
        self.bar.set_description_str(printable(task.words), refresh=False)
        if self.bar.total != max(1, total) or done < self.bar.n:
            self.bar.reset(total=max(1, total))
        if done > self.bar.n:
            self.bar.update(done - self.bar.n)
        else:
            self.bar.refresh()


@contextlib.contextmanager
def notes_from_warnings() -> Iterator[None]:
    """Print our own warnings as notes of one line and hide those of libraries, which are for developers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("always", category=UserWarning, module=r"longcat_core\b")
        warnings.showwarning = lambda message, *_, **__: note(str(message))
        yield


def note(sentence: str) -> None:
    """Print a note on stderr, above a bar that is there."""
    tqdm = sys.modules.get("tqdm")
    with contextlib.nullcontext() if tqdm is None else tqdm.tqdm.external_write_mode(sys.stderr):
        print(f"longcat: note: {printable(sentence)}", file=sys.stderr)
