"""Runs of long video that kill themselves: a process that has everything loaded forks one for each line that it reads.

A line is JSON: folder; prompts; refine (what is kept is pieces of a refined video); log, a file for what happens, a
line each; die_at, the number of the event before which the run sends itself SIGKILL, or null. The answer, a line each,
is how the run ended: a signal as a negative number, or its exit code.

Events are all that Python does to files in the folder, reported by its audit hook; every flush to the disk; every
picture that goes to the encoder, which writes by itself; and every step of sampling.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from longcat_core.files import atomic
from longcat_core.files.media import writing
from longcat_core.generate.long_video import LongVideoRequest, long_video, segment_folder
from longcat_core.generate.pipeline import Pipeline
from longcat_core.generate.refine import RefineRequest, piece_folder, refine_in_folder
from longcat_core.generate.request import NANO, GenerateRequest

from ..support.tiny import tiny_pipeline

FIRST = GenerateRequest("", height=16, width=16, frames=9, steps=2, seed=3)
REFINE = RefineRequest("a", 3, False, 16, 16, steps=12, piece=9, overlap=5)
WATCHED = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree"}


class Events:
    """Writes what happens to the log, and dies before event `die_at`."""

    def __init__(self, folder: str, log: str, die_at: int | None) -> None:
        self.folder, self.die_at, self.count = folder, die_at, 0
        self.log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def __call__(self, what: str) -> None:
        if self.count == self.die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        self.count += 1
        self.tell(what)

    def tell(self, what: str) -> None:
        os.write(self.log, f"{what}\n".encode())

    def watch(self, engine: Pipeline) -> None:
        sys.addaudithook(self._audit)
        flush, pictures, denoise = atomic.flush, writing._pictures, engine.denoise

        def flushed(path: Path) -> None:
            self(f"flush {path.name}")
            flush(path)

        def encoded(*args: Any) -> Iterator[np.ndarray]:
            for picture in pictures(*args):
                self("picture")
                yield picture

        def denoised(*args: Any, **kwargs: Any) -> torch.Tensor:
            self.tell("denoise")
            return denoise(*args, **kwargs)

        atomic.flush, writing._pictures, engine.denoise = flushed, encoded, denoised

    def _audit(self, event: str, args: tuple) -> None:
        writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if not writes and event not in WATCHED:
            return
        paths = [os.fspath(path) for path in args[:2] if isinstance(path, str | os.PathLike)]
        # Within rmtree names are those in an open folder.
        if any(path.startswith(self.folder) for path in paths) or event in ("os.remove", "os.rmdir"):
            self(f"{event} {' '.join(Path(path).name for path in paths)}")


def run(engine: Pipeline, folder: str, prompts: list[str], refine: bool, log: str, die_at: int | None) -> None:
    events = Events(folder, log, die_at)
    events.watch(engine)

    def callback(number: int, of: int, step: Any) -> None:
        events(f"step {number}.{step.index}")

    if refine:
        rows = np.arange(8 * 8 * 3).reshape(8, 8, 3)
        video = np.stack([(rows + 7 * i) % 256 for i in range(13)]).astype(np.uint8)
        finished = refine_in_folder(lambda: engine, NANO, video, REFINE, piece_folder(folder), {}, callback)
    else:
        request = LongVideoRequest(FIRST, tuple(prompts), overlap=5).filled(NANO)
        finished = long_video(lambda: engine, request, segment_folder(folder), callback)
    for _ in finished:
        events("finished")


def main() -> None:
    torch.set_num_threads(1)
    engine = tiny_pipeline()
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                asked = json.loads(line)
                run(engine, **asked)
                code = 0
            except Exception as error:
                with open(asked["log"], "a") as log:
                    print(f"{type(error).__name__}: {' '.join(str(error).split())}", file=log)
            finally:
                os._exit(code)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
