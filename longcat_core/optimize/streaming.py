"""Blocks whose weights wait in CPU memory and lie on the device only while they run.

While one block runs, the weights of the next one that waits are copied beside it. Nothing changes in the result: the
same numbers, multiplied on the same device.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from mmap import PAGESIZE

import numpy as np
import torch
from torch import Tensor, nn

from .adapters import NAMES

# Where a weight begins in a block's buffer: vector loads and 8-bit products want 16 bytes, copies like more.
ALIGN = 256
# One runs, the next one arrives.
SLOTS = 2


def spread(depth: int, streamed: int) -> list[int]:
    """Which `streamed` of `depth` blocks wait in CPU memory: evenly spread, so that every copy has time to arrive."""
    return [(2 * i + 1) * depth // (2 * streamed) for i in range(streamed)]


def pinned(size: int) -> Tensor:
    """`size` bytes [size] uint8 in CPU memory; where there is CUDA, it can copy from and to them beside other work."""
    # Pages of its own: CUDA refuses a page of which another buffer's part is pinned already.
    pages = -(-size // PAGESIZE) * PAGESIZE
    memory = np.empty(pages + PAGESIZE, dtype=np.uint8)
    start = -memory.ctypes.data % PAGESIZE
    buffer = torch.from_numpy(memory[start : start + size])
    if size and torch.cuda.is_available():
        # Not tensor.pin_memory(), whose allocator takes the next power of two: of a whole model that is too much.
        cuda, address = torch.cuda.cudart(), buffer.data_ptr()
        if int(cuda.cudaHostRegister(address, pages, 0)) == 0:
            # Called before the memory is freed, which is what NumPy's arrays are here for.
            weakref.finalize(memory, _unpin, address).atexit = False
        else:
            # CUDA keeps the refusal and tells whoever launches the next kernel.
            with contextlib.suppress(RuntimeError):
                torch.ones((), device="cuda")
    return buffer


def _unpin(address: int) -> None:
    # Something may still be copied from there.
    with contextlib.suppress(RuntimeError):
        torch.cuda.synchronize()
    torch.cuda.cudart().cudaHostUnregister(address)


class _Waiting:
    """Weights of one block in one buffer, those in front that every run needs; adapters stay on the device."""

    def __init__(self, block: nn.Module, late: Callable[[str], bool]) -> None:
        named = [item for item in block.named_parameters() if not item[0].endswith(NAMES)]
        named.sort(key=lambda item: late(item[0]))
        self.parameters = [parameter for _, parameter in named]
        self.places, end = [], 0
        self.always = 0
        for name, parameter in named:
            self.places.append((end, parameter.nbytes))
            end += -(-parameter.nbytes // ALIGN) * ALIGN
            self.always = self.always if late(name) else end
        self.buffer = pinned(end)
        with torch.no_grad():
            for parameter, view in zip(self.parameters, self.views(self.buffer), strict=True):
                parameter.data = view.copy_(parameter.data)

    def views(self, buffer: Tensor) -> list[Tensor]:
        return [
            buffer[start : start + size].view(parameter.dtype).view(parameter.shape)
            for parameter, (start, size) in zip(self.parameters, self.places, strict=True)
        ]

    def lie_in(self, buffer: Tensor) -> None:
        for parameter, view in zip(self.parameters, self.views(buffer), strict=True):
            parameter.data = view

    def stamp(self) -> tuple[int, ...]:
        # Writing to a weight in place, as a LoRA that is exchanged does, makes a copy on the device old.
        return tuple(parameter._version for parameter in self.parameters)


class _Slot:
    """Room on the device for one block, and what lies in it."""

    def __init__(self, size: int, device: torch.device, beside: torch.cuda.Stream | None) -> None:
        self.buffer = torch.empty(size, dtype=torch.uint8, device=device)
        self.holds: tuple | None = None
        self.whole = False
        cuda = device.type == "cuda"
        self.arrived, self.free = (torch.cuda.Event() if cuda else None for _ in range(2))
        if cuda:
            # The memory may have been somebody else's until now.
            self.free.record(torch.cuda.current_stream(device))
            # And must not be another's before what is copied there has come.
            self.buffer.record_stream(beside)


class BlockStream:
    """Runs blocks whose weights do not all fit the device.

    Weights that wait keep their place in `state_dict` and may be written to there. Their parameters lie on the device
    inside `running` alone. No backward pass. Not for two threads at once.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        device: torch.device | str,
        streamed: Iterable[int],
        late: Callable[[str], bool] = lambda name: False,
    ) -> None:
        """blocks: the first of them may lie anywhere; those not in `streamed` are moved to the device.

        late: of a block's parameters, by name, those that most runs can do without (see `running`).
        """
        self.blocks, self.device = blocks, torch.device(device)
        self._late = late
        self._waiting: dict[int, _Waiting] = {}
        self._slots: list[_Slot] = []
        self._beside = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self.extend(streamed)
        for i, block in enumerate(blocks):
            if i not in self._waiting:
                block.to(self.device)

    def extend(self, streamed: Iterable[int]) -> None:
        """Have these blocks wait as well. Not while one runs."""
        self.rest()
        for i in sorted(set(streamed) - set(self._waiting)):
            self._waiting[i] = _Waiting(self.blocks[i], self._late)
            _run_on(self.blocks[i], self.device)
        order = sorted(self._waiting)
        self._after = dict(zip(order, [*order[1:], *order[:1]], strict=True))

    @property
    def streamed(self) -> tuple[int, ...]:
        """Indexes of the blocks that wait in CPU memory."""
        return tuple(sorted(self._waiting))

    @property
    def nbytes(self) -> int:
        """What a run of all blocks copies to the device, without what is late."""
        return sum(waiting.always for waiting in self._waiting.values())

    @contextmanager
    def running(self, i: int, whole: bool = True) -> Iterator[None]:
        """Block i can run inside. whole: with the weights that are late; otherwise those must not be used."""
        waiting = self._waiting.get(i)
        if waiting is None:
            yield
            return
        slot = self._fetch(i, whole)
        if slot.arrived is not None:
            torch.cuda.current_stream(self.device).wait_event(slot.arrived)
        waiting.lie_in(slot.buffer)
        try:
            following = self._after[i]
            if following != i:
                self._fetch(following, whole, keep=slot)
            yield
        finally:
            waiting.lie_in(waiting.buffer)
            if slot.free is not None:
                slot.free.record(torch.cuda.current_stream(self.device))

    def _fetch(self, i: int, whole: bool, keep: _Slot | None = None) -> _Slot:
        """The slot that holds block i, or will; begins to copy into one other than `keep` if none does."""
        if not self._slots:
            size = max(waiting.buffer.nbytes for waiting in self._waiting.values())
            self._slots = [_Slot(size, self.device, self._beside) for _ in range(min(SLOTS, len(self._waiting)))]
        waiting = self._waiting[i]
        holds = i, waiting.stamp()
        for slot in self._slots:
            if slot.holds == holds and slot.whole >= whole:
                return slot
        # The one that holds an older copy, if there is one: it must not be found again.
        slot = next((slot for slot in self._slots if slot.holds and slot.holds[0] == i), None)
        slot = slot or next(slot for slot in reversed(self._slots) if slot is not keep)
        size = waiting.buffer.nbytes if whole else waiting.always
        if self._beside is None:
            slot.buffer[:size].copy_(waiting.buffer[:size])
        else:
            with torch.cuda.stream(self._beside):
                self._beside.wait_event(slot.free)
                slot.buffer[:size].copy_(waiting.buffer[:size], non_blocking=True)
                slot.arrived.record(self._beside)
        slot.holds, slot.whole = holds, whole
        # The last one fetched comes first: the next is looked for behind it.
        self._slots.remove(slot)
        self._slots.insert(0, slot)
        return slot

    def rest(self) -> None:
        """Give back the room on the device until the next run."""
        if self._beside is not None and self._slots:
            # What is being copied must not land in memory that is somebody else's by then.
            self._beside.synchronize()
        self._slots = []


def _run_on(block: nn.Module, device: torch.device) -> None:
    """Tell layers which device they will run on, wherever their weights lie now."""
    for module in block.modules():
        run_on = getattr(module, "run_on", None)
        if run_on is not None:
            run_on(device)


def streamed(
    run: Callable[..., Tensor], stream: BlockStream, need_weights: Callable[[int], bool]
) -> Callable[..., Tensor]:
    """run(i, block, ...) with block i's weights on the device. need_weights: whether it takes those that are late."""

    def running(i: int, *args: object) -> Tensor:
        with stream.running(i, need_weights(i)):
            return run(i, *args)

    return running
