"""How the templates look when they are opened: legible, no node on another, links that can be followed."""

from __future__ import annotations

import itertools

import pytest

from workflows.build import WORKFLOWS

from .browser import open_page

FILES = sorted(WORKFLOWS.glob("*.json"))
# The window for which they are laid out.
WIDTH, HEIGHT = 1600, 1000
LEGIBLE = 0.7


@pytest.fixture(scope="module", params=["canvas", "nodes-2"])
def renderer(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def page(server, renderer, chromium):
    with open_page(server.url, WIDTH, HEIGHT) as page:
        page.renderer(renderer == "nodes-2")
        yield page
        page.renderer(False)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_opened_template_can_be_read(file, page, renderer, artifacts):
    page.drop(file)
    vue = renderer == "nodes-2"
    page.screenshot(artifacts / f"{file.stem}, {renderer}.png")
    assert page.zoom() >= LEGIBLE
    boxes = page.boxes(vue)
    x, y = page.tab.evaluate("() => [...window.app.canvas.ds.offset]")
    right_end, bottom_end = WIDTH / page.zoom(), HEIGHT / page.zoom()
    for kind, left, top, right, bottom in boxes:
        inside = left + x > 0 and right + x <= right_end and top + y > 0 and bottom + y <= bottom_end
        assert inside, f"{kind} lies off the screen"
    for (a, left, top, right, bottom), (b, *other) in itertools.combinations(boxes, 2):
        apart = right <= other[0] or other[2] <= left or bottom <= other[1] or other[3] <= top
        assert apart, f"{a} and {b} overlap"
    assert page.tangles(vue) == []
    note = next(box for box in boxes if box[0] == "MarkdownNote")
    tops = page.tab.evaluate("() => window.app.graph.groups.map(group => group.pos[1])")
    assert all(note[4] <= top for top in tops), "the note hides the title of a group"
