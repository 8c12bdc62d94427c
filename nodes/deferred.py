"""Node classes whose family is imported when one of its nodes is first checked or run.

ComfyUI starts with declarations alone: the network, the kernels and the measuring behind the nodes would be most of
the pack's share of its start.
"""

from __future__ import annotations

import importlib
from types import MethodType
from typing import Any

from .inputs import LongCatNode


def deferred(family: str, node_id: str) -> type[LongCatNode]:
    """The node `node_id` of the module `family`, as ComfyUI registers it."""
    # ComfyUI looks for these in each class's own dict, and for `execute` already when it registers the class.
    methods = {name: _Late() for name in ("validate_inputs", "fingerprint_inputs")}
    return type(node_id, (_Deferred,), {"ID": node_id, "FAMILY": family, "execute": classmethod(_execute), **methods})


class _Deferred(LongCatNode):
    FAMILY: str

    @classmethod
    def real(cls) -> type[LongCatNode]:
        """The class of the family."""
        family = importlib.import_module(f".{cls.FAMILY}", __package__)
        return next(node for node in family.NODES if node.ID == cls.ID)


class _Late:
    """A class method that the real class has, or inherits from ComfyUI's, which then takes it for missing. ComfyUI
    also reads the names of its arguments."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, _: Any, owner: type[_Deferred]) -> MethodType:
        return MethodType(getattr(owner.real(), self.name).__func__, owner)


def _execute(cls: type[_Deferred], **inputs: Any) -> Any:
    real = cls.real()
    # What runs is a class of its own, because `hidden` belongs to one run.
    return type(real.__name__, (real,), {"hidden": cls.hidden}).execute(**inputs)
