"""Tell whether a file ends before the size or the end mark that its container declares.

FFmpeg and Pillow read a clip that is cut short without complaint; a continuation would start at the wrong frame.
"""

from __future__ import annotations

import os
import struct
from typing import BinaryIO

from . import matroska

LAST_BYTES = "its last bytes are missing"

_NUT_INDEX = b"NX\xdd\x67\x2f\x23\xe6\x4e"
# Boxes at the top of an MP4 file. What follows them at the end may be anything, such as notes of a phone.
_BOXES = (b"ftyp", b"moov", b"mdat", b"moof", b"mfra", b"wide", b"free", b"skip", b"styp", b"sidx", b"uuid", b"meta")
_OGG_PAGE, _OGG_HEAD, _LONGEST_PAGE = b"OggS", 27, 65307
_MXF_PARTITION = b"\x06\x0e\x2b\x34\x02\x05\x01\x01\x0d\x01\x02\x01\x01"
_TS_PACKETS = {188: 0, 192: 4, 204: 0}  # bytes of a packet: where its sync byte is


def is_cut_short(file: BinaryIO) -> bool:
    """Whether the end is missing of a Matroska, MP4, AVI, WAV, WebP, GIF, PNG, Ogg, MXF or MPEG-TS file; others seem
    whole."""
    size = os.fstat(file.fileno()).st_size
    file.seek(0)
    head = file.read(4096)
    file.seek(max(0, size - 4096))
    tail = file.read()
    file.seek(0)
    if head.startswith(matroska.HEADER):
        cut = matroska.is_cut_short(file, size)
        file.seek(0)
        return cut
    if head.startswith((b"RIFF", b"RIFX")) and len(head) >= 8:
        length = struct.unpack("<I", head[4:8])[0]
        # Writers that could not go back leave no length, and some count the first eight bytes of an AVI too.
        counted = length + (8 if head[8:12] == b"WEBP" else 0)
        return length not in (0, 0xFFFFFFFF) and counted > size
    if head.startswith(b"GIF8"):
        return tail.rstrip(b"\0\r\n ")[-1:] != b";"
    if head.startswith(b"\x89PNG"):
        return b"IEND" not in tail
    if head.startswith(_OGG_PAGE):
        return _ogg_end(file, size) > size
    if head.startswith(_MXF_PARTITION):
        # A footer ends the file (SMPTE ST 377-1, 7); its place is 0 if the writer could not go back.
        _, value = _mxf_length(head)
        footer = int.from_bytes(head[value + 24 : value + 32], "big")
        return footer > 0 and not _is_mxf_footer(file, footer, size)
    for length, sync in _TS_PACKETS.items():
        places = range(sync, min(len(head), 5 * length), length)
        if len(places) == 5 and all(head[place] == 0x47 for place in places):
            return size % length != 0
    if head[4:8] in _BOXES:
        return _boxes_end(file, size) > size
    return False


def _ogg_end(file: BinaryIO, size: int) -> int:
    """Where the last page of an Ogg file ends (RFC 3533, 6)."""
    begin = max(0, size - _LONGEST_PAGE)
    file.seek(begin)
    tail = file.read()
    file.seek(0)
    at = max(0, tail.rfind(_OGG_PAGE))
    # A page begins with the number of its segments and the length of each.
    head = tail[at : at + _OGG_HEAD]
    lengths = tail[at + _OGG_HEAD :][: head[-1]]
    whole = len(head) == _OGG_HEAD and len(lengths) == head[-1]
    return begin + at + _OGG_HEAD + len(lengths) + sum(lengths) if whole else size + 1


def _mxf_length(pack: bytes) -> tuple[int, int]:
    """The length of the value of an MXF key, and where it begins."""
    more = pack[16] & 0x7F if len(pack) > 16 and pack[16] & 0x80 else 0
    return int.from_bytes(pack[17 : 17 + more] if more else pack[16:17], "big"), 17 + more


def _is_mxf_footer(file: BinaryIO, at: int, size: int) -> bool:
    """Whether an MXF partition at `at` and what it counts as its header and index are in a file of `size` bytes."""
    file.seek(min(at, size))
    pack = file.read(128)
    file.seek(0)
    length, value = _mxf_length(pack)
    header, index = (int.from_bytes(pack[value + place : value + place + 8], "big") for place in (32, 40))
    return pack.startswith(_MXF_PARTITION) and at + value + length + header + index <= size


def has_nut_index(file: BinaryIO) -> bool:
    """Whether a NUT file ends with its index, which writers may leave out."""
    size = os.fstat(file.fileno()).st_size
    file.seek(max(0, size - 4096))
    tail = file.read()
    # Its last bytes are its length and a checksum.
    length = int.from_bytes(tail[-12:-4], "big")
    return (0 < length <= len(tail) and tail[-length:].startswith(_NUT_INDEX)) or _NUT_INDEX in tail


def _boxes_end(file: BinaryIO, size: int) -> int:
    """Where the last box of an MP4 file ends (ISO/IEC 14496-12, 4.2)."""
    at = 0
    while at + 8 <= size:
        file.seek(at)
        head = file.read(16)
        length = int.from_bytes(head[:4], "big")
        if length == 1:
            length = int.from_bytes(head[8:16], "big")
        if length < 8 or head[4:8] not in _BOXES:
            # A length of zero means up to the end.
            break
        at += length
    file.seek(0)
    return at
