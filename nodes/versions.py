"""The version of an avatar in a model's file, which the page asks for to know how many steps a schedule has."""

from __future__ import annotations

import asyncio
from typing import Any

from .host import running_server
from .widgets import VERSIONS

# Answers ?name=FILE, of ComfyUI's diffusion_models folders, with {"avatar": one of VERSIONS, or ""}.
ROUTE = "/longcat/model"


def version_of(name: str) -> str:
    """The version of the avatar in a file; "" for any other file, also for one that cannot be read."""
    from ..longcat_core.checkpoints.load import open_checkpoint
    from ..longcat_core.errors import LongCatError
    from ..longcat_core.sampling.schedules import is_newer
    from .loaders import find

    try:
        audio = open_checkpoint(find("diffusion_models", name)).config.audio
    except (LongCatError, OSError):
        return ""
    return "" if audio is None else VERSIONS[is_newer(audio)]


def answer_page() -> None:
    """Let ComfyUI's server, if there is one, answer ROUTE."""
    if (server := running_server()) is None:
        return
    from aiohttp import web

    async def handler(request: Any) -> Any:
        # Only headers are read, but of a folder that may be on a slow disk.
        return web.json_response({"avatar": await asyncio.to_thread(version_of, request.query.get("name", ""))})

    server.routes.get(ROUTE)(handler)
