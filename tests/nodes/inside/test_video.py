"""The video and the images of the long nodes: read from the folder, saved with flat memory, whole where asked."""

from __future__ import annotations

import copy
import json
import math
import os
import pickle
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from . import cases

MANY, HEIGHT, WIDTH = 200, 128, 224
# Of the 804 frames, 276 MB as an IMAGE.
FLAT_BYTES = 90 << 20


@pytest.fixture
def parts(comfy):
    """Three footages of 4, 1 and 3 frames, whose frames are numbered by their values, and how often each is opened."""
    footage = comfy.core("generate.footage").Footage
    opened = []

    def part(first: int, count: int):
        def read():
            opened.append(first)
            return (np.full((4, 6, 3), number, np.uint8) for number in range(first, first + count))

        return footage(count, 4, 6, read)

    return [part(0, 4), part(4, 1), part(5, 3)], opened


@pytest.fixture
def reel(comfy, parts):
    return comfy.node("video").Reel(parts[0])


@pytest.fixture
def images(comfy, reel):
    return comfy.node("video").ReelImages(reel)


def numbers(images: torch.Tensor) -> list[int]:
    return images[:, 0, 0, 0].mul(255).round().int().tolist()


def test_an_image_that_nobody_computes_with_is_not_read(images, parts):
    assert isinstance(images, torch.Tensor) and images.shape == (8, 4, 6, 3) and len(images) == 8
    assert images.dtype == torch.float32 and images.device.type == "cpu" and images.ndim == images.dim() == 4
    assert images.numel() * images.element_size() == 8 * 4 * 6 * 3 * 4 and images.is_floating_point()
    assert "not read" in repr(images) and "not read" in str([images]) and images.size(0) == 8
    assert not parts[1]


@pytest.mark.parametrize(
    "use",
    [
        lambda images: images.clone(),
        lambda images: images + 0,
        lambda images: torch.cat((images[:2], images[2:])),
        lambda images: torch.stack(list(images)),
        lambda images: torch.stack([images[i] for i in range(8)]),
        lambda images: torch.from_numpy(np.array(images)),
        lambda images: torch.from_numpy(images.numpy()),
        lambda images: torch.from_numpy(np.asarray(images.cpu())),
        lambda images: images.movedim(-1, 1).movedim(1, -1),
        lambda images: images[..., :3],
        lambda images: images[:, :, :, :],
        lambda images: images[torch.arange(8)],
        lambda images: images[[0, 1, 2, 3, 4, 5, 6, 7]],
        lambda images: images.to(torch.float64).float(),
        lambda images: copy.deepcopy(images),
        lambda images: pickle.loads(pickle.dumps(images)),
        lambda images: torch.nn.functional.interpolate(images.movedim(-1, 1), size=(4, 6)).movedim(1, -1),
        lambda images: images.flip(0).flip(0),
        lambda images: torch.ops.aten.clone(images),
        lambda images: torch.from_dlpack(images),
        lambda images: images.contiguous().view(8, 4, 6, 3),
        lambda images: images.reshape(2, 4, 4, 6, 3).flatten(0, 1),
        lambda images: torch.empty_like(images).copy_(images),
        lambda images: torch.where(torch.tensor(True), images, images),
    ],
)
def test_it_is_an_image_wherever_it_is_used(images, use):
    with torch.inference_mode():
        found = use(images)
    assert type(found) is torch.Tensor or type(found) is type(images)
    assert found.shape == (8, 4, 6, 3) and numbers(found.clone()) == list(range(8))


def test_what_is_written_into_it_stays(images):
    images[0] = 1.0
    images.mul_(0.5)
    assert images.max() == 0.5 and images[0].min() == 0.5 and numbers(images)[7] == 4


@pytest.mark.parametrize(
    ("use", "read"),
    [
        (lambda images: images[0], [0]),
        (lambda images: images[-1], [5]),
        (lambda images: images[5, 0, 0], [5]),
        (lambda images: images[4:5].clone(), [4]),
        (lambda images: images[5:, ..., :3].clone(), [5]),
        (lambda images: images[6:][1:].clone(), [5]),
        (lambda images: [images[i] for i in (4, 5, 6)], [4, 5]),
    ],
)
def test_a_part_of_it_is_read_alone(images, parts, use, read):
    use(images)
    assert parts[1] == read and images.whole is None


def test_a_reel_is_cut_and_read_as_often_as_asked(reel):
    for start in range(8):
        for stop in range(start + 1, 9):
            cut = reel.cut(start, stop)
            for _ in range(2):
                assert [int(frame[0, 0, 0]) for frame in cut.read()] == list(range(start, stop))


@pytest.mark.parametrize(
    ("start", "duration", "kept"),
    [(0, 0, range(8)), (0.2, 0, range(3, 8)), (0, 0.2, range(3)), (-0.2, 0, range(5, 8)), (0.1, 0.2, range(2, 5))],
)
def test_trimming_takes_the_frames_that_begin_in_that_time(comfy, reel, start, duration, kept):
    video = comfy.node("video").ReelVideo(reel, 15.0).as_trimmed(start, duration, strict_duration=True)
    assert numbers(video.get_components().images) == list(kept)
    assert video.get_duration() == pytest.approx(len(kept) / 15)


def test_what_cannot_be_trimmed_is_none(comfy, reel):
    video = comfy.node("video").ReelVideo(reel, 15.0)
    assert video.as_trimmed(1.0, 0, strict_duration=False) is None
    assert video.as_trimmed(0.4, 1.0, strict_duration=True) is None
    assert len(video.as_trimmed(0.4, 1.0, strict_duration=False).reel) == 2


def test_get_video_components_and_what_else_asks_a_video(comfy, reel, parts):
    video = comfy.node("video").ReelVideo(reel, 29.97)
    images, audio, fps = comfy("GetVideoComponents", video=video)[:3]
    assert audio is None and fps == pytest.approx(29.97) and not parts[1]
    assert video.get_dimensions() == (6, 4) and video.get_frame_count() == 8
    assert isinstance(video.get_frame_rate(), Fraction) and "mp4" in video.get_container_format()
    assert not parts[1] and numbers(images) == list(range(8))


def output(comfy) -> Path:
    import folder_paths

    return Path(folder_paths.get_output_directory())


def test_save_video_writes_the_frames_with_the_workflow(comfy, model, clip, vae):
    sizes = {"width": cases.WIDTH, "height": cases.HEIGHT, "length": 9, "overlap": 5, "segments": 2}
    sampling = {"seed": 3, "steps": 1, "guidance": 1.0, "mode": "base", "negative_prompt": ""}
    images, _, video = comfy("LongCatLongVideo", model=model, clip=clip, vae=vae, prompts=cases.PROMPT,
                             folder="saved", **sizes, **sampling)  # fmt: skip
    assert len(images) == video.get_frame_count() == 13 and images.whole is None
    path = output(comfy) / "saved.mp4"
    video.save_to(str(path), metadata={"prompt": {"1": "x"}})
    import av

    with av.open(str(path)) as container:
        assert json.loads(container.metadata["prompt"]) == {"1": "x"}
        assert container.streams.video[0].average_rate == 15 and not container.streams.audio
    frames, fps = comfy.core("files.media").read_video(path)
    assert frames.shape == (13, cases.HEIGHT, cases.WIDTH, 3) and fps == 15
    # h264 changes colors a little.
    assert np.abs(frames.astype(int) - images.mul(255).round().numpy().astype(int)).mean() < 12
    assert len(video.get_stream_source().read()) > 1000


class Prompt:
    """What ComfyUI tells a running node of the prompt."""

    def __init__(self, **taking: list[str]) -> None:
        self.nodes = {"long": {"class_type": "LongCatLongVideo", "inputs": {}}}
        for kind, link in taking.items():
            self.nodes[kind] = {"class_type": kind, "inputs": {"x": link}}

    def all_node_ids(self):
        return set(self.nodes)

    def get_node(self, name):
        return self.nodes[name]


@pytest.mark.parametrize(
    ("taking", "refused"),
    [
        ({}, False),
        ({"SaveVideo": ["long", 2]}, False),
        ({"CreateVideo": ["long", 0]}, False),
        ({"ImageScale": ["other", 0]}, False),
        ({"ImageScale": ["long", 0]}, True),
        ({"CreateVideo": ["long", 0], "ImageScale": ["long", 0]}, True),
    ],
)
def test_an_image_that_does_not_fit_into_memory_is_refused_before_the_work(comfy, taking, refused):
    hidden = type("Hidden", (), {"unique_id": "long", "dynprompt": Prompt(**taking)})
    check = comfy.node("video").check_fits
    check(hidden, 0, 13, 64, 96)
    if not refused:
        return check(hidden, 0, 10**6, 720, 1280)
    with pytest.raises(comfy.core("errors").LongCatError, match=r"11,059\.2 GB of memory.* connect the output video"):
        check(hidden, 0, 10**6, 720, 1280)


@pytest.mark.parametrize("form", ["images", "video", "file", "components"])
def test_refining_takes_images_and_videos(comfy, model, clip, vae, frames, form, tmp_path):
    video_of = comfy.node("video")
    clip_frames = frames[:9].mul(255).round().div(255)
    sound = comfy.core("files.media").Sound(torch.linspace(-0.5, 0.5, 9600)[None], 16000)
    if form == "file":
        from comfy_api.latest import InputImpl

        path = tmp_path / "clip.mkv"
        comfy.core("files.media").write_video(path, clip_frames.mul(255).round().byte().numpy(), 30.0, sound)
        given = InputImpl.VideoFromFile(str(path))
    elif form == "components":
        audio = comfy.node("sounds").audio_of(sound)
        given = comfy("CreateVideo", images=clip_frames, fps=30.0, audio=audio)
    else:
        footage = comfy.core("generate.footage").Footage.of(clip_frames.mul(255).round().byte().numpy(), "x")
        reel = video_of.Reel([footage])
        given = video_of.ReelImages(reel) if form == "images" else video_of.ReelVideo(reel, 30.0, sound.cut(0.3))
    sizes = {"resolution": "custom", "width": cases.WIDTH, "height": cases.HEIGHT, "piece": 5, "overlap": 1}
    run = {"model": model, "clip": clip, "vae": vae, "seed": 4, "steps": 12, **sizes}
    images, fps, video = comfy("LongCatRefineLongVideo", video=given, folder=f"refined-{form}", **run)
    plain, _, _ = comfy("LongCatRefineLongVideo", video=clip_frames, folder="refined-plain", **run)
    assert fps == float(video.get_frame_rate()) == (30 if form == "images" else 60)
    assert torch.equal(images.clone(), plain.clone()) and len(images) == 18
    if form == "images":
        assert video.sound is None
    else:
        # Nine frames at 30 a second.
        torch.testing.assert_close(video.sound.samples, sound.cut(0.3).samples, atol=1e-4, rtol=0)


def test_a_video_is_refined_without_a_sound_that_cannot_be_read(comfy, frames, caplog):
    sound_in, audio = comfy.node("video").sound_in, {"waveform": torch.full((1, 1, 16000), math.nan)}
    spoiled = comfy("CreateVideo", images=frames[:9], fps=30.0, audio=audio | {"sample_rate": 16000})
    assert sound_in(spoiled, 0.3) is None and "the sound of the video is left out, because" in caplog.text
    assert sound_in(comfy("CreateVideo", images=frames[:9], fps=30.0), 0.3) is None


def test_the_sound_of_a_trimmed_file(comfy, frames, tmp_path):
    from comfy_api.latest import InputImpl

    given = InputImpl.VideoFromFile(str(tmp_path / "clip.mkv"))
    if not hasattr(given, "as_trimmed"):
        pytest.skip("this ComfyUI does not trim")
    sound = comfy.core("files.media").Sound(torch.linspace(-0.5, 0.5, 9600)[None], 16000)
    pixels = frames[:18].mul(255).round().byte().numpy()
    comfy.core("files.media").write_video(tmp_path / "clip.mkv", pixels, 30.0, sound)
    found = comfy.node("video").sound_in(given.as_trimmed(0.2, 0.3), 0.3)
    torch.testing.assert_close(found.samples, sound.samples[:, 3200:8000], atol=1e-4, rtol=0)
    assert comfy.node("video").sound_in(given, 0.6).samples.shape == (1, 9600)


@pytest.mark.parametrize("form", ["images", "video"])
def test_a_video_is_continued_from_its_end_at_its_own_rate(comfy, vae, frames, form):
    video_of, pixels = comfy.node("video"), frames.mul(255).round().byte().numpy()
    reel = video_of.Reel([comfy.core("generate.footage").Footage.of(pixels, "x")])
    given = video_of.ReelImages(reel) if form == "images" else video_of.ReelVideo(reel, 30.0)
    inputs = {"vae": vae, "cond_frames": 5, "resolution": "custom", "width": 96, "height": 64, "length": 9}
    found = comfy("LongCatVideoContinuation", video=given, fps=30.0 if form == "images" else 15.0, **inputs)
    wanted = comfy("LongCatVideoContinuation", video=frames, fps=30.0, **inputs)
    assert torch.equal(found["samples"], wanted["samples"])


@pytest.fixture
def peak():
    """Starts counting; the function that it gives says by how many bytes the process has grown at most since."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pytest.skip("this system does not reset a process's peak memory")

    def of(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name))

    before = of("VmRSS")
    return lambda: of("VmHWM") - before


def test_memory_stays_flat_for_200_segments(comfy, model, clip, vae, monkeypatch, peak):
    engine, made = comfy.node("engine").ComfyEngine, comfy.core("generate.engine").Generation
    rows = np.arange(HEIGHT)[:, None, None]

    def generate(self, request, *args):
        picture = np.broadcast_to((rows + request.seed).astype(np.uint8), (HEIGHT, WIDTH, 3))
        return made(np.stack([picture] * 9), torch.zeros(1, 16, 3, HEIGHT // 8, WIDTH // 8), request)

    monkeypatch.setattr(engine, "generate", generate)
    # Nothing here depends on whether a busy disk has written what it was given.
    monkeypatch.setattr(os, "fsync", lambda file: None)
    sizes = {"width": WIDTH, "height": HEIGHT, "length": 9, "overlap": 5, "segments": MANY}
    sampling = {"seed": 3, "steps": 1, "guidance": 1.0, "mode": "base", "negative_prompt": ""}
    images, report, video = comfy("LongCatLongVideo", model=model, clip=clip, vae=vae, prompts=cases.PROMPT,
                                  folder="many", **sizes, **sampling)  # fmt: skip
    assert len(images) == 9 + 4 * (MANY - 1) and report.count("\n") == MANY - 1
    video.save_to(str(output(comfy) / "many.mp4"))
    comfy("CreateVideo", images=images, fps=15.0).save_to(str(output(comfy) / "old.mp4"))
    assert peak() < FLAT_BYTES < images.numel() * images.element_size() // 2
    for name in ("many.mp4", "old.mp4"):
        with comfy.core("files.media").open_video(output(comfy) / name) as reader:
            assert reader.frames == len(images)
