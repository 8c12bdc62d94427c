"""What a node shows while it works: one bar for its whole task, words under it, and pictures. Needs no server."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

import comfy.model_management
import comfy.utils
from comfy_execution.progress import PreviewImageTuple, get_progress_state
from comfy_execution.utils import get_executing_context

from ..longcat_core.generate.progress import Part, Progress
from .host import running_server

# The node that works in this thread, if it is one of ours.
RUNNING: ContextVar[NodeProgress | None] = ContextVar("longcat_running", default=None)
# Seconds between two texts while nothing but the step changes.
WORDS_EVERY = 0.5
# Work of fewer seconds is done before anybody could read what it is.
QUICK = 1.0


class Ends(Protocol):
    """Something that plays beside the work and has to end with it."""

    def end(self) -> None: ...


class NodeProgress:
    """The bar and the words of one node; a context manager around its work.

    At its end the words say what the work took, or where it was interrupted: a page may keep showing the last ones.
    """

    def __init__(self, parts: Sequence[Part] = (), **options: Any) -> None:
        """parts, options: those of `Progress`."""
        context = get_executing_context()
        self.node = None if context is None else context.node_id
        self.registry = get_progress_state()
        # Also held by what plays pictures in another thread.
        self.lock = threading.RLock()
        self.player: Ends | None = None
        self.entered = False
        self._bar: comfy.utils.ProgressBar | None = None
        self._done, self._picture = 0, None
        self._words, self._said, self._where = "", 0.0, (-1, "")
        self.task = Progress(parts, self._show, **options)

    def __enter__(self) -> NodeProgress:
        self.entered, self._token = True, RUNNING.set(self)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        self.entered = False
        RUNNING.reset(self._token)
        self.play(None)
        if not (self._words or (self.task.parts and error is None)):
            return
        if error is None:
            self._say(self.task.summary())
        else:
            interrupted = isinstance(error, comfy.model_management.InterruptProcessingException)
            self._say(self.task.stopped("interrupted" if interrupted else "stopped"))

    def step(self, done: int, steps: int, picture: PreviewImageTuple | None = None) -> None:
        """A step of the current part is finished. Raises ComfyUI's exception if the user interrupted it."""
        self._picture = picture
        self.task.step(done, steps)

    def show(self, picture: PreviewImageTuple) -> None:
        """Show a picture instead of what plays."""
        self.play(None)
        with self.lock:
            self._update(picture)

    def play(self, player: Ends | None) -> None:
        """End what plays, and remember what plays now."""
        before, self.player = self.player, player
        if before is not None:
            before.end()

    @property
    def heard(self) -> bool:
        """Whether pictures between two steps reach anybody."""
        return self.entered and self.node is not None and bool(self.registry.handlers)

    def send(self, picture: PreviewImageTuple) -> None:
        """Show a picture from another thread. This does not look for an interrupt, which the node's thread must see."""
        if self.heard:
            self.registry.update_progress(self.node, self._done, self.task.total, picture)

    def _show(self, task: Progress) -> None:
        where, now = (task.number, task.current), time.monotonic()
        if where != self._where or now - self._said >= WORDS_EVERY:
            self._where, self._said = where, now
            self._say(task.words)
        with self.lock:
            picture, self._picture = self._picture, None
            if task.parts and (picture is not None or task.done > self._done):
                self._update(picture)

    def _update(self, picture: PreviewImageTuple | None) -> None:
        if self._bar is None:
            self._bar = comfy.utils.ProgressBar(self.task.total, self.node)
        self._done = self.task.done
        self._bar.update_absolute(self._done, self.task.total, picture)

    def _say(self, words: str) -> None:
        if words and words != self._words:
            self._words = words
            server = running_server()
            if server is not None and self.node is not None:
                server.send_progress_text(words, self.node, server.client_id)


def begins(phase: str) -> None:
    """Say what the running node begins; "" for the steps."""
    running = RUNNING.get()
    if running is not None:
        running.task.phase(phase)


@contextmanager
def working(phase: str) -> Iterator[None]:
    """Say what a node does that has no steps, and at the end how long it took, if it takes longer than QUICK."""
    with NodeProgress() as shown:
        ended = threading.Event()

        def say() -> None:
            with shown.lock:
                if not ended.is_set():
                    shown.task.phase(phase)

        timer = threading.Timer(QUICK, say)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
            with shown.lock:
                ended.set()
