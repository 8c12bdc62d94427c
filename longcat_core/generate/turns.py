"""Turns: one thread at a time works with a pipeline, whose network, VAE and plan change while it runs."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import LongCatError
from ..sampling.sampler import Callback, Step


class Turns:
    """Other threads wait for their turn; the thread that has it may take it again, except from a callback."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._in_callback = False

    @contextmanager
    def take(self) -> Iterator[None]:
        """Wait for the turn and hold it. Raises LongCatError inside a callback of the work that holds it."""
        with self._lock:
            # Read while the lock is held: if it is set, the callback runs in this very thread.
            if self._in_callback:
                raise LongCatError(
                    "a callback uses the pipeline that is calling it; use the pipeline after the call returns, or load "
                    "a second one"
                )
            yield

    def guard(self, callback: Callback | None) -> Callback | None:
        """`callback`, during which `take` refuses."""
        if callback is None:
            return None

        def guarded(step: Step) -> None:
            self._in_callback = True
            try:
                callback(step)
            finally:
                self._in_callback = False

        return guarded
