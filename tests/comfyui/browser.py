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
        tab.wait_for_function(READY)
        self.settle()

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
