"""The workflow files: in step with the nodes, and in ComfyUI's page."""

from __future__ import annotations

import json
import math
from urllib.parse import unquote

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from longcat_core.files.media import write_video
from longcat_core.files.safetensors_io import read_header
from longcat_core.generate.paths import NANO_MODEL
from longcat_core.nano.scorer import analyze
from longcat_core.nano.world import Actor, Scene, render_clip
from workflows.build import NOTE, WORKFLOWS, graphs
from workflows.nano import NANO
from workflows.weights import ALL, DISTILL, DMD, REFINEMENT

from ..support.talking import AVATAR, EAR, SECONDS, SPEECH, TINY_LORA
from .browser import OVERHANG
from .prompts import FPS
from .server import PACK, PACK_NAME

FILES = sorted(WORKFLOWS.glob("*.json"))
OUT_OF_THE_BOX = [file for file in FILES if " nano " in file.stem]
FOR_REAL_WEIGHTS = [file for file in FILES if file not in OUT_OF_THE_BOX]
# Templates of an earlier version of the pack, as people have saved them.
SAVED_BEFORE = sorted((PACK / "tests" / "data" / "workflows").glob("*.json"))
PAGE_ONLY = {"MarkdownNote"}
# What makes a workflow of the real weights run on the embedded model: files and sizes, nothing of its wiring.
LENGTH = 17
SIZE = {"width": 96, "height": 64, "length": LENGTH}
SMALL = {
    "LongCatModelLoader": {"model_name": NANO["model"]},
    "LongCatTextEncoderLoader": {"text_encoder_name": NANO["text"]},
    "VAELoader": {"vae_name": NANO["vae"]},
    "LongCatEmptyLatent": SIZE,
    "LongCatImageToVideo": {"resolution": "custom", **SIZE},
    "LongCatVideoContinuation": {"resolution": "custom", **SIZE},
    "LongCatSampler": {"steps": 2},
    "LongCatLongVideo": {**SIZE, "overlap": 5, "steps": 2, "mode": "base"},
    "LongCatRefine": {"resolution": "custom", "width": 96, "height": 64},
    "LongCatRefineLongVideo": {
        "resolution": "custom",
        "width": 96,
        "height": 64,
        "steps": 2,
        "piece": LENGTH,
        "overlap": 5,
    },
    "LoadImage": {"image": "first.png"},
    "LoadVideo": {"file": "clip.mp4"},
    "LongCatAudioEncoderLoader": {"audio_encoder_name": EAR},
    "LongCatEncodeAudio": {"length": LENGTH, "overlap": 5},
    "LongCatAvatar": {"resolution": "custom", **SIZE, "overlap": 5},
    "LongCatAvatarLongVideo": {"resolution": "custom", **SIZE, "overlap": 5},
    "LoadAudio": {"audio": SPEECH},
}
# What that is for an avatar, whose distilled schedule has its own number of steps.
SMALL_AVATAR = SMALL | {"LongCatModelLoader": {"model_name": AVATAR}, "LongCatSampler": {}}
# Frames and frame rate of what a workflow saves, where they are not those of one clip.
MADE = {
    "LongCat nano 4 - long video": (73, 15),
    "LongCat nano 5 - interactive video": (89, 15),
    "LongCat nano 6 - refine": (66, 30),
    "LongCat nano 7 - long video, refined": (58, 30),
    "LongCat nano 10 - avatar from text": (33, 25),
    "LongCat nano 11 - avatar from an image": (33, 25),
    "LongCat nano 12 - avatar, two people": (73, 25),
    "LongCat nano 13 - avatar, long video": (73, 25),
    "LongCat nano - refine": (34, 30),
    "LongCat nano - interactive video": (89, 15),
    "LongCat real 5 - long video 480p": (3 * LENGTH - 10, 15),
    "LongCat real 6 - interactive video 480p": (4 * LENGTH - 15, 15),
    "LongCat real 7 - refine to 720p": (2 * LENGTH, 30),
    "LongCat real 8 - long video, refined to 720p": (2 * (3 * LENGTH - 10), 30),
    "LongCat real 11 - avatar from text": (LENGTH, 25),
    "LongCat real 12 - avatar from an image": (LENGTH, 25),
    "LongCat real 13 - avatar, two people": (math.ceil(25 * SECONDS), 25),
    "LongCat real 14 - avatar, long video": (math.ceil(25 * SECONDS), 25),
}
# What the page lists as missing, with a button for the download of each.
MISSING_MODELS = """() => {
  const page = document.querySelector('#vue-app').__vue_app__.config.globalProperties;
  return page.$pinia.state.value.missingModel.missingModelCandidates.map(
    ({name, url, directory}) => ({name, url, directory}));
}"""
MODES_OF_REPORTS = """() => window.app.graph.nodes.filter(node => node.type === 'PreviewAny')
  .map(node => node.widgets.find(widget => widget.name === 'preview_mode').value)"""
# What the page adds to a widget's values beside the schema's own.
CONTROLS = {"fixed", "increment", "decrement", "randomize"}


def test_every_graph_has_a_workflow():
    assert {file.stem for file in FILES} == {graph.name for graph in graphs()}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_nodes_and_widgets_are_those_of_the_server(file, client):
    known = client.get_json("/object_info")
    (graph,) = (graph for graph in graphs() if graph.name == file.stem)
    order = [NOTE, *(key for column in graph.columns for key in (*column.top, *column.bottom))]
    told = {i + 1: graph.nodes[key].widgets for i, key in enumerate(order) if key in graph.nodes}
    for node in json.loads(file.read_text(encoding="utf-8"))["nodes"]:
        if node["type"] in PAGE_ONLY:
            continue
        info = known[node["type"]]
        if not node["type"].startswith("LongCat"):
            continue
        shown = {kind: group for kind, group in info["input"].items() if kind != "hidden"}
        inputs = {name: spec for group in shown.values() for name, spec in group.items()}
        assert {slot["name"] for slot in node["inputs"]} == inputs.keys(), node["type"]
        widgets = [
            (name, spec)
            for name, spec in inputs.items()
            if isinstance(spec[0], list) or spec[0] in ("INT", "FLOAT", "BOOLEAN", "COMBO", "STRING")
        ]
        values = [value for value in node["widgets_values"] if value not in CONTROLS]
        assert len(values) == len(widgets), node["type"]
        for (name, (kind, options, *_)), value in zip(widgets, values, strict=True):
            wanted = told[int(node["id"])].get(name, options.get("default"))
            assert wanted is None or value == wanted, f"{node['type']}.{name}"
            if kind in ("INT", "FLOAT"):
                assert options["min"] <= value <= options["max"], name
            elif kind == "BOOLEAN":
                assert isinstance(value, bool), name
            elif kind == "STRING":
                assert isinstance(value, str), name
            elif name not in ("model_name", "text_encoder_name", "audio_encoder_name"):
                assert value in (kind if isinstance(kind, list) else options["options"]), name


def warnings_of_missing_nodes(page) -> int:
    return page.tab.get_by_text("missing node", exact=False).count()


def test_page_warns_of_a_node_that_is_missing(page, tmp_path):
    """The sign that the next test looks for does appear."""
    workflow = json.loads(FILES[0].read_text(encoding="utf-8"))
    workflow["id"] = "1d2b9f0e-0000-4000-8000-000000000000"
    workflow["nodes"][1]["type"] = "LongCatNodeThatIsNotThere"
    file = tmp_path / "unknown.json"
    file.write_text(json.dumps(workflow), encoding="utf-8")
    page.drop(file)
    assert warnings_of_missing_nodes(page)
    page.tab.keyboard.press("Escape")


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_dropped_file_becomes_the_graph(file, page, client, artifacts):
    page.errors.clear()  # at its start the page of ComfyUI 0.8 asks for things on the network
    page.drop(file)
    wanted = json.loads(file.read_text(encoding="utf-8"))
    assert sorted(node["type"] for node in page.nodes()) == sorted(node["type"] for node in wanted["nodes"])
    known = client.get_json("/object_info").keys() | PAGE_ONLY
    assert {node["type"] for node in page.nodes()} <= known
    assert len(page.graph()["links"]) == len(wanted["links"])
    assert warnings_of_missing_nodes(page) == 0
    assert not page.errors
    page.screenshot(artifacts / f"{file.stem}.png")
    (overhang,) = page.tab.evaluate(OVERHANG)
    assert overhang <= 1, "the note is cut off"


@pytest.mark.parametrize("file", [*OUT_OF_THE_BOX, *SAVED_BEFORE], ids=lambda file: file.stem)
def test_run_makes_the_video_and_shows_it(file, page, client, watch, artifacts):
    page.drop(file)
    assert page.run() == "execution_success"
    kinds = {node["type"]: node["id"] for node in page.nodes()}
    if "PreviewAny" in kinds:
        # Its switch is not saved with a workflow; web/js/reports.js sets it.
        assert page.tab.evaluate(MODES_OF_REPORTS) == [True] * [n["type"] for n in page.nodes()].count("PreviewAny")
    saver = kinds["SaveVideo" if "SaveVideo" in kinds else "LongCatBenchmark"]
    outputs = json.loads(page.tab.evaluate("() => JSON.stringify(window.app.nodeOutputs)"))
    (shown,) = outputs[str(saver)]["images"]
    if "SaveVideo" not in kinds:
        page.screenshot(artifacts / f"{file.stem}, run.png")
        return
    frames, fps = watch(client.video(shown), shown["filename"])
    assert (len(frames), fps) == MADE.get(file.stem, (33, FPS)) and frames.std() > 10
    if "interactive" in file.stem:
        motions = [analyze(frames[start : start + 33], 1).actors[0].motion for start in (0, 28, 56)]
        assert motions == ["right", "up", "left"]
    page.tab.wait_for_function("() => [...document.querySelectorAll('video')].some(v => v.videoWidth > 0)")
    page.screenshot(artifacts / f"{file.stem}, run.png")


def test_page_offers_the_downloads_that_are_missing(page):
    """Every file of a template of the real weights, by name, folder and address, until it is there."""
    (file,) = (file for file in FOR_REAL_WEIGHTS if "16 steps" in file.stem)
    page.drop(file)
    wanted = [weight.model for weight in ALL if f'"{weight.name}"' in json.dumps(file_values(file))]
    assert len(wanted) == 4
    missing = page.tab.evaluate(MISSING_MODELS)
    assert sorted(missing, key=lambda model: model["name"]) == sorted(wanted, key=lambda model: model["name"])


def file_values(file) -> list:
    return [node.get("widgets_values") for node in json.loads(file.read_text(encoding="utf-8"))["nodes"]]


@pytest.fixture(scope="module")
def given(server) -> np.ndarray:
    """A clip of the embedded model's world; what the workflows load is laid into the server's folders."""
    clip = render_clip(Scene("gray", (Actor("circle", "red", "right"),)), frames=LENGTH, height=64, width=96, seed=1)
    write_video(server.base / "input" / SMALL["LoadVideo"]["file"], clip, FPS)
    Image.fromarray(clip[0]).save(server.base / "input" / SMALL["LoadImage"]["image"])
    _, (rows, columns) = read_header(NANO_MODEL)["blocks.0.attn.proj.weight"]
    layer = "lora___lorahyphen___blocks___lorahyphen___0___lorahyphen___attn___lorahyphen___proj"
    lora = {
        f"{layer}.lora_down.weight": torch.full((2, columns), 1e-3),
        f"{layer}.lora_up.weight": torch.full((rows, 2), 1e-3),
        f"{layer}.alpha_scale": torch.tensor(1.0),
    }
    loras = server.base / "models" / "loras"
    loras.mkdir(exist_ok=True)
    for weight in (DISTILL, REFINEMENT):
        save_file(lora, loras / weight.name)
    save_file(TINY_LORA, loras / DMD.name)
    return clip


@pytest.mark.parametrize("file", FOR_REAL_WEIGHTS, ids=lambda file: file.stem)
def test_workflow_of_the_real_weights_runs_on_small_ones(file, page, client, watch, given, talking):
    page.drop(file)
    prompt = page.prompt()
    small = SMALL_AVATAR if "avatar" in file.stem else SMALL
    for node in prompt.values():
        node["inputs"].update(small.get(node["class_type"], {}))
    run = client.run(prompt)
    assert run.status == "success", run.end
    (saver,) = (key for key, node in prompt.items() if node["class_type"] == "SaveVideo")
    (saved,) = run.files(saver)
    frames, fps = watch(client.video(saved), saved["filename"])
    assert frames.shape[1:] == (64, 96, 3) and (len(frames), fps) == MADE.get(file.stem, (LENGTH, FPS))
    kinds = {node["class_type"] for node in prompt.values()}
    if kinds & {"LongCatImageToVideo", "LongCatVideoContinuation"}:
        # The last 13 frames of the clip, or the image, stand first.
        first = given[LENGTH - 13] if "LongCatVideoContinuation" in kinds else given[0]
        assert np.abs(frames[0].astype(float) - first).mean() < 12


def test_template_browser_lists_the_workflows_with_their_pictures(page, artifacts):
    served = {}
    page.tab.on("response", lambda answer: served.update({unquote(answer.url).rsplit("/", 1)[-1]: answer.status}))
    page.command("Comfy.BrowseTemplates")
    dialog = page.tab.locator("[role=dialog]")
    dialog.get_by_text(PACK_NAME, exact=False).first.click()
    page.settle()
    page.screenshot(artifacts / "templates.png")
    # Cards are there only near what is in sight, and name their pictures again each time; what they show tells.
    sources = """images => images.filter(image => image.naturalWidth == 512).map(image => {
        const canvas = document.createElement("canvas");
        [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
        canvas.getContext("2d").drawImage(image, 0, 0);
        return canvas.toDataURL();
    })"""
    drawn, titles = set(), set()
    for _ in range(len(FILES)):
        drawn |= set(dialog.locator("img").evaluate_all(sources))
        titles |= {file.stem for file in FILES if dialog.get_by_text(file.stem, exact=True).count()}
        dialog.locator("img").last.hover()
        page.tab.mouse.wheel(0, 300)
        page.settle(300)
    assert titles == {file.stem for file in FILES}
    assert len(drawn) == len(FILES)
    assert not [file.stem for file in FILES if served.get(f"{file.stem}.jpg") != 200], served
    page.tab.keyboard.press("Escape")
