"""Errors for users to read: one clear sentence that names the input and the remedy."""

from __future__ import annotations

# ComfyUI shows a class with its module, for which it takes the path of the pack on disk.
MODULE = "longcat_core.errors"
# Of a sentence: names and reasons that come from files can be as long as the file.
MAX_CHARACTERS = 2000


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
