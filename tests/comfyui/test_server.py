"""The pack in the real ComfyUI program: prompts by HTTP, events by websocket, restarts, what an import leaves."""

from __future__ import annotations

import json
import re
from io import BytesIO

import numpy as np
import pytest
import websocket
from PIL import Image

from longcat_core.nano.scorer import score
from longcat_core.nano.world import Actor, Scene, caption

from .client import Client, Refused, Run
from .prompts import FPS, long_video, node, text_to_video
from .server import PACK_NAME, Server

NODES = {
    "LongCatModelLoader",
    "LongCatTextEncoderLoader",
    "LongCatOptimizations",
    "LongCatSampler",
    "LongCatScheduler",
    "LongCatGuider",
    "LongCatImageToVideo",
    "LongCatVideoContinuation",
    "LongCatRefine",
    "LongCatLongVideo",
    "LongCatRefineLongVideo",
    "LongCatBlockSparseAttention",
    "LongCatSparseAttention",
    "LongCatMultiGPU",
    "LongCatMultiGPUTest",
    "LongCatStepCache",
    "LongCatBenchmark",
    "LongCatFidelity",
    "LongCatCalibrate",
    "LongCatEmptyLatent",
    "LongCatSampleClip",
    "LongCatSampleSpeech",
    "LongCatVAEDecode",
    "LongCatAudioEncoderLoader",
    "LongCatEncodeAudio",
    "LongCatAvatar",
    "LongCatAvatarBoxes",
    "LongCatAvatarLongVideo",
}
# Packages that the headless core or faster kernels use and that ComfyUI does not bring.
OPTIONAL = ("diffusers", "ftfy", "flash_attn", "flash_attn_interface", "sageattention", "xformers")
RED_CIRCLE = Scene("blue", (Actor("circle", "red", "right"),))


def longcat_nodes(client: Client) -> dict:
    known = client.get_json("/object_info").items()
    return {name: info for name, info in known if info["category"].split("/")[0] == "LongCat"}


def test_prompt_gives_the_video_that_it_describes(client, watch, artifacts):
    run = client.run(text_to_video(caption(RED_CIRCLE), seed=1))
    assert run.status == "success" and run.ends == ["execution_success"]
    (file,) = run.files("save")
    content = client.video(file)
    (artifacts / "text_to_video.mp4").write_bytes(content)
    frames, fps = watch(content, file["filename"])
    assert frames.shape == (33, 64, 96, 3) and fps == FPS
    right = score(frames, RED_CIRCLE)
    # The shape is left out: nano rounds corners (docs/nano.md).
    assert right["background"] and right["0.color"] and right["0.motion"], right


def bar(run: Run, node: str) -> list[tuple[float, float]]:
    """The values and maxima of a node's bar that a page draws while the node runs; checks that it only grows, to its
    end."""
    seen = [(value, of) for state, value, of in run.states[node] if state == "running"]
    # ComfyUI itself begins with 0 of 1.
    assert seen[0] == (0, 1)
    values = [value for value, _ in seen[1:]]
    assert values == sorted(values) and len({of for _, of in seen[1:]}) == 1 and seen[-1][0] == seen[-1][1]
    assert run.states[node][-1][0] == "finished"
    return seen[1:]


def test_a_run_has_one_bar_words_and_a_preview_at_each_step(client):
    run = client.run(text_to_video(caption(RED_CIRCLE), seed=2, steps=6))
    assert [(step, total) for node, step, total in run.progress if node == "sampler"] == [(i, 6) for i in range(1, 7)]
    assert {of for _, of in bar(run, "sampler")} == {6}
    assert len(set(run.previews)) >= 6, "every preview is another picture"
    assert all(preview[:2] == b"\xff\xd8" for preview in run.previews), "JPEG"
    words = [text for node, text in run.texts if node == "sampler"]
    assert words[:2] == ["loading the model", "step 1 of 6"]
    assert re.fullmatch(r"6 steps of [\d.]+ s, [\d.]+ s in all", words[-1])


def test_previews_have_the_colors_of_the_video(client, watch):
    run = client.run(text_to_video(caption(RED_CIRCLE), seed=1, steps=10))
    (file,) = run.files("save")
    frames, _ = watch(client.video(file), file["filename"])
    shown = np.asarray(Image.open(BytesIO(run.previews[-1])).convert("RGB")).astype(float)
    # The ground is blue and most of the picture; somewhere is something red.
    ground = np.median(shown.reshape(-1, 3), axis=0)
    assert np.abs(ground - np.median(frames[-1].reshape(-1, 3), axis=0)).max() < 30, ground
    assert shown[..., 0].max() > 150 and (frames[-1][..., 0] > 150).any()


def test_previews_play_between_two_steps_and_end_with_the_node(client):
    run = client.run(text_to_video(caption(RED_CIRCLE), seed=2, steps=3, frames=97))
    assert len(run.previews) > 3 and len(set(run.previews)) > 3
    assert bar(run, "sampler")[-1] == (3, 3)


def test_a_long_video_has_one_bar_for_all_segments_and_says_where_it_is(client):
    prompt = long_video("a red circle moves right on a blue background", "one bar", steps=4, segments=3)
    run = client.run(prompt)
    seen = bar(run, "long")
    assert seen[-1] == (15, 15) and {of for _, of in seen} == {15}, "4 steps and what ends a segment, three times"
    words = [text for node, text in run.texts if node == "long"]
    kinds = ("encoding", "loading the model", "step 1 of 4", "decoding")
    assert all(any(text.startswith(f"segment 1 of 3, {kind}") for text in words) for kind in kinds), words
    assert any(re.fullmatch(r"segment 3 of 3, step \d of 4, [\d.]+ s each(, about .* left)?", text) for text in words)
    assert re.fullmatch(r"3 segments, 12 steps of [\d.]+ s, .* in all", words[-1])
    prompt["long"]["inputs"]["segments"] = 4
    more = client.run(prompt)
    assert bar(more, "long")[0] == (5, 20), "segments that are there already count as done"
    words = [text for node, text in more.texts if node == "long"]
    assert "segment 4 of 4, encoding" in words and words[-1].startswith("4 segments, 3 already there, 4 steps of ")


def test_a_calibration_says_how_far_it_is_and_lies_in_the_output_folder(client, server):
    prompt = text_to_video(caption(RED_CIRCLE))
    kept = {name: prompt[name] for name in ("model", "text", "positive", "negative", "latent")}
    kept["latent"]["inputs"] |= {"width": 128, "height": 128, "length": 65}
    sampled = {name: value for name, value in prompt["sampler"]["inputs"].items() if name != "seed"}
    settings = {"seed": 1, "steps": 3, "budget": 0.1, "dense_steps": 0.2, "file": "found/nano.json"}
    run = client.run(kept | {"calibrate": node("LongCatCalibrate", **sampled | settings)})
    assert run.status == "success" and bar(run, "calibrate")[-1] == (3, 3)
    words = [text for name, text in run.texts if name == "calibrate"]
    assert words[0] == "loading the model" or words[0].startswith("measuring"), words
    # Words of steps are sent twice a second at most, so a quick first step is followed by the words of the third.
    assert "measuring, step 1 of 3" in words and any(re.match(r"measuring, step [23] of 3", text) for text in words), (
        words
    )
    (shown,) = run.outputs["calibrate"]["text"]
    assert shown.startswith("mean density 0.") and shown.endswith("nano.json")
    found = json.loads((server.base / "output" / "found" / "nano.json").read_text(encoding="utf-8"))
    assert found["format"] == "longcat calibration" and len(found["densities"]) == 2


def test_words_say_where_an_interrupt_came(client):
    def stop(run: Run) -> None:
        if len(run.progress) == 2:
            client.interrupt(run.prompt_id)

    run = client.run(text_to_video(caption(RED_CIRCLE), seed=3, steps=400), on_progress=stop)
    assert run.status == "interrupted"
    assert re.fullmatch(r"interrupted at step \d+ of 400", run.texts[-1][1])
    assert client.run(text_to_video(caption(RED_CIRCLE), seed=3, steps=2, frames=5)).status == "success"


def test_without_previews_none_are_sent(another_server):
    server = another_server(flags=("--preview-method", "none")).start()
    with Client(server.url) as client:
        run = client.run(text_to_video(caption(RED_CIRCLE), seed=2, steps=2, frames=9))
    assert run.status == "success" and not run.previews and bar(run, "sampler")[-1] == (2, 2)


def test_comfyui_may_lie_in_a_folder_of_any_name(installation, tmp_path):
    """ComfyUI loads a pack under the name of its path."""
    with Server(installation, tmp_path / "Jürgen 长猫") as server, Client(server.url) as client:
        assert longcat_nodes(client).keys() == NODES
        assert client.run(text_to_video(caption(RED_CIRCLE), steps=2, frames=5)).status == "success"


def test_interrupt_ends_the_prompt_and_the_next_one_works(client):
    def stop(run) -> None:
        if len(run.progress) == 2:
            client.interrupt(run.prompt_id)

    run = client.run(text_to_video(caption(RED_CIRCLE), seed=3, steps=400), on_progress=stop)
    assert run.status == "interrupted" and run.ends == ["execution_interrupted"]
    assert run.end["node_id"] == "sampler"
    assert len(run.progress) < 100
    assert not run.outputs
    assert client.run(text_to_video(caption(RED_CIRCLE), seed=3, steps=2, frames=5)).status == "success"


def test_a_decoded_file_that_was_deleted_is_made_again(client, server):
    """A cleaned temporary folder, while ComfyUI has the node's outputs in its cache."""
    prompt = text_to_video(caption(RED_CIRCLE), steps=2, frames=5)
    prompt["decode"] = node("LongCatVAEDecode", samples=["sampler", 0], vae=["vae", 0], fps=15.0)
    prompt["save"]["inputs"]["video"] = ["decode", 1]
    prompt.pop("video")
    assert client.run(prompt).status == "success"
    for file in (server.base / "temp").glob("longcat-*.mp4"):
        file.unlink()
    prompt["save"]["inputs"]["filename_prefix"] = "video/again"
    run = client.run(prompt)
    assert run.status == "success" and "decode" in run.executed and "sampler" not in run.executed, run.end
    assert "decode" not in client.run(prompt).executed


def test_prompts_in_a_row_do_not_grow_memory(client, server):
    def least(seeds: range) -> int:
        sizes = []
        for seed in seeds:
            assert client.run(text_to_video(caption(RED_CIRCLE), seed=seed, steps=2)).status == "success"
            sizes.append(server.resident_bytes)
        return min(sizes)

    before, _, after = least(range(4)), least(range(4, 12)), least(range(12, 16))
    # It wavers by 4 MB. Over the 9 to 15 prompts between, kept clips (33 frames in fp32: 2.4 MB) add 21 MB or more.
    assert after - before < 12 * 2**20


def test_bad_input_is_reported_at_the_node_and_the_next_prompt_works(client):
    prompt = text_to_video(caption(RED_CIRCLE), steps=2, frames=5)
    prompt["i2v"] = {
        "class_type": "LongCatVideoContinuation",
        "inputs": {
            "vae": ["vae", 0],
            "video": ["decode", 0],
            "cond_frames": 5,
            "resolution": "custom",
            "width": 96,
            "height": 64,
            "length": 5,
        },
    }
    prompt["sampler2"] = {**prompt["sampler"], "inputs": {**prompt["sampler"]["inputs"], "latent_image": ["i2v", 0]}}
    prompt["decode2"] = {"class_type": "VAEDecode", "inputs": {"samples": ["sampler2", 0], "vae": ["vae", 0]}}
    prompt["save"]["inputs"]["video"] = ["video2", 0]
    prompt["video2"] = {"class_type": "CreateVideo", "inputs": {"images": ["decode2", 0], "fps": FPS}}
    with pytest.raises(Refused) as refused:
        client.submit(prompt)
    (error,) = refused.value.answer["node_errors"]["i2v"]["errors"]
    assert "length 5 leaves nothing to generate" in error["details"]
    assert client.run(text_to_video(caption(RED_CIRCLE), steps=2, frames=5)).status == "success"


def test_values_beyond_a_limit_are_refused_before_anything_runs(client):
    with pytest.raises(Refused) as refused:
        client.submit(text_to_video(caption(RED_CIRCLE), steps=0))
    assert "sampler" in refused.value.answer["node_errors"]


def test_every_node_and_input_is_explained(client):
    nodes = longcat_nodes(client)
    assert nodes.keys() == NODES
    for name, info in nodes.items():
        assert info["category"].split("/")[0] == "LongCat" and info["description"], name
        shown = {kind: group for kind, group in info["input"].items() if kind != "hidden"}
        for group in shown.values():
            for key, spec in group.items():
                assert spec[1].get("tooltip"), f"{name}.{key} has no tooltip"
        page = client.get(f"/extensions/{PACK_NAME}/docs/{name}.md").decode()
        assert page.startswith("# "), name
        for key in (key for group in shown.values() for key in group):
            assert key in page, f"{name}'s help page does not mention {key}"


def test_embedded_model_is_in_the_lists_of_stock_nodes(client):
    for name, key, part in (
        ("UNETLoader", "unet_name", "longcat_nano"),
        ("VAELoader", "vae_name", "longcat_nano_vae"),
    ):
        options = client.get_json(f"/object_info/{name}")[name]["input"]["required"][key]
        options = options[0] if isinstance(options[0], list) else options[1]["options"]
        assert any(part in option for option in options), name


def test_nodes_stay_when_optional_packages_fail_and_after_a_restart(another_server):
    server = another_server(blocked=OPTIONAL)
    for _ in range(2):
        with server, Client(server.url) as client:
            assert longcat_nodes(client).keys() == NODES
            assert client.run(text_to_video(caption(RED_CIRCLE), steps=2, frames=5)).status == "success"
    assert "IMPORT FAILED" not in server.log


def test_a_killed_server_goes_on_with_the_same_prompt(another_server):
    """Killed in its second segment, as by the power; queued again, only what is missing is made, and is the same."""
    server = another_server()
    output = server.base / "output" / "longcat"
    prompts = "\n".join(f"a red circle moves {way} on a blue background" for way in ("right", "up", "left"))

    def kept(folder: str) -> dict[str, bytes]:
        """Latents and frames; records tell of the folder's settings, which are the same."""
        return {
            str(path.relative_to(output / folder)): path.read_bytes()
            for path in sorted((output / folder).rglob("*"))
            if path.suffix in (".safetensors", ".mkv", ".json")
        }

    def kill(run) -> None:
        # 40 steps and the decoding of the first segment, then some steps.
        if (output / "killed" / "segment-001").exists() and run.progress[-1][2] == 123 and run.progress[-1][1] > 44:
            server.process.kill()

    with server, Client(server.url) as client:
        assert client.run(long_video(prompts, "longcat/whole", steps=40)).status == "success"
        with pytest.raises((OSError, websocket.WebSocketException)):
            client.run(long_video(prompts, "longcat/killed", steps=40), on_progress=kill)
    assert {path.name for path in (output / "killed").glob("segment-*")} == {"segment-001"}
    before = (output / "killed" / "segment-001" / "frames.mkv").stat().st_mtime_ns
    with server, Client(server.url) as client:
        run = client.run(long_video(prompts, "longcat/killed", steps=40))
        assert run.status == "success" and len(run.files("long")) == 1
        done = {value for node, value, total in run.progress if node == "long" and total == 123}
        assert min(done) == 41 and len(done) == 1 + 82, "two segments of three"
    assert kept("killed") == kept("whole") and len(kept("whole")) == 10
    assert (output / "killed" / "segment-001" / "frames.mkv").stat().st_mtime_ns == before


def test_import_says_nothing(another_server):
    text = another_server().boot_only()
    about = [line for line in text.splitlines() if "longcat" in line.lower()]
    # ComfyUI's own list of import times names every pack.
    told = [line for line in about if not re.search(rf"seconds: .*{PACK_NAME}$", line.strip())]
    assert about and not [line for line in told if "--base-directory" not in line], told
