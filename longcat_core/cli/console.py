"""What the `longcat` commands share: option values, notes and the progress bar. Imports nothing heavy."""

from __future__ import annotations

import argparse
import contextlib
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import LongCatError

if TYPE_CHECKING:
    from ..sampling.sampler import Step

# --- values of options -----------------------------------------------------------------------------------------------


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
    name, colon, strength = text.rpartition(":")
    if name and colon and not Path(text).exists():
        with contextlib.suppress(ValueError):
            return Path(name), float(strength)
    return Path(text), 1.0


# --- output while a command runs -------------------------------------------------------------------------------------


class Progress:
    """A bar on stderr that counts the steps of each sampling in turn; `say` prints sentences above it, on stdout."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self.make = make
        self.bar: Any = None

    def __call__(self, step: Step, label: str = "sampling") -> None:
        if self.bar is None:
            self.bar = self.make()
        if step.index == 0:
            self.bar.set_description(label, refresh=False)
            self.bar.reset(total=step.total)
        self.bar.update()

    def count(self, done: int, of: int, label: str) -> None:
        """Show `done` of `of` pieces of work; the first call may find some already done."""
        if self.bar is None:
            self.bar = self.make()
        if self.bar.total != of or done <= self.bar.n:
            if self.bar.total is not None:
                self.bar.reset()
            self.bar.total, self.bar.initial = of, done - 1
        self.bar.set_description(label, refresh=False)
        self.bar.update(done - self.bar.n)

    def say(self, sentence: str) -> None:
        print(sentence, flush=True) if self.bar is None else self.bar.write(sentence)


@contextlib.contextmanager
def progress(**options: Any) -> Iterator[Progress]:
    """A `Progress` that appears with the first step; options: tqdm's. Raises LongCatError without tqdm."""
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise LongCatError("the progress bar needs tqdm; run: pip install 'longcat-video[headless]'") from error

    bar = Progress(lambda: tqdm(**{"unit": "step", "dynamic_ncols": True} | options))
    try:
        yield bar
    finally:
        if bar.bar is not None:
            bar.bar.close()


@contextlib.contextmanager
def notes_from_warnings() -> Iterator[None]:
    """Print our own warnings as notes of one line and hide those of libraries, which are for developers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("always", category=UserWarning, module=r"longcat_core\b")
        warnings.showwarning = lambda message, *_, **__: note(str(message))
        yield


def note(sentence: str) -> None:
    """Print a note on stderr."""
    print(f"longcat: note: {sentence}", file=sys.stderr)
