"""Errors for users to read, one clear sentence that names the input and the remedy, and the checks of types.

What a script hands in is refused with such a sentence before anything is loaded or computed.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import fields
from numbers import Integral, Real
from typing import Any

# ComfyUI shows a class with its module, for which it takes the path of the pack on disk.
MODULE = "longcat_core.errors"
# Of a sentence: names and reasons that come from files can be as long as the file.
MAX_CHARACTERS = 500


class LongCatError(ValueError):
    """Bad input of any kind. The command line prints the message alone, without a traceback.

    The message is made `printable`, since it quotes names and contents of files.
    """

    __module__ = MODULE

    def __init__(self, message: object = "") -> None:
        super().__init__(printable(str(message)))


class CheckpointError(LongCatError):
    """A file that cannot be read as a LongCat-Video checkpoint, or does not fit the network."""

    __module__ = MODULE


class BackendUnavailable(LongCatError):
    """An unknown attention backend, or one that this machine lacks."""

    __module__ = MODULE


def check_type(name: str, value: object, kind: type | tuple[type, ...], remedy: str) -> None:
    """Raise LongCatError unless `value` is of type `kind`; remedy: what to give instead."""
    if not isinstance(value, kind):
        raise LongCatError(f"{name} cannot be of type {type(value).__name__}; give {remedy}")


def check_path(name: str, path: object) -> None:
    """Raise LongCatError unless `path` is text or a path."""
    check_type(name, path, (str, os.PathLike), "a path")


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise LongCatError unless `value` is one of `choices`."""
    if not isinstance(value, str) or value not in choices:
        raise LongCatError(f"{name} is {value!r}; choose one of {', '.join(choices)}")


def is_whole(value: object) -> bool:
    """Whether `value` is an integer, Python's or NumPy's; True and False are not."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Whether `value` is a real number, Python's or NumPy's; True and False are not."""
    return isinstance(value, Real) and not isinstance(value, bool)


def plain_fields(record: Any) -> None:
    """Replace the numbers of NumPy and PyTorch in the fields of a frozen dataclass by Python's, in place.

    They compare and print otherwise, and JSON and generators of random numbers refuse them.
    """
    for field in fields(record):
        value = getattr(record, field.name)
        if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
            object.__setattr__(record, field.name, value.item())


def listed(names: Sequence[str], most: int = 3, characters: int = MAX_CHARACTERS, separator: str = ", ") -> str:
    """The first `most` names, each `printable` with at most `characters`, and how many more there are."""
    shown = separator.join(printable(name, characters) for name in names[:most])
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown


def printable(text: str, limit: int = MAX_CHARACTERS) -> str:
    """`text` for a terminal or a log: at most `limit` characters, on one line.

    Control characters, which could move the cursor or recolor the terminal, and surrogates, which stand for the bytes
    of a name that is not UTF-8, are written as escapes. A longer text keeps its beginning and its end.
    """
    if len(text) > limit:
        text = f"{text[: limit // 2]} [...] {text[-limit // 2 + 7 :]}"
    if text.isprintable():
        return text
    shown = "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in text)
    return shown if len(shown) <= limit else f"{shown[: limit // 2]} [...] {shown[-limit // 2 + 7 :]}"
