"""Starting a group on this machine, and joining one that torchrun started."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ..errors import LongCatError
from .group import TIMEOUT, Group, check_none, named
from .lifeline import Hub, Line, Listener, Peer, ended, to_json
from .messages import CORE

# Seconds: importing PyTorch from a cold disk takes a minute.
JOINING = 300.0
HOME = "127.0.0.1"
# The folder that holds this package, under the name that a worker gives it.
FOLDER = Path(__file__).parents[2]
# In place of the main script, which another process must not run. sys.path[0] is the working folder, which may hold
# anything.
BOOT = f"""import json, signal, sys
for name in ("SIGINT", "SIGTERM", "SIGHUP"):
    if hasattr(signal, name):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
setup = json.loads(sys.stdin.readline())
sys.path[:1] = setup["path"]
from {CORE}.parallel.worker import main
main(setup)"""


def start(devices: Sequence[torch.device], serve: str = ".mirror") -> Group:
    """A group of this process, rank 0, and a new process on this machine for each further device.

    devices: of all ranks, GPUs or CPUs; this process works on the first one. serve: module with the function `serve`
    that workers call with their group. Takes as long as importing PyTorch does. Raises LongCatError if a process
    cannot join.
    """
    check_none()
    # Listening on this machine alone.
    bound = socket.create_server((HOME, 0))
    port = bound.getsockname()[1]
    server = dist.TCPStore(HOME, port, None, True, TIMEOUT, False, master_listen_fd=bound.detach())
    listener = Listener()
    threads = max(1, (os.cpu_count() or 1) // len(devices))
    processes: dict[int, subprocess.Popen[bytes]] = {}
    try:
        for rank in range(1, len(devices)):
            setup = {
                "path": [str(FOLDER), *sys.path],
                "rank": rank,
                "devices": [str(device) for device in devices],
                "store": [HOME, port],
                "address": to_json(listener.address),
                "serve": serve,
            }
            processes[rank] = _worker(setup, threads)
        peers = _joined(listener, processes, devices)
    except BaseException:
        for process in processes.values():
            process.kill()
            process.wait()
        raise
    finally:
        listener.close()
    store = dist.TCPStore(HOME, port, None, False, TIMEOUT, False)
    return _connected(Group(0, devices, store, hub=Hub(peers, processes), server=server))


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


def _joined(
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


def _connected(group: Group) -> Group:
    try:
        with group.working():
            group.connect()
    except BaseException:
        group.end()
        raise
    return group


def join_as(rank: int, line: Line, setup: Mapping[str, Any]) -> Group:
    """The group that rank 0 describes, in a worker."""
    devices = [torch.device(name) for name in setup["devices"]]
    host, port = setup["store"]
    group = Group(rank, devices, dist.TCPStore(host, port, None, False, TIMEOUT, False), line=line)
    group.connect()
    return group
