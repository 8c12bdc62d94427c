"""The report of `make test-gpu`: merged from what its parts left in a folder, as JSON and as the pages in docs.

`docs/build.py` writes docs/gpu.md and the GPU column of docs/comfyui.md from docs/gpu.json, which `--keep` writes.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

Report = dict[str, Any]
Row = dict[str, Any]

ABOUT, ROWS, SPEED, FILE = "about.json", "matrix.jsonl", "speed.json", "report.json"
KEPT = "gpu.json"
PARTS = {"tests": "the ordinary tests", "nodes": "the nodes' own tests inside ComfyUI"}
KINDS = {
    "pairs": "pairs of weights, sampler, VRAM mode, patch and task, on the nano model",
    "stock": "stock nodes that no axis has, in every VRAM mode, on the nano model",
    "wide": "three blocks of the real width, random weights, 832x480",
}
AXES = ("weights", "sampler", "mode", "extra", "task")
TITLES = {"weights": "weights", "sampler": "sampler", "mode": "VRAM mode", "extra": "patch", "task": "task"}
RIGHT, WRONG, REFUSED = "right", "wrong", "refused"
# A folder of the machine that ran the tests, in what a failed one said.
FOLDERS = re.compile(r"(?<![\w.])/(?:[\w.@+-]+/)+")
# Of a result that an earlier run left: its commit and date.
RUN = "run"
# What ABOUT keeps of an earlier run.
KEPT_OF = ("planned", "limits", "covered")
START, END = "<!-- gpu -->", "<!-- /gpu -->"
TABLE = "| stock node | works | on a GPU | what the test shows |"


def read_rows(folder: Path, identity: str) -> dict[str, Row]:
    """The rows in a folder's ROWS that belong to `identity`, by name; of a row that ran twice, the later one."""
    path, found = folder / ROWS, {}
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            if row.pop("identity") == identity:
                found[row["name"]] = row
    return found


def gather(folder: Path) -> Report:
    """Everything in a folder that belongs to the tree and the machine of its ABOUT."""
    about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
    parts = {}
    for part in PARTS:
        path = folder / f"{part}.json"
        if path.exists():
            kept = json.loads(path.read_text(encoding="utf-8"))
            if kept.get("identity") == about["identity"]:
                for file in kept["files"]:
                    file["failures"] = [(test, FOLDERS.sub(".../", said)) for test, said in file["failures"]]
                parts[part] = {"files": kept["files"], "of": kept["of"]}
    path, speed = folder / SPEED, []
    if path.exists() and (kept := json.loads(path.read_text(encoding="utf-8")))["identity"] == about["identity"]:
        speed = kept["rows"]
    rows = sorted(read_rows(folder, about["identity"]).values(), key=lambda row: (row["kind"], row["name"]))
    rows = [row | {"said": FOLDERS.sub(".../", row["said"])} for row in rows]
    return {"about": about, "parts": parts, "speed": speed, "rows": rows}


def write(folder: Path) -> Report:
    """Write the report of a folder as JSON and Markdown into it."""
    report = gather(folder)
    (folder / FILE).write_text(dump(report), encoding="utf-8")
    (folder / "report.md").write_text(page(report), encoding="utf-8")
    return report


def dump(report: Report) -> str:
    """JSON with a line for each row, so that a diff shows which ones changed."""
    rows = ",\n".join(json.dumps(row) for row in report["rows"])
    about, parts, speed = (json.dumps(report.get(name, []), indent=1) for name in ("about", "parts", "speed"))
    return f'{{"about": {about},\n"parts": {parts},\n"speed": {speed},\n"rows": [\n{rows}\n]}}\n'


def count(rows: Iterable[Row]) -> Counter[str]:
    return Counter(row["verdict"] for row in rows)


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [[str(value).replace("|", "/").replace("\n", " ") for value in row] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in [list(header), ["---"] * len(header), *lines])


def least(rows: Sequence[Row]) -> str:
    """The smallest distance from a row's limit, as "found (limit)"; empty if none has one."""
    found = [row for row in rows if isinstance(row["psnr"], int | float)]
    if not found:
        return "equal" if any(row["psnr"] == "equal" for row in rows) else ""
    row = min(found, key=lambda row: row["psnr"] - row["limit"])
    return f"{row['psnr']:.1f} ({row['limit']:g})"


def machine(about: Report) -> str:
    """The machine and the versions in one sentence."""
    names = ("gpu", "driver", "torch", "triton", "python", "ComfyUI", "comfy-kitchen", "comfy-aimdo", "cores")
    found = [f"{name} {about[name]}" for name in names if about.get(name)]
    return f"{about['date']}, commit {about['commit'] or 'unknown'}: {', '.join(found)}."


def runs(report: Report) -> str:
    """Which results are of which run; empty if all are of the last one."""
    results = {("file of tests", "files of tests"): [f for kept in report["parts"].values() for f in kept["files"]]}
    results |= {("row", "rows"): report["rows"], ("figure of speed", "figures of speed"): report.get("speed", [])}

    def listed(counts: Counter[tuple[str, str]]) -> str:
        return ", ".join(f"{count} {what[count > 1]}" for what, count in counts.items()) or "nothing"

    by_run: dict[str, Counter[tuple[str, str]]] = {}
    for what, entries in results.items():
        for entry in entries:
            by_run.setdefault(entry.get(RUN, ""), Counter())[what] += 1
    now = by_run.pop("", Counter())
    if not by_run:
        return ""
    about = report["about"]
    said = [f"{listed(now)} again at {about['commit'] or 'unknown'}, {about['date']}"]
    said += [f"{listed(counts)} at {run}" for run, counts in sorted(by_run.items())]
    return f"Results of several runs: {'; '.join(said)}."


def overview(report: Report) -> str:
    """One line for each part: how much of it ran, and what came of it."""
    lines = []
    for part, what in PARTS.items():
        kept = report["parts"].get(part)
        if kept is None:
            lines.append((what, "not run", "", "", ""))
            continue
        files = kept["files"]
        passed, skipped = (sum(file[name] for file in files) for name in ("passed", "skipped"))
        failed = sum(len(file["failures"]) for file in files)
        lines.append((what, f"{len(files)} of {kept['of']} files", passed, f"{skipped} skipped", failed))
    for kind, what in KINDS.items():
        rows = [row for row in report["rows"] if row["kind"] == kind]
        found, planned = count(rows), report["about"].get("planned", {}).get(kind, len(rows))
        lines.append((what, f"{len(rows)} of {planned} rows", found[RIGHT], f"{found[REFUSED]} refused", found[WRONG]))
    return table(("part", "ran", "right", "skipped or refused", "wrong"), lines)


def counted(report: Report) -> tuple[int, int, int]:
    """How many rows of the matrix ran, were planned, and are wrong."""
    rows = report["rows"]
    kinds = Counter(row["kind"] for row in rows)
    planned = report["about"].get("planned", {})
    return len(rows), sum(planned.get(kind, kinds[kind]) for kind in KINDS), count(rows)[WRONG]


def notice(report: Report) -> str:
    """The first line of a report: what of a run lacks, and what is wrong; empty if all ran and nothing is."""
    ran, planned, wrong = counted(report)
    lacks = [f"{ran} of {planned} rows of the matrix"] if ran < planned else []
    failed = 0
    for part, what in PARTS.items():
        files, of = [], None
        if kept := report["parts"].get(part):
            files, of = kept["files"], kept["of"]
        failed += sum(len(file["failures"]) for file in files)
        if of is None:
            lacks.append(f"nothing of {what}")
        elif len(files) < of:
            lacks.append(f"{len(files)} of {of} files of {what}")
    found = [f"**Incomplete: {'; '.join(lacks)}.**"] if lacks else []
    if wrong:
        found.append(f"**{wrong} of the rows that ran {'is' if wrong == 1 else 'are'} wrong.**")
    if failed:
        found.append(f"**{failed} {'test' if failed == 1 else 'tests'} failed.**")
    return " ".join(found)


def by_value(report: Report) -> str:
    """The rows of each value of each axis."""
    rows = [row for row in report["rows"] if row["kind"] == "pairs"]
    lines = []
    for axis in AXES:
        for value in dict.fromkeys(row[axis] for row in rows):
            chosen = [row for row in rows if row[axis] == value]
            found = count(chosen)
            lines.append((TITLES[axis], value, found[RIGHT], found[REFUSED], found[WRONG], least(chosen)))
    return table(("axis", "value", "right", "refused", "wrong", "dB nearest its limit (limit)"), lines)


def page(report: Report) -> str:
    """docs/gpu.md."""
    rows = report["rows"]
    parts = [
        "# On a GPU",
        "`python docs/build.py` writes this page from gpu.json, which `make test-gpu` left "
        "([CONTRIBUTING](../CONTRIBUTING.md#on-a-gpu)).",
        notice(report),
        report["about"].get("note", ""),
        machine(report["about"]),
        runs(report),
        overview(report),
        "A video of the nano model is right if its PSNR against the CPU's video of the same prompt reaches the limit, "
        "and, from text, if the scorer finds in it what it finds clearly in the CPU's. Latents of the wide network are "
        "right if they are finite, as near to the headless core's or to those of another VRAM mode as rounding allows, "
        "and within the memory of their mode.",
        report["about"].get("covered", ""),
        "## Limits",
        report["about"].get("limits", ""),
        "## Values",
        by_value(report),
    ]
    failed = [
        (part, file["file"], name, said)
        for part, kept in report["parts"].items()
        for file in kept["files"]
        for name, said in file["failures"]
    ]
    if failed:
        parts += ["## Failed tests", table(("part", "file", "test", "said"), failed)]
    for verdict, title in ((WRONG, "Wrong"), (REFUSED, "Refused")):
        chosen = [(row["name"], row["said"]) for row in rows if row["verdict"] == verdict]
        if chosen:
            parts += [f"## {title}", table(("row", "said"), chosen)]
    if report.get("speed"):
        parts += ["## Speed", "LongCat Benchmark in the real server, on random weights of the full size."]
        parts += [f"### {row['name']}\n\n{row['text']}" for row in report["speed"]]
    parts += ["## Every row"]
    for kind, what in KINDS.items():
        chosen = [row for row in rows if row["kind"] == kind]
        if chosen:
            lines = [
                (row["name"].removeprefix("wide: "), row["verdict"], figure(row), row["seconds"]) for row in chosen
            ]
            parts += [f"### {what[0].upper()}{what[1:]}", table(("row", "verdict", "found (limit)", "s"), lines)]
    return "\n\n".join(part for part in parts if part) + "\n"


def figure(row: Row) -> str:
    """What was measured of a row, with its limit."""
    if row["kind"] == "wide":
        return row["said"]
    if row["psnr"] is None:
        return ""
    return f"{row['psnr']} dB ({row['limit']:g})" if row["psnr"] != "equal" else "equal"


def speeds(report: Report) -> str:
    """The measurements of speed, a line each, from LongCat Benchmark's own text; empty without any."""
    lines = []
    for kept in report.get("speed", []):
        text = kept["text"]
        found = {name: (a, b) for name, a, b in re.findall(r"^\| ([^|]+) \| ([\d.]+) \| ([\d.]+) \|$", text, re.M)}
        if not {"a step (ms)", "first step (s)", "peak memory (GiB)"} <= found.keys():
            lines.append((kept["name"], text.split("\n")[0], "", "", ""))
            continue
        step = " / ".join(f"{float(ms) / 1000:.2f}" for ms in found["a step (ms)"])
        faster = re.search(r"^[AB] is [\d.]+ times as fast as [AB] \(.+\)|B takes [\d. to]+ times as long", text, re.M)
        others = (" / ".join(found[name]) for name in ("first step (s)", "peak memory (GiB)"))
        lines.append((kept["name"], step, faster.group() if faster else "", *others))
    if not lines:
        return ""
    header = ("LongCat Benchmark", "s a step, A / B", "B against A", "first step in s, A / B", "peak GiB, A / B")
    return (
        "Random weights of the full size (13.6 billion), 832x480, 93 frames, with guidance, in the real server; the "
        f"first step of B counts what is made once, such as compiling:\n\n{table(header, lines)}"
    )


def good(report: Report, parts: Iterable[str], matrix: bool) -> bool:
    """Whether all that these parts and, if it is asked for, the matrix planned ran, and nothing failed or is wrong."""
    for part in parts:
        kept = report["parts"].get(part)
        if kept is None or len(kept["files"]) < kept["of"] or any(file["failures"] for file in kept["files"]):
            return False
    if not matrix:
        return True
    found = Counter(row["kind"] for row in report["rows"])
    planned = report["about"].get("planned", {})
    whole = bool(planned) and all(found[kind] >= number for kind, number in planned.items())
    return whole and not count(report["rows"])[WRONG]


# --- docs/comfyui.md -------------------------------------------------------------------------------------------------


def column(name: str, report: Report | None) -> str:
    """The entry of the GPU column for a row of the table of stock nodes: of all rows that have one of its nodes."""
    nodes = set(re.findall(r"\w+", name))
    rows = [row for row in report["rows"] if nodes & set(row["nodes"])] if report else []
    found = count(rows)
    if not rows:
        return "not run"
    if found[WRONG]:
        # The fault may be another node's of the same prompt; the page of all rows says which.
        return f"right in {found[RIGHT]} of {len(rows)}"
    return f"right in {found[RIGHT]}" + (f", refused in {found[REFUSED]}" if found[REFUSED] else "")


def comfyui(text: str, report: Report | None) -> str:
    """docs/comfyui.md with the summary between its markers and the column of its table filled in. report: None if no
    run is kept."""
    before, start, rest = text.partition(START)
    _, end, after = rest.partition(END)
    if start and end:
        summary = "No run is kept yet."
        if report:
            about = report["about"]
            parts = [notice(report), about.get("note", ""), machine(about), runs(report)]
            parts += [overview(report), speeds(report)]
            summary = "\n\n".join([*filter(None, parts), "Every row and every limit: [gpu.md](gpu.md)."])
        text = f"{before}{START}\n\n{summary}\n\n{END}{after}"
    lines, inside = [], False
    for line in text.splitlines():
        inside = line == TABLE or (inside and line.startswith("|"))
        cells = line.split(" | ")
        if inside and len(cells) > 3 and line != TABLE:
            cells[2] = column(cells[0], report)
            line = " | ".join(cells)
        lines.append(line)
    return "\n".join(lines) + "\n"
