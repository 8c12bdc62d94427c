"""From Enter to mp4: whole runs of `longcat generate`, each in a fresh process, by stages.

Stages are those that the progress bar names. What the run waited for adds up to its time; what other threads did
meanwhile is listed beside it.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import LongCatError
from ...generate.paths import ModelPaths
from ...generate.progress import (
    CHECKING,
    DECODING,
    ENCODING,
    FIRST_STEP,
    LOADING,
    LOADING_TEXT,
    SAVING,
    STARTING,
    STEPS,
)
from ...measure.charts import COLORS, FAINT, GRAY, GREEN, INK, Color, Stack, stacked_chart
from ...measure.results import markdown, shown
from ..part import Chart, Part, Results, Row, measured_rows, met_or_missed, ok_rows
from ..stages import ENDING

if TYPE_CHECKING:
    from PIL import Image

PROMPTS = ("a red circle moves right on a blue background", "a green square moves up on a black background")
# Of a process that finds no encoding of it.
NEW = "a yellow triangle turns on a white background"
COLD, WARM, KERNELS, KEPT, HELP = "cold", "warm", "cold, kernels kept", "cold, encoding kept", "longcat --help"
# Starts of `longcat --help`, of which the median counts, and the steps of a run on a smaller card: the first one, and
# others to know how long it would be without kernels.
STARTS, CARD_STEPS = 5, 4
# Blocks of a file that are asked for, to see how much of it the system holds in memory.
SAMPLES, BLOCK = 256, 4096
LABELS = {
    STARTING: "starting: Python, imports",
    LOADING: "loading the model: read, transfer, quantize",
    FIRST_STEP: "first step, with kernels and compiling",
    STEPS: "the other steps",
    SAVING: "saving: the rest of the file",
    ENDING: "ending the process",
}
STAGE_COLORS: dict[str, Color] = {
    STARTING: GRAY,
    CHECKING: FAINT,
    ENDING: INK,
    STEPS: (205, 214, 224),
    FIRST_STEP: COLORS[7],
    LOADING_TEXT: COLORS[1],
    ENCODING: COLORS[3],
    LOADING: COLORS[0],
    DECODING: GREEN,
    SAVING: COLORS[4],
}
# The size and the seconds to reach on an H100: for everything but sampling in a cold run of the distilled model in
# fp8, for decoding, and for the first frames.
AIMED, COLD_S, DECODE_S, FIRST_S = "480x832x93", 12.0, 1.6, 0.3
# Seconds to reach of `longcat --help`.
HELP_S = 0.2
# Runs in ComfyUI, see comfyui_run.py, and the seconds to reach in the last one for everything but sampling.
IN_COMFYUI, COMFYUI_S = ("ComfyUI, start", "ComfyUI, first prompt", "ComfyUI, second prompt"), 4.0
# The pack's share of ComfyUI's start, and the seconds to reach.
PACK_START, PACK_S = "starting: this pack", 0.3


def measure(
    words: Sequence[str],
    paths: ModelPaths,
    folder: Path,
    runs: int,
    text_cache: bool,
    keep: Callable[[Row, Row], None],
    cards: Sequence[float] = (),
) -> None:
    """Time `runs` processes that make two videos each, as many that find compiled kernels, as many that also find the
    encoding of the prompt, one process within the GPU memory of each of the `cards`, in GiB, and the start of
    `longcat --help`.

    words: options of `longcat generate`; paths: of its models; text_cache: whether these leave encodings on disk.
    keep: called with each row and the inputs. Raises LongCatError with the sentence of a command that fails.
    """
    # Only an absolute path names a folder for caches.
    with tempfile.TemporaryDirectory(dir=folder.resolve()) as place:

        def add(names: Sequence[str], prompts: Sequence[str], words: Sequence[str], cache: Path, kernels: Path) -> Row:
            cached = cached_share(_files(paths))
            rows, inputs = _process(words, prompts, Path(place), cache, kernels)
            for name, row in zip(names, rows, strict=True):
                phase = WARM if name.startswith(WARM) else COLD
                notes = [_cached_in_words(cached)] if phase == COLD else []
                row = {"name": name, "phase": phase, "status": "ok"} | row
                keep(row | {"cached": cached if phase == COLD else None, "notes": notes}, inputs)
            return inputs

        for number in range(1, runs + 1):
            # Every first process compiles its kernels and encodes.
            cache, kernels = Path(place) / f"cache-{number}", Path(place) / f"kernels-{number}"
            processes = [((COLD, WARM), PROMPTS), ((KERNELS,), (NEW,)), ((KEPT,), PROMPTS[:1])]
            for names, prompts in processes[: 2 + text_cache]:
                numbered = [f"{name} {number}" for name in names] if runs > 1 else names
                inputs = add(numbered, prompts, words, cache, kernels)
        for gib in cards:
            steps = min(CARD_STEPS, inputs["steps"])
            limited = [*words, "--memory", f"{gib:g}", "--steps", str(steps)]
            cache = Path(place) / f"cache-{gib:g}"
            add([f"{COLD}, {gib:g} GiB, {steps} steps"], PROMPTS[:1], limited, cache, kernels)
    times = [_help_seconds() for _ in range(STARTS)]
    row = {"name": HELP, "phase": "preparation", "status": "ok", "help_s": statistics.median(times), "times_s": times}
    keep(row, inputs)


def _help_seconds() -> float:
    began = time.monotonic()
    start([sys.executable, "-m", "longcat_core", "--help"], os.environ)
    return time.monotonic() - began


def _process(
    words: Sequence[str], prompts: Sequence[str], place: Path, cache: Path, kernels: Path
) -> tuple[list[Row], Row]:
    """Rows of the videos that one process makes, and their inputs. cache, kernels: folders that keep encodings and
    compiled kernels."""
    job, results = place / "job.json", place / "results.json"
    commands = [["generate", prompt, *words, "-o", str(place / "video.mp4")] for prompt in prompts]
    command = [sys.executable, "-m", "longcat_core.cli.timed", str(job)]
    began = time.monotonic()
    job.write_text(json.dumps({"began": began, "commands": commands, "results": str(results)}), encoding="utf-8")
    run = start(command, os.environ | {"XDG_CACHE_HOME": str(cache), "TRITON_CACHE_DIR": str(kernels)})
    ended = time.monotonic()
    if run.returncode or not results.exists():
        raise failure(run)
    found = json.loads(results.read_text(encoding="utf-8"))
    results.unlink()
    first = found["rows"][0]
    # The process ended once, after its last video.
    ending = ended - found["ended"]
    first["stages"].append({"name": ENDING, "s": ending})
    for field in ("wall_s", "less_sampling_s"):
        first[field] += ending
    return found["rows"], found["inputs"]


def start(command: Sequence[str], environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """Run a process to its end, with what it prints as text."""
    return subprocess.run(command, env=environment, capture_output=True, text=True, errors="replace")


def failure(process: subprocess.CompletedProcess[str]) -> LongCatError:
    """The error of a process of `longcat` that failed, in its own sentence."""
    lines = [line for line in process.stderr.splitlines() if line.strip()] or ["it said nothing"]
    return LongCatError(lines[-1].removeprefix("longcat: error: "))


def _files(paths: ModelPaths) -> list[Path]:
    """The files of weights."""
    places = {paths.model, paths.vae, paths.text_encoder}
    found = {file for place in places for file in (place.rglob("*") if place.is_dir() else [place])}
    return sorted(file for file in found if file.suffix in (".safetensors", ".gguf"))


def cached_share(files: Sequence[Path]) -> float | None:
    """The share of the files that the system holds in memory, by samples; None where it cannot be asked."""
    if not hasattr(os, "RWF_NOWAIT"):
        return None
    there = size = 0.0
    for file in files:
        bytes_in_all = file.stat().st_size
        step = max(BLOCK, bytes_in_all // SAMPLES)
        offsets = range(0, bytes_in_all, step)
        with open(file, "rb", buffering=0) as opened:
            try:
                held = sum(_is_held(opened.fileno(), offset) for offset in offsets)
            except OSError:
                return None
        there += bytes_in_all * held / len(offsets) if offsets else 0.0
        size += bytes_in_all
    return there / size if size else None


def _is_held(descriptor: int, offset: int) -> bool:
    try:
        os.preadv(descriptor, [bytearray(1)], offset, os.RWF_NOWAIT)
    except BlockingIOError:
        return False
    return True


def _cached_in_words(share: float | None) -> str:
    held = "an unknown share" if share is None else f"{share:.0%}"
    return f"the system's cache held {held} of the model's files before"


# --- what is shown ---------------------------------------------------------------------------------------------------


def table(results: Results, _: Any = None) -> str:
    """A line for each stage and a column for each run, in seconds."""
    rows = [row for row in measured_rows(results) if row.get("status") == "ok"]
    stages = list(dict.fromkeys(stage["name"] for row in rows for stage in row["stages"]))
    if ENDING in stages:
        stages.append(stages.pop(stages.index(ENDING)))
    by_run = [{stage["name"]: stage["s"] for stage in row["stages"]} for row in rows]
    lines: list[tuple[Any, ...]] = [
        (LABELS.get(name, name), *(_fixed(seconds.get(name)) for seconds in by_run)) for name in stages
    ]
    figures = {
        "**in all**": "wall_s",
        "sampling": "sampling_s",
        "**less sampling**": "less_sampling_s",
        "first frames, from the start of decoding": "first_frames_s",
    }
    lines += [(label, *(_fixed(row.get(field)) for row in rows)) for label, field in figures.items()]
    for name in dict.fromkeys(work["name"] for row in rows for work in row["beside"]):
        lines.append((f"beside: {name}", *(_beside(row, name) for row in rows)))
    found = [markdown(("s", *(row["name"] for row in rows)), lines)]
    return "\n\n".join([*found, *_verdicts(results, rows)])


def _fixed(seconds: float | None) -> str | None:
    return None if seconds is None else f"{seconds:.2f}"


def _beside(row: Row, name: str) -> str | None:
    for work in row["beside"]:
        if work["name"] == name:
            return work.get("what") or _fixed(work["s"])
    return None


def _verdicts(results: Results, rows: Sequence[Row]) -> Iterator[str]:
    """What is to be reached at the size for which it is known, on a GPU."""
    inputs = results["inputs"]
    if not results["machine"].get("gpu"):
        return
    for row in results["rows"]:
        if "help_s" in row:
            seconds = row["help_s"]
            yield f"{HELP}: {_fixed(seconds)} s (<= {HELP_S:g} s: {met_or_missed(seconds <= HELP_S)})."
        for stage in row.get("stages", ()):
            if stage["name"] == PACK_START:
                yield f"{PACK_START}: {_fixed(stage['s'])} s (<= {PACK_S:g} s: {met_or_missed(stage['s'] <= PACK_S)})."
    if inputs.get("size") != AIMED:
        return
    for row in rows:
        seconds = {stage["name"]: stage["s"] for stage in row["stages"]}
        goals = [("decoding", seconds.get(DECODING), DECODE_S), ("first frames", row["first_frames_s"], FIRST_S)]
        if (
            row["name"].startswith(COLD)
            and "GiB" not in row["name"]
            and inputs.get("fp8")
            and inputs.get("steps") == 16
        ):
            goals.insert(0, ("less sampling", row["less_sampling_s"], COLD_S))
        if row["name"] == IN_COMFYUI[2]:
            goals.insert(0, ("less sampling", row["less_sampling_s"], COMFYUI_S))
        said = [
            f"{name} {shown(value)} s (<= {most:g} s: {met_or_missed(value <= most)})"
            for name, value, most in goals
            if value is not None
        ]
        if said:
            yield f"{row['name']}: {', '.join(said)}."


def draw(results: Results, _: Any = None) -> Image.Image:
    """One bar for each run, with its stages one after the other."""
    rows, others = ok_rows(results, "wall_s"), iter(COLORS * 4)
    colors = dict(STAGE_COLORS)
    for row in rows:
        for stage in row["stages"]:
            if stage["name"] not in colors:
                colors[stage["name"]] = next(others)
    stacks = [
        Stack(
            row["name"],
            [(stage["name"], stage["s"]) for stage in row["stages"]],
            f"{row['wall_s']:.1f} s",
        )
        for row in rows
    ]
    inputs = results["inputs"]
    above = f"{inputs.get('model')}, {inputs.get('size')}, {inputs.get('steps')} steps, {inputs.get('dtype')}"
    names = {stage: LABELS.get(stage, stage) for stage in colors}
    return stacked_chart("From Enter to mp4, in seconds", stacks, colors, names, [above])


PART = Part(
    text="""## From Enter to mp4

Whole runs of `longcat generate`, by the stages that its progress bar names. *Cold* is a fresh process, from its start
to its end, the first one on its machine, which compiles kernels; *warm* is a second video of the same pipeline with
another prompt, until its file is there; *kernels kept* is a fresh process with a new prompt that finds the kernels of
Triton compiled, as every later command does; *encoding kept* also finds the prompt's encoding on disk and loads no text
encoder. Stages are what the run waited for and add up to its time; work that other threads did meanwhile is listed
*beside*. *Sampling* counts the first step as long as a later one, since what it takes longer is spent on kernels; *less
sampling* is everything else. A stage ends when the GPU has done its work. *GiB* is a limit of the GPU's memory, as on a
smaller card.""",
    run=None,
    table=table,
    charts=(Chart(draw, ("wall_s",)),),
)
