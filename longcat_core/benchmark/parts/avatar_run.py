"""From a sound to mp4: a whole process of `longcat avatar`, from which a video of many segments is calculated."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...generate.segments import RECORD
from ...measure.results import markdown
from ..part import Part, Results, Row, met_or_missed, ok_rows
from . import run

# Segments that are made.
SEVERAL = 3
# The seconds to reach on an H100 for a minute of speech at this size, with 8 steps in fp8.
AIMED, STEPS, MINUTE, MINUTE_S = "480x832x93", 8, 60, 420.0


def measure(words: Sequence[str], folder: Path, seconds: float, segments: int, keep: Callable[[Row], None]) -> None:
    """Time a process that makes the first segments of a video, at most `SEVERAL`.

    words: options of `longcat avatar`. seconds: of the sound, which takes `segments`, more than one. keep: called with
    the row. Raises LongCatError with the sentence of a command that fails.
    """
    several = min(SEVERAL, segments)
    with tempfile.TemporaryDirectory(dir=folder.resolve()) as place:
        kept = Path(place, "segments")
        own = ["--segments", str(several), "--folder", str(kept), "--output", str(Path(place, "video.mp4"))]
        # Kernels are compiled, and prompts are encoded.
        caches = {"XDG_CACHE_HOME": str(Path(place, "cache")), "TRITON_CACHE_DIR": str(Path(place, "kernels"))}
        # By the clock of files.
        began = time.time()
        process = run.start([sys.executable, "-m", "longcat_core", "avatar", *words, *own], os.environ | caches)
        ended = time.time()
        if process.returncode:
            raise run.failure(process)
        # A record is the last that is written of a segment.
        saved = sorted(path.stat().st_mtime for path in kept.rglob(RECORD))
    row = {
        "first_s": saved[0] - began,
        "segment_s": (saved[-1] - saved[0]) / (several - 1),
        "file_s": ended - saved[-1],
    }
    row |= {"measured_s": ended - began, "several": several, "segments": segments, "seconds": seconds}
    row["wall_s"] = row["first_s"] + (segments - 1) * row["segment_s"] + row["file_s"]
    keep({"name": f"{seconds:.0f} s of speech", "phase": "generation", "status": "ok"} | row)


def table(results: Results, _: Any = None) -> str:
    """What was measured and the video that is calculated, in seconds."""
    rows = ok_rows(results, "wall_s")
    fields = "measured_s", "first_s", "segment_s", "file_s"
    lines = [(row["name"], *(f"{row[field]:.1f}" for field in fields), _calculation(row)) for row in rows]
    several = rows[0]["several"] if rows else SEVERAL
    head = "s", f"{several} segments", "to the first", "each further", "the file", "the whole video"
    return "\n\n".join([markdown(head, lines), *(_verdict(row) for row in rows if _aimed(results, row))])


def _calculation(row: Row) -> str:
    count, first, segment, file = (row[field] for field in ("segments", "first_s", "segment_s", "file_s"))
    return f"{first:.1f} + {count - 1} x {segment:.1f} + {file:.1f} = {row['wall_s']:.0f}"


def _aimed(results: Results, row: Row) -> bool:
    """Whether the row is of what has a target."""
    inputs: Mapping[str, Any] = results["inputs"]
    sized = inputs.get("size") == AIMED and inputs.get("steps") == STEPS and inputs.get("fp8")
    return bool(results["machine"].get("gpu") and sized and round(row["seconds"]) == MINUTE)


def _verdict(row: Row) -> str:
    met = met_or_missed(row["wall_s"] <= MINUTE_S)
    return f"A minute of speech: {row['wall_s']:.0f} s (<= {MINUTE_S:g} s: {met})."


PART = Part(
    text="""## A minute of speech

A whole run of `longcat avatar` on a sound, in a fresh process with empty caches, from its start to its end: Python,
loading, encoding of the whole sound and of the prompt, the first segments with their KV caches, decoding, and the file.
*To the first* ends when the first segment is saved, *each further* is the mean time from one to the next, and *the
file* is what follows the last one: segments before it are encoded while later ones are sampled. The video of the whole
sound is calculated from them.""",
    run=None,
    table=table,
)
