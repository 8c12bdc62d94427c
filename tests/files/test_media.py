"""Pictures and videos written and read back, whole or not at all."""

from __future__ import annotations

import shutil
import struct
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from longcat_core.errors import LongCatError
from longcat_core.files import media, places
from longcat_core.files.media import writing


def moving_bar(frames: int = 9, height: int = 32, width: int = 48) -> np.ndarray:
    """A saturated red bar that moves 4 pixels a frame over blue."""
    video = np.zeros((frames, height, width, 3), np.uint8)
    video[..., 2] = 200
    for i, frame in enumerate(video):
        frame[:, 4 * i : 4 * i + 8] = (220, 30, 30)
    return video


def only_file(folder: Path) -> Path:
    (path,) = folder.iterdir()
    return path


def test_mp4_round_trip_keeps_size_count_rate_and_colors(tmp_path: Path) -> None:
    video = moving_bar()
    media.write_video(tmp_path / "a.mp4", video, 15)
    read, fps = media.read_video(only_file(tmp_path))
    assert read.shape == video.shape and read.dtype == np.uint8 and fps == 15
    # Away from edges, where color is stored at half the resolution, flat colors come back almost exactly.
    assert np.abs(read[0, 8:24, 2:6].astype(int) - (220, 30, 30)).max() <= 4
    assert np.abs(read[0, 8:24, 16:40].astype(int) - (0, 0, 200)).max() <= 4
    error = np.abs(read.astype(int) - video)
    assert error.mean() < 6


@pytest.mark.parametrize("fps", [np.float32(29.97), np.float64(29.97), np.int64(30), Fraction(30000, 1001)])
@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".webp", ".gif"])
def test_any_real_number_is_a_rate(tmp_path: Path, suffix: str, fps: float) -> None:
    media.write_video(tmp_path / f"a{suffix}", moving_bar(3), fps)
    assert len(media.read_video(tmp_path / f"a{suffix}", fps=fps)[0]) == 3


def test_mp4_says_its_color_matrix(tmp_path: Path) -> None:
    import av

    media.write_video(tmp_path / "a.mp4", moving_bar(), 15)
    with av.open(str(tmp_path / "a.mp4")) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264" and stream.codec_context.pix_fmt == "yuv420p"
        frame = next(container.decode(stream))
        assert (int(frame.colorspace), int(frame.color_range)) == (1, 1)


def test_equal_frames_make_equal_mp4(tmp_path: Path) -> None:
    """By its macroblock tree x264 makes several files of these frames, each in half of all runs at most."""
    y, x = np.mgrid[:64, :96]
    video = np.random.default_rng(0).integers(0, 12, (33, 64, 96, 3), dtype=np.uint8) + np.uint8((20, 60, 200))
    for i, frame in enumerate(video):
        frame[(x - 3 * i % 96) ** 2 + (y - 32) ** 2 < 200] += np.uint8((200, 0, 0))
    for number in range(10):
        media.write_video(tmp_path / f"{number}.mp4", video, 15)
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1


def test_webp_is_exact(tmp_path: Path) -> None:
    video = np.random.default_rng(0).integers(0, 256, (5, 16, 32, 3), dtype=np.uint8)
    media.write_video(tmp_path / "a.webp", video, 15)
    read, fps = media.read_video(only_file(tmp_path))
    np.testing.assert_array_equal(read, video)
    assert fps == pytest.approx(15, abs=0.1)


@pytest.mark.parametrize(("height", "width"), [(16, 32), (17, 31)])
def test_mkv_is_exact_and_equal_frames_make_equal_files(tmp_path: Path, height: int, width: int) -> None:
    video = np.random.default_rng(0).integers(0, 256, (9, height, width, 3), dtype=np.uint8)
    media.write_video(tmp_path / "a.mkv", video, 15)
    read, fps = media.read_video(tmp_path / "a.mkv")
    np.testing.assert_array_equal(read, video)
    assert fps == pytest.approx(15)
    media.write_video(tmp_path / "b.mkv", (video[i : i + 4] for i in range(0, 9, 4)), 15)
    assert (tmp_path / "a.mkv").read_bytes() == (tmp_path / "b.mkv").read_bytes()


@pytest.mark.parametrize("suffix", [".mp4", ".webp", ".gif"])
def test_clips_in_a_row_are_one_video(tmp_path: Path, suffix: str) -> None:
    video = moving_bar()
    for name, frames in (("whole", video), ("clips", iter([video[:5], video[5:]]))):
        media.write_video(tmp_path / f"{name}{suffix}", frames, 15)
    whole, clips = (media.read_video(tmp_path / f"{name}{suffix}")[0] for name in ("whole", "clips"))
    np.testing.assert_array_equal(clips, whole)


def test_gif_round_trip(tmp_path: Path) -> None:
    video = moving_bar()
    media.write_video(tmp_path / "a.gif", video, 15)
    read, fps = media.read_video(only_file(tmp_path))
    assert read.shape == video.shape
    assert np.abs(read.astype(int) - video).max() <= 12
    assert fps == pytest.approx(15, abs=0.5)


@pytest.mark.parametrize("suffix", [".webp", ".gif"])
def test_equal_frames_keep_their_time(tmp_path: Path, suffix: str) -> None:
    video = moving_bar(4)[[0, 1, 1, 1, 2, 3]]
    media.write_video(tmp_path / f"a{suffix}", video, 10)
    read, fps = media.read_video(tmp_path / f"a{suffix}")
    assert len(read) == 6 and fps == pytest.approx(10)
    assert np.abs(read.astype(int) - video).max() <= 12


@pytest.mark.parametrize("suffix", [".mp4", ".webp"])
def test_last_frames_only(tmp_path: Path, suffix: str) -> None:
    media.write_video(tmp_path / f"a{suffix}", moving_bar(), 15)
    whole, _ = media.read_video(tmp_path / f"a{suffix}")
    read, _ = media.read_video(tmp_path / f"a{suffix}", last=5)
    np.testing.assert_array_equal(read, whole[-5:])


def test_fractional_rate(tmp_path: Path) -> None:
    media.write_video(tmp_path / "a.mp4", moving_bar(), 29.97)
    assert media.read_video(tmp_path / "a.mp4")[1] == pytest.approx(29.97, abs=0.01)


@pytest.mark.parametrize("suffix", [".mp4", ".webp", ".gif"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device"), RuntimeError])
def test_broken_off_writing_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, error: type[BaseException] | BaseException
) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(b"old")

    def broken(file: Path, *_: object, **__: object) -> None:
        file.write_bytes(b"half")
        raise error

    monkeypatch.setattr(writing, "_write_stream", broken)
    monkeypatch.setattr(writing, "_write_animation", broken)
    expected = LongCatError if isinstance(error, OSError) else error
    with pytest.raises(expected):
        media.write_video(path, moving_bar(), 15)
    assert only_file(tmp_path).read_bytes() == b"old"


def test_interrupt_in_the_encoder_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import av

    real, calls = av.VideoFrame.from_ndarray, []

    class Frame:
        @staticmethod
        def from_ndarray(*args: object, **kwargs: object) -> object:
            calls.append(1)
            if len(calls) == 5:
                raise KeyboardInterrupt
            return real(*args, **kwargs)

    monkeypatch.setattr(av, "VideoFrame", Frame)
    with pytest.raises(KeyboardInterrupt):
        media.write_video(tmp_path / "a.mp4", moving_bar(), 15)
    assert not list(tmp_path.iterdir())


def test_a_link_is_written_through(tmp_path: Path) -> None:
    (tmp_path / "target.webp").write_bytes(b"old")
    (tmp_path / "link.webp").symlink_to(tmp_path / "target.webp")
    media.write_video(tmp_path / "link.webp", moving_bar(), 15)
    assert (tmp_path / "link.webp").is_symlink()
    assert len(media.read_video(tmp_path / "target.webp")[0]) == 9


@pytest.mark.parametrize(
    ("name", "video", "said"),
    [
        ("a.avi", moving_bar(), ".mp4, .mkv, .webp, .gif"),
        ("a.mp4", moving_bar(height=31), "even sides, not 31x48"),
        ("a.mp4", moving_bar().astype(np.float32), "float32"),
        ("a.mp4", moving_bar()[0], r"\[32, 48, 3\]"),
        ("a.mp4", moving_bar()[:0], "a video without frames"),
        ("a.mkv", [], "a video without frames"),
        ("a.mkv", [moving_bar(), moving_bar(height=34)], "34, 48, 3.*all of one size"),
        ("a.webp", [moving_bar(), moving_bar(height=34)], "34, 48, 3.*all of one size"),
    ],
)
def test_what_cannot_be_written(tmp_path: Path, name: str, video: np.ndarray, said: str) -> None:
    with pytest.raises(LongCatError, match=said):
        media.write_video(tmp_path / name, video, 15)
    assert not list(tmp_path.iterdir())


# --- reading ---------------------------------------------------------------------------------------------------------


def test_transparency_is_over_black(tmp_path: Path) -> None:
    Image.new("RGBA", (4, 2), (200, 100, 50, 128)).save(tmp_path / "a.png")
    assert np.abs(media.read_image(tmp_path / "a.png").astype(int) - (100, 50, 25)).max() <= 1


@pytest.mark.parametrize(
    ("orientation", "shown"),
    [
        (1, lambda f: f),
        (2, lambda f: f[:, ::-1]),
        (3, lambda f: f[::-1, ::-1]),
        (4, lambda f: f[::-1]),
        (5, lambda f: f.transpose(1, 0, 2)),
        (6, lambda f: np.rot90(f, -1)),
        (7, lambda f: np.rot90(f.transpose(1, 0, 2), 2)),
        (8, np.rot90),
    ],
)
@pytest.mark.parametrize("name", ["a.png", "a.webp", "a.tiff"])
def test_exif_orientation(
    tmp_path: Path, name: str, orientation: int, shown: Callable[[np.ndarray], np.ndarray]
) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (16, 32, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(picture).save(tmp_path / name, exif=exif, lossless=True)
    np.testing.assert_array_equal(media.read_image(tmp_path / name), shown(picture))


def rotated_primaries() -> bytes:
    """An ICC profile of a display whose red, green and blue are the green, blue and red of sRGB."""
    matrix = {b"gXYZ": (0.4360, 0.2225, 0.0139), b"rXYZ": (0.3851, 0.7169, 0.0971), b"bXYZ": (0.1431, 0.0606, 0.7141)}
    matrix = dict(zip((b"rXYZ", b"gXYZ", b"bXYZ"), (matrix[b"rXYZ"], matrix[b"bXYZ"], matrix[b"gXYZ"]), strict=True))
    matrix[b"wtpt"] = (0.9642, 1.0, 0.8249)
    tags = {
        name: b"XYZ " + bytes(4) + struct.pack(">3i", *(round(65536 * value) for value in values))
        for name, values in matrix.items()
    }
    tags |= dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), b"curv" + struct.pack(">IIH", 0, 1, round(256 * 2.2)) + bytes(2))
    text = b"other"
    tags[b"desc"] = b"desc" + struct.pack(">II", 0, len(text) + 1) + text + bytes(1 + 11 + 67 + 2)
    table, data, at = struct.pack(">I", len(tags)), b"", 128 + 4 + 12 * len(tags)
    for name, content in tags.items():
        table += name + struct.pack(">II", at + len(data), len(content))
        data += content
    head = struct.pack(">I4sI4s4s4s", at + len(data), b"lcms", 0x02100000, b"mntr", b"RGB ", b"XYZ ") + bytes(12)
    head += b"acsp" + bytes(28) + struct.pack(">3i", 63190, 65536, 54061) + bytes(48)
    return head + table + data


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_color_profiles_are_applied(tmp_path: Path, mode: str) -> None:
    Image.new(mode, (4, 2), (230, 40, 40)).save(tmp_path / "a.png", icc_profile=rotated_primaries())
    assert np.abs(media.read_image(tmp_path / "a.png").astype(int) - (40, 230, 40)).max() <= 6
    Image.new(mode, (4, 2), (230, 40, 40)).save(tmp_path / "b.png", icc_profile=b"no profile")
    assert np.abs(media.read_image(tmp_path / "b.png").astype(int) - (230, 40, 40)).max() == 0


@pytest.mark.parametrize(
    ("mode", "color", "expected"),
    [("L", 120, 120), ("I;16", 120 << 8, 120), ("1", 1, 255), ("LA", (100, 255), 100)],
)
def test_other_picture_modes(tmp_path: Path, mode: str, color: object, expected: int) -> None:
    Image.new(mode, (4, 2), color).save(tmp_path / "a.png")
    read = media.read_image(tmp_path / "a.png")
    assert read.shape == (2, 4, 3) and read.dtype == np.uint8 and (read == expected).all()


@pytest.mark.parametrize(("mode", "color"), [("I", 1 << 20), ("F", 0.5)])
def test_pictures_of_32_bits_are_refused(tmp_path: Path, mode: str, color: float) -> None:
    Image.new(mode, (4, 2), color).save(tmp_path / "a.tiff")
    with pytest.raises(LongCatError, match=r"a\.tiff is not a readable image \(its pixels have 32 bits; save it"):
        media.read_image(tmp_path / "a.tiff")


@pytest.mark.parametrize("name", ["a.mp4", "a.webp", "a.gif"])
@pytest.mark.parametrize("content", [b"", b"no video at all", b"\0" * 4096])
def test_unreadable_video(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(LongCatError, match=rf"{name} (is not a readable|holds no)"):
        media.read_video(tmp_path / name)


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_video_that_is_cut_short(tmp_path: Path, share: float) -> None:
    video = np.random.default_rng(0).integers(0, 256, (30, 64, 96, 3), dtype=np.uint8)
    media.write_video(tmp_path / "a.mp4", video, 15)
    content = (tmp_path / "a.mp4").read_bytes()
    (tmp_path / "a.mp4").write_bytes(content[: int(len(content) * share)])
    with pytest.raises(LongCatError, match="is cut short"):
        media.read_video(tmp_path / "a.mp4")


def test_a_video_that_changes_its_size(tmp_path: Path) -> None:
    import av

    for height in (32, 64):
        with av.open(str(tmp_path / f"{height}.ts"), "w", format="mpegts") as container:
            stream = container.add_stream("mpeg2video", rate=25)
            stream.height, stream.width, stream.pix_fmt = height, 48, "yuv420p"
            for picture in moving_bar(9, height, 48):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode())
    (tmp_path / "a.ts").write_bytes(b"".join((tmp_path / f"{height}.ts").read_bytes() for height in (32, 64)))
    with pytest.raises(LongCatError, match=r"a\.ts changes its size from 32x48 to 64x48; cut it"):
        media.read_video(tmp_path / "a.ts")
    assert media.read_video(tmp_path / "a.ts", first=5)[0].shape == (5, 32, 48, 3)


def test_sound_without_pictures_is_not_a_video(tmp_path: Path) -> None:
    import wave

    with wave.open(str(tmp_path / "a.wav"), "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(8000)
        sound.writeframes(bytes(1600))
    with pytest.raises(LongCatError, match="holds no video frames"):
        media.read_video(tmp_path / "a.wav")


# --- fitting ---------------------------------------------------------------------------------------------------------


def test_fitting_cuts_evenly() -> None:
    picture = np.zeros((20, 60, 3), np.uint8)
    picture[:, 20:40] = 255
    fitted = media.resize_and_crop(picture, 20, 20)
    assert (fitted == 255).all(), "the middle third is what stays"
    assert media.resize_and_crop(picture[None], 40, 40).shape == (1, 40, 40, 3)


def test_fitting_keeps_the_aspect() -> None:
    picture = np.zeros((40, 40, 3), np.uint8)
    picture[10:30, 10:30] = 255
    fitted = media.resize_and_crop(picture, 80, 160)
    assert fitted.shape == (80, 160, 3)
    assert (fitted[40, :, 0] > 127).sum() == 80 and (fitted[:, 80, 0] > 127).sum() == 80


def test_fitting_size_is_untouched() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (16, 32, 3), dtype=np.uint8)
    np.testing.assert_array_equal(media.resize_and_crop(picture, 16, 32), picture)


def test_extreme_shapes() -> None:
    for sides in ((1, 1), (1, 500), (500, 1), (37, 91)):
        assert media.resize_and_crop(np.full((*sides, 3), 9, np.uint8), 48, 80).shape == (48, 80, 3)


# --- places to write -------------------------------------------------------------------------------------------------


def test_good_output_passes_and_leaves_no_trace(tmp_path: Path) -> None:
    media.check_output(tmp_path / "a.mp4", 1000)
    media.check_output(tmp_path / "a.png", 1000, sheet=True)
    assert not list(tmp_path.iterdir())


def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(places.shutil, "disk_usage", lambda _: usage._replace(free=2_000_000))
    media.check_output(tmp_path / "a.mp4", 2_000_000)
    with pytest.raises(LongCatError, match=r"3\.0 MB but .* has 2\.0 MB free"):
        media.check_output(tmp_path / "a.mp4", 3_000_000)


def test_estimate_is_generous(tmp_path: Path) -> None:
    video = np.random.default_rng(0).integers(0, 256, (9, 64, 96, 3), dtype=np.uint8)
    for suffix in writing.VIDEO_SUFFIXES:
        path = tmp_path / f"noise{suffix}"
        media.write_video(path, video, 15)
        assert path.stat().st_size < media.estimate_bytes(path, *video.shape[:3])


def test_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(LongCatError, match=r"package av; run: pip install 'longcat-video\[headless\]'"):
        media.write_video(tmp_path / "a.mp4", moving_bar(), 15)
    assert not list(tmp_path.iterdir())
