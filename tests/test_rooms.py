"""The rooms of the house and who may import whom, read from every import statement of the pack."""

from __future__ import annotations

import ast
import re
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# A room may import the rooms on floors above it in this list, and no other room of its own floor.
FLOORS = (
    ("errors",),
    ("files",),
    ("model",),
    ("optimize",),
    ("checkpoints", "sampling", "vae"),
    ("parallel",),
    ("generate",),
    ("training",),
    ("nano",),
    ("measure",),
    ("benchmark",),
    ("cli",),
)
ROOMS = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
# What a room may import if that is less than the floors above it.
NARROWER = {"files": {"errors"}, "model": {"errors"}}
CLOSED_TO_NODES = {"benchmark", "cli"}
COMFYUI = {"app", "comfy", "comfy_api", "comfy_execution", "comfy_extras", "execution", "folder_paths",
           "latent_preview", "node_helpers", "nodes", "server"}  # fmt: skip
LONGEST = 500

FILES = [path for package in ("longcat_core", "nodes") for path in sorted((ROOT / package).rglob("*.py"))]


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path) for path in FILES}


@cache
def imports_of(path: Path) -> list[tuple[int, str]]:
    """Line and absolute dotted name of everything imported, inside functions and for type checkers too."""
    package, found = path.relative_to(ROOT).parent.parts, []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            # Relative names begin with a dot so that the pack's `nodes` differs from ComfyUI's.
            base = "." + ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            name = ".".join(part for part in (base, node.module) if part)
            found += [(node.lineno, f"{name}.{alias.name}") for alias in node.names]
    return found


def inner_imports(path: Path) -> list[tuple[int, str]]:
    """Line and dotted name of what is imported from this pack."""
    return [(line, name[1:]) for line, name in imports_of(path) if name.startswith(".")]


def room_of(name: str) -> str:
    """errors, files, ... of a module in longcat_core; "" for names of longcat_core itself."""
    return [*name.split("."), "", ""][1] if name.startswith("longcat_core") else name.split(".")[0]


def at(path: Path, line: int, name: str) -> str:
    return f"{path.relative_to(ROOT)}:{line} imports {name}"


def test_every_room_has_a_floor():
    found = {room_of(module_of(path)) for path in FILES} - {"", "__main__", "nodes"}
    assert found == set(ROOMS)


@pytest.mark.parametrize("room", sorted(ROOMS))
def test_rooms_import_only_the_floors_above(room):
    allowed = NARROWER.get(room, {other for other, floor in ROOMS.items() if floor < ROOMS[room]}) | {room}
    wrong = [
        at(path, line, name)
        for path in FILES
        if module_of(path).startswith("longcat_core.") and room_of(module_of(path)) == room
        for line, name in inner_imports(path)
        if name.split(".")[0] != "longcat_core" or (room_of(name) in ROOMS and room_of(name) not in allowed)
    ]
    assert not wrong, "\n".join(wrong)


def test_nodes_import_neither_benchmark_nor_commands():
    wrong = [
        at(path, line, name)
        for path in FILES
        if module_of(path).split(".")[0] == "nodes"
        for line, name in inner_imports(path)
        if name.startswith("longcat_core") and room_of(name) in CLOSED_TO_NODES
    ]
    assert not wrong, "\n".join(wrong)


def test_only_nodes_import_comfyui():
    wrong = [
        at(path, line, name)
        for path in FILES
        if module_of(path).split(".")[0] != "nodes"
        for line, name in imports_of(path)
        if name.split(".")[0] in COMFYUI
    ]
    assert not wrong, "\n".join(wrong)


def test_imports_inside_the_pack_are_relative():
    """ComfyUI loads the pack under another name than tests and the command do."""
    wrong = [
        at(path, line, name) for path in FILES for line, name in imports_of(path) if name.startswith("longcat_core")
    ]
    assert not wrong, "\n".join(wrong)


def test_no_two_files_import_each_other():
    """Not by way of other files either."""
    graph = {}
    for path in FILES:
        module = module_of(path)
        # `from .package import module` is an arrow to the module, `from .module import name` too.
        targets = [name if name in MODULES else name.rpartition(".")[0] for _, name in inner_imports(path)]
        graph[module] = {target for target in targets if target in MODULES and target != module}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_modules_that_tests_in_comfyui_name_exist():
    """They are imported by name, inside a ComfyUI that is not everywhere."""
    named = {
        (path.name, found[1])
        for path in (ROOT / "tests" / "nodes" / "inside").glob("*.py")
        for found in re.finditer(r"\"([a-z]+\.[a-z_0-9]+)\"", path.read_text(encoding="utf-8"))
        if found[1].split(".")[0] in ROOMS
    }
    assert named and not {(file, name) for file, name in named if f"longcat_core.{name}" not in MODULES}


def test_files_can_be_read_in_a_sitting():
    lines = {path.relative_to(ROOT).as_posix(): len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert not {path: count for path, count in lines.items() if count > LONGEST}


def test_rooms_stay_within_their_budgets():
    """The table of rooms in docs/architecture.md gives each a number of lines."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"(?m)^\| `(\w+)` \|.*\| ([\d,]+) \|$", page)
    budgets = {room: int(most.replace(",", "")) for room, most in rows}
    assert budgets.keys() == {*ROOMS, "nodes"}
    lines = dict.fromkeys(budgets, 0)
    for path in FILES:
        module = module_of(path)
        room = "nodes" if module.split(".")[0] == "nodes" else room_of(module)
        if room in lines:
            lines[room] += len(path.read_text(encoding="utf-8").splitlines())
    assert not {room: count for room, count in lines.items() if count > budgets[room]}


def test_the_sampler_loop_can_be_followed():
    """Everything that the file of the loop imports, directly or not, is a small part of the house."""
    files = {module_of(path): path for path in FILES}
    found, waiting = set(), ["longcat_core.sampling.sampler"]
    while waiting:
        module = waiting.pop()
        if module in found:
            continue
        found.add(module)
        names = [name for _, name in inner_imports(files[module])]
        waiting += [name if name in MODULES else name.rpartition(".")[0] for name in names]
    found = {module for module in found if files[module].name != "__init__.py"}
    lines = sum(len(files[module].read_text(encoding="utf-8").splitlines()) for module in found)
    assert len(found) <= 18 and lines <= 2000
