"""Write the tables of options in README.md, docs/options.md and the nodes' help pages in web/docs, the locales, and the
pages of the last `make test-gpu`.

    python docs/build.py          write the pages that differ
    python docs/build.py --check  list them, and exit with 1 if there are any

The rows are in longcat_core/generate/options.py, the nodes in nodes/declarations.py. In the README the table between
two markers is replaced; in a help page everything above the marker NOTES. The rest is written by hand. The Chinese
texts of locales/zh are in docs/chinese.py; where one is missing there, ComfyUI shows the English one. The report of a
GPU run is docs/gpu.json.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).parents[1]
START, END = "<!-- options -->", "<!-- /options -->"
NOTES = "<!-- notes -->"
# Any name but longcat_core: the pack's nodes import the engine relatively, as a part of the pack.
PACK = "longcat_pack"


def load(name: str) -> ModuleType:
    """A module of the pack, which is not installed as a package itself."""
    if PACK not in sys.modules:
        package = ModuleType(PACK)
        package.__path__ = [str(ROOT)]
        sys.modules[PACK] = package
    return import_module(f"{PACK}.{name}")


def pages() -> dict[Path, str]:
    """Every page with a table, and its text as it should be."""
    options, nodes = load("longcat_core.generate.options"), load("nodes.declarations").NODES
    readme = ROOT / "README.md"
    found = {readme: _between_markers(readme.read_text(encoding="utf-8"), _common(options))}
    found[ROOT / "docs" / "options.md"] = _all_options(options)
    cli = ROOT / "docs" / "cli.md"
    found[cli] = _between_markers(cli.read_text(encoding="utf-8"), _speeds(load("longcat_core.generate.speeds")))
    for node_id, node in nodes.items():
        path = ROOT / "web" / "docs" / f"{node_id}.md"
        notes = path.read_text(encoding="utf-8").partition(NOTES)[2].strip() if path.exists() else ""
        found[path] = _node_page(node) + (f"\n{NOTES}\n\n{notes}\n" if notes else "")
    return found


def gpu_pages() -> dict[Path, str]:
    """The page of the last GPU run, and the page with its summary and its column of the table of stock nodes."""
    report, docs = load("tests.gpu.report"), ROOT / "docs"
    kept = docs / report.KEPT
    made = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else None
    text = report.comfyui((docs / "comfyui.md").read_text(encoding="utf-8"), made)
    return {docs / "comfyui.md": text} | ({docs / "gpu.md": report.page(made)} if made else {})


def locales() -> dict[Path, str]:
    """Every file in locales, and its text as it should be."""
    nodes, folder = load("nodes.declarations").NODES, ROOT / "locales"
    return {
        folder / "en" / "nodeDefs.json": _json({node_id: _english(node) for node_id, node in nodes.items()}),
        folder / "zh" / "nodeDefs.json": _json({node_id: _chinese(node_id, node) for node_id, node in nodes.items()}),
        folder / "zh" / "main.json": _json({"nodeCategories": load("docs.chinese").CATEGORIES}),
    }


def _json(content: Any) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def _english(node: Any) -> dict[str, Any]:
    inputs = {field.name: _text(field.name, field.tooltip) for field in node.inputs}
    return _locale((node.name, node.description), inputs, [_text(out.name, out.sentence) for out in node.outputs])


def _chinese(node_id: str, node: Any) -> dict[str, Any]:
    texts, words = load("docs.chinese"), load("longcat_core.generate.options").words
    inputs = {}
    for field in node.inputs:
        name, text = texts.INPUTS_OF.get((node_id, field.name)) or texts.INPUTS.get(field.name) or ("", "")
        nano = getattr(getattr(field, "row", None), "nano", None)
        inputs[field.name] = _text(name, text if nano is None or not text else f"{text}LongCat-nano：{words(nano)}。")
    outputs = [_text(*output) for output in texts.OUTPUTS.get(node_id, ())]
    return _locale(texts.NODES.get(node_id, ("", "")), inputs, outputs)


def _text(name: str, tooltip: str) -> dict[str, str]:
    return {key: value for key, value in (("name", name), ("tooltip", tooltip)) if value}


def _locale(names: tuple[str, str], inputs: dict[str, Any], outputs: list[Any]) -> dict[str, Any]:
    """A node as a locale of ComfyUI's page has it, without what is empty."""
    numbered = {str(number): output for number, output in enumerate(outputs) if output}
    found = {"display_name": names[0], "description": names[1], "inputs": inputs, "outputs": numbered}
    return {key: value for key, value in found.items() if value}


def outdated() -> dict[Path, str]:
    """The pages whose file differs, and their text as it should be."""
    return {
        path: text
        for path, text in (pages() | locales() | gpu_pages()).items()
        if not path.exists() or path.read_text(encoding="utf-8") != text
    }


def _between_markers(text: str, table: str) -> str:
    before, _, rest = text.partition(START)
    after = rest.partition(END)[2]
    return f"{before}{START}\n{table}{END}{after}"


def _speeds(speeds: ModuleType) -> str:
    """The sets of the words and their prices, and how the prices were measured."""
    rows, measured = [], {}
    for word, kinds in speeds.SETS.items():
        for kind, found in kinds.items():
            price = found.price
            if price is not None:
                cost = f"{price.psnr:.3g} dB", f"{price.times:.3g}"
                rows.append((f"`{word}`", kind, found.in_words(), *cost))
                measured[price.measured()] = None
    table = _table(("word", "sampling", "sets", "PSNR against exact", "times as fast"), rows)
    return table + "".join(f"\nMeasured: {sentence}.\n" for sentence in measured)


def _common(options: ModuleType) -> str:
    rows = [row for row in options.of_command("generate") if row.common]
    return _table(("option", "meaning", "real model", "nano"), (_line(row) for row in rows))


def _line(row: Any) -> tuple[str, ...]:
    default, nano = row.default_words(), row.default_words(nano=True)
    return f"`{_usage(row)}`", row.help, default, nano


def _usage(row: Any) -> str:
    usage = f"{row.flag} {row.metavar}" if row.metavar else row.flag
    return f"{row.short}, {usage}" if row.short else usage


def _all_options(options: ModuleType) -> str:
    """docs/options.md: a section for each heading, and one for the small commands."""
    parts = [
        "# Options",
        "All options of the `longcat` commands, except those of `longcat bench` and `longcat train-nano`, which their "
        "`--help` lists. [cli.md](cli.md) explains what they are for. Written by `python docs/build.py`.",
    ]
    headings = dict.fromkeys(row.heading for row in options.OPTIONS)
    for heading in headings:
        rows = [row for row in options.OPTIONS if row.heading == heading]
        parts.append(f"## {(heading or 'other commands').capitalize()}")
        head = ("option", "commands", "meaning", "values", "default", "nano")
        parts.append(_table(head, map(_full_line, rows)).rstrip())
    return "\n\n".join(parts) + "\n"


def _full_line(row: Any) -> tuple[str, ...]:
    usage, meaning, default, nano = _line(row)
    nano = "" if nano == default else nano
    meaning += " (required)" if row.required else ""
    return usage, ", ".join(row.commands), meaning, row.range_words(), default, nano


def _node_page(node: Any) -> str:
    # ComfyUI's panel shows two columns; a third one lies beyond its edge.
    inputs = _table(("input", "meaning"), ((f"`{field.name}`", _meaning(field)) for field in node.inputs))
    outputs = "".join(f"- {_output(output)}\n" for output in node.outputs)
    return f"# {node.name}\n\n{node.description}\n\n{inputs}\n**Outputs**\n\n{outputs}"


def _meaning(field: Any) -> str:
    """The sentence of an input, and its default."""
    default = field.default_words
    if not default:
        return f"{field.sentence} Optional." if field.optional else field.sentence
    return f"{field.sentence} **Default:** {default}."


def _output(output: Any) -> str:
    kind = output.kind.upper()
    name = f"`{output.name}` ({kind})" if output.name else kind
    return f"{name}: {output.help}" if output.help else name


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    return "".join("".join(f"| {cell} " if cell else "| " for cell in cells) + "|\n" for cells in _lines(head, rows))


def _lines(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> Iterator[tuple[str, ...]]:
    yield head
    yield ("---",) * len(head)
    for row in rows:
        yield tuple(cell.replace("|", "\\|") for cell in row)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a page differs")
    check = parser.parse_args().check
    found = outdated()
    for path, text in found.items():
        print(path.relative_to(ROOT))
        if not check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    return int(check and bool(found))


if __name__ == "__main__":
    sys.exit(main())
