"""Making a group: of processes that this one starts, or of those that torchrun started."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ..errors import LongCatError
from .group import TIMEOUT, Group, check_free, current, named
from .lifeline import Hub, Line, Listener, Peer, ended, to_json
from .messages import CORE
from .torchrun import torchrun_size

# Seconds: importing PyTorch from a cold disk takes a minute.
JOINING = 300.0
HOME, ANYWHERE = "127.0.0.1", "0.0.0.0"
# In the store of torchrun: what rank 0 tells the others, and the part that belongs to the group.
SETUP, RANKS = "longcat setup", "longcat ranks"
# Rank 0 may check and load for long before it needs the others.
UNTIL_NEEDED = timedelta(days=1)
# The folder that holds this package, under the name that a worker gives it.
FOLDER = Path(__file__).parents[2]
# In place of the main script, which another process must not run. sys.path[0] is the working folder, which may hold
# anything. Only rank 0 listens to signals, and ends the others.
BOOT = f"""import json, signal, sys
for name in ("SIGINT", "SIGTERM", "SIGHUP"):
    if hasattr(signal, name):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
setup = json.loads(sys.stdin.readline())
sys.path[:1] = setup["path"]
from {CORE}.parallel.worker import work
work(setup)"""


def start(devices: Sequence[torch.device], serve: str = ".mirror") -> Group:
    """The group of `started` at once."""
    with started(devices, serve) as ready:
        group = ready()
    assert group is not None, "more than one device"
    return group


@contextmanager
def started(devices: Sequence[torch.device], serve: str = ".mirror") -> Iterator[Callable[[], Group | None]]:
    """Start a group with this process as rank 0, and meanwhile do other things: a worker needs seconds to begin.

    Yields a function that waits for the workers and returns the group; if it is not called, the workers are ended. For
    one device it returns None, and where a group of the same devices is there already, that one; another one is ended.
    devices: of all ranks, GPUs or CPUs; this process works on the first one. The others are new processes on this
    machine, or those that torchrun started. serve: module with the function `serve` that workers call with their group.
    Raises LongCatError if a process cannot join.
    """
    if len(devices) == 1:
        yield lambda: None
        return
    there = current()
    if there is not None and there.devices == tuple(devices) and not there.failed:
        yield lambda: there
        return
    if there is not None:
        there.end()
    check_free()
    if devices[0].type == "cuda" and not dist.is_nccl_available():
        warnings.warn(
            "this PyTorch has no NCCL, so the GPUs exchange data through CPU memory, which is slow", stacklevel=4
        )
    launch = _Joined(devices, serve) if torchrun_size() else _Launch(devices, serve)
    try:
        yield launch.group
    finally:
        launch.end()


def gathers_fast(devices: Sequence[torch.device]) -> bool:
    """Whether ranks on these devices get weights from each other at least as fast as from CPU memory: several GPUs of
    one machine, by NCCL."""
    several = len(devices) > 1 and devices[0].type == "cuda" and dist.is_nccl_available()
    return several and (not torchrun_size() or _on_one_host())


def _on_one_host() -> bool:
    return os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]


class _Launch:
    """New processes on this machine."""

    def __init__(self, devices: Sequence[torch.device], serve: str) -> None:
        self.devices = devices
        # Listening on this machine alone.
        bound = socket.create_server((HOME, 0))
        self.port = bound.getsockname()[1]
        self._server = dist.TCPStore(HOME, self.port, None, True, TIMEOUT, False, master_listen_fd=bound.detach())
        self._listener = Listener(HOME)
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        setup = {
            "path": [str(FOLDER), *sys.path],
            "devices": [str(device) for device in devices],
            "store": [HOME, self.port],
            "address": to_json(self._listener.address),
            "serve": serve,
        }
        threads = max(1, (os.cpu_count() or 1) // len(devices))
        try:
            for rank in range(1, len(devices)):
                self._processes[rank] = _worker(setup | {"rank": rank}, threads)
        except BaseException:
            self.end()
            raise

    def group(self) -> Group:
        peers = joined(self._listener, self._processes, self.devices)
        store = dist.TCPStore(HOME, self.port, None, False, TIMEOUT, False)
        group = Group(0, self.devices, store, hub=Hub(peers, self._processes), server=self._server)
        # From here on it ends them.
        self._processes = {}
        del self._server
        return connected(group)

    def end(self) -> None:
        self._listener.close()
        for process in self._processes.values():
            process.kill()
            process.wait()


class _Joined:
    """The processes of torchrun, perhaps on several hosts."""

    def __init__(self, devices: Sequence[torch.device], serve: str) -> None:
        self.devices = devices
        if torchrun_store().check([SETUP]):
            raise LongCatError("the processes of torchrun have served and ended already; run it again")
        one_host = _on_one_host()
        self._listener = Listener(HOME if one_host else ANYWHERE)
        address = self._listener.address._replace(host=HOME if one_host else os.environ["MASTER_ADDR"])
        setup = {"devices": [str(device) for device in devices], "address": to_json(address), "serve": serve}
        torchrun_store().set(SETUP, json.dumps(setup))

    def group(self) -> Group:
        peers = joined(self._listener, {}, self.devices)
        return connected(Group(0, self.devices, dist.PrefixStore(RANKS, torchrun_store()), hub=Hub(peers, {})))

    def end(self) -> None:
        self._listener.close()


@cache
def torchrun_store() -> dist.Store:
    """What all processes of torchrun can read and write."""
    store: dist.Store = next(iter(dist.rendezvous("env://", timeout=UNTIL_NEEDED)))[0]
    return store


def release() -> None:
    """At the end of rank 0: let the other processes of torchrun go, if they still wait for a group."""
    if torchrun_size() and not torchrun_store().check([SETUP]):
        torchrun_store().set(SETUP, "null")


def _worker(setup: Mapping[str, Any], threads: int) -> subprocess.Popen[bytes]:
    # Each process would take all cores otherwise. PyTorch logs the ends of other ranks, which rank 0 tells better.
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "TORCH_CPP_LOG_LEVEL": "ERROR"}
    process = subprocess.Popen(
        [sys.executable, "-c", BOOT], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, env=environment
    )
    assert process.stdin is not None
    with process.stdin as pipe:
        pipe.write(json.dumps(setup).encode())
    return process


def joined(
    listener: Listener, processes: Mapping[int, subprocess.Popen[bytes]], devices: Sequence[torch.device]
) -> dict[int, Peer]:
    """Each rank but 0. Raises LongCatError if a process ends before, or does not come."""
    peers: dict[int, Peer] = {}
    until = time.monotonic() + JOINING
    while len(peers) < len(devices) - 1:
        if arrived := listener.accept(0.2):
            peers[arrived[0]] = arrived[1]
        for rank, process in processes.items():
            if rank not in peers and process.poll() is not None:
                raise LongCatError(
                    f"{named(rank, devices[rank])}: {ended(process.returncode)} before it joined; see its words above"
                )
        if time.monotonic() > until:
            missing = ", ".join(str(rank) for rank in range(1, len(devices)) if rank not in peers)
            raise LongCatError(f"rank {missing} did not join within {JOINING:g} seconds; use fewer GPUs")
    return peers


def connected(group: Group) -> Group:
    """The group, once all ranks have found each other; without workers if that fails."""
    try:
        with group.working():
            group.connect()
    except BaseException:
        group.end()
        raise
    return group


def joins(rank: int, line: Line, setup: Mapping[str, Any], store: dist.Store) -> Group:
    """The group that rank 0 describes, in a worker."""
    group = Group(rank, [torch.device(name) for name in setup["devices"]], store, line=line)
    group.connect()
    return group
