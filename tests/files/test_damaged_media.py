"""Media that are cut short, no media at all, or hold a surprise: refused in a sentence, and nothing else is opened."""

from __future__ import annotations

import os
import socket
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from longcat_core.errors import LongCatError
from longcat_core.files.media import opening, read_image, read_video, streams, write_video
from longcat_core.generate.media import read_video as read_to_look

from .clips import counted, numbers, write_clip

NOISE = np.random.default_rng(0).integers(0, 256, (20, 32, 48, 3), dtype=np.uint8)
FORMS = {
    ".mkv": ("ffv1", "bgr0"), ".webm": ("libvpx-vp9", "yuv420p"), ".flv": ("libx264", "yuv420p"),
    ".nut": ("ffv1", "bgr0"), ".avi": ("mpeg4", "yuv420p"), ".ts": ("libx264", "yuv420p"),
    ".mp4": ("libx264", "yuv420p"), ".mov": ("libx264", "yuv420p"), ".wmv": ("wmv2", "yuv420p"),
    ".ivf": ("libvpx", "yuv420p"), ".y4m": ("rawvideo", "yuv420p"), ".h264": ("libx264", "yuv420p"),
    ".mxf": ("mpeg2video", "yuv420p"),
}  # fmt: skip


@pytest.mark.parametrize("sound", [False, True])
@pytest.mark.parametrize("suffix", FORMS)
def test_a_clip_that_is_cut_short(tmp_path: Path, suffix: str, sound: bool) -> None:
    if sound and suffix not in (".mkv", ".avi"):
        pytest.skip("no sound of PCM in this container")
    codec, pixels = FORMS[suffix]
    # MPEG-2 has no 15 frames per second.
    fps = 25 if suffix == ".mxf" else 15
    path = write_clip(tmp_path / f"a{suffix}", NOISE, fps, codec=codec, pixels=pixels, sound=sound)
    assert len(read_video(path)[0]) == 20
    content = path.read_bytes()
    for share in (0.11, 0.42, 0.63, 0.9):
        path.write_bytes(content[: int(share * len(content))])
        with pytest.raises(LongCatError, match=r"is cut short|is not a readable|holds no video"):
            read_video(path)


@pytest.mark.parametrize("clusters", ["with", "without"])
@pytest.mark.parametrize("suffix", [".mkv", ".webm"])
def test_a_recording_without_lengths_that_is_cut_short(tmp_path: Path, suffix: str, clusters: str) -> None:
    """Recorders of streams write no length of the segment, and some none of the clusters."""
    codec, pixels = FORMS[suffix]
    path = write_clip(tmp_path / f"a{suffix}", NOISE, codec=codec, pixels=pixels, options={"live": "1"})
    content, cluster = path.read_bytes(), b"\x1f\x43\xb6\x75"
    if clusters == "without":
        head, *rest = content.split(cluster)
        content = head + b"".join(cluster + b"\x01" + b"\xff" * 7 + body[9 - body[0].bit_length() :] for body in rest)
    for end in (b"", bytes(40), b"\xff" * 40):
        path.write_bytes(content + end)
        assert len(read_video(path)[0]) == 20
    for length in (*range(1, len(content), len(content) // 40), len(content) - 5, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(LongCatError, match=r"is cut short|is not a readable|holds no video"):
            read_video(path)


@pytest.mark.parametrize("codec", ["ffv1", "libx264"])
def test_a_nut_without_an_index(tmp_path: Path, codec: str) -> None:
    pixels = "bgr0" if codec == "ffv1" else "yuv420p"
    path = write_clip(tmp_path / "a.nut", NOISE, codec=codec, pixels=pixels, sound=True, options={"write_index": "0"})
    content = path.read_bytes()
    assert len(read_video(path)[0]) == 20
    for length in (*range(1, len(content), len(content) // 40), len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(LongCatError, match=r"is cut short|is not a readable|holds no video"):
            read_video(path)


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv", ".avi"])
@pytest.mark.parametrize("end", [bytes(40), b"\0\0\xff\xffSEFT" + bytes(30), b"\xff" * 40])
def test_what_follows_a_whole_clip_does_not_matter(tmp_path: Path, suffix: str, end: bytes) -> None:
    path = write_clip(tmp_path / f"a{suffix}", NOISE, codec=FORMS[suffix][0], pixels=FORMS[suffix][1])
    path.write_bytes(path.read_bytes() + end)
    assert len(read_video(path)[0]) == 20


def test_a_cut_clip_can_be_looked_at(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.mkv", NOISE)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.warns(UserWarning, match=r"a\.mkv: it is cut short"):
        frames, fps = read_to_look(path)
    assert 5 < len(frames) < 15 and fps == 15


@pytest.mark.parametrize("suffix", [".gif", ".webp"])
def test_an_animation_that_is_cut_short(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    write_video(path, NOISE, 15)
    content = path.read_bytes()
    for part in range(1, 60):
        path.write_bytes(content[: len(content) * part // 60])
        with pytest.raises(LongCatError, match=r"cut short|not a readable"):
            read_video(path)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi", ".flv", ".ts", ".gif", ".webp"])
def test_a_clip_that_is_damaged(tmp_path: Path, capfd: pytest.CaptureFixture[str], suffix: str) -> None:
    """A sentence or a clip, and no words of a decoder on the terminal."""
    path = tmp_path / f"a{suffix}"
    if suffix in FORMS:
        write_clip(path, NOISE[:4], codec=FORMS[suffix][0], pixels=FORMS[suffix][1])
    else:
        write_video(path, NOISE[:4], 15)
    content, damage = path.read_bytes(), np.random.default_rng(0)
    for _ in range(60):
        broken = bytearray(content)
        for _ in range(3):
            at = damage.integers(min(600, len(broken) - 4))
            broken[at : at + 4] = (b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff")[damage.integers(3)]
        path.write_bytes(broken)
        try:
            assert read_video(path, fps=15, last=2)[0].ndim == 4
        except LongCatError:
            continue
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM", "JPEG2000", "TGA", "DDS"])
def test_a_picture_that_is_damaged(tmp_path: Path, form: str) -> None:
    """Decoders of damaged files raise anything; here it is a sentence, or the picture if nothing is missing."""
    path = tmp_path / "a.picture"
    try:
        Image.fromarray(NOISE[0]).save(path, form)
    except (KeyError, OSError):
        pytest.skip(f"this Pillow writes no {form}")
    content = path.read_bytes()
    damage = np.random.default_rng(1)
    for part in range(1, 40):
        cut = bytearray(content[: len(content) * part // 40])
        if part % 2:
            cut = bytearray(content)
            cut[damage.integers(min(64, len(cut)))] ^= 1 << damage.integers(8)
        path.write_bytes(cut)
        try:
            assert read_image(path).ndim == 3
        except LongCatError:
            continue


# --- what a name or a content may lead to ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["take:2.mkv", "2025-01-01T12:30:00.mkv", "http:127.0.0.1:9?a.mkv", "file:a.mkv", "concat:a.mkv|b.mkv", "a%03d.mkv",
     "pipe:0", "-", "a*?.mkv", "data:video,x.mkv", "crypto:a.mkv", "cache:a.mkv", "rtmp:a.mkv", "\udcff.mkv"],
)  # fmt: skip
def test_a_name_is_the_name_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    write_clip(Path("plain.mkv"), counted(3))
    os.rename("plain.mkv", name)
    assert numbers(read_video(name)[0]) == [0, 1, 2]
    if name.endswith(".mkv"):
        write_video(name, counted(4), 15)
        assert len(read_video(name)[0]) == 4 and os.listdir() == [name]


@pytest.mark.parametrize(
    "content",
    [
        "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:0.6,\n{other}\n#EXT-X-ENDLIST\n",
        "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:0.6,\nhttp://127.0.0.1:{port}/a.ts\n",
        "ffconcat version 1.0\nfile '{other}'\n",
        "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=a\nc=IN IP4 127.0.0.1\nt=0 0\nm=video {port} RTP/AVP 96\n",
        '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"><Period><AdaptationSet>'
        '<Representation id="1"><BaseURL>{other}</BaseURL></Representation></AdaptationSet></Period></MPD>',
        "[playlist]\nFile1={other}\nNumberOfEntries=1\n",
        '<svg xmlns="http://www.w3.org/2000/svg"><image href="http://127.0.0.1:{port}/a.png"/></svg>',
    ],
)
@pytest.mark.parametrize("name", ["a.m3u8", "a.mp4", "a.webp", "a.txt"])
def test_no_file_leads_to_another(tmp_path: Path, content: str, name: str) -> None:
    other = write_clip(tmp_path / "other.mkv", counted(3))
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        server.settimeout(0)
        (tmp_path / name).write_text(content.format(other=other, port=server.getsockname()[1]))
        with pytest.raises(LongCatError, match="is not a readable video"):
            read_video(tmp_path / name)
        with pytest.raises(BlockingIOError):
            server.accept()


@pytest.mark.parametrize("name", ["photo.png", "photo.eps", "photo.jpg"])
@pytest.mark.parametrize(
    "start", [b"%!PS-Adobe-3.0 EPSF-3.0\n", b"\xc5\xd0\xd3\xc6" + struct.pack("<6I", 32, 90, 0, 0, 0, 0)]
)
def test_postscript_starts_no_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, start: bytes) -> None:
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    (tmp_path / name).write_bytes(start + b"%%BoundingBox: 0 0 20 20\n%%EndComments\nshowpage\n%%EOF\n")
    for read in (read_image, read_video):
        with pytest.raises(LongCatError, match=r"its format is unknown|is not a readable video"):
            read(tmp_path / name)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("read", [read_image, read_video])
def test_pipes_and_devices_are_not_waited_for(tmp_path: Path, read: object) -> None:
    os.mkfifo(tmp_path / "a.mp4")
    (tmp_path / "zero.webp").symlink_to("/dev/zero")
    for name in ("a.mp4", "zero.webp"):
        with pytest.raises(LongCatError, match=f"{name} is a pipe or a device"):
            read(tmp_path / name)


# --- size ------------------------------------------------------------------------------------------------------------


def empty_png(side: int, depth: int = 8, color: int = 0) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = zlib.compress(bytes(side * (1 + side * depth // 8)), 1)
    head = struct.pack(">IIBBBBB", side, side, depth, color, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.parametrize("depth", [1, 8, 16])
def test_a_large_picture_is_reduced(tmp_path: Path, depth: int) -> None:
    (tmp_path / "a.png").write_bytes(empty_png(6000, depth))
    assert read_image(tmp_path / "a.png").shape == (3000, 3000, 3)


def test_a_reduced_picture_is_the_same_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from longcat_core.files.media import pictures

    y, x = np.mgrid[:200, :300]
    picture = np.stack((x * 255 // 300, y * 255 // 200, x * 0), -1).astype(np.uint8)
    monkeypatch.setattr(pictures, "ENOUGH_PIXELS", 300 * 200 / 4)
    for name, options in (("a.png", {}), ("a.jpg", {"quality": 95}), ("a.tiff", {})):
        Image.fromarray(picture).save(tmp_path / name, **options)
        read = read_image(tmp_path / name)
        assert read.shape == (100, 150, 3) and np.abs(read.astype(int) - picture[::2, ::2]).max() < 12


def test_giant_pictures_are_refused_before_they_are_decoded(tmp_path: Path) -> None:
    head = bytearray(empty_png(8))
    head[16:24] = struct.pack(">II", 100_000, 100_000)
    head[29:33] = struct.pack(">I", zlib.crc32(head[12:29]))
    (tmp_path / "a.png").write_bytes(head)
    with pytest.raises(LongCatError, match=r"a\.png has (too many|100000x100000) pixels; scale it"):
        read_image(tmp_path / "a.png")


@pytest.mark.parametrize(("width", "height"), [(1, 177_000_000), (13_000, 13_000), (177_000_000, 1)])
@pytest.mark.parametrize("kind", ["png", "ppm", "bmp", "tga", "jpg"])
def test_pixels_that_the_file_cannot_hold_take_no_memory(tmp_path: Path, kind: str, width: int, height: int) -> None:
    if max(width, height) > 65_000 and kind in ("tga", "jpg"):
        pytest.skip("its header has 16 bits for a side")
    path = tmp_path / f"a.{kind}"
    Image.new("L", (8, 8)).save(path)
    data = bytearray(path.read_bytes())
    if kind == "png":
        data[16:24] = struct.pack(">II", width, height)
        data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    elif kind == "ppm":
        data[:] = b"P5 %d %d 255\n" % (width, height) + bytes(64)
    elif kind == "bmp":
        data[18:26] = struct.pack("<ii", width, height)
    elif kind == "tga":
        data[12:16] = struct.pack("<HH", width, height)
    else:
        at = data.index(b"\xff\xc0") + 5
        data[at : at + 4] = struct.pack(">HH", height, width)
    path.write_bytes(data)
    with pytest.raises(LongCatError, match=f"declares {width}x{height} pixels, more than a file of its size can hold"):
        read_image(path)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA"])
@pytest.mark.parametrize("size", [(2000, 2000), (1, 60_000), (60_000, 1)])
def test_flat_pictures_of_few_bytes_are_read(tmp_path: Path, mode: str, size: tuple[int, int]) -> None:
    kinds = {"png": {"optimize": True}, "jpg": {"progressive": True, "optimize": True}, "tga": {"rle": True}, "bmp": {}}
    for kind, options in kinds.items():
        wanted = {"jpg": "L" if mode == "1" else "RGB", "tga": "RGB", "bmp": "RGB"}.get(kind, mode)
        Image.new(mode, size).convert(wanted).save(tmp_path / f"a.{kind}", **options)
        assert read_image(tmp_path / f"a.{kind}").shape == (size[1], size[0], 3)


@pytest.mark.parametrize(("codec", "pixels"), [("ffv1", "bgr0"), ("libx264", "yuv420p"), ("libvpx-vp9", "yuv420p")])
def test_giant_frames_are_refused_before_they_are_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, codec: str, pixels: str
) -> None:
    path = write_clip(tmp_path / "a.mkv", counted(2), codec=codec, pixels=pixels)
    assert len(read_video(path)[0]) == 2
    for module in (opening, streams):
        monkeypatch.setattr(module, "MAX_PIXELS", 32 * 48 - 1)
    with pytest.raises(
        LongCatError, match=r"a\.mkv (has 48x32 pixels; scale|holds no video frames that can be decoded)"
    ):
        read_video(path)
