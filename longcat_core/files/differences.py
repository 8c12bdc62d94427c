"""Compare stored settings with current ones, and describe how they differ."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from .fingerprints import as_then

# Number of differences that a sentence names: between a long video and a refined one, nearly all settings differ.
NAMED = 4
# Characters of a value that a sentence shows.
_SHOWN = 60
# Fingerprints and checksums, of which a sentence says only that there is another one.
_DIGITS = re.compile(r"(?:2-)?[0-9a-f]{16}|[0-9a-f]{64}")


def as_read(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as they come out of a JSON file: tuples as lists, names as text."""
    return json.loads(json.dumps(settings))


def differences(there: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Names whose values differ, or that only one side has, in the order of `there`, then of `now`.

    there: as stored, perhaps by an earlier version, whose fingerprints were of another kind.
    """
    names = [name for name in {**there, **now} if there.get(name) != now.get(name)]
    return [name for name in names if there.get(name) != as_then(now.get(name), there.get(name))]


def differences_in_words(there: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The first few differences with both values, and how many more there are; "" without any."""
    names = differences(there, now)
    words = [_in_words(name, there.get(name), now.get(name)) for name in names[:NAMED]]
    return "; ".join([*words, f"{len(names) - NAMED} more"] if len(names) > NAMED else words)


def _in_words(name: str, there: Any, now: Any) -> str:
    if all(isinstance(value, str) and _DIGITS.fullmatch(value) for value in (there, now)):
        return f"another {name}"
    return f"{name} {_both(there, now)}"


def _both(there: Any, now: Any) -> str:
    """Both values; long ones are cut to what is around the first difference."""
    texts = ["none" if value is None else str(value) or "empty" for value in (there, now)]
    same = next((i for i, (a, b) in enumerate(zip(*texts, strict=False)) if a != b), min(map(len, texts)))
    start = max(0, same - 20)
    if max(map(len, texts)) > _SHOWN:
        end = start + _SHOWN
        texts = [f"{'...' * (start > 0)}{text[start:end]}{'...' * (len(text) > end)}" for text in texts]
    return "{} there, {} now".format(*texts)
