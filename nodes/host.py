"""What is there around a node, without importing it: ComfyUI's server, and the processes on other GPUs."""

from __future__ import annotations

import sys
from typing import Any


def running_server() -> Any:
    """ComfyUI's PromptServer, or None. Its module is not imported for that, since importing it takes a second."""
    return getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)


def running_workers() -> Any:
    """The `Workers` of `comfy_ranks`, or None if no MODEL has used several GPUs: it imports torch.distributed."""
    return getattr(sys.modules.get(f"{__package__}.comfy_ranks"), "WORKERS", None)
