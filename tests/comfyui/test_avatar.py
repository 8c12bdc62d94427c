"""A tiny avatar of random weights in the real program: segments, two people, long videos, interrupts, and the page."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from longcat_core.files.media import read_sound

from ..support.talking import AVATAR, FACE, HEIGHT, SECONDS, WIDTH
from .client import Run
from .prompts import FILES, avatar, avatar_long, node
from .test_finding import TYPE

PROMPT = "a face talks"
FPS = 25
VALUES = """() => Object.fromEntries(
  window.app.graph.nodes.find(n => n.type === 'LongCatSampler').widgets.map(w => [w.name, w.value]))"""

pytestmark = pytest.mark.usefixtures("talking")


@pytest.fixture
def saved(client, watch, tmp_path):
    """Frames and seconds of sound of the video that a run's node "save" saved."""

    def read(run: Run) -> tuple[np.ndarray, float]:
        assert run.status == "success", run.end
        (file,) = run.files("save")
        content = client.video(file)
        (tmp_path / "saved.mp4").write_bytes(content)
        frames, fps = watch(content, file["filename"])
        assert fps == FPS and frames.shape[1:] == (HEIGHT, WIDTH, 3)
        return frames, read_sound(tmp_path / "saved.mp4").seconds

    return read


def test_a_segment_from_text_and_one_from_an_image(client, saved):
    frames, seconds = saved(client.run(avatar(PROMPT, image=False)))
    assert len(frames) == 17 and seconds == pytest.approx(17 / FPS, abs=0.05)
    seen, _ = saved(client.run(avatar(PROMPT)))
    assert not np.array_equal(seen, frames)


def test_two_people_have_a_sound_each(client, saved):
    run = client.run(avatar(PROMPT, people=2))
    frames, seconds = saved(run)
    assert len(frames) == 17 and seconds == pytest.approx(17 / FPS, abs=0.05)
    (shown,) = run.files("boxes")
    assert shown["type"] == "temp"
    alone, _ = saved(client.run(avatar(PROMPT)))
    assert not np.array_equal(frames, alone)


def test_a_long_video_ends_with_the_sound_and_resumes(client, server, saved):
    run = client.run(avatar_long(PROMPT, "talk", segments=1))
    assert len(saved(run)[0]) == 17
    first = server.base / "output" / "talk" / "segment-001" / "frames.mkv"
    before = first.stat().st_mtime_ns
    run = client.run(avatar_long(PROMPT, "talk"))
    frames, seconds = saved(run)
    assert len(frames) == math.ceil(SECONDS * FPS) and seconds == pytest.approx(len(frames) / FPS, abs=0.05)
    assert first.stat().st_mtime_ns == before
    words = [text for name, text in run.texts if name == "long"]
    assert words[-1].startswith("3 segments, 1 already there, 16 steps of "), words


def test_an_interrupt_keeps_the_finished_segments(client, server, saved):
    def stop(run: Run) -> None:
        if (server.base / "output" / "cut" / "segment-001").exists():
            client.interrupt(run.prompt_id)

    run = client.run(avatar_long(PROMPT, "cut", mode="base", steps=40), on_progress=stop)
    assert run.status == "interrupted" and run.end["node_id"] == "long"
    assert not (server.base / "output" / "cut" / "segment-003").exists()
    run = client.run(avatar_long(PROMPT, "cut", mode="base", steps=40))
    assert len(saved(run)[0]) == math.ceil(SECONDS * FPS)
    words = [text for name, text in run.texts if name == "long"]
    assert " already there, " in words[-1], words


def test_steps_that_the_model_does_not_have_are_one_sentence(client):
    prompt = avatar(PROMPT)
    prompt["sampler"]["inputs"]["steps"] = 16
    run = client.run(prompt)
    assert run.status == "error" and run.end["node_id"] == "sampler"
    assert "the distilled schedule of LongCat-Video-Avatar 1.5 has exactly 8 steps" in run.end["exception_message"]


def test_the_server_says_which_avatar_a_file_holds(client):
    for name, version in ((AVATAR, "1.5"), (FILES["model"], ""), ("none.safetensors", ""), (f"../input/{FACE}", "")):
        assert json.loads(client.get("/longcat/model", name=name)) == {"avatar": version}


def opened(page, model: str, **sampler) -> None:
    """A loader and a sampler behind a LoRA's place, as the page opens a prompt."""
    given = {"steps": 50, "guidance": 4.0, "mode": "base", "model": ["fast", 0], **sampler}
    prompt = {
        "1": node("LongCatModelLoader", model_name=model, weight_dtype="default"),
        "fast": node("LongCatStepCache", model=["1", 0], threshold=0.1),
        "2": node("LongCatSampler", **given),
    }
    page.tab.evaluate("async text => { await window.app.loadApiJson(JSON.parse(text), 'x') }", json.dumps(prompt))
    page.settle(1500)


def change(page, kind: str, name: str, value: str) -> dict:
    """Choose a value of a node's widget; what the sampler has then."""
    change = TYPE.replace(
        "const [node] = window.app.graph.nodes", "const node = window.app.graph.nodes.find(n => n.type === kind)"
    )
    page.tab.evaluate(change.replace("([name, value])", "([kind, name, value])"), [kind, name, value])
    page.settle(800)
    return page.tab.evaluate(VALUES)


def test_the_steps_of_a_mode_follow_the_model(page):
    opened(page, FILES["model"])
    assert change(page, "LongCatSampler", "mode", "distilled")["steps"] == 16
    assert change(page, "LongCatModelLoader", "model_name", AVATAR)["steps"] == 8
    assert change(page, "LongCatSampler", "mode", "base")["steps"] == 50
    assert change(page, "LongCatSampler", "mode", "distilled")["steps"] == 8
    assert change(page, "LongCatModelLoader", "model_name", FILES["model"])["steps"] == 16


def test_an_opened_workflow_keeps_its_steps(page):
    opened(page, AVATAR, steps=16, mode="distilled", guidance=1.0)
    assert page.tab.evaluate(VALUES)["steps"] == 16
    assert change(page, "LongCatSampler", "mode", "base")["steps"] == 16
    assert change(page, "LongCatSampler", "mode", "distilled")["steps"] == 8
