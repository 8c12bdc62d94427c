"""Ctrl-C for a main thread that waits for other ranks, where Python cannot interrupt it."""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Callable

# Seconds for an interrupt to get through by itself.
PATIENCE = 3.0
NAMES = ("SIGINT", "SIGTERM", "SIGHUP")


def watch_interrupts(stage: Callable[[], object | None], end: Callable[[], None]) -> Callable[[], None]:
    """Call `end`, in a thread, if the main thread is in the same stage seconds after an interrupt.

    stage: what it does that others take part in, None for nothing. Does nothing outside the main thread, and where
    other code watches signals, as asyncio does. Returns what undoes it.
    """
    if threading.current_thread() is not threading.main_thread():
        return lambda: None
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    if before != -1:
        signal.set_wakeup_fd(before)
        reader.close()
        writer.close()
        return lambda: None
    numbers = {getattr(signal, name) for name in NAMES if hasattr(signal, name)}

    def watch() -> None:
        with reader:
            while arrived := reader.recv(64):
                interrupted = stage() if numbers & set(arrived) else None
                if interrupted is not None and not over.wait(PATIENCE) and stage() is interrupted:
                    end()

    def undo() -> None:
        over.set()
        if threading.current_thread() is threading.main_thread():
            signal.set_wakeup_fd(-1)
            writer.close()
            # What a thread lets go of while the interpreter ends aborts the process.
            thread.join(PATIENCE)

    over = threading.Event()
    thread = threading.Thread(target=watch, name="longcat interrupts", daemon=True)
    thread.start()
    return undo
