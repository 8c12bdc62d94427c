"""Write a video in a thread while its frames are still made, so that neither waits for the other."""

from __future__ import annotations

import ctypes
import queue
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType

import numpy as np

from .samples import Sound
from .writing import write_video

# Frames, uint8 [F, H, W, 3], or what reads them, which the writer calls.
Clip = np.ndarray | Callable[[], np.ndarray]
# Clips that may wait for the encoder; whoever makes more waits too, so that memory stays flat.
WAITING = 4


class _GivenUp(Exception):
    """Ends the writer's work without a file."""


class VideoBeside:
    """A context manager around the making of a video: `add` its clips, and at the end of the block the file is there.

    path: of the file, or what returns it, called with the first clip. fps, sound: see `write_video`. If the block ends
    with an error, no file appears. `add` and the end of the block raise what `write_video` raises.
    seconds: after the block, how long the writer worked, without its waiting for clips.
    """

    def __init__(
        self, path: str | Path | Callable[[], str | Path], fps: float, sound: str | Path | Sound | None = None
    ) -> None:
        self._path, self._fps, self._sound = path, fps, sound
        self._clips: queue.Queue[Clip | BaseException | None] = queue.Queue(WAITING)
        self._failed: BaseException | None = None
        self.seconds = 0.0
        self._thread: threading.Thread | None = None
        # In place of `Thread.join`, which takes a thread for ended once a signal has interrupted it (CPython 3.11).
        self._ended = threading.Event()

    def add(self, clip: Clip) -> None:
        """The next frames, uint8 [F, H, W, 3], which the caller does not change any more, or what reads them."""
        self._begin()
        self._put(clip)
        if self._failed is not None:
            raise self._failed

    def __enter__(self) -> VideoBeside:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            # Without any clip the writer says so.
            self._begin()
        if self._thread is not None:
            try:
                self._put(None if error is None else _GivenUp())
                # A signal that arrives as a wait begins is seen only when that wait ends.
                while not self._ended.wait(0.1):
                    pass
            except BaseException:
                self._give_up(self._thread)
                raise
        if error is None and self._failed is not None:
            raise self._failed

    def _give_up(self, thread: threading.Thread) -> None:
        """End a writer that encodes what it has, so that it removes its unfinished file before this process ends."""
        if thread.ident is not None:
            # Some encoders work only when all frames are there, so the writer cannot ask in between.
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(_GivenUp))
        self._ended.wait()

    def _begin(self) -> None:
        if self._thread is None:
            path = self._path() if callable(self._path) else self._path
            self._thread = threading.Thread(target=self._write, args=(path,), name="writing a video", daemon=True)
            self._thread.start()

    def _put(self, clip: Clip | BaseException | None) -> None:
        """Hand over a clip, unless the writer has failed and takes none any more."""
        while self._failed is None:
            try:
                return self._clips.put(clip, timeout=0.1)
            except queue.Full:
                continue

    def _write(self, path: str | Path) -> None:
        self.seconds -= time.monotonic()
        try:
            write_video(path, self._taken(), self._fps, self._sound)
        except _GivenUp:
            pass
        except BaseException as error:
            self._failed = error
        finally:
            self.seconds += time.monotonic()
            self._ended.set()

    def _taken(self) -> Iterator[np.ndarray]:
        while (clip := self._next()) is not None:
            if isinstance(clip, BaseException):
                raise clip
            yield clip() if callable(clip) else clip

    def _next(self) -> Clip | BaseException | None:
        began = time.monotonic()
        clip = self._clips.get()
        self.seconds -= time.monotonic() - began
        return clip
