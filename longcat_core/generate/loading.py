"""The order of a load: the text encoder with its prompts, and the transformer, which may be read meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

import torch

from ..checkpoints.reader import Watch
from .progress import LOADING

Loaded = TypeVar("Loaded")
# Called with what is loaded, the bytes that are there and those of all; 0 of 0 for what has no bytes.
OnLoad = Callable[[str, int, int], None]
# Seconds between two looks at the other thread.
LOOK = 0.1


class _Stopped(Exception):
    """The caller has given up."""


def overlaps(device: torch.device) -> bool:
    """Whether the transformer is read while the text encoder works: not on a CPU, whose cores and memory both need."""
    return device.type == "cuda"


def load_both(
    text: Callable[[Callable[[], None]], object],
    transformer: Callable[[Watch], Loaded],
    on_load: OnLoad,
    device: torch.device,
    at_once: bool,
) -> Loaded:
    """Call both and return what `transformer` returns.

    text: called in this thread with a function to call now and then, which raises the other's error. transformer:
    called with what reads report to. at_once: in a thread of its own, beside `text`; otherwise after it. on_load:
    called in this thread. An error in either ends both, and no thread is left.
    """
    if not at_once:
        text(lambda: None)
        return transformer(lambda done, of: on_load(LOADING, done, of))
    stop, place, read = threading.Event(), same_stream(device), (0, 0)

    def watch(done: int, of: int) -> None:
        nonlocal read
        if stop.is_set():
            raise _Stopped
        read = done, of

    def there() -> Loaded:
        # One stream has one pool of memory, so that a plan's figures hold, and its copies wait for nobody.
        with place:
            return transformer(watch)

    with ThreadPoolExecutor(1, "longcat-load") as pool:
        future = pool.submit(there)
        try:
            text(lambda: _raise(future))
            while not wait([future], LOOK).done:
                on_load(LOADING, *read)
            on_load(LOADING, *read)
            return future.result()
        finally:
            stop.set()


def _raise(future: Future) -> None:
    if future.done():
        future.result()


def same_stream(device: torch.device) -> AbstractContextManager:
    """What gives another thread the current GPU and stream of this one."""
    return torch.cuda.stream(torch.cuda.current_stream(device)) if device.type == "cuda" else nullcontext()
