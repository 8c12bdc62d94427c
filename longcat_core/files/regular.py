"""Open the files that users name: regular files only, read no further than their kind justifies."""

from __future__ import annotations

import codecs
import os
import re
import stat
from pathlib import Path

from ..errors import LongCatError
from .atomic import reason

# Byte order marks of encodings other than UTF-8, the longest first: one begins with another.
MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
# Of a text that a person or a program writes: prompts, configs, records.
MAX_TEXT_BYTES = 64_000_000


def check_regular(path: str | Path, what: str = "", error: type[LongCatError] = LongCatError) -> None:
    """Raise `error` unless `path` is an existing regular file, or a link to one.

    Opening a pipe would wait for its writer, and a device may never end. what: what the file should be, for the
    sentence.
    """
    name = f"{what} {path}".strip()
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError) as fault:
        raise error(f"{name} does not exist; give the path of a file") from fault
    except (OSError, ValueError) as fault:
        raise error(f"{name} cannot be read ({reason(fault)}); check its name and its permissions") from fault
    if stat.S_ISDIR(mode):
        raise error(f"{name} is a folder; give a file")
    if not stat.S_ISREG(mode):
        raise error(f"{name} is a pipe or a device; give a regular file")


def read_bytes(
    path: str | Path, what: str = "", limit: int = MAX_TEXT_BYTES, error: type[LongCatError] = LongCatError
) -> bytes:
    """The content of a regular file of at most `limit` bytes. Raises `error` as `check_regular` does."""
    check_regular(path, what, error)
    name = f"{what} {path}".strip()
    try:
        with open(path, "rb") as file:
            content = file.read(limit + 1)
    except OSError as fault:
        raise error(f"{name} cannot be read ({reason(fault)}); check its permissions") from fault
    if len(content) > limit:
        raise error(f"{name} has more than {limit:,} bytes; give a smaller file")
    return content


def read_text(
    path: str | Path, what: str = "", limit: int = MAX_TEXT_BYTES, error: type[LongCatError] = LongCatError
) -> str:
    """`read_bytes` as UTF-8 text, or as what a byte order mark says, without that mark. Raises `error` for other bytes.

    Editors write the mark; some call UTF-16 with a mark Unicode.
    """
    content = read_bytes(path, what, limit, error)
    encoding = next((name for mark, name in MARKS if content.startswith(mark)), "utf-8-sig")
    try:
        text = content.decode(encoding)
        if "\0" in text:
            raise ValueError("it has null characters")
    except ValueError as fault:
        raise error(f"{what} {path}".strip() + " is not UTF-8 text; save it as UTF-8") from fault
    return text


def read_lines(path: str | Path, what: str = "") -> list[str]:
    """`lines_of` the text of a file, which `read_text` reads."""
    return lines_of(read_text(path, what))


def lines_of(text: str) -> list[str]:
    """The lines of a text as editors show them, without blanks at their ends; empty lines are left out.

    \\n, \\r\\n and \\r end a line; the separators of Unicode, form feeds and vertical tabs do not.
    """
    # A file that others were joined into has byte order marks at the starts of later lines too.
    lines = (line.strip().removeprefix("\ufeff").strip() for line in re.split(r"\r\n|\n|\r", text))
    return [line for line in lines if says_something(line)]


def says_something(text: str) -> bool:
    """Whether a text has a sign that shows: not blanks, the end-of-file sign of DOS or spaces without width alone."""
    return any(sign.isprintable() and not sign.isspace() for sign in text)
