"""Blocks whose weights lie whole on the device only while they run.

Between runs they wait in CPU memory, or in shares on the GPUs of several ranks (`parallel.shards`). While one block
runs, the weights of the next such block are prefetched. The result does not change: the same numbers are multiplied on
the same device.
"""

from __future__ import annotations

import contextlib
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from mmap import PAGESIZE
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .adapters import NAMES

# Alignment of weights in a block's buffer: vector loads and 8-bit GEMMs need 16 bytes, copies are faster with more.
ALIGN = 256
# One block runs while the next one arrives.
SLOTS = 2


def spread(depth: int, streamed: int) -> list[int]:
    """Which `streamed` of `depth` blocks to offload: evenly spread, so that every copy has time to arrive."""
    return [(2 * i + 1) * depth // (2 * streamed) for i in range(streamed)]


def late(name: str) -> bool:
    """Whether most runs of a block do without this parameter: the text's keys and values are computed once per prompt,
    those of audio once per segment."""
    return name.startswith(("cross_attn.kv.", "audio_attn.kv."))


def pinned(size: int) -> Tensor:
    """`size` bytes of CPU memory, [size] uint8, pinned if there is CUDA: copies then overlap with other work."""
    # Whole pages: CUDA refuses a page that is already pinned as a part of another buffer.
    pages = -(-size // PAGESIZE) * PAGESIZE
    memory = np.empty(pages + PAGESIZE, dtype=np.uint8)
    start = -memory.ctypes.data % PAGESIZE
    buffer = torch.from_numpy(memory[start : start + size])
    register(memory, buffer)
    return buffer


def register(memory: np.ndarray, buffer: Tensor) -> None:
    """Pin a buffer that begins with a page of `memory`, if there is CUDA, until the memory is freed."""
    if len(buffer) and torch.cuda.is_available():
        pages = -(-len(buffer) // PAGESIZE) * PAGESIZE
        # Not tensor.pin_memory(), whose allocator rounds up to a power of two, too much for a whole model.
        cuda, address = torch.cuda.cudart(), buffer.data_ptr()
        if int(cuda.cudaHostRegister(address, pages, 0)) == 0:
            # A NumPy array, because its finalizer is called before the memory is freed.
            weakref.finalize(memory, _unpin, address).atexit = False
        else:
            # CUDA keeps the error and reports it at the next launch, which happens here.
            with contextlib.suppress(RuntimeError):
                torch.ones((), device="cuda")


def _unpin(address: int) -> None:
    # A copy from this memory may still be running.
    with contextlib.suppress(RuntimeError):
        torch.cuda.synchronize()
    torch.cuda.cudart().cudaHostUnregister(address)


class BlockWeights(ABC):
    """The weights of one block, one behind the other in a buffer of `nbytes`; adapters stay on the device.

    always: bytes at the front of the buffer that every run needs; behind them lie the `late` weights. kept: whether a
    copy on the device may serve a later pass.
    """

    kept = True

    def __init__(self, block: nn.Module, late: Callable[[str], bool] = lambda name: False) -> None:
        self.named = [item for item in block.named_parameters() if not item[0].endswith(NAMES)]
        self.named.sort(key=lambda item: late(item[0]))
        self.parameters = [parameter for _, parameter in self.named]
        self.places, self.always, end = [], 0, 0
        for name, parameter in self.named:
            self.places.append((end, parameter.nbytes))
            end += -(-parameter.nbytes // ALIGN) * ALIGN
            self.always = self.always if late(name) else end
        self.nbytes = end

    def views(self, buffer: Tensor) -> list[Tensor]:
        """The weights in a buffer with this layout."""
        return [
            buffer[start : start + size].view(parameter.dtype).view(parameter.shape)
            for parameter, (start, size) in zip(self.parameters, self.places, strict=True)
        ]

    def use(self, weights: Sequence[Tensor]) -> None:
        """Let the parameters read these weights."""
        for parameter, view in zip(self.parameters, weights, strict=True):
            parameter.data = view

    def stamp(self) -> tuple[int, ...]:
        """Changes when a weight is written to, as in an exchange of LoRAs; a copy on the device is then outdated."""
        return tuple(parameter._version for parameter in self.parameters)

    @abstractmethod
    def rest(self) -> None:
        """Let the parameters read what they are outside of runs."""

    @abstractmethod
    def bring(self, slot: Slot, whole: bool) -> bool:
        """Begin to fill a slot. whole: with late weights. Returns whether they come in any case."""


class Offloaded(BlockWeights):
    """In CPU memory."""

    # Tensors made in inference mode do not count writes, which `stamp` reads; a model may have been loaded in it.
    @torch.inference_mode(False)
    @torch.no_grad()
    def __init__(self, block: nn.Module, late: Callable[[str], bool], buffer: Tensor | None = None) -> None:
        """buffer: memory that has the weights already."""
        super().__init__(block, late)
        self.buffer = pinned(self.nbytes) if buffer is None else buffer
        for i, view in enumerate(self.views(self.buffer)):
            parameter = self.parameters[i]
            if buffer is None:
                view.copy_(parameter.detach())
            if parameter.is_inference():
                owner, _, leaf = self.named[i][0].rpartition(".")
                self.parameters[i] = nn.Parameter(view, requires_grad=False)
                setattr(block.get_submodule(owner), leaf, self.parameters[i])
            else:
                parameter.data = view

    @torch.no_grad()
    def move(self, buffer: Tensor) -> None:
        """Keep the weights in other memory of `nbytes`, between runs."""
        self.buffer = buffer.copy_(self.buffer)
        self.rest()

    def rest(self) -> None:
        self.use(self.views(self.buffer))

    def bring(self, slot: Slot, whole: bool) -> bool:
        size = self.nbytes if whole else self.always
        if slot.copies is None or slot.free is None or slot.arrived is None:
            slot.buffer[:size].copy_(self.buffer[:size])
        else:
            with torch.cuda.stream(slot.copies):
                slot.copies.wait_event(slot.free)
                slot.buffer[:size].copy_(self.buffer[:size], non_blocking=True)
                slot.arrived.record(slot.copies)
        return whole


class Slot:
    """Memory on the device for one block, and what it holds.

    copies: the stream of copies into it, or None on a CPU. work: a collective that fills it, if one does.
    """

    @torch.inference_mode(False)
    def __init__(self, size: int, device: torch.device, copies: torch.cuda.Stream | None) -> None:
        self.buffer = torch.empty(size, dtype=torch.uint8, device=device)
        self.device, self.copies = device, copies
        self.holds: tuple | None = None
        self.whole = False
        self.work: Any = None
        self.arrived: torch.cuda.Event | None = None
        self.free: torch.cuda.Event | None = None
        if copies is not None:
            self.arrived, self.free = torch.cuda.Event(), torch.cuda.Event()
            # Kernels that are queued already may still use this memory.
            self.free.record(torch.cuda.current_stream(device))
            # If freed during a copy, the memory must not be reused before the copy is complete.
            self.buffer.record_stream(copies)

    def wait(self) -> None:
        """Let what the current stream does from now on wait for what comes into this memory."""
        work, self.work = self.work, None
        if work is not None:
            work.wait()
        if self.arrived is not None:
            torch.cuda.current_stream(self.device).wait_event(self.arrived)


class BlockStream:
    """Runs blocks whose weights do not all fit on the device.

    Offloaded weights keep their place in `state_dict` and may be written to there. Their parameters lie on the device
    only inside `running`. It has no backward pass and serves one thread at a time. shards: blocks that other weights
    than the offloaded ones serve, by index.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        device: torch.device | str,
        streamed: Iterable[int],
        late: Callable[[str], bool] = lambda name: False,
        shards: Mapping[int, BlockWeights] | None = None,
        buffers: Mapping[int, Tensor] | None = None,
    ) -> None:
        """streamed: indexes of the blocks to offload; those that are not among the shards either go to the device.

        late: whether most runs do without the parameter of this name in a block (see `running`). buffers: memory that
        has the weights of some of the streamed blocks already.
        """
        self.blocks, self.device = blocks, torch.device(device)
        self._late = late
        self._offloaded: dict[int, Offloaded] = {}
        self._shards = shards or {}
        self._slots: list[Slot] = []
        self._copies = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self.extend(streamed, buffers or {})
        for i, block in enumerate(blocks):
            if i not in self._held:
                block.to(self.device)

    def extend(self, streamed: Iterable[int], buffers: Mapping[int, Tensor] = MappingProxyType({})) -> None:
        """Offload these blocks as well, to the buffers that have their weights. Must not be called while a block
        runs."""
        self.rest()
        for i in sorted(set(streamed) - set(self._offloaded)):
            self._offloaded[i] = Offloaded(self.blocks[i], self._late, buffers.get(i))
            _run_on(self.blocks[i], self.device)
        self._arrange()

    def _arrange(self) -> None:
        self._held: dict[int, BlockWeights] = {**self._offloaded, **self._shards}
        order = sorted(self._held)
        self._after = dict(zip(order, [*order[1:], *order[:1]], strict=True))

    @property
    def shards(self) -> Mapping[int, BlockWeights]:
        return self._shards

    @shards.setter
    def shards(self, shards: Mapping[int, BlockWeights]) -> None:
        self.rest()
        self._shards = shards
        self._arrange()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Inside, all blocks come from this process's own memory, because other ranks take no part."""
        shards = self.shards
        self.shards = {}
        try:
            yield
        finally:
            self.shards = shards

    @property
    def streamed(self) -> tuple[int, ...]:
        """Indexes of the offloaded blocks."""
        return tuple(sorted(self._offloaded))

    def offloaded(self, i: int) -> Offloaded:
        """What keeps the weights of an offloaded block."""
        return self._offloaded[i]

    @property
    def nbytes(self) -> int:
        """Bytes that a run of all blocks copies to the device, without late weights."""
        return sum(offloaded.always for offloaded in self._offloaded.values())

    @contextmanager
    def running(self, i: int, whole: bool = True) -> Iterator[None]:
        """Inside, block i can run. whole: including its late weights, which must not be used otherwise."""
        held = self._held.get(i)
        if held is None:
            yield
            return
        slot = self._fetch(i, whole)
        slot.wait()
        held.use(held.views(slot.buffer))
        try:
            following = self._after[i]
            # The first block again, for the next pass, if a copy of it is kept until then.
            if following > i or (following < i and self._held[following].kept):
                self._fetch(following, whole, keep=slot)
            yield
        finally:
            held.rest()
            if not held.kept:
                slot.holds = None
            if slot.free is not None:
                slot.free.record(torch.cuda.current_stream(self.device))

    def _fetch(self, i: int, whole: bool, keep: Slot | None = None) -> Slot:
        """The slot that holds block i, or will: starts a copy into one other than `keep` if necessary."""
        if not self._slots:
            size = max(held.nbytes for held in self._held.values())
            self._slots = [Slot(size, self.device, self._copies) for _ in range(min(SLOTS, len(self._held)))]
        held = self._held[i]
        holds = i, held.stamp()
        for slot in self._slots:
            if slot.holds == holds and slot.whole >= whole:
                return slot
        # Prefer a slot with an outdated copy, which must not be found again.
        outdated = next((slot for slot in self._slots if slot.holds and slot.holds[0] == i), None)
        slot = outdated or next(slot for slot in reversed(self._slots) if slot is not keep)
        slot.holds, slot.whole = holds, held.bring(slot, whole)
        # The slot fetched last comes first, so that the next copy goes into another one.
        self._slots.remove(slot)
        self._slots.insert(0, slot)
        return slot

    def rest(self) -> None:
        """Free the memory on the device until the next run."""
        if self._copies is not None and self._slots:
            # A running copy must not write to memory that has been reused.
            self._copies.synchronize()
        self._slots = []


def _run_on(block: nn.Module, device: torch.device) -> None:
    """Prepare layers to run on `device`, regardless of where their weights lie now."""
    for module in block.modules():
        run_on = getattr(module, "run_on", None)
        if run_on is not None:
            run_on(device)


def streamed(
    run: Callable[..., Tensor], stream: BlockStream, need_weights: Callable[[int], bool]
) -> Callable[..., Tensor]:
    """run(i, block, ...) with block i's weights on the device. need_weights: whether a block needs its late weights."""

    def running(i: int, *args: object) -> Tensor:
        with stream.running(i, need_weights(i)):
            return run(i, *args)

    return running
