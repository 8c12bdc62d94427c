"""From a sound to mp4: whole processes of `longcat avatar`, of which a video of many segments is calculated."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...errors import LongCatError
from ...measure.results import markdown
from ..part import Part, Results, Row, met_or_missed, ok_rows
from . import run

# Segments of the longer process.
SEVERAL = 3
# The seconds to reach on an H100 for a minute of speech at this size, with 8 steps in fp8.
AIMED, STEPS, MINUTE, MINUTE_S = "480x832x93", 8, 60, 420.0


def measure(words: Sequence[str], folder: Path, seconds: float, segments: int, keep: Callable[[Row], None]) -> None:
    """Time a process that makes one segment of a video, and one that makes `SEVERAL`.

    words: options of `longcat avatar`. seconds: of the sound, which takes `segments`, more than one. keep: called with
    the row. Raises LongCatError with the sentence of a command that fails.
    """
    several = min(SEVERAL, segments)
    with tempfile.TemporaryDirectory(dir=folder.resolve()) as place:
        first_s, several_s = (_process(words, Path(place, str(count)), count) for count in (1, several))
    segment_s = (several_s - first_s) / (several - 1)
    times = {"first_s": first_s, "several_s": several_s, "segment_s": segment_s}
    times["wall_s"] = first_s + (segments - 1) * segment_s
    counts = {"seconds": seconds, "segments": segments, "several": several}
    keep({"name": f"{seconds:.0f} s of speech", "phase": "generation", "status": "ok"} | times | counts)


def _process(words: Sequence[str], place: Path, segments: int) -> float:
    """Seconds of a process from its start to its end. place: a new folder, for its video and its caches."""
    place.mkdir()
    # Every process compiles its kernels and encodes, so that they differ in segments only.
    caches = {"XDG_CACHE_HOME": str(place / "cache"), "TRITON_CACHE_DIR": str(place / "kernels")}
    own = ["--segments", str(segments), "--output", str(place / "video.mp4")]
    began = time.monotonic()
    process = run.start([sys.executable, "-m", "longcat_core", "avatar", *words, *own], os.environ | caches)
    took = time.monotonic() - began
    if process.returncode:
        lines = [line for line in process.stderr.splitlines() if line.strip()] or ["it said nothing"]
        raise LongCatError(lines[-1].removeprefix("longcat: error: "))
    return took


def table(results: Results, _: Any = None) -> str:
    """The processes that ran and the video that is calculated, in seconds."""
    rows = ok_rows(results, "wall_s")
    lines = [
        (row["name"], *(f"{row[field]:.1f}" for field in ("first_s", "several_s", "segment_s")), _calculated(row))
        for row in rows
    ]
    several = rows[0]["several"] if rows else SEVERAL
    head = "", "one segment, s", f"{several} segments, s", "each further segment, s", "the whole video, s"
    return "\n\n".join([markdown(head, lines), *(_verdict(row) for row in rows if _aimed(results, row))])


def _calculated(row: Row) -> str:
    """The last column, with the calculation."""
    return f"{row['first_s']:.1f} + {row['segments'] - 1} x {row['segment_s']:.1f} = {row['wall_s']:.0f}"


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

Whole runs of `longcat avatar` on a sound, each in a fresh process with empty caches, from its start to its end: Python,
loading, encoding of the whole sound and of the prompt, segments with their KV caches, decoding, and the file. One
process makes only the first segment and another one the first few. Their difference gives the seconds of a further
segment, and the video of the whole sound is calculated: the first process, and as many further segments as the sound
takes.""",
    run=None,
    table=table,
)
