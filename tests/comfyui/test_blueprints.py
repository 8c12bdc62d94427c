"""The two subgraphs of the pack: found by the page's node search, placed, and run."""

from __future__ import annotations

import pytest

from workflows.build import BLUEPRINTS
from workflows.nano import NANO

from .browser import open_page

NAMES = sorted(file.stem for file in BLUEPRINTS.glob("*.json"))
# What makes the placed node run on the embedded model.
SMALL = {
    "LongCatModelLoader": {"model_name": NANO["model"]},
    "LongCatTextEncoderLoader": {"text_encoder_name": NANO["text"]},
    "VAELoader": {"vae_name": NANO["vae"]},
    "LongCatEmptyLatent": {"width": 96, "height": 64, "length": 9},
    "LongCatSampler": {"steps": 2},
    "LongCatLongVideo": {"width": 96, "height": 64, "length": 9, "overlap": 5, "steps": 2, "mode": "base"},
    "LongCatRefineLongVideo": {"resolution": "twice the size", "steps": 2, "piece": 9, "overlap": 5},
}
PLACED = "() => window.app.graph.nodes.map(node => [node.title, node.isSubgraphNode?.() ?? false])"
# A Save Video behind the first output.
SAVE = """() => {
  const node = window.app.graph.nodes[0], save = window.LiteGraph.createNode('SaveVideo');
  window.app.graph.add(save);
  save.pos = [node.pos[0] + node.size[0] + 80, node.pos[1]];
  node.connect(node.outputs.findIndex(output => output.type === 'VIDEO'), save, 0);
}"""


@pytest.fixture
def page(server, chromium):
    with open_page(server.url) as page:
        yield page


def test_there_are_two():
    assert NAMES == ["LongCat Long Video, Refined", "LongCat Text to Video"]


@pytest.mark.parametrize("name", NAMES)
def test_found_in_the_search_placed_and_run(name, page, client, artifacts):
    if name not in {entry["name"] for entry in client.get_json("/global_subgraphs").values()}:
        pytest.skip("this ComfyUI does not know blueprints")
    page.tab.evaluate("() => window.app.graph.clear()")
    page.command("Workspace.SearchBox.Toggle")
    page.tab.keyboard.type(name)
    page.settle(1500)
    page.screenshot(artifacts / f"search, {name}.png")
    page.tab.keyboard.press("Enter")
    page.settle(1500)
    page.tab.mouse.click(800, 500)  # the newest page lets the node hang on the pointer until a click
    page.settle(1000)
    assert page.tab.evaluate(PLACED) == [[name, True]]
    page.tab.evaluate(SAVE)
    page.screenshot(artifacts / f"{name}.png")
    prompt = page.prompt()
    for node in prompt.values():
        node["inputs"].update(SMALL.get(node["class_type"], {}))
    lora = [key for key, node in prompt.items() if node["class_type"] == "LoraLoaderModelOnly"]
    for node in prompt.values():
        for socket, wire in node["inputs"].items():
            if isinstance(wire, list) and wire[0] in lora:
                node["inputs"][socket] = prompt[wire[0]]["inputs"]["model"]
    for key in lora:
        del prompt[key]
    run = client.run(prompt)
    assert run.status == "success", run.end
    (saver,) = (key for key, node in prompt.items() if node["class_type"] == "SaveVideo")
    assert run.files(saver)
