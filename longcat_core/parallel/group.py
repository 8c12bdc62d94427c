"""A group of processes that work on one video: rank 0 is the process of the command, the others serve it."""

from __future__ import annotations

import atexit
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

from ..errors import LongCatError
from .interrupts import watch_interrupts
from .lifeline import Failure, Hub, Line
from .messages import packed, unpacked

# Of collectives: compiling in one rank takes minutes. A rank that dies is noticed without it.
TIMEOUT = timedelta(minutes=30)
# Seconds, for a worker to leave, and to learn which rank failed where communication did.
LEAVING, VERDICT = 5.0, 3.0
# Without the first two, PyTorch ends the whole process, ComfyUI included, when a rank is gone or late. The third one
# keeps its monitor, which does nothing then, from printing that the store of a failed group is gone. The last one
# leaves out the multicast of NVLink, which windows do not need.
SETTINGS = {
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
    "TORCH_NCCL_ENABLE_MONITORING": "0",
    "TORCH_NCCL_COORD_CHECK_MILSEC": "1000000000",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
}
_current: Group | None = None


class Group:
    """This process's place in a group of `size` processes; `start` and `join` make it.

    rank: 0 for the process that everything starts from. devices: of all ranks; device: of this one. Tensors go through
    `torch.distributed`, whose default group this is: NCCL between GPUs, gloo for tensors in CPU memory. Everything but
    `send`, `end` and `working`, which are rank 0's, and `receive`, which is the workers', is a collective: all ranks
    call it in the same order.

    As a context manager it ends the group.
    """

    def __init__(
        self,
        rank: int,
        devices: Sequence[torch.device],
        store: dist.Store,
        *,
        hub: Hub | None = None,
        line: Line | None = None,
        server: dist.Store | None = None,
    ) -> None:
        self.rank, self.devices = rank, tuple(devices)
        self._hub, self._line, self._store, self._server = hub, line, store, server
        self._ending = threading.Lock()
        # What rank 0 does together with the others, if anything.
        self._stage: object | None = None
        self._idle = threading.Event()
        self._idle.set()
        self._threads = torch.get_num_threads()
        if hub is not None:
            hub.watch(self._abort)
            self._unwatch = watch_interrupts(lambda: self._stage, self._break)

    @property
    def size(self) -> int:
        return len(self.devices)

    @property
    def failed(self) -> bool:
        """In rank 0: whether the group has failed. `start` ends it and makes another one."""
        return self._hub is not None and self._hub.failed

    @property
    def device(self) -> torch.device:
        return self.devices[self.rank]

    def send(self, message: object) -> None:
        """From rank 0 to every worker: objects of this package, of PyTorch and of Python's own types, modules included.

        Tensors of any dtype arrive contiguous on the worker's device and without gradients, each once, even if the
        message has it in several places. Returns when the message is on its way. Raises LongCatError if the group has
        failed.
        """
        assert self._hub is not None
        data, tensors = packed(message)
        with self.working():
            self._hub.send(data)
            for tensor in tensors:
                self._broadcast_bytes(tensor.detach().to(self.device).contiguous())

    def receive(self) -> Any:
        """In a worker: the next message, however long it takes. None is the last one."""
        assert self._line is not None
        message, tensors = unpacked(self._line.receive(), self.device)
        for tensor in tensors:
            self._broadcast_bytes(tensor)
        return message

    def _broadcast_bytes(self, tensor: Tensor) -> None:
        # NCCL and gloo do not know all dtypes.
        if tensor.numel():
            self.broadcast(tensor.view(-1).view(torch.uint8))

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Fill `tensor`, contiguous and of one shape and dtype everywhere, with that of rank 0; returns it."""
        dist.broadcast(tensor, 0)
        return tensor

    def check(self) -> None:
        """In rank 0: raise LongCatError with the failing rank's own sentence if the group has failed."""
        if self._hub is not None and self._hub.failed:
            raise self._failed(self._hub.failure())

    @contextmanager
    def working(self) -> Iterator[None]:
        """In rank 0, around everything that needs the other ranks, from the message to the last collective.

        If a rank fails, LongCatError with its own sentence takes the place of what that causes here. Another exception
        leaves the ranks out of step, so it ends the workers and with them the group.
        """
        self.check()
        outer, self._stage = self._stage, self._stage or object()
        self._idle.clear()
        try:
            yield
        except BaseException as error:
            if self._hub is None:
                raise
            # What failed here may be communication with a rank whose end is not yet noticed.
            failure = self._hub.failure(VERDICT if is_communication(error) else 0.0)
            by_others = failure is not None or (self.failed and is_communication(error))
            self._break()
            if not by_others or not isinstance(error, Exception):
                raise
            raise self._failed(failure) from error
        finally:
            self._stage = outer
            if outer is None:
                self._idle.set()
        # Aborted communication leaves garbage and raises nothing.
        self.check()

    @contextmanager
    def within(self, seconds: float, sentence: str) -> Iterator[None]:
        """In rank 0: what takes longer inside ends the workers and raises LongCatError with the sentence."""
        late = threading.Event()

        def end() -> None:
            late.set()
            self._break()

        timer = threading.Timer(seconds, end)
        timer.daemon = True
        timer.start()
        try:
            yield
        except Exception as error:
            # Aborted communication may raise anything.
            if late.is_set():
                raise LongCatError(sentence) from error
            raise
        finally:
            timer.cancel()

    def end(self) -> None:
        """In rank 0: end the workers and leave the group, also after a failure. A second call does nothing."""
        global _current
        if _current is not self:
            return
        _current = None
        if self._hub is None:
            dist.destroy_process_group()
            return
        # In the middle of what another thread does, as when ComfyUI ends during a prompt, nobody reads a message.
        orderly = not self._hub.failed and self._idle.is_set()
        if orderly:
            self._hub.leave()
            try:
                self.send(None)
            except LongCatError:
                orderly = False
        if not orderly:
            self._hub.kill()
        self._leave(orderly)
        # A thread that is in a collective when the interpreter ends aborts the process.
        self._idle.wait(LEAVING)
        self._hub.wait(LEAVING if orderly else 0.0)
        self._unwatch()
        torch.set_num_threads(self._threads)
        atexit.unregister(self.end)

    def connect(self) -> None:
        """Make the default group of `torch.distributed`; for `start` and `join`. All ranks wait for each other."""
        global _current
        for name, value in SETTINGS.items():
            os.environ.setdefault(name, value)
        gpu = self.device.type == "cuda"
        if gpu:
            torch.cuda.set_device(self.device)
        _current = self
        if self._hub is not None:
            atexit.register(self.end)
            if not gpu:
                # All ranks share the cores.
                torch.set_num_threads(max(1, self._threads // self.size))
        # Without `device_id`: with it a mesh splits the communicator, which crashes in a process's second group (2.11).
        dist.init_process_group(
            backend_of(self.devices),
            store=self._store,
            rank=self.rank,
            world_size=self.size,
            timeout=TIMEOUT,
        )

    def _break(self) -> None:
        """End the workers and all communication with them, now."""
        if self._hub is not None:
            self._hub.kill()
        self._abort()

    def _abort(self) -> None:
        # Rank 0 may be waiting in the store for a rank that is gone.
        self._server = None
        # gloo notices by itself, but on a GPU the kernel of a collective waits for ever.
        if self.device.type == "cuda":
            self._leave(orderly=False)

    def _leave(self, orderly: bool) -> None:
        with self._ending:
            if not dist.is_initialized():
                return
            if orderly:
                dist.destroy_process_group()
                return
            # At once: an abort waits for the kernels of all communicators, and these wait for ranks that are gone.
            aborts = [getattr(group, "abort", None) for group in distributed_c10d._world.pg_map]
            threads = [threading.Thread(target=abort, daemon=True) for abort in aborts if abort is not None]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            distributed_c10d._abort_process_group()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._break()
        self.end()

    def _failed(self, failure: Failure | None) -> LongCatError:
        if failure is None:
            return LongCatError("the processes on the other GPUs were ended; run it again")
        return LongCatError(f"{named(failure.rank, self.devices[failure.rank])}: {failure.sentence}")


def named(rank: int, device: torch.device) -> str:
    """A rank for a user: `GPU 1 (rank 1)`."""
    return f"GPU {device.index or 0} (rank {rank})" if device.type == "cuda" else f"rank {rank}"


def is_communication(error: BaseException) -> bool:
    """Whether an exception may be of communication with another rank, which is gone then."""
    words = ("gloo", "nccl", "connection", "process group")
    return isinstance(error, dist.DistError | OSError) or any(word in str(error).lower() for word in words)


def backend_of(devices: Sequence[torch.device]) -> str:
    """What `torch.distributed` communicates by: NCCL between GPUs where PyTorch has it, and gloo."""
    return "cpu:gloo,cuda:nccl" if devices[0].type == "cuda" and dist.is_nccl_available() else "gloo"


def current() -> Group | None:
    """The group that this process belongs to."""
    return _current


def end_current() -> None:
    """End the group that this process belongs to, if it does."""
    if _current is not None:
        _current.end()


def check_free() -> None:
    """Raise LongCatError if this process belongs to a group of `torch.distributed` that other code made."""
    if not dist.is_available():
        raise LongCatError("this PyTorch cannot use several GPUs, because it was built without torch.distributed")
    if dist.is_initialized():
        raise LongCatError("torch.distributed is in use by other code in this process; use one GPU, or another process")
