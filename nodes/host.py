"""The ComfyUI server around the nodes, if there is one: other programs load the nodes without it."""

from __future__ import annotations

import sys
from typing import Any


def running_server() -> Any:
    """ComfyUI's PromptServer, or None. Its module is not imported for that, since importing it takes a second."""
    return getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
