"""How much of a card's memory was in use while something ran, by all processes."""

from __future__ import annotations

import threading
from types import TracebackType

import torch

INTERVAL = 0.05


class Watch:
    """Use as a context manager, again and again. peak_gib: most of the card's memory in use inside, over what was in
    use when the watch was made; None on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.peak_gib = device, None
        self.before = self._used() if device.type == "cuda" else 0
        self.stop = threading.Event()
        self.thread: threading.Thread | None = None

    def _used(self) -> int:
        free, total = torch.cuda.mem_get_info(self.device)
        return total - free

    def _watch(self) -> None:
        most = 0
        while True:
            most = max(most, self._used() - self.before)
            self.peak_gib = most / 2**30
            if self.stop.wait(INTERVAL):
                return

    def __enter__(self) -> Watch:
        if self.device.type == "cuda":
            self.stop.clear()
            self.thread = threading.Thread(target=self._watch, daemon=True)
            self.thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.thread is not None:
            self.stop.set()
            self.thread.join()
            self.thread = None
