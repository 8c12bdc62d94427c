"""Seeded mutations of files: bits and lengths of any file, and the values of the JSON that some begin with."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from typing import Any

# Tokens that json.dumps cannot write; put in as text and then stripped of their quotes.
RAW = ("NaN", "Infinity", "-Infinity", "1e999", "9" * 5000, "[" * 3000 + "]" * 3000)
VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 1, 1.5, 2**31, 2**53, 2**63, 2**64, 10**30, "", "1", "../x", "/etc/passwd", "\x1b[31m", "\udc80",
    "x" * 100_000, [], [[]], {}, {"a": 1}, [0] * 1000, *(f"\0{token}" for token in RAW),
)  # fmt: skip
NUMBERS = (0, 1, 2, 7, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1)


def mutated(content: bytes, draw: random.Random) -> bytes:
    """The content with one to three mutations, of its header's values if it has a JSON header."""
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        header = _json_part(content)
        if header is not None and draw.random() < 0.6:
            content = _with_other_values(content, header, draw)
        else:
            content = draw.choice(BYTES)(content, draw)
    return content


def _json_part(content: bytes) -> tuple[int, int] | None:
    """Where JSON begins and ends: the whole file, or the header of safetensors."""
    if content[:1] in (b"{", b"["):
        return 0, len(content)
    if len(content) > 8 and content[8:9] == b"{":
        return 8, min(len(content), 8 + struct.unpack("<Q", content[:8])[0])
    return None


def _with_other_values(content: bytes, part: tuple[int, int], draw: random.Random) -> bytes:
    begin, end = part
    try:
        root = json.loads(content[begin:end])
    except (ValueError, RecursionError):
        return _flip(content, draw)
    places = list(_places(root))
    if not places:
        return _flip(content, draw)
    doubled = ""
    # Small and large containers alike, so that a rare field is met as often as one of a thousand tensors.
    holder, key = draw.choice(draw.choice(_by_depth(places)))
    kind = draw.randrange(7)
    if kind == 0:
        del holder[key]
    elif kind == 1 and isinstance(holder, dict):
        names = (f"{key}.9999999999", "", f"../{key}", str(key).upper(), "\x1b]0;x")
        holder[draw.choice(names)] = holder.pop(key)
    elif kind == 2 and isinstance(holder, dict):
        doubled = f"{json.dumps(key)}: {json.dumps(draw.choice(places)[0])}, "
    elif kind == 3 and isinstance(holder[key], int) and not isinstance(holder[key], bool):
        holder[key] += draw.choice((-1, 1, 8, -8, 2**32))
    elif kind == 4:
        other, place = draw.choice(places)
        holder[key], other[place] = other[place], holder[key]
    else:
        holder[key] = draw.choice(VALUES)
    try:
        text = json.dumps(root)
    except (ValueError, RecursionError):
        # A swap may put a value into itself.
        return _flip(content, draw)
    for token in RAW:
        text = text.replace(json.dumps(f"\0{token}"), token)
    if doubled:
        text = text[:1] + doubled + text[1:]
    written = text.encode("utf-8", "surrogatepass")
    if begin:
        return struct.pack("<Q", len(written)) + written + content[end:]
    return written


def _places(node: Any, depth: int = 0) -> Any:
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in list(items):
        yield node, key
        if depth < 6:
            yield from _places(value, depth + 1)


def _by_depth(places: list[tuple[Any, Any]]) -> list[list[tuple[Any, Any]]]:
    groups: dict[tuple[str, int], list[tuple[Any, Any]]] = {}
    for holder, key in places:
        groups.setdefault((type(holder[key]).__name__, len(holder).bit_length()), []).append((holder, key))
    return list(groups.values())


def _at(content: bytes, draw: random.Random) -> int:
    """A place; headers, at the beginning, are drawn more often than data."""
    most = len(content) if draw.random() < 0.4 else min(len(content), draw.choice((64, 1024, 8192)))
    return draw.randrange(most) if most else 0


def _flip(content: bytes, draw: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(draw.choice((1, 1, 4, 32))):
        if changed:
            changed[_at(content, draw)] ^= 1 << draw.randrange(8)
    return bytes(changed)


def _cut(content: bytes, draw: random.Random) -> bytes:
    return content[: _at(content, draw)]


def _remove(content: bytes, draw: random.Random) -> bytes:
    at = _at(content, draw)
    return content[:at] + content[at + draw.choice((1, 4, 100, 5000)) :]


def _insert(content: bytes, draw: random.Random) -> bytes:
    at = _at(content, draw)
    return content[:at] + draw.randbytes(draw.choice((1, 4, 100))) + content[at:]


def _repeat(content: bytes, draw: random.Random) -> bytes:
    at = _at(content, draw)
    part = content[at : at + draw.choice((1, 16, 1000))]
    return content[:at] + part * draw.choice((2, 3, 50)) + content[at + len(part) :]


def _number(content: bytes, draw: random.Random) -> bytes:
    at, width = _at(content, draw), draw.choice((1, 2, 4, 8))
    number = draw.choice(NUMBERS) % (1 << 8 * width)
    return content[:at] + number.to_bytes(width, draw.choice(("little", "big"))) + content[at + width :]


def _fill(content: bytes, draw: random.Random) -> bytes:
    at, size = _at(content, draw), draw.choice((4, 64, 4096))
    return content[:at] + draw.choice((b"\0", b"\xff", b"\x7f")) * size + content[at + size :]


BYTES: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    _flip, _flip, _number, _number, _cut, _remove, _insert, _repeat, _fill,
)  # fmt: skip
