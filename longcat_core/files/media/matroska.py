"""Tell whether a Matroska or WebM file ends before it should (RFC 8794, RFC 9559)."""

from __future__ import annotations

from typing import BinaryIO

HEADER = b"\x1a\x45\xdf\xa3"

_SEGMENT, _CLUSTER = b"\x18\x53\x80\x67", b"\x1f\x43\xb6\x75"
# Elements of a segment or a cluster. The others are inside of these, or do not belong to the file.
_KNOWN = (
    HEADER, _SEGMENT, _CLUSTER, b"\x11\x4d\x9b\x74", b"\x15\x49\xa9\x66", b"\x16\x54\xae\x6b", b"\x1c\x53\xbb\x6b",
    b"\x19\x41\xa4\x69", b"\x10\x43\xa7\x70", b"\x12\x54\xc3\x67", b"\x58\x54", b"\xa0", b"\xa1", b"\xa3", b"\xa7",
    b"\xab", b"\xaf", b"\xbf", b"\xe7", b"\xec",
)  # fmt: skip


def is_cut_short(file: BinaryIO, size: int) -> bool:
    """Whether a file of `size` bytes ends before its segment does, or, if that has no length, inside of an element.

    Recorders of streams write no lengths of the segment, and some write none of its clusters.
    """
    at = 0
    while at < size:
        file.seek(at)
        head = file.read(12)
        identity = head[: 9 - head[0].bit_length()] if head[0] else b""
        if not 1 <= len(identity) <= 4:
            return False
        if not any(known.startswith(identity) for known in _KNOWN):
            # Something else follows.
            return False
        length, start = _variable_number(head, len(identity))
        if identity not in _KNOWN or at + start > size:
            return True
        if length is None and identity not in (_SEGMENT, _CLUSTER):
            return False
        if length is not None and identity == _SEGMENT:
            # The first segment is the clip.
            return at + start + length > size
        # The elements of a cluster without a length are taken one by one.
        at += start + (length or 0)
    return at > size


def _variable_number(data: bytes, at: int) -> tuple[int | None, int]:
    """A number (RFC 8794, section 4) and where it ends. None: of ones alone, which means that it was not known."""
    first = data[at] if at < len(data) else 0
    bytes_of = 9 - first.bit_length() if first else 1
    most = (1 << 7 * bytes_of) - 1
    number = int.from_bytes(data[at : at + bytes_of], "big") & most
    return None if number == most else number, at + bytes_of
