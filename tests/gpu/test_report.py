"""The report counts what it was given, misses nothing that did not run, and fills the column of docs/comfyui.md."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from . import report

ABOUT = {"identity": "here", "date": "2026-11-28", "commit": "abc", "gpu": "A card", "torch": "2.11",
         "ComfyUI": "0.33.0", "planned": {"pairs": 3, "stock": 1}}  # fmt: skip


def row(name: str, verdict: str = "right", **values: Any) -> dict[str, Any]:
    made = {"identity": "here", "kind": "pairs", "name": name, "mode": "dynamic VRAM", "verdict": verdict, "said": ""}
    made |= {"psnr": 40.0, "limit": 25.0, "seconds": 1.0, "nodes": ["KSampler"]}
    made |= {"weights": "bf16", "sampler": "KSampler", "extra": "none", "task": "T2V"}
    return made | values


def ran(part: str, failures: list | None = None, of: int = 1) -> dict[str, Any]:
    file = {"file": f"tests/test_{part}.py", "passed": 3, "skipped": 1, "failures": failures or [], "seconds": 2.0}
    return {"identity": "here", "files": [file], "of": of}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / report.ABOUT).write_text(json.dumps(ABOUT))
    for part in report.PARTS:
        (tmp_path / f"{part}.json").write_text(json.dumps(ran(part)))
    return tmp_path


def put(folder: Path, *rows: dict[str, Any]) -> report.Report:
    with (folder / report.ROWS).open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return report.write(folder)


THREE = (row("a"), row("b", psnr=26.5), row("c", "refused", said="needs a package", psnr=None))


def test_what_was_found_is_counted(folder):
    made = put(folder, *THREE, row("d", kind="stock", nodes=["VAEDecodeTiled"]))
    text = (folder / "report.md").read_text()
    assert f"| {report.KINDS['pairs']} | 3 of 3 rows | 2 | 1 refused | 0 |" in text
    assert "| weights | bf16 | 2 | 1 | 0 | 26.5 (25) |" in text
    assert "| c | needs a package |" in text and "## Wrong" not in text
    assert report.good(made, report.PARTS, True)
    assert json.loads((folder / report.FILE).read_text()) == json.loads(json.dumps(made))


def test_parts_of_several_runs_are_merged(folder):
    put(folder, *THREE[:2])
    made = put(folder, THREE[2], row("d", kind="stock"))
    assert len(made["rows"]) == 4 and report.good(made, report.PARTS, True)


@pytest.mark.parametrize("identity", ["here", "elsewhere"])
def test_figures_of_this_tree_are_shown(folder, identity):
    kept = {"identity": identity, "of": 1, "rows": [{"name": "bf16 (A), fp8 (B)", "text": "| a step (ms) | 1 | 2 |"}]}
    (folder / report.SPEED).write_text(json.dumps(kept))
    put(folder, *THREE)
    shown = "### bf16 (A), fp8 (B)\n\n| a step (ms) | 1 | 2 |" in (folder / "report.md").read_text()
    assert shown == (identity == "here")


def test_figures_of_speed_are_a_table_in_the_guide(folder):
    figures = "| a step (ms) | 5928 | 4824 |\n| first step (s) | 5.92 | 6.41 |\n| peak memory (GiB) | 3.69 | 3.68 |\n"
    texts = {
        "fast": f"A card\n\nB is 1.23 times as fast as A (1.22 to 1.24).\n\n{figures}",
        "same": f"A and B are not distinguishable: B takes 0.99 to 1.00 times as long.\n\n{figures}",
        "slow": f"A is 1.50 times as fast as B (1.40 to 1.60).\n{figures}",
        "none": "did not run: out of memory",
    }
    rows = [{"name": name, "text": text} for name, text in texts.items()]
    (folder / report.SPEED).write_text(json.dumps({"identity": "here", "of": 4, "rows": rows}))
    made = put(folder, *THREE)
    text = report.comfyui(PAGE, made)
    figures = "5.92 / 6.41 | 3.69 / 3.68 |"
    assert f"| fast | 5.93 / 4.82 | B is 1.23 times as fast as A (1.22 to 1.24) | {figures}" in text
    assert f"| same | 5.93 / 4.82 | B takes 0.99 to 1.00 times as long | {figures}" in text
    assert f"| slow | 5.93 / 4.82 | A is 1.50 times as fast as B (1.40 to 1.60) | {figures}" in text
    assert "| none | did not run: out of memory |" in text
    assert report.speeds({**made, "speed": []}) == ""


def test_the_later_run_of_a_row_counts_and_other_trees_do_not(folder):
    made = put(folder, row("a", "wrong", said="crash"), row("b", identity="elsewhere"), row("a"))
    assert [(row["name"], row["verdict"]) for row in made["rows"]] == [("a", "right")]


@pytest.mark.parametrize(
    "rows",
    [
        (*THREE, row("d", "wrong", kind="stock", said="crash: gone")),
        THREE,
        (*THREE[:2], row("d", kind="stock")),
    ],
    ids=["one wrong", "a kind not run", "a row not run"],
)
def test_what_is_wrong_or_lacks_is_not_good(folder, rows):
    made = put(folder, *rows)
    assert not report.good(made, report.PARTS, True)
    assert report.good(made, report.PARTS, False), "the tests themselves passed"


def test_failed_and_missing_tests_are_not_good(folder):
    (folder / "tests.json").write_text(json.dumps(ran("tests", [["test_x", "assert 1 == 2"]])))
    made = put(folder)
    assert not report.good(made, ["tests"], False) and report.good(made, ["nodes"], False)
    assert "| tests | tests/test_tests.py | test_x | assert 1 == 2 |" in report.page(made)
    (folder / "tests.json").write_text(json.dumps(ran("tests", of=2)))
    assert not report.good(report.gather(folder), ["tests"], False), "a file that was not run"
    (folder / "tests.json").unlink()
    assert not report.good(report.gather(folder), ["tests"], False)


def test_a_run_that_was_cut_short_says_so_first(folder):
    made = put(folder, *THREE, row("d", kind="stock"))
    assert report.notice(made) == "" and "Incomplete" not in report.page(made)
    (folder / "tests.json").write_text(json.dumps(ran("tests", [["test_x", "no"]], of=4)))
    (folder / "nodes.json").unlink()
    made["rows"][0]["verdict"] = "wrong"
    made = report.gather(folder) | {"rows": made["rows"][:2]}
    said = report.notice(made)
    assert said.startswith("**Incomplete: 2 of 4 rows of the matrix; 1 of 4 files of the ordinary tests; nothing of ")
    assert said.endswith("**1 of the rows that ran is wrong.** **1 test failed.**")
    made["about"]["note"] = "A note."
    for text in (report.page(made), report.comfyui(PAGE, made)):
        assert text.index("Incomplete") < text.index("A note.") < text.index("| part |")


def test_folders_of_the_machine_are_left_out(folder):
    said = 'File "/some/where/site-packages/a.py": no file tests/b.py, 3/4, /tmp/x'
    (folder / "tests.json").write_text(json.dumps(ran("tests", [["test_x", said]])))
    made = put(folder, row("a", "wrong", said=said))
    short = 'File ".../a.py": no file tests/b.py, 3/4, .../x'
    assert made["parts"]["tests"]["files"][0]["failures"][0][1] == made["rows"][0]["said"] == short


PAGE = f"""# In ComfyUI

{report.START}
old
{report.END}

{report.TABLE}
|---|---|---|---|
| KSampler | yes | x | equal |
| SamplerCustomAdvanced, CFGGuider | yes | x | a | b |
| VAEDecodeTiled | yes |  | close |
| TrainLoraNode | yes | old | two steps |

| another | table | with | columns |
| KSampler | stays | as | it is |
"""


def test_the_column_of_stock_nodes_is_filled(folder):
    rows = (*THREE, row("d", "wrong", nodes=["VAEDecodeTiled"]), row("e", nodes=["CFGGuider"]))
    text = report.comfyui(PAGE, put(folder, *rows))
    assert "| KSampler | yes | right in 2, refused in 1 | equal |" in text
    assert "| SamplerCustomAdvanced, CFGGuider | yes | right in 1 | a | b |" in text
    assert "| VAEDecodeTiled | yes | right in 0 of 1 | close |" in text
    assert "| TrainLoraNode | yes | not run | two steps |" in text
    assert "| KSampler | stays | as | it is |" in text
    assert "old\n" not in text and "gpu A card, torch 2.11" in text
    assert report.comfyui(text, report.gather(folder)) == text, "writing it again changes nothing"


def test_without_a_run_nothing_is_right():
    text = report.comfyui(PAGE, None)
    assert "| KSampler | yes | not run | equal |" in text and "No run is kept yet." in text
