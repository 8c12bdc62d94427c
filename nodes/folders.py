"""The folders of the long nodes: names with ComfyUI's patterns, inside the output folder, and files that get lost."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from datetime import datetime
from pathlib import Path, PureWindowsPath
from typing import Any, ClassVar

import folder_paths

from ..longcat_core.errors import LongCatError
from ..longcat_core.files.places import bytes_in_words
from ..longcat_core.generate.segment_folder import SegmentFolder
from .declarations import NODES
from .fields import Widget
from .inputs import LongCatNode

# The page and the server replace them in the filename_prefix of ComfyUI's own nodes, but not for nodes of packs.
PATTERN = re.compile(r"%([^%]+)%")
DATE_PART = re.compile(r"yyyy|yy|dd?|MM?|hh?|mm?|ss?")
DAY = "date:yyyy-MM-dd"
DATES = {"date": DAY, "year": "date:yyyy", "month": "date:MM", "day": "date:dd", "hour": "date:hh",
         "minute": "date:mm", "second": "date:ss"}  # fmt: skip
UNSAFE = re.compile(r'[/?<>\\:*|"\x00-\x1F\x7F]')
NODE_NAME = "Node name for S&R"


def is_link(value: Any) -> bool:
    """Whether the value of an input in a prompt is a link to another node's output."""
    return isinstance(value, list)


def written_out(name: str, hidden: Any, width: int, height: int) -> str:
    """A folder's name with its patterns replaced: %date:yyyy-MM-dd%, %year%, %width%, %Node.widget% and so on.

    hidden: of the node that runs, with the prompt and the workflow. Raises LongCatError for a node or a widget that
    the workflow does not have. Any other text between percent signs stays.
    """
    now = datetime.now()

    def replaced(found: re.Match[str]) -> str:
        text = DATES.get(found[1], found[1])
        if text.startswith("date:"):
            return DATE_PART.sub(lambda part: _date_part(part[0], now), text.removeprefix("date:"))
        if text in ("width", "height"):
            return str(width if text == "width" else height)
        node, point, widget = text.rpartition(".")
        return UNSAFE.sub("_", _value(node, widget, hidden)) if point and node else found[0]

    return PATTERN.sub(replaced, name)


def _date_part(letters: str, now: datetime) -> str:
    if letters[0] == "y":
        return f"{now.year:04}"[-len(letters) :]
    value = {"d": now.day, "M": now.month, "h": now.hour, "m": now.minute, "s": now.second}[letters[0]]
    return f"{value:0{len(letters)}}"


def _value(node: str, widget: str, hidden: Any) -> str:
    """What a widget is set to. The node goes by its name for S&R, else its title, else its class, as in the page."""
    prompt = hidden.dynprompt.get_original_prompt() if hidden.dynprompt is not None else {}
    workflow = (hidden.extra_pnginfo or {}).get("workflow") or {}
    named = {str(each["id"]): each.get("properties", {}).get(NODE_NAME) for each in workflow.get("nodes", [])}
    keys = (
        lambda number, each: named.get(number),
        lambda number, each: each.get("_meta", {}).get("title"),
        lambda number, each: each["class_type"],
    )
    for key in keys:
        for number, each in prompt.items():
            if key(number, each) == node and widget in each["inputs"]:
                value = each["inputs"][widget]
                if is_link(value):
                    raise LongCatError(f"folder names %{node}.{widget}%, which is connected; name an input that is set")
                return str(value).lower() if isinstance(value, bool) else str(value)
    raise LongCatError(
        f"folder names %{node}.{widget}%, but the workflow has no node {node!r} with a widget {widget!r}; name the "
        "node by its title, or leave the pattern out"
    )


def names_nodes(name: str) -> bool:
    """Whether a folder's name has patterns that only the whole prompt can tell."""
    return any("." in found and not found.startswith("date:") for found in PATTERN.findall(name))


def output_folder(name: str) -> Path:
    """A folder inside ComfyUI's output folder. Links in there are followed, to another disk for instance.

    Raises LongCatError for an empty name, and for one that leads out.
    """
    root = Path(os.path.abspath(folder_paths.get_output_directory()))
    relative = name.replace("\\", "/").strip()
    # Outside Windows a drive would become a folder of that name, and a home directory does everywhere.
    foreign = relative.startswith("~") or (PureWindowsPath(relative).drive and not Path(relative).drive)
    path = Path(os.path.normpath(root / relative))
    try:
        with suppress(FileNotFoundError, NotADirectoryError):
            os.stat(path)
        inside = path.is_relative_to(root) or path.resolve().is_relative_to(root.resolve())
    except (OSError, ValueError, RuntimeError):  # too long, with a null character, or links in a circle
        inside = False
    if foreign or not inside or path == root:
        raise LongCatError(
            f"folder {name!r} is not inside ComfyUI's output folder; give a name such as longcat/my-video"
        )
    return path


def check_room(path: Path, needed: int) -> None:
    """Raise LongCatError if the disk has less than `needed` bytes for a folder that nothing is in yet."""
    there = next(place for place in (path, *path.parents) if place.exists())
    if there == path and any(path.iterdir()):
        return
    if (free := shutil.disk_usage(there).free) < needed:
        raise LongCatError(
            f"a segment may take {bytes_in_words(needed)}, but the disk of folder {str(path)!r} has "
            f"{bytes_in_words(free)} free; free some space, or name a folder that is a link to another disk"
        )


class Delivered:
    """Which files the outputs of each node read, so that ComfyUI runs a node again once one of them is gone.

    ComfyUI asks for a node's fingerprint before every run: it stays the same while the files are there.
    """

    # Of the last runs: a node and its widgets -> how often files were lost, and the files with their sizes and times.
    _kept: ClassVar[dict[str, tuple[int, dict[Path, tuple[int, int]]]]] = {}
    MOST = 256

    @staticmethod
    def key(node: str, inputs: Mapping[str, Any]) -> str:
        """inputs: of the node in the prompt; what is connected counts as None."""
        known = {name: None if is_link(value) else value for name, value in inputs.items()}
        return json.dumps([node, known], sort_keys=True, default=str)

    @classmethod
    def remember(cls, key: str, files: Iterable[Path]) -> None:
        lost, _ = cls._kept.pop(key, (0, {}))
        while len(cls._kept) >= cls.MOST:
            cls._kept.pop(next(iter(cls._kept)))
        cls._kept[key] = lost, {path: _state(path) for path in files}

    @classmethod
    def fingerprint(cls, key: str) -> int:
        lost, files = cls._kept.get(key, (0, {}))
        if any(_state(path) != state for path, state in files.items()):
            lost += 1
            cls._kept[key] = lost, {}
        return lost


def _state(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
    except OSError:
        return -1, -1
    return found.st_size, found.st_mtime_ns


class FolderNode(LongCatNode):
    """A node that keeps what it made in a folder."""

    @classmethod
    def fingerprint_inputs(cls, **inputs: Any) -> int:
        return Delivered.fingerprint(_key(cls, inputs))

    @classmethod
    def remember(cls, files: list[Path]) -> None:
        """Let ComfyUI run this node again as soon as one of the files is gone or changed."""
        prompt = cls.hidden.dynprompt
        if prompt is not None:
            Delivered.remember(_key(cls, prompt.get_node(cls.hidden.unique_id)["inputs"]), files)


def _key(node: type[LongCatNode], inputs: Mapping[str, Any]) -> str:
    """What a node and its widgets are remembered by."""
    names = [field.name for field in NODES[node.ID].inputs if isinstance(field, Widget)]
    widgets = {name: inputs[name] for name in names if name in inputs}
    return Delivered.key(f"{node.ID} {node.hidden.unique_id}", widgets)


def check_folder(folder: str | None, needed: int, open_folder: Callable[[Path], SegmentFolder]) -> None:
    """Raise LongCatError if it is known that no run can use the folder. needed: bytes of one segment.

    Only a running node knows what patterns of other nodes stand for.
    """
    if folder is None:
        return
    if names_nodes(folder):
        output_folder(PATTERN.sub("x", folder))
        return
    path = output_folder(written_out(folder, None, 0, 0))
    open_folder(path).check_place()
    check_room(path, needed)
