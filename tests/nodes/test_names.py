"""What nodes import of each other and of the core exists. Nothing else sees that where ComfyUI is not installed."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

NODES = Path(__file__).parents[2] / "nodes"
MODULES = sorted(path.stem for path in NODES.glob("*.py"))


def tree_of(module: str) -> ast.Module:
    return ast.parse((NODES / f"{module}.py").read_text(encoding="utf-8"))


def defined(module: str) -> set[str]:
    """The names that a module of nodes has by itself or imports."""
    found = set()
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found |= {alias.asname or alias.name for alias in node.names}
    return found


def imported(module: str) -> Iterator[tuple[str, str]]:
    """(module, name) of all that a module of nodes imports of the pack: of its own folder ("" for that) or the core."""
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.ImportFrom) and node.level:
            yield from ((node.module or "", alias.name) for alias in node.names)


@pytest.mark.parametrize("module", MODULES)
def test_imported_names_exist(module):
    for source, name in imported(module):
        if source.startswith("longcat_core"):
            assert hasattr(import_module(source), name) or import_module(f"{source}.{name}")
        else:
            assert name in (defined(source) if source else MODULES), (source, name)
