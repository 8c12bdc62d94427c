"""Declarations of nodes as ComfyUI's schemas."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from comfy_api.latest import io

from .declarations import NODES
from .fields import Socket, Widget

CATEGORY = "LongCat"
KINDS = {"whole": io.Int, "number": io.Float, "switch": io.Boolean, "text": io.String, "choice": io.Combo}


class LongCatNode(io.ComfyNode):
    """A node that `declarations` declares under ID."""

    ID: str

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(cls.ID, cls.choices())

    @classmethod
    def choices(cls) -> dict[str, Sequence[str]]:
        """Choices of the inputs whose choices depend on the machine."""
        return {}


def schema(node_id: str, choices: dict[str, Sequence[str]]) -> io.Schema:
    """The schema of a declared node; `choices` replaces those of the inputs that it names."""
    node = NODES[node_id]
    return io.Schema(
        node_id=node_id,
        display_name=node.name,
        category=CATEGORY,
        description=node.description,
        inputs=[_socket(field) if isinstance(field, Socket) else _widget(field, choices) for field in node.inputs],
        outputs=[
            getattr(io, output.kind).Output(display_name=output.name or None, tooltip=output.tooltip or None)
            for output in node.outputs
        ],
        is_output_node=node.shows,
    )


def _socket(field: Socket) -> io.Input:
    return getattr(io, field.kind).Input(field.name, optional=field.optional, tooltip=field.tooltip)


def _widget(field: Widget, choices: dict[str, Sequence[str]]) -> io.Input:
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
    return KINDS[row.kind].Input(row.name, **{name: value for name, value in settings.items() if value is not None})
