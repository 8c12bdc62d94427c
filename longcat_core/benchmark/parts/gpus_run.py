"""A whole video of the distilled model on one GPU and on several: its steps, decoding and the file; exact and fp8."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from ...files.media import VideoBeside
from ...generate.vae import VideoVAE
from ...measure.clock import peak_gib, reset_peak, synchronize
from ...measure.results import markdown
from ...optimize.switches import Optimizations
from ...parallel.group import Group
from ...parallel.led_vae import LedVAE
from ...sampling.sampler import sample
from ...sampling.schedules import make_schedule
from .. import workload
from ..part import Part, Results, by_name, measured_rows, met_or_missed, preparation
from ..variants import EXACT, FP8_8BIT, Bench, Row
from . import gpus
from .paths import DISTILLED_STEPS

FPS = 15.0


def sized(bench: Bench) -> Bench:
    """Without guidance."""
    return bench.sized(replace(bench.size, batch=1))


def run(bench: Bench) -> None:
    """A row of one whole run by path and number of GPUs, one GPU first.

    ms: of the run; sampling_ms: of its steps; decoding_ms: of decoding and writing the file; ratio: ms on one GPU over
    this one's; first_s: a run of one step before, which loads kernels.
    """
    bench.report.content["inputs"]["steps"] = DISTILLED_STEPS
    for path in (EXACT, FP8_8BIT):
        if path != EXACT and not (bench.fp8 and bench.quantize()):
            return
        first: Row = {}
        for count in (1, *gpus.counts(bench.device)):
            with gpus.ranks(bench, count) as group:
                row = bench.add(gpus.row_of("whole run", path, count), _whole_run, bench, path, group)
            first = first or row
            gpus.compare(first, row)


@torch.no_grad()
def _whole_run(bench: Bench, path: str, group: Group | None) -> Row:
    model, inputs, device = bench.model, bench.inputs(), bench.device
    chosen = Optimizations(**bench.path(path))
    vae = VideoVAE(gpus.random_vae(bench))
    if group is not None:
        vae.spread = LedVAE(group, vae.model)
    with TemporaryDirectory() as folder, workload.switched(model, chosen, path):

        def timed(steps: int) -> tuple[float, float]:
            """Milliseconds of sampling, and of what follows."""
            synchronize(device)
            began = time.perf_counter()
            latents = sample(model, inputs.latents, make_schedule("distilled", steps), **inputs.prompts())
            synchronize(device)
            sampled = time.perf_counter()
            with VideoBeside(Path(folder, "video.mp4"), FPS) as video:
                for part in vae.decode_frames(latents):
                    video.add(part[0].mul(255).round().to(torch.uint8).cpu().numpy())
            return 1000 * (sampled - began), 1000 * (time.perf_counter() - sampled)

        first = sum(timed(1))
        reset_peak(device)
        sampling, decoding = timed(DISTILLED_STEPS)
    stages = {"sampling_ms": sampling, "decoding_ms": decoding}
    return {"first_s": first / 1000, "ms": sampling + decoding, "peak_gib": peak_gib(device)} | stages


def calculated(one: float, two: float, count: int) -> float:
    """What `count` GPUs would take, from what one and two took, in the same unit.

    What two GPUs did not halve, exchange included, takes as long on more.
    """
    whole = max(0.0, 2 * two - one)
    return whole + (one - whole) / count


def table(results: Results, targets: Any) -> str:
    """Rows as measured with their targets, and what four and eight GPUs would take by calculation."""
    rows = by_name(results)
    lines: list[Sequence[Any]] = []
    for row in measured_rows(results):
        seconds = (None if row.get(name) is None else row[name] / 1000 for name in ("ms", "sampling_ms", "decoding_ms"))
        lines.append((row["name"], *seconds, row.get("ratio"), row.get("peak_gib"), row["status"]))
    head: tuple[str, ...] = "", "s", "sampling s", "decoding and file s", "x one GPU", "peak GiB", ""
    text = markdown(head, lines)
    judged = targets is not None and targets.comparable(results)
    if judged:
        text += f"\n\n{targets.verdicts(results)}"
    lines = []
    for path in (EXACT, FP8_8BIT):
        one, two = (rows.get(gpus.row_of("whole run", path, count)["name"], {}).get("ms") for count in (1, 2))
        if one is None or two is None:
            continue
        for count in (4, 8):
            ms = calculated(one, two, count)
            least = targets.content["gpus_run"]["calculated"].get(str(count)) if judged else None
            bound = (None, "") if least is None else (f">= {least} x", met_or_missed(one / ms >= least))
            lines.append((f"{path}, {count} GPUs", ms / 1000, one / ms, *bound))
    head = "by calculation", "s", "x one GPU", "target", ""
    assumption = "Calculated from one and two GPUs of one host: what two did not halve takes as long on more."
    return f"{text}\n\n{markdown(head, lines)}\n\n{assumption}{preparation(results)}"


PART = Part(
    text=f"""## A whole run on several GPUs

One video of the distilled model, {DISTILLED_STEPS} steps without guidance, from noise to the finished .mp4, on one GPU
and on several of the same host in one run, with random weights. Encoding the prompt, loading the model, starting the
other GPUs' processes and loading kernels come before and do not count; the whole video is made once. All GPUs decode,
and the file is written meanwhile.""",
    run=run,
    table=table,
    sized=sized,
)
