"""Writes workflows/*.json and subgraphs/*.json through ComfyUI's own page, and the pictures of the workflows.

    python -m workflows.build [NAME ...]     # from the pack's folder; wants a checkout and Chromium

nano.py and real.py name nodes and sockets; the page knows the rest of the file format. NAME: parts of file names, to
write only those. A picture that is there already is kept; delete it to have it made again.
"""

from __future__ import annotations

import json
import sys
import tempfile
import tomllib
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.comfyui.browser import Page, open_page
from tests.comfyui.server import PACK, Installation, Server

from . import nano, real
from .blueprints import Blueprint, blueprints
from .graph import Graph, Layout, place
from .pictures import write_picture

WORKFLOWS, BLUEPRINTS = PACK / "workflows", PACK / "subgraphs"
OURS, CORE = "longcat-video", "comfy-core"
NOTE, NOTE_WIDTH = "note", 1200
# What a screen of 1600 x 1000 pixels shows of the canvas, right of the side bar and below the menu.
SCREEN = {"left": 74, "top": 100, "width": 1510, "height": 890}

# Nodes in a grid, so that none hides another while they are measured.
MAKE = """({nodes, links}) => {
  const graph = window.app.graph, ds = window.app.canvas.ds;
  graph.clear();
  window.made = {};
  for (const [key, spec] of Object.entries(nodes)) {
    const node = window.LiteGraph.createNode(spec.type), count = Object.keys(window.made).length;
    if (!node) throw new Error('no node type ' + spec.type);
    graph.add(node);
    if (spec.title) node.title = spec.title;
    // A node whose file is missing would be measured with a complaint; its file comes last (PLACE).
    for (const [name, value] of Object.entries(spec.properties.models ? {} : spec.widgets)) {
      const widget = name ? node.widgets.find(w => w.name === name) : node.widgets[0];
      if (!widget) throw new Error(spec.type + ' has no widget ' + name);
      widget.value = value;
      widget.callback?.(value);
    }
    // Again, since a mode sets the steps and the guidance that belong to it.
    for (const [name, value] of Object.entries(spec.properties.models ? {} : spec.widgets))
      if (name) node.widgets.find(w => w.name === name).value = value;
    for (const [name, value] of Object.entries(spec.properties)) node.properties[name] = value;
    node.pos = [(count % 8) * 1500, Math.floor(count / 8) * 1500];
    node.setSize([spec.width, node.computeSize()[1]]);
    window.made[key] = node;
  }
  for (const [from, output, to, input] of links) {
    const source = window.made[from].outputs.findIndex(slot => slot.name === output);
    const target = window.made[to].inputs.findIndex(slot => slot.name === input);
    if (source < 0 || target < 0) throw new Error(`no link ${from}.${output} - ${to}.${input}`);
    window.made[from].connect(source, window.made[to], target);
  }
  ds.scale = 0.12;
  ds.offset[0] = ds.offset[1] = 1000;
  graph.setDirtyCanvas(true, true);
}"""
# A node that Vue draws includes its title of 30 units.
MEASURE = """vue => Object.fromEntries(Object.entries(window.made).map(([key, node]) => {
  if (!vue) return [key, node.computeSize()];
  const shown = document.querySelector(`[data-node-id="${node.id}"]`), scale = window.app.canvas.ds.scale;
  if (!shown) throw new Error('not drawn: ' + key);
  const box = shown.getBoundingClientRect();
  return [key, [box.width / scale, box.height / scale - 30]];
}))"""
NOTE_HEIGHT = """() => Math.max(...[...document.querySelectorAll('.comfy-markdown .tiptap')].flatMap(
  note => [...note.children].map(part => part.offsetTop + part.offsetHeight)))"""
PLACE = """({nodes, pos, size, links, bends, groups}) => {
  const graph = window.app.graph;
  for (const [key, spec] of Object.entries(nodes))
    if (spec.properties.models)
      for (const [name, value] of Object.entries(spec.widgets))
        window.made[key].widgets.find(w => w.name === name).value = value;
  for (const [key, node] of Object.entries(window.made)) {
    node.pos = pos[key];
    node.setSize(size[key]);
  }
  links.forEach(([, , to, input], i) => {
    const link = graph.links.get(window.made[to].inputs.find(slot => slot.name === input).link);
    for (const point of bends[i]) graph.createReroute(point, link);
  });
  for (const [title, box] of groups) {
    const group = new window.LiteGraph.LGraphGroup(title);
    group.pos = box.slice(0, 2);
    group.size = box.slice(2);
    group.color = '#3f789e';
    graph.add(group);
  }
  graph.setDirtyCanvas(true, true);
}"""

# The nodes become one; each input outside sets the inputs of the nodes inside that are named for it.
CONVERT = """({inputs, outputs, name, description}) => {
  const graph = window.app.graph, made = window.made;
  for (const group of [...graph.groups]) graph.remove(group);
  const {subgraph, node} = graph.convertToSubgraph(new Set(Object.values(made)));
  subgraph.name = node.title = name;
  for (const input of [...subgraph.inputs]) subgraph.removeInput(input);
  const inside = Object.fromEntries(Object.entries(made).map(([key, one]) => [key, subgraph.getNodeById(one.id)]));
  for (const [label, wires] of Object.entries(inputs))
    for (const [i, [key, input]] of wires.entries()) {
      const slot = inside[key].inputs.find(one => one.name === input);
      const outer = i ? subgraph.inputs.find(one => one.name === label) : subgraph.addInput(label, String(slot.type));
      outer.connect(slot, inside[key]);
    }
  for (const [key, output] of outputs) {
    const slot = inside[key].outputs.find(one => one.name === output);
    subgraph.addOutput(output.toLowerCase(), String(slot.type)).connect(slot, inside[key]);
  }
  node.setSize([340, node.computeSize()[1]]);
  node.pos = [0, 0];
}"""


def graphs() -> Iterator[Graph]:
    yield from nano.graphs()
    yield from real.graphs()


def measure(page: Page) -> dict[str, tuple[float, float]]:
    """Width and height that each node needs, in the renderer that needs more."""
    sizes = page.tab.evaluate(MEASURE, False)
    page.renderer(vue=True)
    drawn = page.tab.evaluate(MEASURE, True)
    page.renderer(vue=False)
    return {key: (round(drawn[key][0]), round(max(sizes[key][1], drawn[key][1]))) for key in sizes}


def draw(page: Page, graph: Graph) -> Layout:
    """Make the graph in the page and lay it out."""
    nodes: dict[str, dict[str, Any]] = {}
    if graph.note:
        nodes[NOTE] = {"type": "MarkdownNote", "title": graph.heading, "width": NOTE_WIDTH, "widgets": {"": graph.note}}
    for column in graph.columns:
        for key in (*column.top, *column.bottom):
            node = graph.nodes[key]
            nodes[key] = {"type": node.type, "title": node.title, "width": column.width, "widgets": node.widgets}
    for key, spec in nodes.items():
        models = list(graph.nodes[key].models) if key in graph.nodes else []
        spec["properties"] = {"models": models} if models else {}
    page.tab.evaluate(MAKE, {"nodes": nodes, "links": graph.links})
    page.settle(500)
    sizes = measure(page)
    page.look_at((0, 0, NOTE_WIDTH, 400), 0.9)
    note = max(page.tab.evaluate(NOTE_HEIGHT) + 30, sizes[NOTE][1]) if graph.note else 0
    for column in graph.columns:
        column.width = max([column.width, *(sizes[key][0] for key in (*column.top, *column.bottom))])
    layout = place(graph, {key: sizes[key][1] for key in graph.nodes}, top=note + 14)
    if graph.note:
        layout.pos[NOTE], layout.size[NOTE] = [-16, 0], [min(NOTE_WIDTH, layout.right + 32), note]
    asked = {"pos": layout.pos, "size": layout.size, "bends": layout.bends, "groups": layout.groups}
    page.tab.evaluate(PLACE, {**asked, "nodes": nodes, "links": graph.links})
    page.settle(500)
    return layout


def sign(nodes: list[dict[str, Any]], versions: dict[str, str]) -> None:
    """Write on every node the pack that it comes from, by which the page and its manager find a missing one."""
    for node in nodes:
        if node["type"] != "MarkdownNote":
            pack = OURS if node["type"].startswith("LongCat") else CORE
            node["properties"] |= {"cnr_id": pack, "ver": versions[pack]}


def blueprint(page: Page, asked: Blueprint, versions: dict[str, str]) -> dict[str, Any]:
    """The file of a blueprint: one node, and the subgraph that it stands for."""
    draw(page, asked.graph)
    wires = {name: [wire.split(".") for wire in inside] for name, inside in asked.inputs.items()}
    outputs = [wire.split(".") for wire in asked.outputs]
    named = {"name": asked.graph.name, "description": asked.description}
    page.tab.evaluate(CONVERT, {"inputs": wires, "outputs": outputs, **named})
    page.settle(500)
    file = page.graph()
    (subgraph,) = file["definitions"]["subgraphs"]
    ids = {subgraph["id"]: str(uuid.uuid5(uuid.NAMESPACE_URL, f"longcat-video/{asked.graph.name}"))}
    for i, slot in enumerate((*subgraph["inputs"], *subgraph["outputs"])):
        ids[slot["id"]] = str(uuid.uuid5(uuid.NAMESPACE_URL, f"longcat-video/{asked.graph.name}/{i}"))
    sign(subgraph["nodes"], versions)
    subgraph |= {"category": "LongCat", "description": asked.description, "revision": 0}
    file["nodes"][0]["properties"] |= {"cnr_id": OURS, "ver": versions[OURS]}
    file["id"], file["extra"] = ids[subgraph["id"]], {}
    text = json.dumps(file)
    for made, fixed in ids.items():
        text = text.replace(made, fixed)
    return json.loads(text)


def build(page: Page, graph: Graph, versions: dict[str, str]) -> dict[str, Any]:
    """The workflow file of a graph."""
    layout = draw(page, graph)
    file = page.graph()
    file["id"] = str(uuid.uuid5(uuid.NAMESPACE_URL, f"longcat-video/{graph.name}"))
    for i, group in enumerate(file["groups"]):
        # Not the page's random ones, so that building again changes nothing.
        group["id"] = i + 1
    sign(file["nodes"], versions)
    # All of it on the screen, as large as it can be.
    width, height = layout.right + 48, layout.bottom + 24
    scale = min(1.0, SCREEN["width"] / width, SCREEN["height"] / height)
    offset = [SCREEN["left"] / scale + 24, SCREEN["top"] / scale + 30]
    file["extra"] = {k: v for k, v in file["extra"].items() if k in ("reroutes", "linkExtensions")}
    file["extra"]["ds"] = {"scale": round(scale, 4), "offset": [round(x, 2) for x in offset]}
    return file


def write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def versions(installation: Installation) -> dict[str, str]:
    """Of this pack and of ComfyUI, under their names in the registry."""
    project = tomllib.loads((PACK / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return {OURS: project["version"], CORE: installation.version}


def main() -> None:
    wanted = sys.argv[1:] or [""]
    with tempfile.TemporaryDirectory() as folder, Server(Installation.find(), Path(folder)) as server:
        signed = versions(server.installation)
        # A page each: a page gives new nodes the values of earlier ones of the same number.
        for i, graph in enumerate(graphs()):
            if any(part in graph.name for part in wanted):
                with open_page(server.url) as page:
                    file = build(page, graph, signed)
                write(WORKFLOWS / f"{graph.name}.json", file)
                if not (picture := WORKFLOWS / f"{graph.name}.jpg").exists():
                    write_picture(picture, graph, seed=i + 1)
                print(graph.name, file["extra"]["ds"]["scale"], flush=True)
        for asked in blueprints():
            if any(part in asked.graph.name for part in wanted):
                with open_page(server.url) as page:
                    write(BLUEPRINTS / f"{asked.graph.name}.json", blueprint(page, asked, signed))
                print(asked.graph.name, flush=True)


if __name__ == "__main__":
    main()
