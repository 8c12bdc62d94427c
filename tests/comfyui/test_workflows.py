"""The workflow files: in step with the nodes, and in ComfyUI's page."""

from __future__ import annotations

import json
from urllib.parse import unquote

import pytest
from PIL import Image

from .browser import find_chromium, open_page
from .build_workflows import WORKFLOWS, graphs
from .server import PACK_NAME

FILES = sorted(WORKFLOWS.glob("*.json"))
OUT_OF_THE_BOX = [file for file in FILES if "nano" in file.stem or "optimizations" in file.stem]
PAGE_ONLY = {"MarkdownNote"}
# What the page adds to a widget's values beside the schema's own.
CONTROLS = {"fixed", "increment", "decrement", "randomize"}


@pytest.fixture(scope="module")
def page(server):
    try:
        find_chromium()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    with open_page(server.url) as page:
        yield page


def test_every_task_has_a_workflow_and_a_square_picture():
    assert {file.stem for file in FILES} == {graph.name for graph in graphs()}
    assert len(OUT_OF_THE_BOX) == 2
    for file in FILES:
        with Image.open(file.with_suffix(".jpg")) as picture:
            assert picture.format == "JPEG" and picture.width == picture.height >= 256


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_nodes_and_widgets_are_those_of_the_server(file, client):
    known = client.get_json("/object_info")
    (graph,) = (graph for graph in graphs() if graph.name == file.stem)
    told = {i + 1: spec["widgets"] for i, spec in enumerate(graph.nodes)}
    for node in json.loads(file.read_text(encoding="utf-8"))["nodes"]:
        if node["type"] in PAGE_ONLY:
            continue
        info = known[node["type"]]
        if not node["type"].startswith("LongCat"):
            continue
        inputs = {name: spec for group in info["input"].values() for name, spec in group.items()}
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
            elif name not in ("model_name", "text_encoder_name"):
                assert value in (kind if isinstance(kind, list) else options["options"]), name


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_dropped_file_becomes_the_graph(file, page, client, artefacts):
    page.errors.clear()  # at its start the page of ComfyUI 0.8 asks for things on the network
    page.drop(file)
    wanted = json.loads(file.read_text(encoding="utf-8"))
    assert sorted(node["type"] for node in page.nodes()) == sorted(node["type"] for node in wanted["nodes"])
    known = client.get_json("/object_info").keys() | PAGE_ONLY
    assert {node["type"] for node in page.nodes()} <= known
    assert len(page.graph()["links"]) == len(wanted["links"])
    assert page.tab.get_by_text("missing node", exact=False).count() == 0
    assert not page.errors
    page.screenshot(artefacts / f"{file.stem}.png")


@pytest.mark.parametrize("file", OUT_OF_THE_BOX, ids=lambda file: file.stem)
def test_run_makes_the_video_and_shows_it(file, page, client, watch, artefacts):
    page.drop(file)
    assert page.run() == "execution_success"
    (saver,) = (node["id"] for node in page.nodes() if node["type"] == "SaveVideo")
    outputs = json.loads(page.tab.evaluate("() => JSON.stringify(window.app.nodeOutputs)"))
    (shown,) = outputs[str(saver)]["images"]
    frames, _ = watch(client.video(shown), shown["filename"])
    assert frames.shape[0] == 33 and frames.std() > 10
    page.tab.wait_for_function("() => [...document.querySelectorAll('video')].some(v => v.videoWidth > 0)")
    page.screenshot(artefacts / f"{file.stem}, run.png")


def test_template_browser_lists_the_workflows_with_their_pictures(page, artefacts):
    served = {}
    page.tab.on("response", lambda answer: served.update({unquote(answer.url).rsplit("/", 1)[-1]: answer.status}))
    page.command("Comfy.BrowseTemplates")
    dialog = page.tab.locator("[role=dialog]")
    dialog.get_by_text(PACK_NAME, exact=False).first.click()
    page.settle()
    page.screenshot(artefacts / "templates.png")
    # The page shows pictures under names of its own, so their number tells that they were drawn.
    widths = dialog.locator("img").evaluate_all("images => images.map(image => image.naturalWidth)")
    assert sum(width == 512 for width in widths) == len(FILES)
    for file in FILES:
        assert served.get(f"{file.stem}.jpg") == 200, served
        assert dialog.get_by_text(file.stem, exact=True).count(), file.stem
    page.tab.keyboard.press("Escape")
