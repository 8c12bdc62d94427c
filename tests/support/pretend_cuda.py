"""A GPU played by the CPU: which device a tensor claims to be on, and who waits for whom.

Tensors are ordinary ones. Their storages are marked as the GPU's where they were made or moved there, and an operation
over both kinds fails as it does on a GPU. Operations of the current stream happen at once, copies on a second stream as
late as they may; until then their target holds garbage. What such a copy could overwrite or read too early is an
error: every use of a storage must be behind an event, or a synchronization, that the other stream waited for.
"""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
GIB = 1 << 30


class WrongOrder(AssertionError):
    """Two streams use the same memory and none waits for the other."""


class Event:
    def __init__(self, **_: Any) -> None:
        self.stream: Stream | None = None
        self.at, self.jobs = 0, 0

    def record(self, stream: Stream | None = None) -> None:
        self.stream = stream or Stream.current
        self.at, self.jobs = self.stream.clock, self.stream.enqueued
        self.seen = dict(self.stream.seen)

    def synchronize(self) -> None:
        if self.stream is not None:
            self.stream.finish(self.jobs)

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: Event) -> float:
        return 1.0 + other.at - self.at


class Stream:
    """seen: up to which of another stream's operations this one has waited."""

    current: Stream
    main: Stream

    def __init__(self, device: Any = None, **_: Any) -> None:
        self.device = CUDA
        self.clock = self.enqueued = self.finished = 0
        self.seen: dict[Stream, int] = {}
        self.waiting: list[Callable[[], None]] = []

    def wait_event(self, event: Event) -> None:
        if event.stream is not None and event.stream is not self:
            event.stream.finish(event.jobs)
            for stream, at in {**event.seen, event.stream: event.at}.items():
                self.seen[stream] = max(self.seen.get(stream, 0), at)

    def wait_stream(self, stream: Stream) -> None:
        event = Event()
        event.record(stream)
        self.wait_event(event)

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        self.finish(self.enqueued)
        for stream in Stream.every:
            stream.seen[self] = self.clock

    def later(self, job: Callable[[], None]) -> None:
        self.waiting.append(job)
        self.enqueued += 1

    def finish(self, jobs: int) -> None:
        while self.finished < jobs:
            self.finished += 1
            self.waiting.pop(0)()


class _Memory:
    """Of every storage: is it the GPU's, and which operation of which stream wrote and which read it last."""

    def __init__(self) -> None:
        self.marked: dict[int, bool] = {}
        self.wrote: dict[int, tuple[Stream, int]] = {}
        self.read: dict[int, dict[Stream, int]] = {}

    @staticmethod
    def key(x: Tensor) -> int:
        return x.untyped_storage()._cdata

    def is_cuda(self, x: Tensor) -> bool:
        return x.device.type == "cpu" and self.marked.get(self.key(x), False)

    def claimed(self, x: Tensor) -> torch.device:
        return CUDA if self.is_cuda(x) else x.device

    def mark(self, x: Tensor, cuda: bool) -> Tensor:
        key = self.key(x)
        self.forget(key)
        if cuda:
            self.marked[key] = True
            # Another tensor's storage may come to lie there.
            weakref.finalize(x.untyped_storage(), self.forget, key)
        return x

    def forget(self, key: int) -> None:
        for known in (self.marked, self.wrote, self.read):
            known.pop(key, None)

    def use(self, x: Tensor, writes: bool) -> None:
        if not self.is_cuda(x) or not x.numel():
            return
        key, now = self.key(x), Stream.current
        others = [self.wrote[key]] if key in self.wrote else []
        if writes:
            others += self.read.get(key, {}).items()
        for stream, at in others:
            if stream is not now and now.seen.get(stream, 0) < at:
                raise WrongOrder(f"{'written' if writes else 'read'} before another stream was done with it")
        now.clock += 1
        if writes:
            self.wrote[key], self.read[key] = (now, now.clock), {}
        else:
            self.read.setdefault(key, {})[now] = now.clock


MEMORY = _Memory()
# Indexes, and numbers without a dimension, may be the CPU's.
_FOREIGN = ("aten::index", "aten::_index_put_impl_", "aten::index_put", "aten::copy_", "aten::set_")


class _Operations(TorchDispatchMode):
    def __init__(self, runtime: _Runtime) -> None:
        super().__init__()
        self.runtime = runtime

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.device.type == "cpu"]
        name = func._schema.name
        cuda = [MEMORY.is_cuda(x) for x in given]
        if any(cuda):
            self.runtime.launch()
        if any(cuda) and not name.startswith(_FOREIGN):
            stray = [x for x, own in zip(given, cuda, strict=True) if not own and x.ndim]
            if stray:
                raise RuntimeError(f"{name}: tensors on cuda:0 and cpu, the latter {tuple(stray[0].shape)}")
        if name == "aten::copy_" and len(cuda) == 2 and cuda[0] != cuda[1]:
            return self._copy(func, args, kwargs, *cuda)
        mutated = [x for arg, x in zip(func._schema.arguments, args, strict=False)
                   if isinstance(x, Tensor) and arg.alias_info is not None and arg.alias_info.is_write]  # fmt: skip
        for x in given:
            MEMORY.use(x, any(x is other for other in mutated))
        out = func(*args, **kwargs)
        keys = {MEMORY.key(x) for x in given}
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and x.device.type == "cpu" and MEMORY.key(x) not in keys:
                MEMORY.mark(x, any(cuda))
                MEMORY.use(x, True)
        return out

    def _copy(self, func: Any, args: tuple, kwargs: dict, to_cuda: bool, from_cuda: bool) -> Tensor:
        target, source = args[:2]
        MEMORY.use(target, True)
        MEMORY.use(source, False)
        stream = Stream.current
        if stream is Stream.main:
            func(*args, **kwargs)
            return target
        _quietly(lambda: target.view(torch.uint8).fill_(255))
        stream.later(lambda: _quietly(lambda: func(*args, **kwargs)))
        return target


def _quietly(run: Callable[[], Any]) -> None:
    with torch._C.DisableTorchFunction(), _disable_current_modes():
        run()


def _is_cuda(device: Any) -> bool:
    return device is not None and not isinstance(device, int) and torch.device(device).type == "cuda"


class Generator(torch.Generator):
    claimed = CPU

    def __new__(cls, device: Any = "cpu") -> Generator:
        self = super().__new__(cls, "cpu")
        self.claimed = CUDA if _is_cuda(device) else CPU
        return self

    def __init__(self, device: Any = "cpu") -> None:
        pass


_GETTERS = {
    torch.Tensor.device.__get__: lambda x, plain: CUDA if MEMORY.is_cuda(x) else plain,
    torch.Tensor.is_cuda.__get__: lambda x, plain: MEMORY.is_cuda(x),
}
_HOST_ONLY = (torch.Tensor.numpy, torch.Tensor.__array__)


class _Claims(TorchFunctionMode):
    def __init__(self, runtime: _Runtime) -> None:
        super().__init__()
        self.runtime = runtime

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in _GETTERS:
            return _GETTERS[func](args[0], func(*args))
        if func in _HOST_ONLY and MEMORY.is_cuda(args[0]):
            raise TypeError("can't convert cuda:0 device type tensor to numpy; use Tensor.cpu()")
        if func is torch.Tensor.cpu:
            return self._moved(args[0], CPU, args[0].dtype, False, False)
        if func is torch.Tensor.cuda:
            return self._moved(args[0], CUDA, args[0].dtype, False, False)
        if func is torch.Tensor.to:
            return self._to(*args, **kwargs)
        device = kwargs.get("device")
        generator = kwargs.get("generator")
        if not _is_cuda(device):
            if device is not None and torch.device(device).type == "cpu" and args and isinstance(args[0], Tensor):
                # empty_like and its kin: marked after their input otherwise.
                return MEMORY.mark(func(*args, **kwargs), False)
            self._check(generator, CUDA if args and isinstance(args[0], Tensor) and MEMORY.is_cuda(args[0]) else CPU)
            return func(*args, **kwargs)
        self._check(generator, CUDA)
        if func is not torch.empty:
            self.runtime.launch()
        kwargs["device"] = "cpu"
        out = func(*args, **kwargs)
        if isinstance(out, Tensor):
            MEMORY.mark(out, True)
            if func is not torch.empty:
                MEMORY.use(out, True)
        return out

    def _check(self, generator: Any, device: torch.device) -> None:
        if generator is not None and generator.claimed != device:
            raise RuntimeError(f"Expected a '{device}' device type for generator but found '{generator.claimed}'")

    def _to(self, x: Tensor, *args: Any, non_blocking: bool = False, copy: bool = False, **kwargs: Any) -> Tensor:
        device, dtype = kwargs.get("device"), kwargs.get("dtype")
        for arg in args:
            if isinstance(arg, Tensor):
                device, dtype = MEMORY.claimed(arg), arg.dtype
            elif isinstance(arg, torch.dtype):
                dtype = arg
            elif isinstance(arg, bool):
                non_blocking = arg
            elif arg is not None:
                device = arg
        device = MEMORY.claimed(x) if device is None else device
        if torch.device(device).type == "meta" or x.device.type == "meta":
            return x.to(device, dtype or x.dtype)
        return self._moved(x, CUDA if _is_cuda(device) else CPU, dtype or x.dtype, non_blocking, copy)

    def _moved(self, x: Tensor, device: torch.device, dtype: torch.dtype, non_blocking: bool, copy: bool) -> Tensor:
        own = MEMORY.claimed(x)
        if own == device and x.dtype == dtype and not copy:
            return x
        if x.requires_grad and torch.is_grad_enabled():
            out = x.to(dtype, copy=True)
            return MEMORY.mark(out, _is_cuda(device))
        if own == device:
            return x.detach().to(dtype, copy=True)
        wide = x.detach().to(dtype)
        out = MEMORY.mark(torch.empty(x.shape, dtype=dtype), _is_cuda(device))
        return out.copy_(wide, non_blocking=non_blocking)


@contextmanager
def _on(stream: Stream | None) -> Iterator[None]:
    before, Stream.current = Stream.current, stream or Stream.current
    try:
        yield
    finally:
        Stream.current = before


class _Runtime:
    """torch.cuda.cudart(). registered: (address, bytes) of what is pinned."""

    def __init__(self) -> None:
        self.registered: dict[int, int] = {}
        self.errors: list[str] = []
        # Of a call that failed, reported by the next kernel.
        self.pending = ""
        self.refuses = False
        # Of memory that this process may have, as it was limited.
        self.fractions: list[float] = []

    def limit(self, fraction: float, device: Any = None) -> None:
        if not (isinstance(device, int) or device.index is not None):
            raise ValueError(f"Expected a torch.device with a specified index or an integer, but got:{device}")
        if not 0 <= fraction <= 1:
            raise ValueError(f"Invalid fraction value: {fraction}. Allowed range: 0~1")
        self.fractions.append(fraction)

    def launch(self) -> None:
        if self.pending:
            said, self.pending = self.pending, ""
            raise RuntimeError(f"CUDA error: {said}")

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        if self.refuses:
            self.pending = "operation not supported"
            return 801
        pages = set(range(address // 4096, (address + size - 1) // 4096 + 1))
        for other, length in self.registered.items():
            if pages & set(range(other // 4096, (other + length - 1) // 4096 + 1)):
                self.pending = "part or all of the requested memory range is already mapped"
                self.errors.append(self.pending)
                return 712
        self.registered[address] = size
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        if self.registered.pop(address, None) is None:
            self.errors.append("pointer does not correspond to a registered memory region")
            return 713
        return 0


class Properties:
    name, total_memory, major, minor, multi_processor_count = "pretended", 80 * GIB, 9, 0, 132


def _caches() -> list[Any]:
    """Functions of the package that keep what they made: by device, of which there are others now."""
    found = [value for name, module in list(sys.modules.items()) if name.startswith("longcat_core")
             for value in vars(module).values() if hasattr(value, "cache_clear")]  # fmt: skip
    return found


@contextmanager
def pretended() -> Iterator[_Runtime]:
    """ "cuda" is a device while this is entered; Triton is not there, and no kernel but PyTorch's own."""
    patch = pytest.MonkeyPatch()
    Stream.main = Stream.current = Stream()
    Stream.every = [Stream.main]
    runtime, init = _Runtime(), Stream.__init__

    def counted(self: Stream, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        Stream.every.append(self)

    def synchronize(device: Any = None) -> None:
        for stream in Stream.every:
            stream.synchronize()

    fakes = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "_lazy_init": lambda: None,
        "Stream": Stream,
        "Event": Event,
        "current_stream": lambda device=None: Stream.current,
        "default_stream": lambda device=None: Stream.main,
        "stream": _on,
        "synchronize": synchronize,
        "empty_cache": lambda: None,
        "cudart": lambda: runtime,
        "mem_get_info": lambda device=None: (80 * GIB, 80 * GIB),
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_properties": lambda device=None: Properties,
        "get_device_name": lambda device=None: Properties.name,
        "set_per_process_memory_fraction": runtime.limit,
        "get_per_process_memory_fraction": lambda device=None: [1.0, *runtime.fractions][-1],
        "reset_peak_memory_stats": lambda device=None: None,
    }
    for name in ("memory_allocated", "memory_reserved", "max_memory_allocated", "max_memory_reserved"):
        fakes[name] = lambda device=None: 0
    for name, fake in fakes.items():
        patch.setattr(torch.cuda, name, fake)
    patch.setattr(Stream, "__init__", counted)
    patch.setattr(torch, "Generator", Generator)
    patch.setattr(torch.Tensor, "record_stream", lambda self, stream: None)
    patch.setattr("longcat_core.optimize.requirement.needs_cuda", lambda capability, exactly=False: "pretended")
    # The modes below are those of one thread.
    patch.setattr("longcat_core.generate.pipeline.overlaps", lambda device: False)
    MEMORY.__init__()
    for cached in _caches():
        cached.cache_clear()
    try:
        with _Claims(runtime), _Operations(runtime):
            yield runtime
            gc.collect()
    finally:
        patch.undo()
        for cached in _caches():
            cached.cache_clear()
