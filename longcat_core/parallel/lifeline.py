"""The connections between rank 0 and its workers: messages one way, failures the other, and the end of either side.

A connection ends with the process at its other side, however that ends, so nobody polls and nobody waits for a rank
that is gone. A worker ends at once when rank 0 does; rank 0 learns which rank failed first and why.
"""

from __future__ import annotations

import json
import os
import queue
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, answer_challenge, deliver_challenge, wait
from typing import Any, NamedTuple, NoReturn

# Seconds after the first failure in which its cause may come: a rank that dies makes others fail.
GRACE = 0.4


class Address(NamedTuple):
    """Where rank 0 listens, and the key that both sides prove to know."""

    host: str
    port: int
    key: bytes


class Peer(NamedTuple):
    """A worker that has connected: the connection, and its socket for closing one direction."""

    connection: Connection
    socket: socket.socket


class Failure(NamedTuple):
    """What happened to a rank. caused: by another rank, probably, because what failed is communication."""

    rank: int
    sentence: str
    caused: bool


class Listener:
    """Where workers reach rank 0."""

    def __init__(self, host: str = "127.0.0.1") -> None:
        self._socket = socket.create_server((host, 0), backlog=64)
        self.address = Address(host, self._socket.getsockname()[1], os.urandom(32))

    def accept(self, timeout: float) -> tuple[int, Peer] | None:
        """The rank of a worker that connects; None if nobody who knows the key does within `timeout` seconds."""
        if not wait([self._socket], timeout):
            return None
        accepted, _ = self._socket.accept()
        # Messages are small and must not wait until earlier ones are acknowledged.
        accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection = Connection(accepted.dup().detach())
        try:
            deliver_challenge(connection, self.address.key)
            answer_challenge(connection, self.address.key)
            return int(json.loads(connection.recv_bytes())["rank"]), Peer(connection, accepted)
        except (AuthenticationError, EOFError, OSError, ValueError):
            connection.close()
            accepted.close()
            return None

    def close(self) -> None:
        self._socket.close()


class Hub:
    """Rank 0's side of all connections. processes: those workers that this process started."""

    def __init__(self, peers: Mapping[int, Peer], processes: Mapping[int, subprocess.Popen[bytes]]) -> None:
        self._peers, self._processes = dict(peers), dict(processes)
        self._failures: list[Failure] = []
        self._leaving = self._killed = False
        self._known = threading.Event()
        self._thread = threading.Thread(name="longcat ranks")

    def watch(self, on_failure: Callable[[], None]) -> None:
        """Watch all workers from now on. on_failure: called once, in a thread, if one has failed and all are ended."""
        self._thread = threading.Thread(target=self._watch, args=(on_failure,), name="longcat ranks", daemon=True)
        self._thread.start()

    @property
    def failed(self) -> bool:
        """Whether a worker has failed or ended, or `kill` was called."""
        return self._killed or bool(self._failures)

    def failure(self, timeout: float = 0.0) -> Failure | None:
        """What the workers failed of, if that becomes known within `timeout` seconds."""
        if self._failures:
            timeout = 2 * GRACE
        elif self._leaving:
            # They were ended, and what ends on purpose does not say why.
            timeout = 0.0
        self._known.wait(timeout)
        # `caused` ones last; sorting keeps the order otherwise.
        return min(self._failures, key=lambda failure: failure.caused, default=None)

    def send(self, data: bytes) -> None:
        """Send a message to every worker. Raises OSError if one is gone."""
        for peer in self._peers.values():
            peer.connection.send_bytes(data)

    def leave(self) -> None:
        """From now on it is right that workers end."""
        self._leaving = True

    def wait(self, timeout: float) -> None:
        """Wait until all workers have ended, and end those that have not within `timeout` seconds."""
        self._thread.join(timeout)
        self.kill()
        for process in self._processes.values():
            process.wait()
        # Not even its end comes from a machine that is gone.
        self._thread.join(1 + 2 * GRACE)
        if self._thread.is_alive():
            return
        for peer in self._peers.values():
            peer.connection.close()
            peer.socket.close()

    def kill(self) -> None:
        """End all workers at once, in the middle of their work."""
        self._leaving = self._killed = True
        for peer in self._peers.values():
            # Its reader sees the end, wherever it runs; what it says last still arrives.
            with suppress(OSError):
                peer.socket.shutdown(socket.SHUT_WR)
        for process in self._processes.values():
            process.kill()

    def _watch(self, on_failure: Callable[[], None]) -> None:
        ranks = {peer.connection: rank for rank, peer in self._peers.items()}
        until: float | None = None
        while ranks and (until is None or time.monotonic() < until):
            for ready in wait(list(ranks), None if until is None else until - time.monotonic()):
                assert isinstance(ready, Connection)
                rank = ranks[ready]
                try:
                    failure = Failure(rank, **json.loads(ready.recv_bytes()))
                except (EOFError, OSError):
                    del ranks[ready]
                    if self._leaving or any(known.rank == rank for known in self._failures):
                        continue
                    failure = Failure(rank, self._last_words(rank), False)
                self._failures.append(failure)
                until = until or time.monotonic() + GRACE
        if self._failures:
            self.kill()
            self._known.set()
            on_failure()

    def _last_words(self, rank: int) -> str:
        code = None
        if process := self._processes.get(rank):
            with suppress(subprocess.TimeoutExpired):
                code = process.wait(GRACE)
        return ended(code)


class Line:
    """A worker's side. Once it is there, the process ends as soon as rank 0 does."""

    def __init__(self, address: Address, rank: int) -> None:
        self._connection = Client((address.host, address.port), authkey=address.key)
        self._connection.send_bytes(json.dumps({"rank": rank}).encode())
        self._messages: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        threading.Thread(target=self._read, name="longcat rank 0", daemon=True).start()

    def receive(self) -> bytes:
        """The next message, however long that takes."""
        return self._messages.get()

    def report(self, sentence: str, caused: bool) -> None:
        """Tell rank 0 that this rank failed."""
        self._connection.send_bytes(json.dumps({"sentence": sentence, "caused": caused}).encode())

    def _read(self) -> None:
        while True:
            try:
                data = self._connection.recv_bytes()
            except (EOFError, OSError):
                leave()
            self._messages.put(data)


def leave(code: int = 0) -> NoReturn:
    """End this process now, although its main thread may wait for other ranks. Workers have no files to tidy up."""
    os._exit(code)


def ended(code: int | None) -> str:
    """How a process ended, in words."""
    if code is None:
        return "its process ended"
    if code == -9:
        return "its process was killed; if nobody did that, the memory of the machine has run out"
    return f"its process was ended by signal {-code}" if code < 0 else f"its process ended with exit code {code}"


def to_json(address: Address) -> dict[str, Any]:
    return {"host": address.host, "port": address.port, "key": address.key.hex()}


def from_json(record: Mapping[str, Any]) -> Address:
    return Address(record["host"], record["port"], bytes.fromhex(record["key"]))
