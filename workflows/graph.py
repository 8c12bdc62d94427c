"""A workflow in the making: nodes in columns, and links by the names of nodes and sockets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

FIXED = {"control_after_generate": "fixed"}
# Between columns, with room for links that go up or down there.
GAP = 58
# Between the bottom of one node and the top of the next: the title, and the pack's badge above it.
BELOW = 58
# From a group's top to its first node: the group's title, the badge and the node's title.
HEAD = 90
# Between two links that run above or below the nodes.
LANE = 18
# Up or down from a lane to a socket, beyond which a link needs another bend.
FAR = 180


@dataclass
class Node:
    """tall: at least this high, in the units of the graph. models: what the page offers to download for it."""

    type: str
    title: str = ""
    tall: float = 0
    widgets: dict[str, Any] = field(default_factory=dict)
    models: Sequence[dict[str, str]] = ()


@dataclass
class Column:
    """Nodes from the top down, and from the bottom up; title: of the group, "" to belong to the one on the left."""

    width: float
    title: str
    top: list[str] = field(default_factory=list)
    bottom: list[str] = field(default_factory=list)


@dataclass
class Graph:
    """name: file name and title in the template browser. heading, note: title and Markdown of the note above the nodes.
    label, shown: of its picture, the latter prompts of a bundled model, one for each segment.
    """

    name: str
    heading: str
    note: str
    label: str
    shown: tuple[str, ...]
    nodes: dict[str, Node] = field(default_factory=dict)
    columns: list[Column] = field(default_factory=list)
    links: list[tuple[str, str, str, str]] = field(default_factory=list)

    def column(self, width: float, title: str = "") -> None:
        self.columns.append(Column(width, title))

    def add(self, key: str, type: str, title: str = "", *, tall: float = 0, bottom: bool = False, **widgets: Any):
        """A node below the last one of the last column; the name `text_` is the first widget, whatever its name."""
        models = widgets.pop("models", ())
        widgets = {"" if name == "text_" else name: value for name, value in widgets.items()}
        self.nodes[key] = Node(type, title, tall, widgets, models)
        column = self.columns[-1]
        (column.bottom if bottom else column.top).append(key)

    def link(self, *wires: str) -> None:
        """Each wire "node.OUTPUT node.input"."""
        for wire in wires:
            (source, output), (target, name) = (end.split(".") for end in wire.split(" "))
            self.links.append((source, output, target, name))


@dataclass
class Layout:
    """pos, size: of each node. bends: of each link, the points that it runs through. groups: title, [x, y, w, h]."""

    pos: dict[str, list[float]]
    size: dict[str, list[float]]
    bends: list[list[list[float]]]
    groups: list[tuple[str, list[float]]]
    right: float
    bottom: float


def place(graph: Graph, heights: dict[str, float], top: float) -> Layout:
    """Columns side by side below y = `top`, where a link that passes a column runs above or below its nodes.

    heights: what each node needs, in the renderer that needs most.
    """
    column_of = {key: i for i, column in enumerate(graph.columns) for key in (*column.top, *column.bottom)}
    lefts = [sum(column.width + GAP for column in graph.columns[:i]) for i in range(len(graph.columns))]
    tall = {key: max(heights[key], node.tall) for key, node in graph.nodes.items()}
    deep = max(sum(tall[key] + BELOW for key in (*column.top, *column.bottom)) - BELOW for column in graph.columns)
    pos: dict[str, list[float]] = {}
    for column, left in zip(graph.columns, lefts, strict=True):
        y = 0.0
        for key in column.top:
            pos[key] = [left, y]
            y += tall[key] + BELOW
        y = deep
        for key in column.bottom:
            y -= tall[key]
            pos[key] = [left, y]
            y -= BELOW
    size = {key: [graph.columns[column_of[key]].width, tall[key]] for key in graph.nodes}

    bends: list[list[list[float]]] = []
    above = below = 0
    for source, _, target, _ in graph.links:
        first, last = column_of[source] + 1, column_of[target]
        if last <= first:
            bends.append([])
            continue
        if pos[source][1] + tall[source] / 2 > deep / 2:
            y = deep + 28 + LANE * below
            below += 1
        else:
            y = -62 - LANE * above
            above += 1
        link = [[lefts[first] - GAP / 2, y], [lefts[last] - GAP / 2, y]]
        # The bow of a link at a socket is as wide as a quarter of its length; a bend beside the socket keeps it in
        # the gap.
        if abs(y - pos[source][1]) > FAR:
            link.insert(0, [link[0][0], pos[source][1] + 26])
        if abs(y - pos[target][1]) > FAR:
            link.append([link[-1][0], pos[target][1] + 46])
        bends.append(link)
    head = HEAD + LANE * above
    bottom = deep + 20 + (LANE * below + 16 if below else 0)
    groups: list[tuple[str, list[float]]] = []
    for column, left in zip(graph.columns, lefts, strict=True):
        if column.title:
            groups.append((column.title, [left - 16, -head, column.width + 32, bottom + head]))
        elif groups:
            groups[-1][1][2] = left + column.width + 16 - groups[-1][1][0]
    right = lefts[-1] + graph.columns[-1].width
    shift = top + head
    for point in (*pos.values(), *(bend for link in bends for bend in link)):
        point[1] += shift
    for _, box in groups:
        box[1] += shift
    return Layout(pos, size, bends, groups, right, bottom + shift)
