"""One evaluation on one GPU and on several: with and without guidance, refining, decoding; exact and in fp8."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ...measure.charts import BLUE, GRAY
from ...measure.clock import measure
from ...measure.results import markdown, shown
from ...model.config import ModelConfig
from ...optimize.block_sparse import BlockSparse
from ...optimize.plan import Work
from ...optimize.switches import Exchange, Optimizations
from ...parallel.division import Division
from ...parallel.group import Group
from ...parallel.layout import exchanged_bytes, measured_links
from ...parallel.led_vae import LedVAE
from ...parallel.mirror import share
from ...parallel.sequence import CHUNKS, FIRST
from ...parallel.start import start
from ...vae.network import WanVAE
from ...vae.parts import decoded
from .. import workload
from ..part import Chart, Part, Results, bars, by_name, measured_rows, met_or_missed, ok_rows, preparation, spread
from ..scaling import NETWORK, PER_HOST, WEAK, Basis, chart, sent_and_attention
from ..variants import EXACT, FP8_8BIT, Bench, Row
from .profile import family

if TYPE_CHECKING:
    from PIL import Image

GUIDED, SINGLE, REFINED, DECODED = "with guidance", "without guidance", "refining", "decoding"
# As many frames on each of two GPUs as `SINGLE` has on one.
LONGER = "without guidance, twice as long"
# Latents that `REFINED` has where the bench's size is that of a GPU: 704x1280 and 189 frames.
LARGE = workload.Size(704, 1280, 189, 1)
COUNTS = (2, 4, 8)
SIDES = "height", "width", "frames"
# What is calculated for several hosts and drawn.
CALCULATED = (GUIDED, EXACT), (SINGLE, EXACT), (REFINED, EXACT), (SINGLE, FP8_8BIT)
# The other ways to exchange tensors.
EXCHANGES: tuple[Exchange, ...] = ("messages", "int8")
FLOORS = f"""*Divided* is one GPU's time, of which the part in blocks divides evenly. *Exchange* is what a GPU sends,
at the speed that its group of ranks reached. *Open* is the part of it that no work hides: by windows about an
{FIRST}th, the first heads; by messages, which travel in {CHUNKS} chunks, the queries, keys and values of the first
chunk and the results of the last. The *floor* is *divided* and *open* together. What was measured *beyond* it are
copies of a GPU's own heads, the multiprocessors that the exchange takes from attention, and waiting for another
GPU."""


class Case(NamedTuple):
    """What is timed at a size. settings: of block-sparse attention, or None."""

    name: str
    size: workload.Size
    settings: BlockSparse | None = None


def cases(bench: Bench) -> list[Case]:
    small = bench.device.type == "cpu"
    refined = replace(bench.size, batch=1, frames=max(bench.size.frames, 17)) if small else LARGE
    return [
        Case(GUIDED, replace(bench.size, batch=2)),
        Case(SINGLE, replace(bench.size, batch=1)),
        Case(REFINED, refined, BlockSparse()),
        Case(LONGER, replace(bench.size, batch=1, frames=2 * bench.size.frames - 1)),
    ]


def counts(device: torch.device) -> list[int]:
    """How many ranks are tried beside one."""
    there = torch.cuda.device_count() if device.type == "cuda" else min(COUNTS)
    return [count for count in COUNTS if count <= there]


def run(bench: Bench) -> None:
    """Rows of every case by path and number of GPUs, one GPU first.

    ratio: the time on one GPU over this one. exchange_ms: what NCCL's kernels and copies to other GPUs took in rank 0,
    hidden or not; copies_ms: what other copies took there. outside_ms: what every rank computes by itself, outside the
    blocks. exchange_gbs: measured bandwidth of a rank in the row's exchange, `by` windows or messages.
    """
    for path in (EXACT, FP8_8BIT):
        if path != EXACT and not (bench.fp8 and bench.quantize()):
            return
        first: dict[str, Row] = {}
        for count in (1, *counts(bench.device)):
            with ranks(bench, count) as group:
                for case in cases(bench):
                    if case.name == LONGER and (path != EXACT or count > 2):
                        continue
                    row = _add(bench, path, case, count, group)
                    compare(first.setdefault(case.name, row), row)
                    if case.name == SINGLE and group is not None:
                        # Without windows the exact exchange is by messages already.
                        for exchange in EXCHANGES if Division.of(group).windows else EXCHANGES[1:]:
                            compare(first[SINGLE], _add(bench, path, case, count, group, exchange))
                if path == EXACT:
                    row = bench.add(row_of(DECODED, path, count), _decoding, bench, group)
                    compare(first.setdefault(DECODED, row), row)


@contextmanager
def ranks(bench: Bench, count: int) -> Iterator[Group | None]:
    """The bench's model runs on `count` GPUs while this context is open; None: on one."""
    if count == 1:
        yield None
        return
    devices = [torch.device("cuda", at) if bench.device.type == "cuda" else bench.device for at in range(count)]
    with start(devices) as group:
        try:
            share(group, bench.model)
            yield group
        finally:
            bench.model.execution.ranks = None


def row_of(name: str, path: str, count: int) -> Row:
    """What names the row of a case, a path and a number of GPUs."""
    gpus = "1 GPU" if count == 1 else f"{count} GPUs"
    return {"name": f"{name}, {path}, {gpus}", "case": name, "path": path, "gpus": count, "phase": "path"}


def _add(bench: Bench, path: str, case: Case, count: int, group: Group | None, exchange: Exchange = "exact") -> Row:
    chosen = Optimizations(**bench.path(path), exchange=exchange)
    name = path if exchange == "exact" else f"{path}, {exchange} exchange"
    return bench.add(row_of(case.name, name, count), _evaluation, bench.sized(case.size), chosen, case, group)


def compare(first: Row, row: Row) -> None:
    """Give a row its ratio to the row of one GPU."""
    if "ms" in row and "ms" in first and row is not first:
        row["ratio"] = first["ms"] / row["ms"]


@torch.no_grad()
def _evaluation(bench: Bench, chosen: Optimizations, case: Case, group: Group | None) -> Row:
    model, inputs = bench.model, bench.inputs()
    with workload.switched(model, chosen, case.name), workload.attending(model, case.settings):
        forward = workload.network_forward(model, inputs)
        step = workload.step_of(forward, inputs, chosen)
        # One call of these takes as long as several steps.
        repeats = 1 if case.name in (REFINED, LONGER) else bench.repeats
        row = measure(step, bench.device, repeats, bench.budget, 0).as_row()
        if group is not None:
            link = measured_links(group)[group.size]
            written = chosen.exchange == "exact" and link.written > 0
            speed = link.written if written else link.all_to_all
            row |= profiled(step, bench.device)
            if bench.device.type == "cuda":
                row["peak_gib"] += sum(windows.nbytes for windows in Division.of(group).windows.values()) / 2**30
            row |= {"exchange_gbs": speed / 1e9, "by": "windows" if written else "messages"}
        else:
            skip = workload.network_forward(model, inputs, around_block=lambda i, run, tokens: tokens)
            row["outside_ms"] = measure(skip, bench.device, 3, bench.budget, 0).ms
    return row


def profiled(step: Callable[[], object], device: torch.device) -> Row:
    """exchange_ms, copies_ms: milliseconds of NCCL's kernels and of copies to other GPUs, and of other copies, in one
    call; {} on a CPU."""
    if device.type != "cuda":
        return {}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize(device)
    times = {"exchange_ms": 0.0, "copies_ms": 0.0}
    for event in profile.key_averages():
        exchange = any(word in event.key.lower() for word in ("nccl", "_put_rows"))
        name = "exchange_ms" if exchange else "copies_ms" if family(event.key) == "copies" else ""
        if name:
            times[name] += event.self_device_time_total / 1000
    return times


def random_vae(bench: Bench) -> WanVAE:
    """On the bench's device."""
    return WanVAE(workload.vae_config(bench.device)).to(bench.device, bench.model.dtype).eval()


@torch.no_grad()
def _decoding(bench: Bench, group: Group | None) -> Row:
    """Decoding a clip of the bench's size in the network's dtype, with random weights."""
    size, device, vae = bench.size, bench.device, random_vae(bench)
    latents = torch.randn(1, *size.latents()[1:], device=device, dtype=bench.model.dtype)
    decode: Callable[[Tensor], Any] = (lambda x: decoded(vae, x)) if group is None else LedVAE(group, vae).decode

    def whole() -> None:
        for _ in decode(latents):
            pass

    return measure(whole, device, bench.repeats, bench.budget).as_row()


def basis(results: Results, case: str, path: str) -> Basis | None:
    """What more GPUs are calculated from, or None where one and two were not measured.

    What two GPUs took beyond half of the work in blocks is the exchange that is not hidden; see `pass_seconds`.
    """
    rows = by_name(results)
    # A half on half of the GPUs.
    one, two = (rows.get(row_of(SINGLE if case == GUIDED else case, path, n)["name"], {}) for n in (1, 2))
    if "ms" not in one or "ms" not in two:
        return None
    outside = one.get("outside_ms") or 0.0
    inside = one["ms"] - outside
    exchange = max(0.0, two["ms"] - inside / 2 - outside) * 4
    size = LARGE if case == REFINED else workload.Size(*(results["inputs"][side] for side in SIDES))
    density = 1 - (BlockSparse().sparsity or 0.0) if case == REFINED else 1.0
    work = Work(size.latents(), False, density=density)
    found = sent_and_attention(ModelConfig(), work, torch.bfloat16.itemsize)
    return Basis(1 + (case == GUIDED), inside, outside, exchange, *found)


def calculated(results: Results, case: str, path: str, count: int) -> float | None:
    """Milliseconds on `count` GPUs from what one and two took, or None where these were not measured."""
    found = basis(results, case, path)
    return None if found is None else found.on(count)


def table(results: Results, targets: Any) -> str:
    """Rows as measured with targets and floors, and what four and eight GPUs would take by calculation."""
    lines = [
        (row["name"], row.get("ms"), spread(row), row.get("ratio"), row.get("exchange_ms"), row.get("copies_ms"),
         row.get("outside_ms"), row.get("peak_gib"), row["status"])
        for row in measured_rows(results)
    ]  # fmt: skip
    head = "", "ms", "from, to", "x one GPU", "exchange ms", "copies ms", "outside blocks ms", "peak GiB", ""
    text = markdown(head, lines)
    speeds: dict[tuple[int, str], dict[str, None]] = {}
    for row in results["rows"]:
        if row.get("exchange_gbs"):
            speeds.setdefault((row["gpus"], row["by"]), {})[shown(row["exchange_gbs"])] = None
    for (count, by), found in speeds.items():
        way = "writes into the others' memory" if by == "windows" else "sends to the others by messages"
        text += f"\n\nBetween {count} GPUs each {way} at {' or '.join(found)} GB/s."
    calculated_targets: dict[str, list[float]] = {}
    if targets is not None and targets.comparable(results):
        text += f"\n\n{targets.verdicts(results)}\n\n{_floors(results)}"
        calculated_targets = targets.content["gpus"]["calculated"]
    return f"{text}\n\n{_calculations(results, calculated_targets)}{preparation(results)}"


def _floors(results: Results) -> str:
    """The least that GPUs which share tokens could take with this exchange, of results of the released size."""
    rows, lines = by_name(results), []
    sizes = {SINGLE: workload.Size(*(results["inputs"][side] for side in SIDES)), REFINED: LARGE}
    for row in results["rows"]:
        case, count, speed = row.get("case"), row.get("gpus"), row.get("exchange_gbs")
        one = rows.get(row_of(str(case), row.get("path", ""), 1)["name"], {})
        if case not in sizes or not speed or "ms" not in one:
            continue
        outside = one["outside_ms"]
        divided = (one["ms"] - outside) / count + outside
        whole = exchanged_bytes(ModelConfig(), Work(sizes[case].latents(), False), torch.bfloat16.itemsize)
        sent = whole * (count - 1) / count**2 / 1e9
        exchange = 1000 * sent / speed
        left = exchange / (FIRST if row.get("by") == "windows" else CHUNKS)
        floor = divided + left
        figures = sent, exchange, left, floor, one["ms"] / floor, row["ms"] - floor
        lines.append((row["name"], divided, *figures))
    head = "", "divided ms", "sent GB", "exchange ms", "open ms", "floor ms", "x one GPU", "measured beyond ms"
    return f"{markdown(head, lines)}\n\n{FLOORS}"


def _calculations(results: Results, targets: Mapping[str, Sequence[float]]) -> str:
    """targets: by case and path, of four and of eight GPUs."""
    lines: list[Sequence[Any]] = []
    for path in (EXACT, FP8_8BIT):
        for case in (GUIDED, SINGLE, REFINED):
            one = by_name(results).get(row_of(case, path, 1)["name"], {}).get("ms")
            cells: list[Any] = []
            for at, count in enumerate((4, 8)):
                ms = calculated(results, case, path, count)
                ratio = None if one is None or ms is None else one / ms
                least = targets.get(f"{case}, {path}")
                verdict = ""
                if least is not None and ratio is not None:
                    verdict = f" (>= {least[at]:g}: {met_or_missed(ratio >= least[at])})"
                cells += ms, f"{shown(ratio)}{verdict}"
            lines.append((f"{case}, {path}", one, *cells))
    head = "by calculation", "1 GPU ms", "4 GPUs ms", "x one GPU", "8 GPUs ms", "x one GPU"
    assumption = (
        "Calculated from one and two GPUs of one host: work in blocks divides evenly, work outside of blocks does not, "
        "and the exchange that two GPUs did not hide grows as the share that each GPU sends. Both halves of guidance "
        "run on half of the GPUs each."
    )
    return f"{markdown(head, lines)}\n\n{assumption}{_hosts(results)}"


def _hosts(results: Results) -> str:
    """What GPUs of several hosts would take, as a paragraph that follows; "" where nothing was measured."""
    lines: list[Sequence[Any]] = []
    for case, path in CALCULATED:
        found = basis(results, case, path)
        one = by_name(results).get(row_of(case, path, 1)["name"], {}).get("ms")
        if found is not None and one is not None:
            times = [
                found.on_hosts(count, hidden) for count in (2 * PER_HOST, 4 * PER_HOST) for hidden in (1 - 1 / FIRST, 0)
            ]
            lines.append((f"{case}, {path}", *(f"{shown(ms)} ({shown(one / ms)}x)" for ms in times)))
    if not lines:
        return ""
    head = "", *(f"{n} GPUs, {how}" for n in (2 * PER_HOST, 4 * PER_HOST) for how in ("hidden", "not hidden"))
    text = (
        f"Hosts of {PER_HOST} GPUs by calculation, in milliseconds: with a network card for each GPU, which is assumed "
        f"to reach {NETWORK / 1e9:g} GB/s (400 Gbit/s), if attention hides all but 1/{FIRST} of the network's time, as "
        "it does within a host, and if it hides none of it. The halves of guidance run on hosts of their own. None of "
        "this was measured."
    )
    growing = basis(results, SINGLE, EXACT)
    if growing is not None:
        text = (
            "In the plot, a video that grows with the GPUs has as many frames on each as one GPU has alone. Attention, "
            f"{growing.attention:.0%} of the work in blocks by FLOPs, grows with the square of its length, at the same "
            f"speed.\n\n{text}"
        )
    return f"\n\n{text}\n\n{markdown(head, lines)}"


def _side_by_side(rows: list[Row]) -> list[Row]:
    """Rows of evaluations, those of one case together."""
    timed = [row for row in rows if "case" in row]
    order = list(dict.fromkeys((row["path"], row["case"]) for row in timed))
    return sorted(timed, key=lambda row: order.index((row["path"], row["case"])))


CHART = bars(
    "One evaluation on several GPUs, {blocks} blocks",
    "ms",
    "ms",
    color=lambda row: GRAY if row["gpus"] == 1 else BLUE,
    rows=_side_by_side,
)


def _scaling(results: Results, _: Any) -> Image.Image:
    strong = {
        f"{case}, {path}": found for case, path in CALCULATED if (found := basis(results, case, path)) is not None
    }
    weak = {name: strong[name] for case, path in CALCULATED if case == SINGLE and (name := f"{case}, {path}") in strong}
    seen: dict[str, list[tuple[float, float]]] = {}
    for row in ok_rows(results, "ms", "ratio"):
        case, path = row["case"], row["path"]
        name = f"{WEAK}{SINGLE}, {path}" if case == LONGER else f"{case}, {path}"
        seen.setdefault(name, []).append((float(row["gpus"]), row["ratio"]))
    return chart("Speed by number of GPUs, {blocks} blocks".format(**results["inputs"]), strong, weak, seen)


PART = Part(
    text="""## Several GPUs

One evaluation on one GPU and on several of the same host, in one run. With guidance its two halves run on half of the
GPUs each; the GPUs of one sample share its tokens. They write queries, keys, values and results into each other's
memory, or send messages by NCCL; the sentence below the table says which. *Exchange* counts NCCL's kernels and copies
to other GPUs in the first GPU, hidden behind work or not.""",
    run=run,
    table=table,
    charts=(CHART, Chart(_scaling, ("ms", "exchange_gbs"), "-scaling")),
)
