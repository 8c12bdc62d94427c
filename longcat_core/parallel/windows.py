"""Windows: memory of each rank that the other ranks of its machine write into (MPI's word for it).

GPUs that reach each other's memory need no messages: a rank copies what another one computes with straight to where
that one reads it. The windows of GPUs are PyTorch's symmetric memory, those of processes on a CPU are files in memory.
"""

from __future__ import annotations

import math
import socket
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

from ..optimize.shared_memory import Place, can_share, mapped, shared
from .group import TIMEOUT
from .weights import agreed

# What tells a machine from another one of the same name.
BOOT = Path("/proc/sys/kernel/random/boot_id")
# Bytes that a trial writes to each rank.
TRIAL = 1 << 16
# How long ranks wait for each other in a trial.
PATIENCE = timedelta(seconds=20)
# What making windows raises where this is not possible. Older versions of PyTorch lack symmetric memory.
IMPOSSIBLE = (AttributeError, ImportError, OSError, RuntimeError, TypeError)
# Windows of GPUs that this process has made. PyTorch counts them (2.11), and ranks that have counted to other numbers
# do not find each other, as when a process starts a second group of new processes.
_made = 0
# How many of a GPU's multiprocessors may write into another GPU while the rest compute, and how many do while nothing
# else is to be done.
PROGRAMS, ALL_PROGRAMS = (8, 16, 32), 128


class Windows:
    """Those of a process group. All of its ranks call each method, in the same order."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        """device: this rank's."""
        self.group, self.device = group, device
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        # How many of `PROGRAMS` write while others compute, until the links are measured.
        self.programs = PROGRAMS[-1]
        # Of every rank, as bytes that this one can write, and what keeps them alive.
        self._held: dict[Hashable, tuple[list[Tensor], Any]] = {}
        self._number = torch.zeros(1, device=device)
        # Copies go first, because they wait for a link and leave most of the GPU to what computes meanwhile.
        self._stream = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None
        self._second = torch.cuda.Stream(device) if device.type == "cuda" else None

    @property
    def others(self) -> list[int]:
        """The other ranks, from the next one on, so that no two write to one at the same time."""
        return [(self.rank + i) % self.size for i in range(1, self.size)]

    def of(self, name: Hashable, shape: Sequence[int], dtype: torch.dtype) -> list[Tensor]:
        """The window with that name of each rank as a tensor, whose values are undefined until they are written.

        What was written before `arrived` is there after it. Nobody may write what is still read: a further `arrived`
        tells when all ranks have read.
        """
        count = math.prod(shape) * dtype.itemsize
        if name not in self._held or len(self._held[name][0][0]) < count:
            if name in self._held:
                self._idle()
                del self._held[name]
            self._held[name] = self._mapped(max(count, 1))
        return [window[:count].view(dtype).view(*shape) for window in self._held[name][0]]

    @property
    def nbytes(self) -> int:
        """Of this rank's memory that windows take, which PyTorch's allocator does not count."""
        return sum(len(windows[self.rank]) for windows, _ in self._held.values())

    def arrived(self) -> None:
        """Wait until all ranks have written what they had to; on a GPU, its current stream waits."""
        # A collective ends in one rank after it has begun in all. NCCL's also ends when the group is aborted, unlike a
        # kernel that waits for a rank by itself.
        dist.all_reduce(self._number, group=self.group)

    @contextmanager
    def beside(self) -> Iterator[None]:
        """What the block starts on a GPU runs beside what comes after it, until `join`, and after what came before."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            yield

    @contextmanager
    def turns(self) -> Iterator[Callable[[int], AbstractContextManager[Any]]]:
        """Within the block, given(i) makes the current stream of a GPU one that even and odd i have by themselves.

        What starts on one of both fills what the end of the other's last kernel leaves idle. Both begin after what came
        before the block, and what comes after it waits for both.
        """
        if self._second is None:
            yield lambda i: nullcontext()
            return
        first = torch.cuda.current_stream(self.device)
        self._second.wait_stream(first)
        try:
            yield lambda i: torch.cuda.stream(self._second if i % 2 else first)
        finally:
            first.wait_stream(self._second)

    def begun(self) -> torch.cuda.Event | None:
        """Everything that has been started `beside` so far, for `join`."""
        return None if self._stream is None else self._stream.record_event()

    def join(self, event: torch.cuda.Event | None) -> None:
        """Let the current stream wait for what had `begun`."""
        if event is not None:
            torch.cuda.current_stream(self.device).wait_event(event)

    def release(self) -> None:
        """Free the memory of all windows."""
        if self._held:
            self._idle()
            self._held.clear()

    def works(self) -> bool:
        """Whether what ranks write arrives; False where they cannot map each other's memory."""
        store = distributed_c10d._get_process_group_store(self.group)
        store.set_timeout(PATIENCE)
        try:
            windows = self.of("trial", (self.size, TRIAL), torch.uint8)
        except IMPOSSIBLE:
            return False
        finally:
            store.set_timeout(TIMEOUT)
        for window in windows:
            window[self.rank] = 1 + self.rank
        self.arrived()
        wanted = torch.arange(1, 1 + self.size, dtype=torch.uint8, device=self.device)
        right = bool((windows[self.rank] == wanted[:, None]).all())
        self.release()
        return right

    def _idle(self) -> None:
        """Wait until no rank uses a window."""
        self.arrived()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _mapped(self, count: int) -> tuple[list[Tensor], Any]:
        if self.device.type == "cuda":
            own, handle = _symmetric(count, self.device, self.group)
            windows = [handle.get_buffer(rank, (count,), torch.uint8) for rank in range(self.size)]
            return windows, (own, handle)
        own, place = shared(count)
        # As a plain tuple: in ComfyUI this package has another name than in the other ranks.
        places: list[Any] = [None] * self.size
        dist.all_gather_object(places, tuple(place), self.group)
        windows = []
        # Of a process that may not be looked into; the others must not wait.
        with suppress(OSError):
            windows = [own if rank == self.rank else mapped(Place(*place)) for rank, place in enumerate(places)]
        if not agreed(bool(windows), self.group):
            raise OSError("not every rank can map the memory of all others")
        return windows, None


def _symmetric(count: int, device: torch.device, group: dist.ProcessGroup) -> tuple[Tensor, Any]:
    """`count` bytes of symmetric memory, and what knows those of all ranks."""
    # Not at the top: see `IMPOSSIBLE`.
    import torch.distributed._symmetric_memory as symmetric

    global _made
    _made += 1
    own = symmetric.empty(count, dtype=torch.uint8, device=device)
    return own, symmetric.rendezvous(own, group)


def machines(device: torch.device, alone: dist.ProcessGroup) -> list[str]:
    """That of each rank of the default group, all of which call it before they make windows.

    device: this rank's; alone: a group of this rank.
    """
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, (socket.gethostname() + (BOOT.read_text() if BOOT.exists() else ""), _made))
    # By oneself counts as much as with others. The trial tells if it does not.
    with suppress(*IMPOSSIBLE):
        for _ in range(_made, max(made for _, made in found)):
            _symmetric(1, device, alone)
    return [machine for machine, _ in found]


def can_map(device: torch.device, others: Sequence[torch.device]) -> bool:
    """Whether a rank on `device` may have windows of ranks on `others` of its machine; a trial shows whether it has."""
    if device.type == "cuda":
        return all(torch.cuda.can_device_access_peer(device, other) for other in others if other != device)
    return device.type == "cpu" and can_share()
