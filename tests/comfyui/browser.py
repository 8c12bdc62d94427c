"""ComfyUI's web page in headless Chromium."""

from __future__ import annotations

import base64
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from playwright.sync_api import Page as Tab

TIMEOUT = 300_000  # milliseconds until a page is taken to hang; no measure of speed
READY = "() => window.app?.graph && window.app.extensionManager && document.querySelector('canvas')"

DROP = """async ({content, name, type}) => {
  const bytes = Uint8Array.from(atob(content), c => c.charCodeAt(0));
  const data = new DataTransfer();
  data.items.add(new File([bytes], name, {type}));
  const canvas = document.querySelector('#graph-canvas') || document.querySelector('canvas');
  const box = canvas.getBoundingClientRect();
  const at = {clientX: box.left + box.width * 0.6, clientY: box.top + box.height * 0.5};
  for (const kind of ['dragenter', 'dragover', 'drop'])
    canvas.dispatchEvent(new DragEvent(kind, {bubbles: true, cancelable: true, dataTransfer: data, ...at}));
}"""

LISTEN = """() => {
  window.longcatEnd = null;
  for (const kind of ['execution_success', 'execution_error', 'execution_interrupted'])
    window.app.api.addEventListener(kind, event => { window.longcatEnd = kind; }, {once: true});
}"""

# Scale and offset so that the box (in graph units) fills the canvas, right of the side bar and below the tabs.
LOOK_AT = """([x, y, width, height, scale]) => {
  const canvas = window.app.canvas, ds = canvas.ds, ratio = window.devicePixelRatio;
  ds.scale = scale;
  ds.offset[0] = (canvas.canvas.width / ratio / scale - width) / 2 - x;
  ds.offset[1] = (canvas.canvas.height / ratio / scale - height) / 2 - y;
  canvas.setDirty(true, true);
}"""


# Box of each node as drawn, with its title: [type, left, top, right, bottom] in units of the graph.
BOXES = """vue => {
  const {scale, offset} = window.app.canvas.ds, canvas = window.app.canvas.canvas.getBoundingClientRect();
  return window.app.graph.nodes.map(node => {
    const drawn = vue && document.querySelector(`[data-node-id="${node.id}"]`);
    const [left, top] = node.pos, [width, height] = node.size;
    if (!drawn) return [node.type, left, top - 30, left + width, top + height];
    const box = drawn.getBoundingClientRect();
    const x = side => (side - canvas.left) / scale - offset[0], y = side => (side - canvas.top) / scale - offset[1];
    return [node.type, x(box.left), y(box.top), x(box.right), y(box.bottom)];
  });
}"""

# Links that run from right to left, and links that run behind a node: their drawn curves against the nodes' edges,
# which for its own two nodes lie inside of the sockets.
TANGLES = """boxes => {
  const graph = window.app.graph, context = document.createElement('canvas').getContext('2d'), found = [];
  context.lineWidth = 2;
  for (const link of graph.links.values()) {
    const source = graph.nodes.findIndex(node => node.id == link.origin_id);
    const target = graph.nodes.findIndex(node => node.id == link.target_id);
    const name = `${boxes[source][0]} - ${boxes[target][0]}`;
    if (boxes[source][3] > boxes[target][1]) found.push(`${name} runs to the left`);
    const parts = [link, ...[...graph.reroutes.values()].filter(part => part.linkIds.has(link.id))];
    if (!parts.every(part => part.path)) found.push(`${name} is not drawn`);
    boxes.forEach(([type, left, top, right, bottom], i) => {
      const inset = i === source || i === target ? 26 : 3, edge = [];
      for (let x = left + inset; x < right - inset; x += 2) edge.push([x, top + 3], [x, bottom - 3]);
      for (let y = top + 3; y < bottom - 3; y += 2) edge.push([left + inset, y], [right - inset, y]);
      const hit = part => part.path && edge.some(([x, y]) => context.isPointInStroke(part.path, x, y));
      if (parts.some(hit)) found.push(`${name} runs behind ${type}`);
    });
  }
  return found;
}"""

RENDERER = "vue => window.app.extensionManager.setting.set('Comfy.VueNodes.Enabled', vue)"

# How many pixels of each note lie beyond its right edge.
OVERHANG = """() => [...document.querySelectorAll('.comfy-markdown .tiptap')]
  .map(note => note.scrollWidth - note.clientWidth)"""


def find_chromium() -> str:
    """CHROMIUM, else a Chromium or Chrome on the path. FileNotFoundError if there is none."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    found = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    if found is None:
        raise FileNotFoundError("no Chromium; install one (Debian: apt-get install chromium) or set CHROMIUM")
    return found


class Page:
    """One open ComfyUI page."""

    def __init__(self, tab: Tab, url: str) -> None:
        self.tab = tab
        self.errors: list[str] = []
        tab.on("pageerror", lambda error: self.errors.append(str(error)))
        tab.set_default_timeout(TIMEOUT)
        tab.goto(url, wait_until="domcontentloaded")
        self._ready()

    def _ready(self) -> None:
        self.tab.wait_for_function(READY)
        self.settle()

    def reload(self) -> None:
        """Load the page again, as some settings ask for."""
        self.tab.reload(wait_until="domcontentloaded")
        self._ready()

    def settle(self, milliseconds: int = 3000) -> None:
        """Give the page time to draw: it tells nobody when it has."""
        self.tab.wait_for_timeout(milliseconds)

    def drop(self, file: Path, type: str = "application/json") -> None:
        """Drop a file on the canvas and wait until another graph with nodes is there."""
        before = self.tab.evaluate("() => window.app.graph.id")
        content = base64.b64encode(file.read_bytes()).decode()
        self.tab.evaluate(DROP, {"content": content, "name": file.name, "type": type})
        self.tab.wait_for_function(
            "before => window.app.graph.nodes.length && window.app.graph.id !== before", arg=before
        )
        self.settle()

    def nodes(self) -> list[dict[str, Any]]:
        return self.tab.evaluate(
            "() => window.app.graph.nodes.map(n => ({id: n.id, type: n.type, unknown: Boolean(n.has_errors)}))"
        )

    def graph(self) -> dict[str, Any]:
        return json.loads(self.tab.evaluate("() => JSON.stringify(window.app.graph.serialize())"))

    def prompt(self) -> dict[str, Any]:
        """The graph in the form that the Run button posts."""
        return json.loads(self.tab.evaluate("async () => JSON.stringify((await window.app.graphToPrompt()).output)"))

    def run(self) -> str:
        """Press Run and wait for the end: "execution_success", "execution_error" or "execution_interrupted"."""
        self.tab.evaluate(LISTEN)
        self.tab.locator("[data-testid=queue-button]").first.click()
        self.tab.wait_for_function("() => window.longcatEnd")
        self.settle()
        return self.tab.evaluate("() => window.longcatEnd")

    def command(self, name: str) -> None:
        self.tab.evaluate("name => window.app.extensionManager.command.execute(name)", name)
        self.settle(1500)

    def look_at(self, box: tuple[float, float, float, float], scale: float) -> None:
        """Show the box (x, y, width, height) of the graph; below 0.67 the canvas draws no text."""
        self.tab.evaluate(LOOK_AT, [*box, scale])
        self.settle(1000)

    def renderer(self, vue: bool) -> None:
        """Draw the nodes as Nodes 2.0 does, or on the canvas."""
        self.tab.evaluate(RENDERER, vue)
        self.settle(2500)

    def boxes(self, vue: bool) -> list[tuple[str, float, float, float, float]]:
        """Each node's type, left, top, right and bottom as the renderer draws it."""
        return [tuple(box) for box in self.tab.evaluate(BOXES, vue)]

    def tangles(self, vue: bool) -> list[str]:
        """Links that run to the left or behind a node, in words."""
        return self.tab.evaluate(TANGLES, self.tab.evaluate(BOXES, vue))

    def zoom(self) -> float:
        return self.tab.evaluate("() => window.app.canvas.ds.scale")

    def screenshot(self, path: Path) -> None:
        self.tab.screenshot(path=str(path))


@contextmanager
def open_page(url: str, width: int = 1600, height: int = 1000) -> Iterator[Page]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=find_chromium(), headless=True, args=["--no-sandbox", "--disable-gpu"]
        )
        try:
            yield Page(browser.new_page(viewport={"width": width, "height": height}), url)
        finally:
            browser.close()
