"""Targets, and where the time of missed ones goes, on made-up results."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest

from longcat_core.benchmark import report, targets, variants
from longcat_core.benchmark.parts import refine
from longcat_core.errors import LongCatError
from longcat_core.measure import results

TOKENS = 37_440
TARGETS = targets.Targets.beside(Path(__file__).parents[2] / "docs" / "performance.md")


def made_up(kind, rows, name="", **inputs):
    machine = {"cpu": "C", "gpu": "G", "gpu_memory_gib": 80, "torch": "2", "packages": {}}
    known = {"size": "480x832x93", "batch": 2, "blocks": 48, "steps": 50, "tokens": TOKENS, "hidden_size": 4096}
    head = {"schema": results.SCHEMA, "kind": kind, "name": name or kind, "date": "2026-01-01T00:00:00+00:00"}
    rows = [{"status": "ok", **row} for row in rows]
    return head | {"command": "longcat bench", "machine": machine, "inputs": known | inputs, "rows": rows}


def path(name, ms, first_s=8.0, peak_gib=18.0, weights_gib=14.0, attention="flash4", text="cudnn"):
    return {"name": name, "ms": ms, "first_s": first_s, "peak_gib": peak_gib, "weights_gib": weights_gib,
            "attention": attention, "text_attention": text, "times_ms": [ms]}  # fmt: skip


@pytest.fixture
def found():
    paths = [
        path(variants.EAGER, 11800.0),
        path(variants.COMPILED, 9300.0),
        path(variants.EXACT, 6500.0, first_s=15.0),
        path(f"{variants.EXACT}, distilled", 3300.0),
        path(variants.FP8, 4950.0, peak_gib=19.5),
        path(variants.FP8_8BIT, 4700.0, attention="sage", text="flash4"),
        path(f"{variants.FP8}, distilled", 2500.0),
    ]
    backends = [
        {"name": "flash4", "attention": "self", "ms": 66.0},
        {"name": "sage", "attention": "self", "ms": 58.0},
        {"name": "cudnn", "attention": "cross", "ms": 1.25},
        {"name": "flash4", "attention": "cross", "ms": 1.5},
    ]
    profile = [
        {"name": "attention", "phase": "family", "ms": 3390.0, "calls": 96, "share": 0.6},
        {"name": "GEMM", "phase": "family", "ms": 2400.0, "calls": 300, "share": 0.4},
        {"name": variants.EXACT, "phase": "total", "ms": 6510.0, "busy_ms": 6500.0},
    ]
    return {
        "paths": made_up("paths", paths),
        "backends": made_up("backends", backends, blocks=4),
        "profile": made_up("profile", profile, variant=variants.EXACT),
    }


def lines(text):
    """Cells of the table's rows by the first cell."""
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return {row[0]: row[1:] for row in rows[2:]}


def test_projections_by_themselves():
    # A block's GEMMs with guidance: 51 ms in bf16, 28 in fp8.
    assert TARGETS.projections_ms("bf16", 2 * TOKENS, 1) == pytest.approx(50.59)
    assert TARGETS.projections_ms("fp8", 2 * TOKENS, 1) == pytest.approx(28.52)
    assert TARGETS.projections_ms("bf16", TOKENS, 48) == pytest.approx(24 * 50.59)


def test_where_the_time_of_a_missed_target_goes(found):
    cells_of = lines(TARGETS.floor(found))
    missed = {f"{target.name}: {target.what}" for target, _ in TARGETS.missed(found["paths"])}
    assert cells_of.keys() == missed and "fp8: step with guidance" not in missed
    # 48 x (66 + 1.25) ms by itself, 48 x 50.59 ms at the ceiling.
    alone, ceiling = 3.228, 2.42832
    step = cells_of["exact: step with guidance"]
    assert step == ["<= 6 s", "6.50 s", "3.23 s", "3.39 s", "2.40 s", f"{6.5 - alone - 2.4:.2f} s", "5.66 s"]
    assert alone + ceiling == pytest.approx(5.66, abs=5e-3)
    ratio = cells_of["exact: speedup over the compiled baseline"]
    assert ratio[1] == "1.43 x" and ratio[2:6] == step[2:6] and ratio[6] == f"{9.3 / (alone + ceiling):.2f} x"
    # Half of it at each of sixteen steps.
    whole = cells_of["exact, distilled: 16 steps, no guidance"]
    assert whole[1:] == ["52.80 s", "25.82 s", "27.12 s", "19.20 s", f"{52.8 - 25.824 - 19.2:.2f} s", "45.25 s"]
    assert cells_of["exact: first call"][1:] == ["15.00 s", "-", "-", "-", "8.50 s (57%)", "6.50 s"]
    assert cells_of["fp8: peak memory"][1:] == ["19.50 GiB", "-", "-", "-", "5.50 GiB", "14.00 GiB"]
    sage = cells_of["fp8 and 8-bit attention: step with guidance"]
    assert sage[1:] == [
        "4.70 s",
        f"{48 * 0.0595:.2f} s",
        "-",
        targets.NO_PROFILE,
        "-",
        f"{48 * (59.5 + 28.52) / 1000:.2f} s",
    ]


def test_a_profile_or_kernels_of_another_run_are_ignored(found):
    other = copy.deepcopy(found)
    other["profile"]["inputs"]["size"] = "480x832x49"
    other["backends"]["inputs"]["batch"] = 1
    assert lines(TARGETS.floor(other))["exact: step with guidance"][2:] == ["-", "-", targets.NO_PROFILE, "-", "-"]
    del other["profile"], other["backends"]
    assert lines(TARGETS.floor(other))["exact: first call"] == lines(TARGETS.floor(found))["exact: first call"]


def test_no_floor_where_all_is_met_or_the_run_was_another(found):
    small = copy.deepcopy(found)
    small["paths"]["inputs"]["blocks"] = 4
    assert TARGETS.floor(small) == "" and TARGETS.floor({}) == ""
    for row in found["paths"]["rows"][2:]:
        row |= {"ms": 10.0, "first_s": 1.0, "peak_gib": 1.0}
    assert TARGETS.floor(found) == "" and "floor allows" not in report.page(found, {}, targets=TARGETS)


def refined(**inputs):
    rows = [
        path(refine.DENSE_EXACT, 40_000.0) | {"phase": "baseline"},
        path(refine.SPARSE_EXACT, 8_850.0) | {"phase": "path", "ratio": 4.4},
        path(refine.ALONE["dense"], 680.0) | {"phase": "attention"},
        path(refine.ALONE["block-sparse"], 60.0) | {"phase": "attention"},
        path(refine.SPARSE_FP8, 7_500.0) | {"phase": "fp8", "ratio": 5.3},
    ]
    known = {"size": "704x1280x189", "batch": 1, "tokens": 168_960}
    return made_up("refine", rows, **known | inputs)


def test_targets_of_refining_stand_beside_the_measured_at_full_size_only():
    text = report.page({"refine": refined()}, {}, targets=TARGETS)
    cells_of = lines(text.split("## Refining")[1])
    assert cells_of["block-sparse, exact"][3:6] == ["<= 8.9 s", "met", "2.05"]
    assert cells_of["block-sparse, fp8"][3:6] == ["<= 6 s", "missed", "2.42"]
    assert cells_of["dense, exact"][3:6] == ["-", "-", "0.45"] and cells_of["attention alone, dense"][5] == "-"
    floored = lines(text.split("## Refining")[0])
    ((name, cells),) = floored.items()
    ceiling = 48 * 28.52 * 168_960 / (2 * TOKENS)
    assert name == "block-sparse, fp8: evaluation of the refinement"
    assert cells[1:] == ["7.50 s", "2.88 s", "-", targets.NO_PROFILE, "-", f"{2.88 + ceiling / 1000:.2f} s"]
    families = {"attention": 3100.0, "GEMM": 3500.0}
    rows = [{"name": name, "phase": "family", "ms": ms, "calls": 1, "share": 0.5} for name, ms in families.items()]
    known = {"size": "704x1280x189", "batch": 1, "variant": refine.SPARSE_FP8}
    profile = made_up("profile", rows, "profile-refine-fp8", **known)
    cells_of = lines(TARGETS.floor({"refine": refined(), "profile-refine-fp8": profile}))
    assert cells_of["block-sparse, fp8: evaluation of the refinement"][2:5] == ["2.88 s", "3.10 s", "3.50 s"]
    for changed in ({"blocks": 4}, {"size": "64x96x29"}):
        page = report.page({"refine": refined(**changed)}, {}, targets=TARGETS)
        assert "floor allows" not in page and "| target |" not in page and "| block-sparse, fp8 |" in page


def sparse_results(**inputs):
    alone = {"phase": "attention", "density": 0.15, "exact": True}
    rows = [
        path("attention alone, dense", 65.0) | {"phase": "attention"},
        path("attention alone, dense, 8 bits", 50.0) | {"phase": "attention"},
        path("attention alone, 0.15, fa4", 20.0) | alone,
        path("attention alone, 0.15, triton", 30.0) | alone,
        path("attention alone, 0.15, cudnn-fp8", 10.0) | alone | {"exact": False},
        path("attention alone, 0.3, fa4", 15.0) | alone | {"density": 0.3},
        path("dense, fp8 and 8-bit attention", 4_000.0) | {"phase": "baseline"},
        path("sparse, exact", 3_700.0) | {"phase": "path"},
        path("sparse, fp8", 2_300.0) | {"phase": "fp8"},
        path("sparse, fp8 and 8-bit attention", 2_300.0) | {"phase": "fp8"},
    ]
    return made_up("sparse", rows, sparse={"density": 0.15}, **inputs)


def test_targets_of_sparse_attention():
    """A whole video mixes dense and sparse steps; what was not measured is said so."""
    text = report.page({"sparse": sparse_results()}, {}, targets=TARGETS)
    section = text.split("## Sparse attention")[1]
    rows = [
        line.split(" | ") for line in section.splitlines() if line.startswith(("| sparse, exact | ", "| sparse, fp8"))
    ]
    judged = {row[1]: (row[2], row[3], row[4].removesuffix(" |")) for row in rows if "<=" in row[2]}
    assert judged["50 steps with guidance, the first 10 dense"] == ("<= 135 s", "132.00", "met")
    assert judged["16 steps, no guidance, the first 3 dense"] == ("<= 22 s", "-", "not measured")
    steps = [row[3:] for row in rows if row[1] == "step with guidance"]
    assert steps == [["3.70", "missed |"], ["2.30", "met |"]]
    ((name, cells),) = lines(text.split("## Sparse attention")[0]).items()
    assert name == "sparse, exact: step with guidance" and cells[1:3] == ["3.70 s", "0.96 s"]
    # Of 50 steps 10 are dense; half of the batch at each of 16 steps.
    slow = sparse_results()
    slow["rows"] += [
        {"status": "ok", **path("dense, fp8 and 8-bit attention, distilled", 2_100.0)},
        {"status": "ok", **path("sparse, fp8 and 8-bit attention, distilled", 1_400.0)},
    ]
    profiles = {}
    for variant, families in ((variants.FP8_8BIT, (3_500.0, 1_400.0)), ("sparse, fp8", (1_100.0, 1_300.0))):
        measured = zip(("attention", "GEMM"), families, strict=True)
        rows = [{"name": name, "phase": "family", "ms": ms, "calls": 1, "share": 0.5} for name, ms in measured]
        profiles[variant] = made_up("profile", rows, f"profile-{variant}", variant=variant)
    cells = lines(TARGETS.floor({"sparse": slow, **profiles}))[
        "sparse, fp8 and 8-bit attention, distilled: 16 steps, no guidance, the first 3 dense"
    ]
    alone, projected = (3 * 48 * 50.0 + 13 * 48 * 20.0) / 2000, 16 * 48 * 28.52 / 2000
    within, gemms, spent = (3 * 3.5 + 13 * 1.1) / 2, (3 * 1.4 + 13 * 1.3) / 2, 3 * 2.1 + 13 * 1.4
    assert cells[1:] == [f"{s:.2f} s" for s in (spent, alone, within, gemms, spent - alone - gemms, alone + projected)]
    profiles[variants.FP8_8BIT]["machine"]["gpu"] = "another"
    cells = lines(TARGETS.floor({"sparse": slow, **profiles}))[
        "sparse, fp8 and 8-bit attention, distilled: 16 steps, no guidance, the first 3 dense"
    ]
    assert cells[2:6] == [f"{alone:.2f} s", "-", targets.NO_PROFILE, "-"]
    small = report.page({"sparse": sparse_results(blocks=4)}, {}, targets=TARGETS)
    assert "floor allows" not in small and "<= 3.6 s" not in small


def test_targets_of_avatars():
    fp8, limit = "continuation, fp8 and 8-bit attention", "continuation, fp8, "
    rows = [
        path("from an image, exact", 3_400.0) | {"peak_gib": 36.0},
        path("from an image, two speakers, exact", 3_500.0),
        path("continuation, exact, 36 GiB", 2_900.0) | {"peak_gib": 33.0},
        path(fp8, 2_200.0) | {"weights_gib": 16.0},
        path(f"{limit}no limit", 2_500.0),
        path(f"{limit}24 GiB", 2_700.0),
        path(f"{limit}16 GiB", 3_000.0),
    ]
    text = report.page({"avatar": made_up("avatar", rows, batch=1)}, {}, targets=TARGETS)
    section = text.split("## Avatars")[1]
    judged = {}
    for line in section.splitlines():
        name, *cells = line.strip("| ").split(" | ")
        if len(cells) == 4 and "<=" in cells[1]:
            judged[name, cells[0]] = cells[1:]
    assert judged["from an image, exact", "one evaluation"] == ["<= 3.5 s", "3.40", "met"]
    assert judged["from an image, exact", "peak memory"][1:] == ["36.00", "missed"]
    assert judged["from an image, two speakers, exact", "time over one speaker"] == ["<= 1.05 x", "1.03", "met"]
    assert judged[fp8, "weights"] == ["<= 17 GiB", "16.00", "met"]
    assert judged[f"{limit}24 GiB", "time over no limit"][1:] == ["1.08", "met"]
    assert judged[f"{limit}16 GiB", "time over no limit"][2] == "missed"
    assert judged["continuation, exact", "one evaluation"][1:] == ["-", "not measured"]
    assert judged["continuation, exact, 36 GiB", "peak memory"] == ["<= 35 GiB", "33.00", "met"]
    assert "The public code takes 6.47 s (from an image) and 6.31 s (continuation)" in section


def test_profiles_of_several_paths_are_sections_of_their_own(found):
    rows = [{"name": "GEMM", "phase": "family", "ms": 1.0, "calls": 2, "share": 1.0}]
    found["profile-fp8"] = made_up("profile", rows, "profile-fp8", variant=variants.FP8)
    plots = {"profile.png": b"", "profile-fp8.png": b""}
    text = report.page(found, plots, targets=TARGETS)
    first, second = text.split("## Where the time goes: ")[1:]
    assert first.startswith("exact\n") and second.startswith("fp8\n")
    assert first.count("](performance-profile.png)") == 1 and "profile-fp8.png" not in first
    assert second.count("](performance-profile-fp8.png)") == 1


def test_a_page_without_targets_beside_it_and_a_broken_file(tmp_path):
    page = tmp_path / "page.md"
    assert targets.Targets.beside(page) is None
    (tmp_path / "page-targets.json").write_text("{}")
    with pytest.raises(LongCatError, match=r"page-targets\.json as targets"):
        targets.Targets.beside(page)
