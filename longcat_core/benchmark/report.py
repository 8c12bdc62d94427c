"""The page of performance, written whole from files of results: every figure in it comes from one of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import LongCatError
from ..generate.media import atomic_path
from .ablation import COMPILED, EAGER, EXACT, FP8, FP8_SAGE, GUESSED_OF_S
from .plots import pictures, require_matplotlib
from .results import markdown, read, shown

# Order of the page.
KINDS = (
    *("paths", "ablation", "profile", "backends", "exactness", "policies", "memory", "scale", "recompiles"),
    "training",
)
DISTILLED_STEPS = 16
# What the public implementations take on an H100 80GB at 480x832x93 with guidance, in seconds a step.
PUBLIC = {EAGER: 11.88, COMPILED: 9.45}
PUBLIC_SIZE, PUBLIC_TOLERANCE = "480x832x93", 0.05
EXACT_LIMIT = 1.1


class Target(NamedTuple):
    """name: of the row in `paths`; limit and value in `unit`; below: whether smaller is better."""

    name: str
    what: str
    limit: float
    unit: str
    below: bool
    value: Callable[[dict[str, Any], dict[str, dict]], float | None]


def _ratio(to: str) -> Callable[[dict[str, Any], dict[str, dict]], float | None]:
    return lambda row, rows: rows[to]["ms"] / row["ms"] if rows.get(to, {}).get("status") == "ok" else None


def _seconds(row: dict[str, Any], rows: dict[str, dict]) -> float:
    return row["ms"] / 1000


def _peak(row: dict[str, Any], rows: dict[str, dict]) -> float | None:
    return row["peak_gib"]


def _first(row: dict[str, Any], rows: dict[str, dict]) -> float:
    return row["first_s"]


def _whole(row: dict[str, Any], rows: dict[str, dict]) -> float:
    return DISTILLED_STEPS * row["ms"] / 1000


TARGETS = (
    Target(EXACT, "step with guidance", 6.0, "s", True, _seconds),
    Target(EXACT, "against the compiled baseline", 1.55, "x", False, _ratio(COMPILED)),
    Target(EXACT, "against the eager baseline", 1.95, "x", False, _ratio(EAGER)),
    Target(EXACT, "peak memory", 30.0, "GiB", True, _peak),
    Target(EXACT, "first call", 12.0, "s", True, _first),
    Target(FP8, "step with guidance", 5.0, "s", True, _seconds),
    Target(FP8, "against the compiled baseline", 1.9, "x", False, _ratio(COMPILED)),
    Target(FP8, "against the eager baseline", 2.35, "x", False, _ratio(EAGER)),
    Target(FP8, "peak memory", 19.0, "GiB", True, _peak),
    Target(FP8, "first call", 15.0, "s", True, _first),
    Target(FP8_SAGE, "step with guidance", 4.2, "s", True, _seconds),
    Target(f"{EXACT}, distilled", f"{DISTILLED_STEPS} steps, no guidance", 50.0, "s", True, _whole),
    Target(f"{FP8}, distilled", f"{DISTILLED_STEPS} steps, no guidance", 42.0, "s", True, _whole),
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
    "profile": "## Where the time goes\n\nKernels of one step under the PyTorch profiler, summed by family.",
    "backends": "## Attention kernels\n\nAt the model's shapes; the error is relative, against fp32 on a slice.",
    "exactness": f"""## Exactness

Relative error of the output against an fp32 run of the same weights on the same inputs, on the first blocks of the
network, and of whole videos of the embedded model. The ratio is to the error of the plain 16-bit baseline; exact may
have {EXACT_LIMIT}.""",
    "policies": "## What to keep out of fp8\n\nError against the 16-bit network with only some layers in fp8.",
    "memory": """## Memory

Peak of a forward over what the model holds, beside what `longcat_core.model.memory.activation_bytes` counts. The
largest ratio is what ComfyUI's estimate has to be multiplied by (`MEMORY_FIT_OWN` in `nodes/comfy_model.py`).""",
    "scale": "## By number of tokens\n\nThe exact path, without guidance.",
    "recompiles": """## Compiling

One model, its blocks compiled; one change after the other. *Graphs*: how many were compiled anew for it.""",
    "training": "## Gradient checkpointing\n\nOne loss and its gradients, with and without recomputing each block.",
}


def write_page(folders: Sequence[Path], output: Path) -> int:
    """Write the page `output` and its plots beside it, from all results in `folders` (or files named one by one).

    Of two results of one kind, the later one counts. Raises LongCatError where there are none, or matplotlib is not.
    """
    require_matplotlib()
    found: dict[str, dict[str, Any]] = {}
    for folder in folders:
        if not folder.exists():
            raise LongCatError(f"{folder} does not exist; give a folder that longcat bench wrote to")
        for path in sorted(folder.glob("*.json")) if folder.is_dir() else [folder]:
            results = read(path)
            kind = results["kind"]
            if kind not in found or results["date"] > found[kind]["date"]:
                found[kind] = results
    if not any(kind in found for kind in KINDS):
        raise LongCatError(f"no results in {', '.join(map(str, folders))}; run longcat bench with --output there first")
    plots = {name: data for kind in KINDS if kind in found for name, data in pictures(found[kind]).items()}
    text = page(found, plots)
    output.parent.mkdir(parents=True, exist_ok=True)
    for name, data in plots.items():
        with atomic_path(output.with_name(f"{output.stem}-{name}")) as temporary:
            temporary.write_bytes(data)
    with atomic_path(output) as temporary:
        temporary.write_text(text, encoding="utf-8")
    print(f"{output}: {', '.join(kind for kind in KINDS if kind in found)}; {len(plots)} plots beside it")
    return 0


def page(found: dict[str, dict[str, Any]], plots: dict[str, bytes], stem: str = "performance") -> str:
    """The page's text from results by kind."""
    places = {hardware(results) for results in found.values()}
    shared = places.pop() if len(places) == 1 else ""
    sections = [INTRODUCTION, *([f"Machine: {shared}"] if shared else [])]
    if "paths" in found:
        sections.append(_targets(found["paths"], found.get("exactness"), shared))
    for kind in KINDS:
        if kind not in found:
            continue
        results = found[kind]
        names = [name for name in plots if name.split(".")[0] == kind or name.startswith(f"{kind}-")]
        images = [f"![{name.removesuffix('.png')}]({stem}-{name})" for name in names]
        parts = [TEXTS[kind], origin(results, shared), TABLES[kind](results), *images, _reasons(results)]
        sections.append("\n\n".join(part for part in parts if part))
    return "\n\n".join(section.strip() for section in sections) + "\n"


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


def _targets(results: dict[str, Any], exactness: dict[str, Any] | None, shared: str) -> str:
    rows = {row["name"]: row for row in results["rows"]}
    inputs = results["inputs"]
    same = inputs.get("size") == PUBLIC_SIZE and inputs.get("batch") == 2 and inputs.get("blocks") == 48
    lines = []
    for target in TARGETS:
        row = rows.get(target.name, {"status": "not run"})
        value = target.value(row, rows) if row["status"] == "ok" else None
        met = None if value is None else (value <= target.limit if target.below else value >= target.limit)
        sign = "<=" if target.below else ">="
        verdict = {None: f"not measured ({row['status']})", True: "met", False: "missed"}[met]
        if met is not None and not same:
            verdict = "of another run"
        measured = "-" if value is None else f"{shown(value)} {target.unit}"
        lines.append((target.name, target.what, f"{sign} {target.limit:g} {target.unit}", measured, verdict))
    # In fp32 there is no 16-bit path to compare with.
    rounded = exactness is not None and exactness["inputs"].get("dtype") != "float32"
    for row in exactness["rows"] if rounded else ():
        if row["name"] == EXACT and row.get("ratio") is not None:
            verdict = "met" if row["ratio"] <= EXACT_LIMIT else "missed"
            told = f"{shown(row['ratio'])} x"
            lines.append((EXACT, "error over the plain 16-bit path's", f"<= {EXACT_LIMIT} x", told, verdict))
    notes = ""
    if not same:
        notes = f"\n\nThe targets are for {PUBLIC_SIZE}, 48 blocks, batch 2 on an H100; this run was another."
    head = ("path", "what", "target", "measured", "")
    return f"## Targets\n\n{origin(results, shared)}\n\n{markdown(head, lines)}{notes}\n\n{_anchors(rows)}"


def _anchors(rows: dict[str, dict]) -> str:
    """The baseline beside the public implementations' figures, which were measured elsewhere and are constants here."""
    lines = []
    for name, public in PUBLIC.items():
        row = rows.get(name, {})
        if row.get("status") != "ok":
            lines.append((name, f"{public} s", "-", "-", "not measured"))
            continue
        seconds = row["ms"] / 1000
        off = seconds / public - 1
        verdict = (
            f"within {PUBLIC_TOLERANCE:.0%}" if abs(off) <= PUBLIC_TOLERANCE else f"not within {PUBLIC_TOLERANCE:.0%}"
        )
        lines.append((name, f"{public} s", f"{shown(seconds)} s", f"{off:+.1%}", verdict))
    head = ("", "public LongCat-Video, H100", "measured", "difference", "")
    return markdown(head, lines)


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
    "training": _columns(
        name="", ms="ms", peak_gib="peak GiB", gradient_difference="difference of gradients", equal="equal", status=""
    ),
}
