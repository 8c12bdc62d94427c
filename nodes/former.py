"""What earlier versions named otherwise, so that workflows and prompts saved with them go on working.

ComfyUI replaces a node by its id (`io.NodeReplace`, since 0.33: its page then offers it) and knows nothing of inputs.
So prompts also pass through `renewed`, in every version, and web/js/longcat.js renews workflows as they are opened.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from .host import running_server


@dataclass(frozen=True)
class Renamed:
    """The id that took an old one's place, with as many outputs. inputs: name of every input -> its old name. widgets:
    old names in the order in which a workflow keeps their values."""

    id: str
    inputs: dict[str, str]
    widgets: tuple[str, ...]
    outputs: int = 1


# Old id -> what took its place. Every id is still the first one.
RENAMED: dict[str, Renamed] = {}
# (node, input) -> old value -> new value. kv_cache was a switch at first.
VALUES: dict[tuple[str, str], dict[bool, str]] = {
    ("LongCatSampler", "kv_cache"): {True: "exact", False: "off"},
    ("LongCatGuider", "kv_cache"): {True: "exact", False: "off"},
}
# (node, input) -> widgets that stood before it and are gone, and how many values the node had with them. A prompt may
# keep them: ComfyUI ignores them.
REMOVED: dict[tuple[str, str], tuple[tuple[str, ...], int]] = {
    ("LongCatOptimizations", "fused_text"): (("late_scales",), 15)
}


def for_page(node_id: str, name: str) -> dict[str, Any]:
    """What the page has to know of an input's past; empty for most."""
    values = {str(old).lower(): new for old, new in VALUES.get((node_id, name), {}).items()}
    found: dict[str, Any] = {"was": values} if values else {}
    if (node_id, name) in REMOVED:
        gone, saved = REMOVED[node_id, name]
        found["after_removed"] = {"count": len(gone), "saved": saved}
    return found


def renewed(prompt: dict[str, Any], renamed: dict[str, Renamed]) -> None:
    """Bring a prompt in API form up to date, in place."""
    for node in prompt.values():
        if not isinstance(node, dict) or not isinstance(inputs := node.get("inputs"), dict):
            continue
        if new := renamed.get(node.get("class_type", "")):
            node["class_type"] = new.id
            node["inputs"] = inputs = {name: inputs[old] for name, old in new.inputs.items() if old in inputs}
        for name, value in inputs.items():
            known = VALUES.get((node.get("class_type", ""), name))
            # 1 == True, but a whole number was never a value of a switch.
            if known and isinstance(value, bool):
                inputs[name] = known[value]


def renew_prompts(renamed: dict[str, Renamed]) -> None:
    """Let ComfyUI's server, if there is one, pass every prompt through `renewed` before it is checked."""

    def handler(request: dict[str, Any]) -> dict[str, Any]:
        if isinstance(prompt := request.get("prompt"), dict):
            renewed(prompt, renamed)
        return request

    if (server := running_server()) is not None:
        server.add_on_prompt_handler(handler)


async def offer_replacements(renamed: dict[str, Renamed]) -> None:
    """Let ComfyUI's page offer the new node where a workflow has an old one; ComfyUI 0.8 cannot."""
    from comfy_api.latest import ComfyAPI, io

    if not hasattr(io, "NodeReplace"):
        return
    for old, new in renamed.items():
        inputs = [{"new_id": name, "old_id": was} for name, was in new.inputs.items()]
        outputs = [{"new_idx": i, "old_idx": i} for i in range(new.outputs)]
        replacement = io.NodeReplace(new.id, old, list(new.widgets), inputs, outputs)
        try:
            await ComfyAPI().node_replacement.register(replacement)
        except AttributeError as error:
            logging.debug("LongCat: this ComfyUI takes no replacement of nodes: %s", error)
            return
