"""The page of performance, written whole from files of results: every figure in it comes from one of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..errors import LongCatError
from ..files.media import atomic_path
from ..measure.results import markdown, name_of, read, shown
from . import floor, targets
from .ablation import COMPILED, GUESSED_OF_S
from .plots import picture_names, pictures, require_matplotlib
from .targets import DISTILLED_STEPS, EXACT_LIMIT

# Order of the page.
KINDS = (
    *("paths", "ablation", "profile", "backends", "exactness", "policies", "memory", "scale", "recompiles"),
    *("cards", "load", "training", "continuation", "refine"),
)

INTRODUCTION = """# Performance

Written by `longcat bench report` from the results of `longcat bench`; nothing here is typed by hand. Every section
names its machine, its inputs and the command that made it. Ratios are of one run on one machine.

*Baseline* is this repository's own plain network (`longcat_core/benchmark/baseline.py`) on the same weights, run the
way public implementations run LongCat-Video: separate projections, autocast, reshapes, padded cross-attention,
FlashAttention-2, torch.compile around the whole network or none. *Exact* computes the same in 16 bits with every exact
optimization. A step is one evaluation of the network, with guidance for both halves, and the sampler's update. Times
are medians. *First call* is the first one of a variant, in which blocks are compiled; what PyTorch's compile cache kept
of variants before it is not compiled again.
"""
TEXTS = {
    "paths": "## Steps side by side\n\nAll in one process, one after the other, on the same weights and inputs.",
    "ablation": f"""## What each optimization is worth

*Added*: one after the other to the plain network, in this order, each compared with the row before. *Taken alone*: the
full set without it, compared with the full set. Worth and guess are shares of the eager baseline's time; the published
guesses were seconds of {GUESSED_OF_S:.0f}.""",
    "profile": "## Where the time goes: {variant}\n\nKernels of one step under the PyTorch profiler, by family.",
    "backends": "## Attention kernels\n\nAt the model's shapes; the error is relative, against fp32 on a slice.",
    "exactness": f"""## Exactness

Relative error of the output against an fp32 run of the same weights on the same inputs, on the first blocks of the
network, and of whole videos of the embedded model. The ratio is to the error of the plain 16-bit baseline; exact may
have {EXACT_LIMIT}.""",
    "policies": "## What to keep out of fp8\n\nError against the 16-bit network with only some layers in fp8.",
    "memory": """## Memory

Peak of a forward over what the model holds, beside what `longcat_core.optimize.memory.activation_bytes` counts. The
largest ratio is what estimates have to be multiplied by (`MEMORY_FIT_OWN` there).""",
    "scale": "## By number of tokens\n\nThe exact path, without guidance.",
    "recompiles": """## Compiling

One model, its blocks compiled; one change after the other. *Graphs*: how many were compiled anew for it.""",
    "continuation": """## Given frames from a cache

Steps of the sampler with clean latents in front: one of an image, four of a clip's end. *Off*: their keys and values
are computed at every step. *Exact* keeps them, and what guidance takes of these frames; *official* leaves that out.
*Once*: filling the cache, once a generation, memory pinned for an offloaded one included. Peaks are of the whole
generation. *Difference*: of the frames after these steps from those without a cache, relative.""",
    "refine": f"""## Refining to 720p

One evaluation of the network without guidance, attention in full and block-sparse. *Attention alone* is one layer's, of
block-sparse attention with its choice of chunks. The public code takes {targets.PUBLIC_REFINE} s, block-sparse and
eager, on an H100 for {targets.REFINE_SIZE}.""",
    "cards": """## Smaller cards

Steps of the sampler while PyTorch may take no more memory than such a card has. *Plan*: what `longcat` chooses by
itself then. *Floor*: the step without a limit, or what the weights that wait take to be copied once a forward if that
is longer. Peaks are of the whole sampling. *Difference*: of the latents after these steps from those without a limit,
relative: blocks that wait change nothing, halves of guidance round otherwise. The GPU's own speed stays what it is; a
smaller card is slower.""",
    "load": """## Loading

From a file that the system was asked to forget, in turn with reading it by as many threads; medians. *Share*: of the
rate of reading. To fp8, weights are quantised as they arrive.""",
    "training": "## Gradient checkpointing\n\nOne loss and its gradients, with and without recomputing each block.",
}


def write_page(folders: Sequence[Path], output: Path) -> int:
    """Write the page `output` and its plots beside it, from all results in `folders` (or files named one by one).

    Of two results of one name, the later one counts. Raises LongCatError where there are none, or matplotlib is not.
    """
    require_matplotlib()
    found: dict[str, dict[str, Any]] = {}
    for folder in folders:
        if not folder.exists():
            raise LongCatError(f"{folder} does not exist; give a folder that longcat bench wrote to")
        for path in sorted(folder.glob("*.json")) if folder.is_dir() else [folder]:
            results = read(path)
            name = name_of(results)
            if name not in found or results["date"] > found[name]["date"]:
                found[name] = results
    told = list(_in_order(found))
    if not told:
        raise LongCatError(f"no results in {', '.join(map(str, folders))}; run longcat bench with --output there first")
    plots = {name: data for results in told for name, data in pictures(results).items()}
    text = page(found, plots)
    output.parent.mkdir(parents=True, exist_ok=True)
    for name, data in plots.items():
        with atomic_path(output.with_name(f"{output.stem}-{name}")) as temporary:
            temporary.write_bytes(data)
    with atomic_path(output) as temporary:
        temporary.write_text(text, encoding="utf-8")
    print(f"{output}: {', '.join(map(name_of, told))}; {len(plots)} plots beside it")
    return 0


def _in_order(found: dict[str, dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Results in the order of the page."""
    for kind in KINDS:
        yield from (found[name] for name in sorted(found) if found[name]["kind"] == kind)


def page(found: dict[str, dict[str, Any]], plots: dict[str, bytes], stem: str = "performance") -> str:
    """The page's text from results by name."""
    places = {hardware(results) for results in found.values()}
    shared = places.pop() if len(places) == 1 else ""
    sections = [INTRODUCTION, *([f"Machine: {shared}"] if shared else [])]
    if "paths" in found:
        results = found["paths"]
        table = targets.table(results, found.get("exactness"))
        sections.append(f"## Targets\n\n{origin(results, shared)}\n\n{table}")
    sections.append(floor.section(found))
    for results in _in_order(found):
        kind, variant = results["kind"], results["inputs"].get("variant", "")
        names = [name for name in picture_names(results) if name in plots]
        images = [f"![{name.removesuffix('.png')}]({stem}-{name})" for name in names]
        text = TEXTS[kind].replace("{variant}", variant)
        parts = [text, origin(results, shared), TABLES[kind](results), *images, _reasons(results)]
        sections.append("\n\n".join(part for part in parts if part))
    return "\n\n".join(section.strip() for section in sections if section) + "\n"


def hardware(results: dict[str, Any]) -> str:
    """What these results were made on: machine and software."""
    machine = results["machine"]
    name = machine.get("gpu") or machine["cpu"]
    if machine.get("gpu"):
        name += f" ({machine['gpu_memory_gib']} GiB, driver {machine.get('driver') or 'unknown'})"
    packages = [f"{name} {number}" for name, number in machine.get("packages", {}).items()]
    software = [f"PyTorch {machine['torch']}", *([f"CUDA {machine['cuda']}"] if machine.get("cuda") else []), *packages]
    return f"{name}; {', '.join(software)}."


def origin(results: dict[str, Any], shared: str = "") -> str:
    """One paragraph: where (unless that is `shared`), when, on what and by which command these results were made."""
    inputs = results["inputs"]
    where = hardware(results)
    sized = f"{inputs.get('model')}, {inputs.get('blocks')} blocks, {inputs.get('dtype')}, {inputs.get('size')} "
    sized += f"({inputs.get('tokens')} tokens), batch {inputs.get('batch')}"
    at = f" at commit {results['commit']}" if results.get("commit") else ""
    # Where the results went says nothing of them.
    command = re.sub(r" --output \S+", "", results["command"])
    told = "" if where == shared else f"{where} "
    return f"{told}{sized}. {results['date'][:16].replace('T', ' ')} UTC{at}, by `{command}`."


def _reasons(results: dict[str, Any]) -> str:
    """Why a row has no figures, and what the network said of itself."""
    lines = []
    for row in results["rows"]:
        lines += [f"- {row['name']}: {text}" for text in (row.get("reason"), *row.get("notes", ())) if text]
    return "\n".join(dict.fromkeys(lines))


# --- one table a kind ------------------------------------------------------------------------------------------------


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:+.1f} %"


def _spread(row: dict[str, Any]) -> str:
    times = row.get("times_ms") or []
    return f"{shown(min(times))} to {shown(max(times))}" if times else "-"


def _paths(results: dict[str, Any]) -> str:
    rows = {row["name"]: row for row in results["rows"]}
    compiled, steps = rows.get(COMPILED, {}), results["inputs"].get("steps", 50)
    lines = []
    for row in results["rows"]:
        if row.get("phase") == "preparation":
            continue
        ms = row.get("ms")
        over = (
            compiled["ms"] / ms if ms and compiled.get("status") == "ok" and row.get("phase") != "distilled" else None
        )
        count = DISTILLED_STEPS if row.get("phase") == "distilled" else steps
        whole = None if ms is None else f"{count * ms / 1000:.0f} s ({count} steps)"
        last = [row.get(key) for key in ("peak_gib", "first_s", "attention", "status")]
        lines.append((row["name"], ms, _spread(row), row.get("ratio"), over, whole, *last))
    head = ("", "ms a step", "from, to", "x eager", "x compiled", "a video, estimated", "peak GiB", "first call s")
    return markdown((*head, "attention", ""), lines) + _prepared(results)


def _prepared(results: dict[str, Any]) -> str:
    rows = [r for r in results["rows"] if r.get("phase") == "preparation" and r["status"] == "ok"]
    return "".join(f"\n\nBefore that, {row['name']} took {shown(row['first_s'])} s." for row in rows)


def _refine(results: dict[str, Any]) -> str:
    """Rows, and at the size that they are for the targets and the public figure beside them."""
    judged = targets.comparable(results)
    asked = {target.name: target for target in targets.REFINE_TARGETS}
    lines = []
    for row in results["rows"]:
        if row.get("phase") == "preparation":
            continue
        line, ms, target = [row["name"], row.get("ms"), _spread(row), row.get("ratio")], row.get("ms"), None
        if judged:
            target = asked.get(row["name"])
            verdict = None if target is None or ms is None else "met" if target.met(ms / 1000) else "missed"
            public = targets.PUBLIC_REFINE * 1000 / ms if ms and row.get("phase") != "attention" else None
            line += [target and target.asked, verdict, public]
        lines.append((*line, row.get("peak_gib"), row.get("first_s"), row.get("attention"), row["status"]))
    head = ("", "ms", "from, to", "x dense", *(("target", "reached", "x public") if judged else ()))
    return markdown((*head, "peak GiB", "first call s", "attention", ""), lines) + _prepared(results)


def _worth(row: dict[str, Any]) -> tuple[Any, ...]:
    return row.get("ms"), row.get("ratio"), row.get("worth_ms")


def _ablation(results: dict[str, Any]) -> str:
    phases: dict[str, dict[str, dict]] = {}
    for row in results["rows"]:
        phases.setdefault(row.get("phase", ""), {})[row["name"]] = row
    lines = []
    alone = phases.get("removed", {})
    for name, row in phases.get("baseline", {}).items():
        lines.append((name, row.get("ms"), None, None, None, None, None, row.get("peak_gib"), row["status"]))
    for name, row in phases.get("added", {}).items():
        without, guess = alone.get(f"without {name}", {}), row.get("guess_s")
        guessed = "-" if guess is None else f"{100 * guess / GUESSED_OF_S:.1f} %"
        shares = _percent(row.get("share")), _percent(without.get("share"))
        lines.append((f"+ {name}", *_worth(row), *shares, guessed, row.get("peak_gib"), row["status"]))
    for name, row in phases.get("fp8", {}).items():
        lines.append((name, *_worth(row), _percent(row.get("share")), None, None, row.get("peak_gib"), row["status"]))
    head = ("", "ms a step", "x eager", "worth ms", "share", "share, taken alone", "published guess", "peak GiB", "")
    return markdown(head, lines)


def _profile(results: dict[str, Any]) -> str:
    families = [r for r in results["rows"] if r.get("phase") == "family"]
    whole = next((r for r in results["rows"] if r.get("phase") == "total"), {})
    lines = [(r["name"], r["ms"], f"{100 * r['share']:.1f} %", r["calls"]) for r in families]
    longest = [
        (k["name"].replace("`", "'")[:90], k["family"], k["ms"], k["calls"]) for k in results.get("kernels", [])[:12]
    ]
    told = f"Kernels take {shown(whole.get('busy_ms'))} ms of a step of {shown(whole.get('ms'))} ms."
    tables = markdown(("family", "ms", "share", "calls"), lines), markdown(("kernel", "family", "ms", "calls"), longest)
    return f"{told}\n\n{tables[0]}\n\nThe longest:\n\n{tables[1]}"


def _columns(**columns: str) -> Callable[[dict[str, Any]], str]:
    """A table of rows' fields under headings."""
    return lambda results: markdown(
        tuple(columns.values()), [[row.get(name) for name in columns] for row in results["rows"]]
    )


def _exactness(results: dict[str, Any]) -> str:
    lines = []
    for row in results["rows"]:
        blocks = ", ".join(shown(error, 4) for error in row.get("per_block", ()))
        error = None if row.get("error") is None else f"{row['error']:.3e}"
        lines.append((row["name"], error, row.get("ratio"), row.get("psnr"), blocks or None, row["status"]))
    return markdown(("", "relative error", "x baseline's", "PSNR dB", "after each block", ""), lines)


def _memory(results: dict[str, Any]) -> str:
    columns = {
        "name": "",
        "tokens": "tokens",
        "counted_gib": "counted GiB",
        "measured_gib": "measured GiB",
        "fit": "fit",
    }
    fits = [row["fit"] for row in results["rows"] if row.get("fit") is not None]
    told = f"\n\nLargest fit: {max(fits):.3f}." if fits else "\n\nThis device does not tell its peak."
    return _columns(**columns, status="")(results) + told


def _cards(results: dict[str, Any]) -> str:
    lines = []
    for row in results["rows"]:
        if row.get("phase") == "preparation":
            continue
        asked, met = row.get("target"), row.get("met")
        told = None if asked is None else f"{asked}: {'met' if met else 'missed'}"
        figures = [row.get(name) for name in ("ms", "ratio", "transfer_ms", "floor_ms", "peak_gib", "difference")]
        lines.append((row["name"], row["plan"], *figures, told, row["status"]))
    head = ("", "plan", "ms a step", "x no limit", "transfer ms", "floor ms", "peak GiB", "difference", "target", "")
    rate = results["inputs"].get("copy_gb_s")
    return markdown(head, lines) + (f"\n\nCopies to the GPU: {shown(rate)} GB/s." if rate else "")


def _load(results: dict[str, Any]) -> str:
    lines = []
    for row in results["rows"]:
        share, asked = row.get("share"), row.get("target")
        told = None if share is None or asked is None else f">= {asked:.0%}: {'met' if share >= asked else 'missed'}"
        of_disk = None if share is None else f"{share:.0%}"
        lines.append((row["name"], row.get("seconds"), row.get("gb_s"), of_disk, told, row["status"]))
    inputs = results["inputs"]
    told = "" if inputs.get("cold") else " The system kept it in memory: there is no asking it to forget here."
    return markdown(("", "s", "GB/s", "share", "target", ""), lines) + f"\n\n{shown(inputs['file_gb'])} GB.{told}"


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "paths": _paths,
    "ablation": _ablation,
    "profile": _profile,
    "backends": _columns(
        name="", attention="attention", ms="ms", tflops="TFLOP/s", error="error", exact="exact", status=""
    ),
    "exactness": _exactness,
    "policies": _columns(name="in fp8", error="relative error", psnr="PSNR dB", status=""),
    "memory": _memory,
    "scale": _columns(size="", tokens="tokens", ms="ms", peak_gib="peak GiB", first_s="first call s", status=""),
    "recompiles": _columns(
        name="", graphs="graphs", at_most="at most", held="held", first_s="first forward s", status=""
    ),
    "continuation": _columns(
        name="",
        ms="ms a step",
        ratio="x off",
        once_ms="once ms",
        cache_gib="cache GiB",
        peak_gib="peak GiB",
        difference="difference",
        status="",
    ),
    "refine": _refine,
    "cards": _cards,
    "load": _load,
    "training": _columns(
        name="", ms="ms", peak_gib="peak GiB", gradient_difference="difference of gradients", equal="equal", status=""
    ),
}
