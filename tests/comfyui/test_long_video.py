"""The long nodes on a real server and in the page: video, cache, takes, and refusals in our own words."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from . import prompts
from .browser import open_page
from .client import Refused
from .prompts import node

PROMPT = "a red circle moves right on a blue background"


def video_of(prompt: dict) -> dict:
    """The prompt with the long video saved from its output video."""
    prompt["save"]["inputs"]["video"] = ["long", 2]
    prompt.pop("video", None)
    return prompt


def refined(prompt: dict, folder: str, **settings) -> dict:
    """The prompt with its long video refined, which is saved by node "refined"."""
    inputs = {"model": ["model", 0], "clip": ["text", 0], "vae": ["vae", 0], "video": ["long", 2], "prompt": ""}
    inputs |= {"seed": 1, "steps": 12, "double_rate": True, "resolution": "custom", "width": 96, "height": 64}
    inputs |= {"piece": 9, "overlap": 5, "folder": folder, **settings}
    save = {"filename_prefix": "video/refined", "format": "mp4", "codec": "h264"}
    return prompt | {
        "refine": node("LongCatRefineLongVideo", **inputs),
        "refined": node("SaveVideo", video=["refine", 2], **save),
    }


def test_a_long_video_is_saved_and_refined_as_video(client, server, watch):
    prompt = refined(video_of(prompts.long_video(f"{PROMPT}\n{PROMPT}", "video/long", steps=2)), "video/refined")
    run = client.run(prompt)
    assert run.status == "success", run.end
    frames, fps = watch(client.video(*run.files("save")), "long.mp4")
    assert frames.shape == (13, 64, 96, 3) and fps == 15
    frames, fps = watch(client.video(*run.files("refined")), "refined.mp4")
    assert frames.shape == (26, 64, 96, 3) and fps == 30
    # As prompts of earlier versions connect it: the same frames as IMAGE are found in the same take.
    prompt["refine"]["inputs"] |= {"video": ["long", 0], "fps": 15.0}
    run = client.run(prompt)
    assert run.status == "success" and "long" not in run.executed, run.end
    assert not list((server.base / "output" / "video" / "refined").glob("take-*"))


def test_images_that_are_connected_later_hold_the_video(client, server, watch):
    """ComfyUI has the node's outputs in its cache by then and does not run it again."""
    prompt = video_of(prompts.long_video(PROMPT, "later/%date:yyyy-MM-dd%", steps=2))
    assert client.run(prompt).status == "success"
    assert list((server.base / "output" / "later").glob("20??-??-??/segment-001/frames.mkv"))
    images = node("SaveAnimatedWEBP", images=["long", 0], filename_prefix="later", fps=15.0, lossless=True, quality=80,
                  method="fastest")  # fmt: skip
    run = client.run(prompt | {"images": images})
    assert run.status == "success" and "long" not in run.executed, run.end
    frames, _ = watch(client.video(*run.files("images")), "later.webp")
    assert len(frames) == 9 and np.ptp(frames) > 50


def test_files_that_were_deleted_are_made_again(client, server):
    prompt = video_of(prompts.long_video(PROMPT, "deleted", steps=2))
    assert client.run(prompt).status == "success"
    assert "long" not in client.run(prompt).executed
    shutil.rmtree(server.base / "output" / "deleted")
    run = client.run(prompt)
    assert run.status == "success" and "long" in run.executed
    assert (server.base / "output" / "deleted" / "segment-001" / "frames.mkv").is_file()
    assert "long" not in client.run(prompt).executed


def test_another_prompt_destroys_nothing(client, server):
    folder = server.base / "output" / "takes"
    prompt = video_of(prompts.long_video(PROMPT, "takes", steps=2))
    client.run(prompt)
    before = (folder / "segment-001" / "frames.mkv").read_bytes()
    client.run(video_of(prompts.long_video("a green square moves up", "takes", steps=2)))
    assert (folder / "segment-001" / "frames.mkv").read_bytes() == before
    assert (folder / "take-002" / "segment-001" / "frames.mkv").is_file()
    client.run(
        video_of(prompts.long_video(PROMPT, "takes", steps=2)) | {"more": node("PreviewAny", source=["long", 1])}
    )
    assert sorted(path.name for path in folder.glob("take-*")) == ["take-002"]


@pytest.mark.skipif(os.name != "posix", reason="a link to another disk")
def test_a_link_in_the_output_folder_is_followed(client, server, tmp_path):
    (server.base / "output" / "disk").symlink_to(tmp_path, target_is_directory=True)
    assert client.run(video_of(prompts.long_video(PROMPT, "disk/mine", steps=2))).status == "success"
    assert (tmp_path / "mine" / "segment-001" / "frames.mkv").is_file()


def sentences(answer: dict) -> dict[str, list[str]]:
    """What the server says of each node."""
    return {name: [error["details"] for error in found["errors"]] for name, found in answer["node_errors"].items()}


def test_a_folder_of_the_second_stage_is_refused_before_the_first_one_runs(client, server):
    (server.base / "output" / "a-file").touch()
    prompt = refined(video_of(prompts.long_video(PROMPT, "first", steps=2)), "a-file")
    # Otherwise the long video alone would still be made.
    prompt.pop("save")
    with pytest.raises(Refused) as refused:
        client.submit(prompt)
    said = sentences(refused.value.answer)
    assert list(said) == ["refine"] and len(said["refine"]) == 1
    assert "a-file is not a folder; name a folder" in said["refine"][0]
    assert not (server.base / "output" / "first").exists()


def test_the_page_shows_our_sentence(server, artifacts, chromium):
    """Of what is known when Run is pressed, and of what a node finds out when it runs."""
    known = video_of(prompts.long_video(PROMPT, "toast", steps=60, mode="distilled"))
    later = video_of(prompts.long_video(PROMPT, "toast", steps=2, begin_with=["image", 0]))
    later["image"] = node("EmptyImage", width=96, height=64, batch_size=3, color=0)
    with open_page(server.url) as page:
        for name, prompt, said in (
            ("refused", known, "60 steps are out of range; the distilled schedule takes 1 to 50"),
            ("failed", later, "begin_with lasts 0.20 s at 15 fps, and 5 frames to continue from last"),
        ):
            page.tab.evaluate("async s => { await window.app.loadApiJson(JSON.parse(s), 'toast') }", json.dumps(prompt))
            page.settle()
            page.tab.locator("[data-testid=queue-button]").first.click()
            page.tab.get_by_text(said).first.wait_for()
            page.screenshot(Path(artifacts) / f"{name}.png")
