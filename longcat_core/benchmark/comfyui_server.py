"""ComfyUI's server in a process of its own, over a temporary folder that has this pack among its custom nodes."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import struct
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import LongCatError

PACK = Path(__file__).parents[2]
PACK_NAME = "longcat-video"
HOST = "127.0.0.1"
# Of a start on a cold disk, and of silence while a prompt runs; a server that has ended is noticed at once.
START_SECONDS, SILENCE = 600.0, 900.0
# How many lines of the server's log an error repeats.
LAST_LINES = 3
# The type of the server's binary messages that hold a node's words.
TEXT = 3
# A line of ComfyUI's list of what importing custom nodes took.
PACK_SECONDS = re.compile(rf"([\d.]+) seconds[^:]*: .*{re.escape(PACK_NAME)}\s*$", re.MULTILINE)


def free_port(wanted: int | None) -> int:
    """`wanted`, or any port that is free. Raises LongCatError if it is taken."""
    with socket.socket() as probe:
        # A server that has just ended does not hold its port.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, wanted or 0))
        except OSError as error:
            raise LongCatError(f"port {wanted} is taken; give another one") from error
        return probe.getsockname()[1]


@dataclass
class Events:
    """What the server said of a prompt, in order, each with the seconds since it was queued. nodes: which node
    begins. progress: (node, done, of). words: (node, text). end: when all was done."""

    nodes: list[tuple[float, str]] = field(default_factory=list)
    progress: list[tuple[float, str, int, int]] = field(default_factory=list)
    words: list[tuple[float, str, str]] = field(default_factory=list)
    end: float = 0.0


class Server:
    """ComfyUI's process over a temporary folder; a context manager that ends it and removes the folder."""

    def __init__(self, checkout: Path, python: Path, files: Mapping[str, Sequence[Path]], port: int, cpu: bool) -> None:
        """files: folder of `models` -> files and folders of shards that it has. cpu: leave GPUs alone."""
        self.checkout, self.python, self.files, self.port, self.cpu = checkout, python, files, port, cpu
        self.url = f"http://{HOST}:{port}"
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Server:
        self.base = Path(tempfile.mkdtemp(prefix="longcat-comfyui-"))
        try:
            self._fill()
        except BaseException as error:
            self.__exit__()
            if isinstance(error, OSError):
                raise LongCatError(
                    f"{self.base} takes no links ({error}); measuring ComfyUI needs a temporary folder that does"
                ) from error
            raise
        return self

    def _fill(self) -> None:
        for folder in ("custom_nodes", "input", "output", "temp", "user", "page"):
            (self.base / folder).mkdir()
        (self.base / "page" / "index.html").write_text("<!doctype html>\n", encoding="utf-8")
        (self.base / "custom_nodes" / PACK_NAME).symlink_to(PACK, target_is_directory=True)
        for kind, paths in self.files.items():
            place = self.base / "models" / kind
            place.mkdir(parents=True)
            for path in map(Path.absolute, paths):
                (place / path.name).symlink_to(path, target_is_directory=path.is_dir())

    def __exit__(self, *_: object) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        # The link goes first, lest the pack be emptied.
        (self.base / "custom_nodes" / PACK_NAME).unlink(missing_ok=True)
        shutil.rmtree(self.base, ignore_errors=True)

    def start(self) -> tuple[float, float]:
        """Start, and wait until it answers; the seconds that this took, and those that importing this pack took."""
        options = ("--listen", HOST, "--port", str(self.port), "--disable-api-nodes", "--disable-auto-launch")
        # ComfyUI 0.8 would keep its database in the checkout.
        places = ("--base-directory", str(self.base), "--front-end-root", str(self.base / "page"))
        database = ("--database-url", f"sqlite:///{self.base / 'user' / 'comfyui.db'}")
        command = [str(self.python), "main.py", *options, *places, *database, *(["--cpu"] if self.cpu else [])]
        # Nothing is written into the checkout, and nothing is downloaded.
        quiet = {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1"}
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | quiet
        # As after a first start, which leaves compiled sources; where the pack cannot be written to, they are missing.
        sources = [str(PACK / name) for name in ("__init__.py", "longcat_core", "nodes")]
        subprocess.run([str(self.python), "-m", "compileall", "-q", *sources], stdout=subprocess.DEVNULL, check=False)
        began = time.perf_counter()
        with (self.base / "log").open("wb") as log:
            self.process = subprocess.Popen(
                command, cwd=self.checkout, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        while not self._answers():
            self.check_alive()
            if time.perf_counter() - began > START_SECONDS:
                raise LongCatError(f"ComfyUI did not answer within {START_SECONDS:g} s; {self._last()}")
            time.sleep(0.05)
        wall = time.perf_counter() - began
        found = PACK_SECONDS.search(self._log())
        return wall, float(found[1]) if found else 0.0

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/system_stats", timeout=10):
                return True
        except OSError:
            return False

    def _log(self) -> str:
        return (self.base / "log").read_text(encoding="utf-8", errors="replace")

    def _last(self) -> str:
        lines = [line.strip() for line in self._log().splitlines() if line.strip()]
        return f"its last lines: {' | '.join(lines[-LAST_LINES:])}" if lines else "it printed nothing"

    def check_alive(self) -> None:
        """Raise LongCatError with its last lines if the server has ended."""
        code = None if self.process is None else self.process.poll()
        if code is not None:
            raise LongCatError(f"ComfyUI ended with exit code {code}; {self._last()}")

    def check_nodes(self, prompt: Mapping[str, dict[str, Any]]) -> None:
        """Raise LongCatError for a node of the prompt that this ComfyUI lacks."""
        with urllib.request.urlopen(f"{self.url}/object_info", timeout=SILENCE) as answer:
            known = json.load(answer)
        for kind in sorted({node["class_type"] for node in prompt.values()} - known.keys()):
            if kind.startswith("LongCat"):
                raise LongCatError(f"ComfyUI did not load the pack's node {kind}; {self._last()}")
            raise LongCatError(f"this ComfyUI has no node {kind}; update ComfyUI")

    def run(self, prompt: Mapping[str, dict[str, Any]]) -> Events:
        """Queue a prompt, and read messages until it has ended."""
        import websocket

        client, events = uuid.uuid4().hex, Events()
        try:
            page = websocket.create_connection(f"ws://{HOST}:{self.port}/ws?clientId={client}", timeout=1)
        except OSError as error:
            self.check_alive()
            raise LongCatError(f"ComfyUI takes no connection ({error}); {self._last()}") from error
        try:
            page.send(json.dumps({"type": "feature_flags", "data": {"supports_preview_metadata": True}}))
            began = time.perf_counter()
            number, heard = self._queue(prompt, client), time.perf_counter()
            while not events.end:
                try:
                    message = page.recv()
                except websocket.WebSocketTimeoutException:
                    self.check_alive()
                    if time.perf_counter() - heard > SILENCE:
                        raise LongCatError(f"ComfyUI said nothing for {SILENCE:g} s; {self._last()}") from None
                    continue
                except (OSError, websocket.WebSocketException) as error:
                    # The connection breaks a moment before the process is gone.
                    with suppress(subprocess.TimeoutExpired):
                        self.process and self.process.wait(timeout=5)
                    self.check_alive()
                    raise LongCatError(f"the connection to ComfyUI broke ({error}); {self._last()}") from error
                heard = time.perf_counter()
                self._read(message, number, heard - began, events)
        finally:
            page.close()
        return events

    def _queue(self, prompt: Mapping[str, dict[str, Any]], client: str) -> str:
        body = json.dumps({"prompt": prompt, "client_id": client}).encode()
        request = urllib.request.Request(f"{self.url}/prompt", body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=SILENCE) as answer:
                return str(json.load(answer)["prompt_id"])
        except urllib.error.HTTPError as error:
            answer = json.loads(error.read() or b"{}")
            details = [each for node in answer.get("node_errors", {}).values() for each in node["errors"]]
            words = details[0].get("details") or details[0]["message"] if details else answer.get("error")
            raise LongCatError(f"ComfyUI refused the workflow: {words}") from error

    @staticmethod
    def _read(message: str | bytes, number: str, at: float, events: Events) -> None:
        if isinstance(message, bytes):
            if len(message) >= 8 and struct.unpack(">I", message[:4])[0] == TEXT:
                (length,) = struct.unpack(">I", message[4:8])
                node, words = message[8 : 8 + length], message[8 + length :]
                events.words.append((at, node.decode(), words.decode()))
            return
        event = json.loads(message)
        kind, data = event["type"], event.get("data", {})
        if data.get("prompt_id") != number:
            return
        if kind == "executing" and data.get("node"):
            events.nodes.append((at, data["node"]))
        elif kind == "progress":
            events.progress.append((at, data["node"], data["value"], data["max"]))
        elif kind == "execution_success":
            events.end = at
        elif kind in ("execution_error", "execution_interrupted"):
            words = data.get("exception_message", "it was interrupted").strip()
            raise LongCatError(f"the prompt failed in ComfyUI at {data.get('node_type', 'a node')}: {words}")
