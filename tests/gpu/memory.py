"""How much of a card's memory each process held at most."""

from __future__ import annotations

import subprocess
import threading

INTERVAL = 0.2
QUERY = ("nvidia-smi", "--query-compute-apps=pid,used_gpu_memory", "--format=csv,noheader,nounits")


class Meter:
    """Asks the driver several times a second. Where it does not tell processes apart, it knows of none."""

    def __init__(self, query: tuple[str, ...] = QUERY) -> None:
        self.query, self.most = query, {}
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)

    def start(self) -> Meter:
        self.thread.start()
        return self

    def stop(self) -> None:
        self.stopped.set()

    def _watch(self) -> None:
        while not self.stopped.wait(INTERVAL):
            try:
                self.take(subprocess.run(self.query, capture_output=True, text=True, timeout=10).stdout)
            except (OSError, subprocess.TimeoutExpired):
                return

    def take(self, text: str) -> None:
        """Read what the driver said: a line "pid, MiB" for each process."""
        for line in text.splitlines():
            pid, _, mib = (part.strip() for part in line.partition(","))
            if pid.isdigit() and mib.isdigit():
                self.most[int(pid)] = max(self.most.get(int(pid), 0), int(mib))

    def reset(self, pid: int) -> None:
        self.most.pop(pid, None)

    def peak_gib(self, pid: int) -> float | None:
        """Since the last reset; None if the driver did not name the process."""
        return self.most[pid] / 1024 if pid in self.most else None
