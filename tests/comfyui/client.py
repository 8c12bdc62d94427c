"""Talks to a ComfyUI server as its web page does: prompts by HTTP, progress and previews by websocket."""

from __future__ import annotations

import json
import struct
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import websocket

# Seconds of silence after which a server is taken to hang; no measure of speed.
SILENCE = 300
PREVIEW, TEXT, PREVIEW_WITH_METADATA = 1, 3, 4
ENDS = {
    "execution_success": "success",
    "execution_error": "error",
    "execution_interrupted": "interrupted",
}

Prompt = dict[str, dict[str, Any]]


class Refused(Exception):
    """The server's answer to a prompt that it does not run: {"error": ..., "node_errors": ...}."""

    def __init__(self, answer: dict[str, Any]) -> None:
        super().__init__(json.dumps(answer)[:2000])
        self.answer = answer


@dataclass
class Run:
    """What was told of one prompt, in order.

    status: "success", "error" or "interrupted". end: the data of the message that ended it. progress: (node, step,
    steps) of each step. texts: (node, words) of each text on a node. previews: the JPEG or PNG bytes of each preview.
    states: per node, (state, value, max) in each message that a page draws its bar from. outputs: per node, as in
    /history.
    """

    prompt_id: str
    status: str = ""
    end: dict[str, Any] = field(default_factory=dict)
    progress: list[tuple[str, int, int]] = field(default_factory=list)
    states: dict[str, list[tuple[str, float, float]]] = field(default_factory=dict)
    texts: list[tuple[str, str]] = field(default_factory=list)
    previews: list[bytes] = field(default_factory=list)
    executed: list[str] = field(default_factory=list)
    ends: list[str] = field(default_factory=list)
    outputs: dict[str, Any] = field(default_factory=dict)
    history: dict[str, Any] = field(default_factory=dict)

    def files(self, node: str) -> list[dict[str, str]]:
        """The files {"filename", "subfolder", "type"} that an output node saved, under whichever key."""
        return [
            item
            for value in self.outputs[node].values()
            if isinstance(value, list)
            for item in value
            if isinstance(item, dict) and "filename" in item
        ]


class Client:
    """One web page's connection. Use as a context manager."""

    def __init__(self, url: str, silence: float = SILENCE) -> None:
        self.url, self.id = url, uuid.uuid4().hex
        self.socket = websocket.create_connection(
            f"{url.replace('http', 'ws', 1)}/ws?clientId={self.id}", timeout=silence
        )
        # Without this, previews come without the node they belong to.
        self.socket.send(json.dumps({"type": "feature_flags", "data": {"supports_preview_metadata": True}}))

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def get(self, path: str, **query: str) -> bytes:
        query_string = f"?{urllib.parse.urlencode(query)}" if query else ""
        with urllib.request.urlopen(f"{self.url}{path}{query_string}", timeout=SILENCE) as answer:
            return answer.read()

    def get_json(self, path: str) -> Any:
        return json.loads(self.get(path))

    def post(self, path: str, body: Any) -> bytes:
        request = urllib.request.Request(
            f"{self.url}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=SILENCE) as answer:
            return answer.read()

    def submit(self, prompt: Prompt) -> str:
        """Queue a prompt in API form and return its id. Raises Refused if the server finds fault with it."""
        try:
            return json.loads(self.post("/prompt", {"prompt": prompt, "client_id": self.id}))["prompt_id"]
        except urllib.error.HTTPError as error:
            raise Refused(json.loads(error.read())) from error

    def interrupt(self, prompt_id: str) -> None:
        self.post("/interrupt", {"prompt_id": prompt_id})

    def run(self, prompt: Prompt, on_progress: Callable[[Run], None] | None = None) -> Run:
        """Submit a prompt and read messages until it has ended. `on_progress` is called after each step's message."""
        run = Run(self.submit(prompt))
        while not run.status:
            message = self.socket.recv()
            if isinstance(message, bytes):
                self._picture(message, run)
            else:
                self._event(json.loads(message), run, on_progress)
        entry = self._history(run.prompt_id)
        run.history, run.outputs = entry["status"], entry["outputs"]
        return run

    def _history(self, prompt_id: str) -> dict[str, Any]:
        # The entry is written just after the last message; the queue is empty once it is there.
        while prompt_id not in (history := self.get_json(f"/history/{prompt_id}")):
            pass
        return history[prompt_id]

    def _event(self, message: dict[str, Any], run: Run, on_progress: Callable[[Run], None] | None) -> None:
        kind, data = message["type"], message.get("data", {})
        if data.get("prompt_id") != run.prompt_id:
            return
        if kind == "progress":
            run.progress.append((data["node"], data["value"], data["max"]))
            if on_progress:
                on_progress(run)
        elif kind == "progress_state":
            for node, state in data["nodes"].items():
                run.states.setdefault(node, []).append((state["state"], state["value"], state["max"]))
        elif kind == "executing" and data.get("node"):
            run.executed.append(data["node"])
        elif kind in ENDS:
            run.status, run.end = ENDS[kind], data
            run.ends.append(kind)

    @staticmethod
    def _picture(message: bytes, run: Run) -> None:
        (kind,) = struct.unpack(">I", message[:4])
        if kind == TEXT:
            (length,) = struct.unpack(">I", message[4:8])
            run.texts.append((message[8 : 8 + length].decode(), message[8 + length :].decode()))
        elif kind == PREVIEW:
            run.previews.append(message[8:])
        elif kind == PREVIEW_WITH_METADATA:
            (length,) = struct.unpack(">I", message[4:8])
            if json.loads(message[8 : 8 + length])["prompt_id"] == run.prompt_id:
                run.previews.append(message[8 + length :])

    def video(self, file: dict[str, str]) -> bytes:
        return self.get(
            "/view", filename=file["filename"], subfolder=file.get("subfolder", ""), type=file.get("type", "output")
        )
