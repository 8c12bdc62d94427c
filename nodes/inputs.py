"""Declarations of nodes as ComfyUI's schemas.

Arguments that this ComfyUI does not know are left out. What web/js/longcat.js reads travels under PAGE in an input.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from comfy_api.latest import io

from .choices import choices_of
from .declarations import NODES
from .fields import Node, Socket, Widget
from .finding import PLACES
from .former import for_page
from .widgets import LONG_MODES, VERSIONS

KINDS = {"whole": io.Int, "number": io.Float, "switch": io.Boolean, "text": io.String, "choice": io.Combo}
PAGE = "longcat"


class LongCatNode(io.ComfyNode):
    """A node that `declarations` declares under ID."""

    ID: str

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(cls.ID, choices_of(cls.ID))


def schema(node_id: str, choices: dict[str, Sequence[str]]) -> io.Schema:
    """The schema of a declared node; `choices` replaces those of the inputs that it names."""
    node, place = NODES[node_id], PLACES[node_id]
    # ComfyUI 0.8 does not know them.
    finding = {"search_aliases": list(place.aliases), "essentials_category": place.essentials}
    known = inspect.signature(io.Schema).parameters
    return io.Schema(
        **{name: value for name, value in finding.items() if name in known},
        node_id=node_id,
        display_name=node.name,
        category=place.category,
        description=node.description,
        inputs=[
            _socket(field) if isinstance(field, Socket) else _widget(node_id, field, choices) for field in node.inputs
        ],
        outputs=[
            getattr(io, output.kind).Output(display_name=output.name or None, tooltip=output.tooltip or None)
            for output in node.outputs
        ],
        hidden=[io.Hidden[name] for name in node.hidden],
        is_output_node=node.shows,
    )


def _socket(field: Socket) -> io.Input:
    kinds = [getattr(io, kind) for kind in field.kind.split(",")]
    settings = {"optional": field.optional, "tooltip": field.tooltip}
    if len(kinds) > 1:
        return io.MultiType.Input(field.name, kinds, **settings)
    return kinds[0].Input(field.name, **settings)


def _widget(node_id: str, field: Widget, choices: dict[str, Sequence[str]]) -> io.Input:
    row = field.row
    settings: dict[str, Any] = {"default": row.default, "optional": field.optional, "tooltip": field.tooltip}
    if row.kind == "choice":
        settings["options"] = list(choices.get(row.name, row.choices))
    if row.kind == "text":
        settings["multiline"] = field.multiline
    if row.kind in ("whole", "number"):
        settings |= {"min": row.least, "max": row.most, "step": row.step}
    if row.digits is not None:
        settings["round"] = 10**-row.digits
    if field.new_seed is not None:
        settings["control_after_generate"] = field.new_seed
    # An argument only since ComfyUI 0.33, but pages of 0.8 know it too.
    extra: dict[str, Any] = {"advanced": True} if field.advanced else {}
    if page := _for_page(node_id, field):
        extra[PAGE] = page
    settings["extra_dict"] = extra or None
    return KINDS[row.kind].Input(row.name, **{name: value for name, value in settings.items() if value is not None})


def _for_page(node_id: str, field: Widget) -> dict[str, Any]:
    """What web/js/longcat.js does with an input; empty for most."""
    found = for_page(node_id, field.name)
    if field.only_for:
        found["only_for"] = dict([field.only_for])
    if sets := mode_defaults(NODES[node_id], field):
        found["sets"] = sets
    return found


def mode_defaults(node: Node, field: Widget) -> dict[str, dict[str, dict[str, Any]]]:
    """For an input that chooses a schedule: choice -> another input -> its default then, and the most that fits; where
    an avatar has others, these by its version under "of"."""
    if field.name != "mode":
        return {}
    rows = [other.row for other in node.inputs if isinstance(other, Widget) and other.row.schedules]
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for choice in field.row.choices:
        schedule = LONG_MODES.get(choice, (choice,))[0]
        found[choice] = {}
        for row in rows:
            default, most = row.schedules.get(schedule, (row.default, row.most))
            rule: dict[str, Any] = {"default": default, "most": most}
            for version in VERSIONS:
                if values := row.schedules.get(f"{schedule} {version}"):
                    rule.setdefault("of", {})[version] = dict(zip(("default", "most"), values, strict=True))
            found[choice][row.name] = rule
    return found
