"""Finding and using nodes in ComfyUI's page: the search, what a mode sets and hides, and files of earlier versions."""

from __future__ import annotations

import json
import re
import urllib.error
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .browser import Page
from .client import Client
from .prompts import FILES, node, text_to_video
from .server import PACK, Server

# Node -> values of its widgets by position, as workflows have kept them since the first version; none is a default.
KEPT = {
    "LongCatSampler": [7, "fixed", 50, 3.5, "distilled", "official"],
    "LongCatScheduler": ["enhance_hf", 16],
    "LongCatGuider": [3.5, "off"],
    "LongCatImageToVideo": ["480p", 640, 320, 33, 2],
    "LongCatVideoContinuation": [5, "custom", 640, 320, 33, 2, 24],
    "LongCatRefine": [False, "twice the size", 320, 640, 24, 5],
    "LongCatLongVideo": ["a\nb", "blurred", 2, 320, 160, 33, 5, 9, 4, 2.5, "distilled", "latents", "old/place", "off",
                         24, 30],
    "LongCatRefineLongVideo": ["a", 9, 40, False, "custom", 640, 320, 33, 5, "old/place", 24],
    "LongCatBlockSparseAttention": [0.5, 0.25, "8x4x4"],
    "LongCatSparseAttention": [0.3, "old/place.json"],
    "LongCatMultiGPU": ["2"],
    "LongCatMultiGPUTest": ["2"],
    "LongCatStepCache": [0.12],
    "LongCatBenchmark": [5, 2.5],
    "LongCatFidelity": [7, "fixed", 9, 1, "enhance_hf", False, "off"],
    "LongCatCalibrate": [7, "fixed", 9, 1, "enhance_hf", 0.05, 0.3, "old/place.json", "off"],
}  # fmt: skip
# The same of a version that named or kept something otherwise, and what it means now; inputs that came later are at the
# end, with their defaults.
FORMER = {
    "LongCatSampler": ([7, "fixed", 50, 3.5, "base", True], [7, "fixed", 50, 3.5, "base", "exact", 1, "exact"]),
    "LongCatGuider": ([3.5, False], [3.5, "off", 1]),
    # With late_scales before the last one.
    "LongCatOptimizations": (
        [False, True, "packed", "auto", "off", *[True] * 6, False, True, False, True],
        [False, True, "packed", "auto", "off", *[True] * 6, False, True, True, "exact"],
    ),
}
# What people search for -> a node that is found.
SEARCHED = {
    "t2v": "LongCat Sampler",
    "txt2vid": "Empty LongCat Latent",
    "img2vid": "LongCat Image to Video",
    "video extend": "LongCat Video Continuation",
    "upscale video": "LongCat Refine",
    "meituan": "LongCat Guider",
    "longcat nano": "LongCat Model Loader",
    "cfg zero": "LongCat Guider",
    "teacache": "LongCat Step Cache",
    "sparse attention": "LongCat Block-Sparse Attention",
    "psnr": "LongCat Fidelity",
}
VALUES = """() => Object.fromEntries(window.app.graph.nodes.map(n => [n.type, n.widgets.map(w => w.value)]))"""
HIDDEN = """type => window.app.graph.nodes.find(n => n.type === type).widgets.filter(w => w.hidden).map(w => w.name)"""
ADD = """async type => {
  // Not graph.clear(), after which the page gives a new node the values of the old one with the same id.
  await window.app.extensionManager.command.execute('Comfy.NewBlankWorkflow');
  const node = window.LiteGraph.createNode(type);
  node.pos = [100, 100];
  window.app.graph.add(node);
}"""
# Where the middle of a node's widget is on the screen.
MIDDLE = """name => {
  const [node] = window.app.graph.nodes, widget = node.widgets.find(w => w.name === name), ds = window.app.canvas.ds;
  const box = window.app.canvas.canvas.getBoundingClientRect();
  const [x, y] = [node.pos[0] + node.size[0] / 2, node.pos[1] + widget.last_y + 10];
  return [box.left + (x + ds.offset[0]) * ds.scale, box.top + (y + ds.offset[1]) * ds.scale];
}"""
TYPE = """([name, value]) => {
  const [node] = window.app.graph.nodes, widget = node.widgets.find(w => w.name === name);
  widget.value = value;
  widget.callback?.(value, window.app.canvas, node);
}"""


@pytest.fixture(params=["canvas", "Nodes 2.0"])
def renderer(request, page) -> Iterator[str]:
    """Draws nodes on the canvas or as elements of the page."""
    page.renderer(request.param == "Nodes 2.0")
    yield request.param
    # The server keeps the setting, and later pages would open with it.
    page.renderer(False)


def workflow(widgets: dict[str, list[Any]]) -> dict[str, Any]:
    """A file in the page's form with one node for each type, and nothing connected."""
    nodes = [
        {"id": i, "type": kind, "pos": [400 * (i % 4), 500 * (i // 4)], "size": [320, 400], "flags": {}, "order": i,
         "mode": 0, "inputs": [], "outputs": [], "properties": {}, "widgets_values": values}
        for i, (kind, values) in enumerate(widgets.items(), 1)
    ]  # fmt: skip
    rest = {"last_node_id": len(nodes), "last_link_id": 0, "links": [], "groups": [], "config": {}, "extra": {}}
    # The page is done when the graph has another id.
    return {"id": str(uuid.uuid4()), "nodes": nodes, "version": 0.4, **rest}


def drop(page: Page, tmp_path: Path, content: dict[str, Any]) -> None:
    file = tmp_path / "old.json"
    file.write_text(json.dumps(content), encoding="utf-8")
    page.drop(file)


def knows_aliases(client) -> bool:
    return "search_aliases" in client.get_json("/object_info/LongCatSampler")["LongCatSampler"]


def test_search_finds_a_node_by_what_people_call_it(page, client, artifacts):
    if not knows_aliases(client):
        pytest.skip("this ComfyUI knows no other names of nodes")
    page.command("Comfy.NewBlankWorkflow")
    page.tab.mouse.dblclick(700, 500)
    field = page.tab.locator("input:focus")
    field.wait_for()
    for words, name in SEARCHED.items():
        field.fill(words)
        page.tab.get_by_text(name, exact=True).locator("visible=true").first.wait_for()
        page.screenshot(artifacts / f"search, {words}.png")
    page.tab.keyboard.press("Escape")


def test_workflows_of_earlier_versions_keep_their_values(page, tmp_path):
    """Above all no mode sets anything while a file is opened."""
    drop(page, tmp_path, workflow(KEPT))
    saved = {node["type"]: node["widgets_values"] for node in page.graph()["nodes"]}
    for found in (page.tab.evaluate(VALUES), saved):
        # Inputs that came later are at the end.
        assert {kind: values[: len(KEPT[kind])] for kind, values in found.items()} == KEPT
    assert page.tab.evaluate(HIDDEN, "LongCatImageToVideo") == ["width", "height"]
    assert page.tab.evaluate(HIDDEN, "LongCatVideoContinuation") == []


def test_workflows_with_former_inputs_are_read(page, tmp_path):
    drop(page, tmp_path, workflow({kind: old for kind, (old, _) in FORMER.items()}))
    assert page.tab.evaluate(VALUES) == {kind: new for kind, (_, new) in FORMER.items()}


def test_prompt_of_a_script_keeps_its_values_in_the_page(page):
    """The page opens such a prompt by calling the widgets as a hand does."""
    given = {"steps": 50, "guidance": 4.0, "mode": "distilled", "seed": 3, "kv_cache": "off"}
    page.tab.evaluate(
        "async text => { await window.app.loadApiJson(JSON.parse(text), 'script') }",
        json.dumps({"1": node("LongCatSampler", **given) | {"_meta": {"title": "LongCat Sampler"}}}),
    )
    page.settle(1500)
    (kept,) = page.prompt().values()
    assert given.items() <= kept["inputs"].items()


def choose(page: Page, renderer: str, name: str, value: str) -> None:
    """Choose a value of the only node's widget by hand."""
    if renderer == "canvas":
        page.tab.mouse.click(*page.tab.evaluate(MIDDLE, name))
        page.tab.locator(".litemenu-entry", has_text=re.compile(f"^{value}$")).click()
        page.settle(600)
    else:
        page.tab.locator("[data-node-id]").get_by_label(name, exact=True).first.click()
        page.tab.get_by_role("option", name=value, exact=True).click()
        page.settle(600)


def test_mode_sets_steps_and_guidance_but_nothing_that_was_typed(page, renderer, artifacts):
    page.tab.evaluate(ADD, "LongCatSampler")
    page.look_at((0, 0, 900, 600), 1)
    values = "() => Object.fromEntries(window.app.graph.nodes[0].widgets.map(w => [w.name, w.value]))"
    choose(page, renderer, "mode", "distilled")
    found = page.tab.evaluate(values)
    assert (found["mode"], found["steps"], found["guidance"]) == ("distilled", 16, 1)
    page.screenshot(artifacts / f"mode, {renderer}.png")
    page.tab.evaluate(TYPE, ["steps", 30])
    choose(page, renderer, "mode", "enhance_hf")
    found = page.tab.evaluate(values)
    assert (found["mode"], found["steps"], found["guidance"]) == ("enhance_hf", 30, 4)
    page.tab.evaluate(TYPE, ["guidance", 3.5])
    choose(page, renderer, "mode", "refine")
    found = page.tab.evaluate(values)
    assert (found["mode"], found["steps"], found["guidance"]) == ("refine", 30, 1)


def test_size_shows_where_it_counts(page, renderer, artifacts):
    page.tab.evaluate(ADD, "LongCatImageToVideo")
    page.look_at((0, 0, 900, 600), 1)
    assert page.tab.evaluate(HIDDEN, "LongCatImageToVideo") == ["width", "height"]
    shown = page.tab.locator("[data-node-id]").get_by_text("width", exact=True).locator("visible=true")
    if renderer != "canvas":
        shown.first.wait_for(state="hidden")
    choose(page, renderer, "resolution", "custom")
    assert page.tab.evaluate(HIDDEN, "LongCatImageToVideo") == []
    if renderer != "canvas":
        shown.first.wait_for()
    page.screenshot(artifacts / f"resolution, {renderer}.png")
    (made,) = page.prompt().values()
    assert {"width", "height"} <= made["inputs"].keys()


def test_prompts_with_former_inputs_run(client):
    prompt = text_to_video("a red circle", steps=1, frames=5, kv_cache=True)
    prompt["fast"] = node("LongCatOptimizations", model=["model", 0], fused_qkv=True, fused_ffn=True, text_mode="exact",
                          attention="auto", compile="off", explicit_fp32=True, gradient_checkpointing=False,
                          late_scales=True)  # fmt: skip
    prompt["sampler"]["inputs"]["model"] = ["fast", 0]
    run = client.run(prompt)
    assert run.status == "success", run.end


def test_page_speaks_chinese(page, client, artifacts):
    texts = json.loads((PACK / "locales" / "zh" / "nodeDefs.json").read_text(encoding="utf-8"))["LongCatSampler"]
    assert client.get_json("/i18n")["zh"]["nodeDefs"]["LongCatSampler"] == texts
    choose_locale = "async name => window.app.extensionManager.setting.set('Comfy.Locale', name)"
    page.tab.evaluate(choose_locale, "zh")
    try:
        page.reload()
        page.tab.evaluate(ADD, "LongCatSampler")
        page.look_at((0, 0, 900, 600), 1)
        title, labels = page.tab.evaluate(
            "() => { const [n] = window.app.graph.nodes; return [n.title, n.widgets.map(w => w.label ?? w.name)]; }"
        )
        assert title == texts["display_name"]
        assert {texts["inputs"][name]["name"] for name in ("steps", "guidance", "mode", "kv_cache")} <= set(labels)
        page.screenshot(artifacts / "chinese.png")
    finally:
        page.tab.evaluate(choose_locale, "en")
        page.reload()


OLD = """
import importlib, sys, types
from comfy_api.latest import ComfyExtension

package = sys.modules["longcat_nodes"] = types.ModuleType("longcat_nodes")
package.__path__ = [{path!r}]
former = importlib.import_module("longcat_nodes.former")
RENAMED = {{"OldLongCatScheduler": former.Renamed("LongCatScheduler", {{"model": "model", "mode": "schedule",
            "steps": "count"}}, ("schedule", "count"))}}


class Extension(ComfyExtension):
    async def on_load(self):
        await former.offer_replacements(RENAMED)

    async def get_node_list(self):
        former.renew_prompts(RENAMED)
        return []


async def comfy_entrypoint():
    return Extension()
"""


@pytest.fixture(scope="module")
def renaming(installation, tmp_path_factory) -> Iterator[Server]:
    """A server whose pack has renamed a node and its inputs, by the code that stands ready for it."""
    server = Server(installation, tmp_path_factory.mktemp("renaming"))
    pack = server.base / "custom_nodes" / "renaming"
    pack.mkdir()
    text = OLD.format(path=str(PACK / "nodes"))
    (pack / "__init__.py").write_text(text, encoding="utf-8")
    try:
        yield server.start()
    finally:
        server.remove()


def test_prompt_with_a_node_under_its_old_id_runs(renaming):
    prompt = {
        "model": node("LongCatModelLoader", model_name=FILES["model"], weight_dtype="default"),
        "old": node("OldLongCatScheduler", model=["model", 0], schedule="distilled", count=8),
        "show": node("PreviewAny", source=["old", 0]),
    }
    with Client(renaming.url) as client:
        run = client.run(prompt)
    assert run.status == "success", run.end
    (shown,) = run.outputs["show"]["text"]
    assert shown.startswith("tensor([1.0000") and shown.count(",") == 8


def test_page_offers_the_node_that_took_an_old_ones_place(renaming, page, tmp_path, artifacts):
    """Only since ComfyUI 0.33. The page does not replace it by itself."""
    with Client(renaming.url) as client:
        try:
            offered = client.get_json("/node_replacements")
        except urllib.error.HTTPError:
            pytest.skip("this ComfyUI replaces no nodes")
    assert [each["new_node_id"] for each in offered["OldLongCatScheduler"]] == ["LongCatScheduler"]
    browser = page.tab.context.browser
    other = Page(browser.new_page(viewport={"width": 1600, "height": 1000}), renaming.url)
    try:
        drop(other, tmp_path, workflow({"OldLongCatScheduler": ["distilled", 8]}))
        other.screenshot(artifacts / "replacement.png")
        other.tab.get_by_role("button", name="View details").click()
        other.settle(1500)
        other.screenshot(artifacts / "replacing.png")
        other.tab.get_by_role("button", name=re.compile("^Replace")).locator("visible=true").first.click()
        other.settle(1500)
        other.screenshot(artifacts / "replaced.png")
        assert other.tab.evaluate(VALUES) == {"LongCatScheduler": ["distilled", 8]}
    finally:
        other.tab.close()


def test_help_page_shows_the_meaning_of_every_input(page, artifacts):
    """The panel is narrow: what lies beyond its edge is not read."""
    page.tab.evaluate(ADD, "LongCatSampler")
    page.tab.evaluate("() => window.app.canvas.selectNode(window.app.graph.nodes[0])")
    page.settle(800)
    page.tab.locator("[data-testid=info-button]").first.click()
    cell = page.tab.locator("table td", has_text="Number of denoising steps").first
    cell.wait_for()
    page.settle(800)
    page.screenshot(artifacts / "help.png")
    beyond = cell.evaluate(
        """cell => {
          let panel = cell.parentElement;
          while (panel && !['auto', 'scroll', 'hidden'].includes(getComputedStyle(panel).overflowX))
            panel = panel.parentElement;
          const edge = panel ? panel.getBoundingClientRect().right : window.innerWidth;
          return cell.getBoundingClientRect().right - Math.min(edge, window.innerWidth);
        }"""
    )
    assert beyond <= 1
