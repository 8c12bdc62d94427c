"""One evaluation of LongCat-Video-Avatar: from an image and as a continuation, one speaker and two, exact and fp8."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...errors import LongCatError
from ...measure.clock import GIB, clean_up, measure, synchronize
from ...measure.results import markdown, shown
from ...measure.speed import SEED
from ...model.config import AudioConfig, ModelConfig
from ...model.kv_cache import Reference
from ...optimize.plan import Plan, Work, apply_plan
from ...optimize.sparse.settings import Sparse
from ...optimize.switches import Optimizations
from ...sampling.conditioning import video_frames
from .. import workload
from ..part import STEPS, Part, Results, measured_rows, preparation, spread
from ..variants import EXACT, FP8, FP8_8BIT, Bench, Row
from . import cards

IMAGE, CACHED_IMAGE, LATER = "from an image", "from an image, cached", "continuation"
TWO = ", two speakers"
DENSITY = 0.15
# A limit within which the released model is whole on the device in 16 bits, and the KV cache of a continuation is not.
ROOM_GIB = 36.0
# Latents that a continuation is given behind the reference frame: those of 13 frames.
GIVEN = 4
# What smaller models than the released one hear.
SMALL = AudioConfig(groups=2, channels=16, hidden=32, width=48, tokens=6)


def sized(bench: Bench) -> Bench:
    """Without guidance, with an avatar of the model's size in its place, and long enough for a continuation."""
    config, device, dtype = bench.model.config, bench.device, bench.model.dtype
    model = bench.model
    if config.audio is None:
        # Two models do not fit on the device.
        bench.model = model = None
        clean_up(device)
        whole = config.hidden_size == ModelConfig().hidden_size
        model = workload.random_model(replace(config, audio=AudioConfig() if whole else SMALL), device, dtype)
    frames = max(bench.size.frames, video_frames(GIVEN + 1))
    return replace(bench, model=model).sized(replace(bench.size, frames=frames, batch=1))


class Case(NamedTuple):
    """What is evaluated. name: IMAGE with the image's frame in the input, CACHED_IMAGE or LATER, whose clean frames
    are in a KV cache."""

    name: str
    speakers: int = 1

    @property
    def clean(self) -> int:
        """Clean latent frames, the reference frame of a continuation among them."""
        return 1 + GIVEN if self.name == LATER else 1

    @property
    def reference(self) -> Reference | None:
        return Reference() if self.name == LATER else None


def run(bench: Bench) -> None:
    """Rows of every case, the most important first, because a budget may end before the last: exact, fp8 with 8-bit
    attention, sparse, and within the memory of smaller cards. In 16 bits one limit is enough, of the released model.

    ms: of one evaluation; once_ms: filling the KV cache, once a segment; cache_gib: its size; weights_gib: of all
    weights. In rows of cards: plan, given_gib and ratio, the time over that without a limit.
    """
    rows = {}
    for case in (Case(IMAGE), Case(LATER), Case(LATER, 2), Case(IMAGE, 2), Case(CACHED_IMAGE)):
        rows[case] = _add(bench, EXACT, case)
    _cards(bench, EXACT, (ROOM_GIB,), rows[Case(LATER)])
    if not (bench.fp8 and bench.quantize()):
        return
    for case in (Case(IMAGE), Case(LATER), Case(LATER, 2)):
        _add(bench, FP8_8BIT, case)
    sparse = Sparse(DENSITY)
    for case, settings in (
        (Case(LATER), sparse),
        (Case(LATER), replace(sparse, kernel="cudnn-fp8")),
        (Case(IMAGE), sparse),
    ):
        _add(bench, FP8, case, settings)
    _cards(bench, FP8, cards.LIMITS_GIB)


def _add(bench: Bench, path: str, case: Case, sparse: Sparse | None = None) -> Row:
    name = f"{case.name}{TWO if case.speakers > 1 else ''}, {path}"
    if sparse is not None:
        name += f", sparse {sparse.density:g}{'' if sparse.kernel == 'auto' else f' by {sparse.kernel}'}"
    head = {"name": name, "speakers": case.speakers, "batch": 1, "phase": "path" if path == EXACT else "fp8"}
    head |= {"density": sparse and sparse.density}
    return bench.add(head, _evaluation, bench, path, case, sparse)


def _cards(bench: Bench, path: str, gibs: Sequence[float], first: Row | None = None) -> None:
    """Rows of a continuation within every limit, from the most memory to the least. first: the row without a limit, if
    it exists. Then only limits in GiB follow, those of the released model: within a share of what another model needs,
    blocks would be offloaded, and stay so in the rows after these."""
    if path == FP8:
        cards.settle(bench.model, bench.device)
    channels, frames, *sides = bench.size.latents(bench.model.config.in_channels)[1:]
    work = Work((1, channels, frames + 1, *sides), False, Case(LATER).clean)
    found = cards.plans(bench, path == FP8, work, gibs)
    for limit, plan in found if first is None else [(limit, plan) for limit, plan in found if limit.gib]:
        head: Row = {"name": f"{LATER}, {path}, {limit.name}", "phase": "card", "limit_gib": limit.gib}
        head |= {"plan": plan.describe(bench.model.config.depth) or "all on the device", "streamed": plan.streamed}
        head |= {"given_gib": limit.size and limit.size / GIB}
        row = bench.add(head, _within, bench, path, limit, plan)
        first = first or row
        if row is not first and "ms" in row and "ms" in first:
            row["ratio"] = row["ms"] / first["ms"]


def _within(bench: Bench, path: str, limit: cards.Limit, plan: Plan) -> Row:
    apply_plan(bench.model, plan)
    clean_up(bench.device)
    with cards.within(bench.device, limit.size):
        return _evaluation(bench, path, Case(LATER), None, plan.offload_kv_cache)


@torch.no_grad()
def _evaluation(bench: Bench, path: str, case: Case, sparse: Sparse | None, offload: bool = False) -> Row:
    """Timings of one evaluation as the sampler makes it. offload: the KV cache lies in CPU memory."""
    model, chosen = bench.model, Optimizations(**bench.path(path))
    model.sparse = sparse
    try:
        with workload.switched(model, chosen, f"{case.name}, {path}") as notes:
            evaluate, once = _prepared(bench, case, offload)
            row = measure(evaluate, bench.device, bench.repeats, bench.budget, 0).as_row() | once
        if model.sparse != sparse:
            raise LongCatError(f"sparse attention was given up at its first step: {'; '.join(notes)}")
    finally:
        model.sparse = None
    weights = sum(parameter.nbytes for parameter in model.parameters()) / GIB
    kernel = workload.kernel_name(model.choose_kernels(bench.device).attend)
    return row | {"weights_gib": weights, "attention": kernel, "notes": notes}


def _prepared(bench: Bench, case: Case, offload: bool) -> tuple[Callable[[], Tensor], Row]:
    """One evaluation, and what filling its KV cache takes."""
    model, inputs, clean, reference = bench.model, bench.inputs(), case.clean, case.reference
    device, latents = bench.device, inputs.latents
    if reference is not None:
        latents = torch.cat((latents[:, :, :1], latents), dim=2)
    text = replace(model.embed_text(inputs.context, inputs.mask), audio=heard(bench, case.speakers))
    options: dict[str, Any] = {"progress": workload.TIMESTEP / 1000, "reference": reference}
    if case.name == IMAGE:
        t = torch.full((1, latents.shape[2]), workload.TIMESTEP, device=device)
        t[:, :clean] = 0
        return lambda: model(latents, t, text, num_cond_latents=clean, **options), {}
    synchronize(device)
    started = time.perf_counter()
    given = latents[:, :, :clean].contiguous()
    cache = model.fill_kv_cache(given, "cpu" if offload else None, reference=reference)
    synchronize(device)
    once = {"once_ms": 1000 * (time.perf_counter() - started), "cache_gib": cache.nbytes / GIB}
    x, t = latents[:, :, clean:].contiguous(), torch.full((1, 1), workload.TIMESTEP, device=device)
    return lambda: model(x, t, text, kv_cache=cache, **options), once


def heard(bench: Bench, speakers: int) -> Any:
    """Random audio of one segment; several people each have a part of the width."""
    config: AudioConfig = bench.model.config.audio
    shape = speakers, bench.size.frames, config.window, config.groups, config.channels
    windows = torch.randn(shape, generator=torch.Generator(bench.device).manual_seed(SEED), device=bench.device)
    if speakers == 1:
        return bench.model.embed_audio(windows)
    _, rows, columns = (n // step for n, step in zip(bench.size.latents()[2:], (1, 2, 2), strict=True))
    owner = torch.arange(columns, device=bench.device).repeat(rows) * (speakers + 1) // columns
    classes = owner[:, None] == torch.arange(speakers + 1, device=bench.device)
    return bench.model.embed_audio(windows, classes)


def table(results: Results, targets: Any) -> str:
    """Rows; at full size with targets and the public implementation's figures."""
    judged = targets is not None and targets.comparable(results)
    public: dict[str, float] = targets.content["avatar"]["public_s"] if judged else {}
    lines: list[Sequence[Any]] = []
    for row in measured_rows(results):
        name, ms = row["name"], row.get("ms")
        times = [1000 * public[name] / ms if name in public and ms else None] if judged else []
        figures = map(row.get, ("once_ms", "peak_gib", "weights_gib", "cache_gib", "ratio", "plan", "status"))
        lines.append((name, ms, spread(row), *times, *figures))
    head = ("", "ms", "from, to", *(["x public"] if judged else []), "once ms", "peak GiB", "weights GiB", "cache GiB",
            "x no limit", "plan", "")  # fmt: skip
    text = markdown(head, lines) + preparation(results)
    if judged:
        known = " and ".join(f"{shown(seconds)} s ({name.rpartition(', ')[0]})" for name, seconds in public.items())
        text += f"\n\n{targets.verdicts(results)}\n\nThe public code takes {known} on an H100, eager."
    return text


PART = Part(
    text="""## Avatars

One evaluation of LongCat-Video-Avatar 1.5 without guidance, with random weights. *From an image* evaluates all frames,
the image's among them; *cached* reads that frame's keys and values from a KV cache. A *continuation* reads those of a
reference frame and of four conditioning frames. *Once* is the time to fill the cache, once a segment. Sparse attention
keeps 0.15 of the blocks. Rows with a limit may use only that much memory; *plan* is what `longcat` then chooses by
itself. In 16 bits the KV cache of a continuation takes 5.7 GiB, so its target for memory belongs to the row whose cache
lies in CPU memory.""",
    run=run,
    table=table,
    charts=(STEPS,),
    sized=sized,
)
