"""JSON of files and headers, checked against a type once, where it is read.

A record is a frozen dataclass or a type such as `dict[str, list[int]]`. pydantic checks it strictly: text does not
count as a number, nor 1.5 as an integer; depth and digits are bounded. Fields that a dataclass does not name are
ignored. A number that must be finite is a `FiniteFloat`.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

from pydantic import FiniteFloat, TypeAdapter, ValidationError

from ..errors import LongCatError, printable
from .regular import MAX_TEXT_BYTES, read_bytes

T = TypeVar("T")

__all__ = ["FiniteFloat", "parse_record", "read_record"]


def read_record(
    path: str | Path,
    kind: type[T],
    what: str,
    remedy: str = "get the file again",
    limit: int = MAX_TEXT_BYTES,
    error: type[LongCatError] = LongCatError,
) -> T:
    """The JSON file at `path` as a `kind`. Raises `error` for a file that cannot be read or holds something else.

    what: what the file is, for the sentence; remedy: its end.
    """
    return parse_record(read_bytes(path, limit=limit, error=error), kind, f"{path}", what, remedy, error)


def parse_record(
    text: bytes | str,
    kind: type[T],
    source: str,
    what: str,
    remedy: str = "get the file again",
    error: type[LongCatError] = LongCatError,
) -> T:
    """JSON text as a `kind`. Raises `error`, naming the first fault, for text that is not JSON or of another kind.

    source: where the text stands, for the sentence.
    """
    try:
        content = text.removeprefix(b"\xef\xbb\xbf") if isinstance(text, bytes) else text
        return cast(T, _adapter(cast(Any, kind)).validate_json(content, strict=True))
    except ValidationError as fault:
        first = fault.errors(include_url=False, include_context=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        message = str(first["msg"])
        why = printable(f"{place}: {message}" if place else message, 200)
        raise error(f"{source} is not {what} ({why[:1].lower()}{why[1:]}); {remedy}") from fault


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    """Built once, which takes longer than reading a record does."""
    return TypeAdapter(kind)
