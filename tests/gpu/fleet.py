"""Real ComfyUI servers side by side, one for each way to use the card's memory, each with a queue of prompts."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import websocket

from longcat_core.files.media import read_video
from longcat_core.files.safetensors_io import read_tensors

from ..comfyui.client import Client, Refused, Run
from ..comfyui.server import Installation, Server
from ..support.python_path import python_path
from .cells import CPU, DYNAMIC, HELD, NOVRAM, STATIC
from .graphs import Prompt

GIB = 2**30
HELD_GIB = 12
# Less than the wide network's weights and activations, so that they are streamed.
SMALL, SMALL_GIB = "held to 3 GB", 3
# Compiling is the longest that a server says nothing.
SILENCE = 120
# What PyTorch says when the CUDA context of a process is lost.
SPOILED = ("CUDA error", "illegal memory access", "device-side assert")


@dataclass(frozen=True)
class Seen:
    """What came of a prompt. status: "success", "error" (of a node), "refused" (by the server before it ran) or
    "crash" (the server ended, hung or did not start). said: the sentence that goes with the last three."""

    status: str
    said: str = ""
    node: str = ""
    frames: np.ndarray | None = None
    seconds: float = 0.0


def flags(mode: str, total_bytes: int, installation: Installation) -> tuple[str, ...]:
    """The command line of a mode on a card of `total_bytes`."""
    if mode in (HELD, SMALL):
        kept = max(0.0, total_bytes / GIB - (HELD_GIB if mode == HELD else SMALL_GIB))
        known = (installation.path / "comfy" / "cli_args.py").read_text(encoding="utf-8")
        # Dynamic VRAM leaves its own headroom and does not look at the reserve, which rules everything else.
        headroom = ("--vram-headroom", f"{kept:.2f}") if "--vram-headroom" in known else ()
        return ("--reserve-vram", f"{kept:.2f}", *headroom)
    return {DYNAMIC: (), STATIC: (STATIC,), NOVRAM: (NOVRAM,), CPU: (CPU,)}[mode]


def dummy_page(folder: Path, installation: Installation) -> tuple[str, ...]:
    """--front-end-root with an empty page, where the package of ComfyUI's page is not installed."""
    if os.environ.get("COMFYUI_FRONTEND"):
        return ()
    probe = subprocess.run([installation.python, "-c", "import comfyui_frontend_package"], capture_output=True)
    if not probe.returncode:
        return ()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "index.html").write_text("<!doctype html><title>ComfyUI without its page</title>\n", encoding="utf-8")
    return ("--front-end-root", str(folder))


class Booted:
    """A server of a mode, started when it is first needed and again after it ended."""

    def __init__(self, server: Server) -> None:
        self.server, self.client, self.closed = server, None, False

    def ready(self) -> Client:
        """The connection to the running server. RuntimeError if it does not start."""
        if self.client is None:
            if self.closed:
                raise RuntimeError("the run is over")
            self.server.start()
            self.client = Client(self.server.url, silence=SILENCE)
        return self.client

    def drop(self) -> None:
        """End the server; the next prompt starts it again."""
        if self.client is not None:
            self.client.socket.close()
        self.client = None
        self.server.stop()

    def run(self, prompts: Sequence[Prompt]) -> Seen:
        """Run prompts in order up to the first that fails; the node "save" of the last one keeps frames. Never raises:
        what goes wrong is in the answer."""
        started = time.monotonic()
        seen = Seen("error", "nothing to run")
        for prompt in prompts:
            try:
                seen = self._run(prompt)
            except (OSError, RuntimeError, ValueError, LookupError, websocket.WebSocketException) as error:
                # A server that died shows it by a closed connection; what it printed last says why.
                end = self.server.log.strip().splitlines()[-1:] if self.server.log_path.exists() else []
                with contextlib.suppress(AttributeError):  # the run is over, which stops it as well
                    self.drop()
                seen = Seen("crash", " | ".join([f"{type(error).__name__}: {str(error)[-300:]}", *end]))
            if seen.status != "success":
                break
        if any(words in seen.said for words in SPOILED):
            # Every later prompt of this process would fail as well.
            self.drop()
        return replace(seen, seconds=time.monotonic() - started)

    def _run(self, prompt: Prompt) -> Seen:
        client = self.ready()
        try:
            run = client.run(prompt)
        except Refused as refused:
            return Seen("refused", sentence(refused.answer), next(iter(refused.answer.get("node_errors") or {}), ""))
        if run.status != "success":
            said = " ".join(str(run.end.get("exception_message", run.status)).split())
            return Seen("error", said[:400], str(run.end.get("node_id", "")))
        return Seen("success", frames=self._frames(run) if "save" in prompt else None)

    def _frames(self, run: Run) -> np.ndarray:
        """The frames of a video, uint8 [F, H, W, 3], or latents, fp32 [B, C, T, H, W]."""
        (file,) = run.files("save")
        path = self.server.base / file.get("type", "output") / file.get("subfolder", "") / file["filename"]
        if path.suffix == ".latent":
            return read_tensors(path)["latent_tensor"].float().numpy()
        frames, _ = read_video(path)
        path.unlink()
        return frames


def sentence(answer: dict) -> str:
    """What a server says of a prompt that it does not run, in one line."""
    found = [error["details"] for part in (answer.get("node_errors") or {}).values() for error in part["errors"]]
    error = answer.get("error")
    return " | ".join(found) or (error.get("message", str(error)) if isinstance(error, dict) else str(error))


class Fleet:
    """Makes servers over folders inside `folder`, which share the models in `models`."""

    def __init__(self, installation: Installation, folder: Path, models: Path, total_bytes: int) -> None:
        self.installation, self.folder, self.models, self.total_bytes = installation, folder, models, total_bytes
        self.page = dummy_page(folder / "page", installation)
        self.made: dict[str, Booted] = {}

    def server(self, mode: str, name: str = "", threads: int = 0) -> Booted:
        """A server of a mode, not yet started, under a name of its own. threads: of PyTorch on the CPU; 0: its own
        choice."""
        name = name or mode.strip("-").replace(" ", "-")
        base = self.folder / name
        (base / "models").mkdir(parents=True)
        for kind in ("diffusion_models", "loras"):
            (base / "models" / kind).symlink_to(self.models / kind, target_is_directory=True)
        options = (*flags(mode, self.total_bytes, self.installation), *self.page)
        server = Server(self.installation, base, flags=options, cpu=False, more=environment(threads))
        self.made[name] = Booted(server)
        return self.made[name]

    def end(self, logs: Path) -> None:
        """Stop all servers, keep their logs in `logs` and remove what they wrote."""
        for booted in self.made.values():
            # Its thread may still wait for an answer; it must not start the server again.
            booted.closed = True
        for name, booted in self.made.items():
            with contextlib.suppress(AttributeError):  # its thread stopped it meanwhile
                booted.drop()
            if booted.server.log_path.exists():
                (logs / f"{name}.log").write_bytes(booted.server.log_path.read_bytes())
            booted.server.remove()


def environment(threads: int) -> dict[str, str]:
    """What the servers of the matrix see beside what those of tests/comfyui see: packages that were unpacked for a
    machine without a network lie on the Python path."""
    return python_path() | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
