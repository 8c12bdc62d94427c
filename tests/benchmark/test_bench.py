"""longcat bench on the embedded model: every part, its files and pictures, the page, the budget, what fails."""

from __future__ import annotations

import io
import json
import math
import os
from dataclasses import fields
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from PIL import Image

from longcat_core.benchmark import bench, options, report, variants, workload
from longcat_core.benchmark.parts import cards, decode, gpus, load, refine, sparse
from longcat_core.benchmark.parts.profile import family
from longcat_core.benchmark.targets import Targets
from longcat_core.cli import main as cli
from longcat_core.errors import LongCatError
from longcat_core.measure import results
from longcat_core.model.config import ModelConfig
from longcat_core.optimize.block_sparse import BlockSparse
from longcat_core.optimize.compiled_blocks import COMPILED_BLOCK
from longcat_core.optimize.optimized import OptimizedTransformer
from longcat_core.optimize.quantization import quantized_layers
from longcat_core.optimize.switches import Optimizations

from ..support.tiny import tiny_config

PUBLISHED = Targets.beside(Path(__file__).parents[2] / "docs" / "performance.md")
SMALL = ["--size", "32x48", "--frames", "5", "--blocks", "1", "--few-blocks", "1", "--repeats", "1"]


@pytest.fixture(autouse=True)
def no_compiler(monkeypatch):
    """Graphs are captured but not compiled: generated code is tested elsewhere."""
    monkeypatch.setattr(COMPILED_BLOCK, "backend", "eager")
    monkeypatch.setattr(workload.STEP, "backend", "eager")
    compile_ = torch.compile

    def captured(function, **options):
        return compile_(function, **options | {"backend": "eager", "options": None})

    monkeypatch.setattr(torch, "compile", captured)
    yield
    COMPILED_BLOCK.forget()
    workload.STEP.forget()
    torch._dynamo.reset()


def run(part, folder, *more):
    assert cli.main(["bench", part, *SMALL, "--device", "cpu", "--output", str(folder), *more]) == 0


def rows_of(folder, kind):
    return {row["name"]: row for row in results.read(folder / f"{kind}.json")["rows"]}


def is_picture(data):
    """Whether an image has more than one color on more than its frame."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    counts = sorted((count for count, _ in image.getcolors(1 << 24)), reverse=True)
    return min(image.size) > 100 and sum(counts[1:]) > 0.01 * sum(counts)


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """One run of all parts, shared by all test processes."""
    folder = tmp_path_factory.getbasetemp()
    folder = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "bench-all"
    with FileLock(folder.with_suffix(".lock")):
        if (folder / "run").exists():
            return folder / "run"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(COMPILED_BLOCK, "backend", "eager")
            patch.setattr(workload.STEP, "backend", "eager")
            compile_ = torch.compile
            patch.setattr(torch, "compile", lambda f, **o: compile_(f, **o | {"backend": "eager", "options": None}))
            run("all", folder / "unfinished")
        (folder / "unfinished").rename(folder / "run")
    COMPILED_BLOCK.forget()
    torch._dynamo.reset()
    return folder / "run"


@pytest.mark.parametrize("kind", options.PARTS)
def test_every_part_leaves_a_file_that_says_where_it_comes_from(everything, kind):
    content = json.loads((everything / f"{kind}.json").read_text(encoding="utf-8"))
    assert content["schema"] == results.SCHEMA and content["kind"] == kind
    assert content["command"].startswith("longcat ") and content["date"].endswith("+00:00")
    assert {"cpu", "torch", "python", "packages", "device"} <= content["machine"].keys()
    # Room for given frames, and what refining makes of a video.
    sizes = {"recompiles": (32, 48, 13), "continuation": (32, 48, 17), "refine": (64, 96, 29)}
    # Room for key blocks to be left out.
    sizes["sparse"] = (32, 48, 725)
    sizes["avatar"] = (32, 48, 17)
    size = workload.Size(*sizes.get(kind, (32, 48, 5)))
    assert content["inputs"]["size"] == str(size) and content["inputs"]["blocks"] == 1
    assert content["inputs"]["tokens"] == size.tokens(ModelConfig())
    assert content["rows"] and all(row["name"] and row["status"] for row in content["rows"])
    assert [row for row in content["rows"] if row["status"] == "ok"]
    for row in content["rows"]:
        assert row["status"] != "failed", row
        assert (row["status"] == "ok") != ("reason" in row)


def test_pictures_show_something(everything):
    drawn = sorted(path.name for path in everything.glob("*.png"))
    # A CPU does not report its peak, so memory has no picture.
    found = [results.read(path) for path in everything.glob("*.json")]
    assert {content["kind"] for content in found} == options.PARTS.keys()
    drawable = [content for content in found if content["kind"] != "memory"]
    wanted = [name for content in drawable for name in bench.part(content["kind"]).chart_names(content)]
    assert drawn == sorted(wanted) and "profile-fp8.png" in drawn
    assert all(is_picture((everything / name).read_bytes()) for name in drawn)


def test_paths_hold_the_baselines_and_fp8(everything):
    rows = rows_of(everything, "paths")
    for name in (variants.EAGER, variants.COMPILED, variants.EXACT, variants.FP8, "exact, distilled", "fp8, distilled",
                 "exact, compiled", "fp8, compiled"):  # fmt: skip
        assert rows[name]["status"] == "ok" and rows[name]["ms"] > 0 and rows[name]["first_s"] > 0
    eager, exact = rows[variants.EAGER], rows[variants.EXACT]
    assert exact["ratio"] == pytest.approx(eager["ms"] / exact["ms"])
    for name, way in (("exact", "off"), ("exact, compiled", "blocks"), ("fp8", "off"), ("fp8, compiled", "blocks")):
        row = rows[name]
        assert (row["compiled"], row["optimizations"]["compile"], row["batch"]) == (way == "blocks", way, 2)
    assert rows["exact, distilled"]["batch"] == 1
    assert rows[variants.FP8_8BIT]["status"] == "unavailable" and "cudnn-fp8" in rows[variants.FP8_8BIT]["reason"]


def test_every_switch_is_added_once_and_removed_once(everything):
    rows = list(rows_of(everything, "ablation").values())
    # Of training; of memory; of several GPUs; of 8-bit layers, which come after the others.
    other = {"gradient_checkpointing", "split_guidance", "exchange", "fp8"}
    known = {field.name for field in fields(Optimizations)} - other
    added = [row for row in rows if row.get("phase") == "added"]
    assert {row["switch"] for row in added} == known | {"layout"}
    for before, row in pairwise(added):
        changed = {name for name, value in row["optimizations"].items() if value != before["optimizations"][name]}
        assert changed <= {row["switch"]}
        assert row["worth_ms"] == pytest.approx(before["ms"] - row["ms"]) and row["over"] == before["name"]
    full = added[-1]["optimizations"]
    removed = {row["switch"]: row for row in rows if row.get("phase") == "removed"}
    assert removed.keys() == known
    for name, row in removed.items():
        assert [key for key, value in row["optimizations"].items() if value != full[key]] == [name]


def test_exactness_is_measured_against_fp32(everything):
    rows = rows_of(everything, "exactness")
    assert rows["fp32"]["error"] == 0 and rows[variants.EAGER]["error"] < 1e-5
    assert rows[variants.EXACT]["error"] < 1e-5 < rows[variants.FP8]["error"] < 0.1
    assert len(rows[variants.FP8]["per_block"]) == 1 and rows[variants.FP8]["psnr"] > 20
    assert rows["nano video, fp8"]["error"] > rows["nano video"]["error"]


def test_parts_do_not_inherit_fp8_weights(everything):
    weights = rows_of(everything, "paths")[variants.EXACT]["weights_gib"]
    assert {row["weights_gib"] for row in rows_of(everything, "scale").values()} == {weights}
    assert rows_of(everything, "refine")[refine.DENSE_EXACT]["weights_gib"] == weights


def test_fewer_layers_in_fp8_cost_less(everything):
    rows = rows_of(everything, "policies")
    assert 0 < rows["only ffn.down"]["error"] < rows["all"]["error"] and rows["all"]["psnr"] > 20


def test_recompiles_stay_within_their_limits(everything):
    rows = rows_of(everything, "recompiles")
    assert {name: row["graphs"] for name, row in rows.items() if row["graphs"]} == {
        "first step": 1,
        "without guidance": 1,
        "one given frame": 1,
        "more given frames": 1,
        "given frames from a cache": 1,
        "another resolution": 1,
    }
    assert len(rows) == 13 and all(row["held"] for row in rows.values())


def test_a_kv_cache_does_not_change_the_output(everything):
    rows = rows_of(everything, "continuation")
    ways = ("off", "exact", "official", "exact, offloaded")
    assert list(rows) == [f"{n} given, {way}" for n in (4, 1) for way in ways]
    for n in (1, 4):
        off, exact, official, offloaded = (rows[f"{n} given, {way}"] for way in ways)
        assert "cache_gib" not in off and "ratio" not in off
        # Keys and values of 6 tokens a latent, in every channel of the one block, in fp32.
        width = workload.load_model(workload.NANO, torch.device("cpu"), torch.float32, 1).config.hidden_size
        for row in (exact, official, offloaded):
            assert row["cache_gib"] * 2**30 == 2 * 4 * 6 * n * width
            assert 0 < row["once_ms"] < math.inf and row["ratio"] == pytest.approx(off["ms"] / row["ms"])
        assert exact["difference"] < 1e-5 and offloaded["difference"] < 1e-5
        # Its guidance sums lack the given frames.
        assert 1e-4 < official["difference"] < 1


def test_an_avatar_has_rows_of_every_case(everything):
    rows = rows_of(everything, "avatar")
    cases = ("from an image", "continuation")
    for name in (f"{case}{speakers}, exact" for case in cases for speakers in ("", ", two speakers")):
        row = rows[name]
        assert row["status"] == "ok" and row["speakers"] == 1 + ("two" in name) and row["weights_gib"] > 0
        assert ("once_ms" in row) == ("cache_gib" in row) == ("continuation" in name)
    limits = [row for row in rows.values() if row["phase"] == "card"]
    assert [row["status"] for row in limits] == ["ok"] * 4
    assert "ratio" not in limits[0] and all(row["ratio"] > 0 for row in limits[1:])
    assert limits[0]["weights_gib"] < rows["continuation, exact"]["weights_gib"]
    sparse = rows["continuation, fp8, sparse 0.15"]
    assert sparse["status"] == "ok" and "too few for sparse attention" in sparse["notes"][0]
    assert "cudnn-fp8" in rows["continuation, fp8 and 8-bit attention"]["reason"]


def test_several_gpus_beside_one(everything):
    rows = rows_of(everything, "gpus")
    for case in ("with guidance", "without guidance", "refining", "decoding"):
        one, two = rows[f"{case}, exact, 1 GPU"], rows[f"{case}, exact, 2 GPUs"]
        assert one["status"] == two["status"] == "ok" and two["ratio"] == pytest.approx(one["ms"] / two["ms"])
        assert case == "decoding" or (one["outside_ms"] > 0 and two["exchange_gbs"] > 0)
    assert all(rows[f"without guidance, exact, {way} exchange, 2 GPUs"]["ratio"] > 0 for way in ("messages", "int8"))
    one, two = (rows[f"without guidance, twice as long, exact, {count}"] for count in ("1 GPU", "2 GPUs"))
    assert two["ratio"] == pytest.approx(one["ms"] / two["ms"])
    assert "gpus-scaling.png" in bench.part("gpus").draw(results.read(everything / "gpus.json"))
    content = results.read(everything / "gpus.json")
    # Half of the guidance on half of the GPUs.
    two = rows["without guidance, exact, 2 GPUs"]["ms"]
    assert gpus.calculated(content, "with guidance", "exact", 4) == two
    assert gpus.calculated(content, "with guidance", "fp8 and 8-bit attention", 4) is None


def test_decoding_beside_diffusers(everything):
    rows = rows_of(everything, "decode")
    for size in ("32x48x5", "32x48x9"):
        theirs, ours = rows[f"{size}, diffusers"], rows[f"{size}, ours"]
        assert theirs["difference"] < 0.01 and ours["ratio"] == pytest.approx(theirs["ms"] / ours["ms"])
        assert ours["first_frames_s"] > 0
    aimed = {"name": "a", "decoder": "ours", "video": decode.AIMED, "status": "ok", "ms": 5.0, "ratio": 2.5}
    text = bench.part("decode").table({"rows": [aimed], "machine": {"gpu": "H200"}}, None)
    assert text.endswith("704x1280x185: 2.50 times as fast as diffusers (>= 2 times: met).")


def test_what_more_gpus_would_take():
    """Of 100 ms outside of blocks and 1,000 in them, and 40 of exchange that two GPUs do not hide."""
    rows = [
        {"name": "refining, exact, 1 GPU", "ms": 1100.0, "outside_ms": 100.0},
        {"name": "refining, exact, 2 GPUs", "ms": 640.0},
    ]
    assert gpus.calculated({"rows": rows}, "refining", "exact", 4) == pytest.approx(100 + 250 + 40 * 3 / 4)
    assert gpus.calculated({"rows": rows}, "refining", "exact", 8) == pytest.approx(100 + 125 + 40 * 7 / 16)


def test_the_floor_of_a_pass_on_two_gpus():
    """Half of 3,000 ms in blocks and 100 outside, and of 14.7 GB at 147.2 GB/s the quarter that nothing hides."""
    two = {
        "case": "without guidance",
        "path": "exact",
        "gpus": 2,
        "exchange_gbs": 147.22,
        "by": "messages",
        "status": "ok",
    }
    one = {"name": "without guidance, exact, 1 GPU", "ms": 3100.0, "outside_ms": 100.0, "status": "ok"}
    two |= {"name": "without guidance, exact, 2 GPUs", "ms": 1700.0, "ratio": 3100 / 1700}
    inputs = {"height": 480, "width": 832, "frames": 93, "size": "480x832x93", "batch": 2, "blocks": 48}
    text = bench.part("gpus").table({"kind": "gpus", "inputs": inputs, "rows": [one, two]}, PUBLISHED)
    assert "| without guidance, exact, 2 GPUs | 1600 | 14.72 | 100.00 | 25.00 | 1625 | 1.91 | 75.00 |" in text
    assert "| without guidance, exact | 3100 | 925.00 | 3.35 (>= 3.6: missed) |" in text


def test_whole_runs_on_several_gpus(everything):
    rows = rows_of(everything, "gpus_run")
    one, two = rows["whole run, exact, 1 GPU"], rows["whole run, exact, 2 GPUs"]
    assert two["ratio"] == pytest.approx(one["ms"] / two["ms"])
    assert min(row[stage] for row in (one, two) for stage in ("first_s", "sampling_ms", "decoding_ms")) > 0
    measured = [dict(one, ms=50e3, sampling_ms=49e3, decoding_ms=1e3), dict(two, ms=27e3, ratio=50 / 27)]
    inputs = {"size": "480x832x93", "batch": 1, "blocks": 48}
    text = bench.part("gpus_run").table({"kind": "gpus_run", "inputs": inputs, "rows": measured}, PUBLISHED)
    assert "| whole run, exact, 2 GPUs | speed over one GPU | >= 1.7 x | 1.85 | met |" in text
    # 4 s that two GPUs did not halve, and a fourth of 46.
    assert "| exact, 4 GPUs | 15.50 | 3.23 | >= 2.8 x | met |" in text


def test_sparse_attention_beside_dense(everything):
    rows = rows_of(everything, "sparse")
    for density in ("0.15", "0.3", "0.0625"):
        row = rows[f"attention alone, {density}, plain"]
        assert row["status"] == "ok" and row["error"] < 1e-5 and row["ratio"] > 0
    for step in ("exact", "exact, distilled", "fp8", "fp8, distilled"):
        dense, row = rows[f"dense, {step}"], rows[f"sparse, {step}"]
        assert row["status"] == "ok" and row["ratio"] == pytest.approx(dense["ms"] / row["ms"])
        # The video is long enough, so none was dense all the same.
        assert row["notes"] == [] and row["batch"] == dense["batch"] == (1 if "distilled" in step else 2)
    assert "cudnn-fp8" in rows["sparse, fp8 by cudnn-fp8"]["reason"]


def test_refining_ends_in_fp8(everything):
    names = [row["name"] for row in results.read(everything / "refine.json")["rows"]]
    alone = list(refine.ALONE.values())
    exact = [refine.SPARSE_EXACT, refine.DENSE_EXACT]
    assert names == [*alone, *exact, "quantizing the weights", refine.SPARSE_FP8, refine.DENSE_FP8]
    rows = rows_of(everything, "refine")
    for name in (*exact, refine.SPARSE_FP8, refine.DENSE_FP8):
        row = rows[name]
        assert 0 < row["ms"] < math.inf and row["batch"] == 1
        assert row["attention"] == ("sdpa" if "dense" in name else "block-sparse, plain")
    assert rows[exact[0]]["ratio"] == pytest.approx(rows[exact[1]]["ms"] / rows[exact[0]]["ms"])
    assert rows[alone[1]]["ratio"] == pytest.approx(rows[alone[0]]["ms"] / rows[alone[1]]["ms"])
    assert rows[exact[1]]["weights_gib"] > 1.5 * rows[refine.SPARSE_FP8]["weights_gib"]


@pytest.fixture
def seen(monkeypatch):
    """Settings of sparse attention of the networks that run from here on, and whether they have 8-bit layers."""
    seen = []
    original = workload.network_forward

    def watched(model, inputs):
        seen.append((model.block_sparse or model.sparse, bool(quantized_layers(model))))
        return original(model, inputs)

    monkeypatch.setattr(workload, "network_forward", watched)
    return seen


def test_only_sparse_rows_use_block_sparse_attention(tmp_path, seen):
    run("refine", tmp_path, "--no-plots")
    assert [(sparse is not None, fp8) for sparse, fp8 in seen] == [
        (True, False), (False, False), (True, True), (False, True)
    ]  # fmt: skip
    assert seen[0][0] == BlockSparse()
    assert results.read(tmp_path / "refine.json")["inputs"]["size"] == "32x48x5"


def test_profiles_of_the_refinement_use_block_sparse_attention(tmp_path, seen):
    for variant in ("refine", "refine+fp8"):
        run("profile", tmp_path, "--variant", variant, "--no-plots")
    assert seen == [(BlockSparse(), False), (BlockSparse(), True)]


def test_profiles_of_sparse_steps(tmp_path, seen):
    for variant, path in (("sparse", variants.EXACT), ("sparse+fp8", variants.FP8)):
        run("profile", tmp_path, "--variant", variant, "--no-plots")
        content = results.read(tmp_path / f"profile-{variant.replace('+', '-')}.json")
        total = next(row for row in content["rows"] if row["phase"] == "total")
        assert content["inputs"]["variant"] == total["name"] == f"sparse, {path}" and content["inputs"]["batch"] == 2
        # A video that is too short for sparse attention would be noted.
        assert total["status"] == "ok" and total["notes"] == []
    assert seen == [(sparse.SETTINGS, False), (sparse.SETTINGS, True)]


def test_some_parts_of_all(tmp_path):
    run("all", tmp_path, "--parts", "profile, training", "--no-plots")
    assert {path.name for path in tmp_path.glob("*.json")} == {"profile.json", "training.json"}


def test_profiles_of_several_paths_have_their_own_files(everything, tmp_path):
    refining = {"profile-refine": refine.SPARSE_EXACT, "profile-refine-fp8": refine.SPARSE_FP8}
    for name, variant in ({"profile": "exact", "profile-fp8": "fp8"} | refining).items():
        content = results.read(everything / f"{name}.json")
        assert (content["kind"], content["name"], content["inputs"]["variant"]) == ("profile", name, variant)
        trace = "exact" if name == "profile" else name.removeprefix("profile-")
        assert (everything / f"trace-{trace}.json.gz").stat().st_size
        assert content["inputs"]["batch"] == (1 if name in refining else 2)
        same = results.read(everything / "refine.json")["inputs"]["size"] == content["inputs"]["size"]
        assert same == (name in refining)
    # Not where its path did not run.
    assert not (everything / "profile-fp8-8bit.json").exists()
    run("profile", tmp_path, "--variant", "fp8+8bit", "--no-plots")
    content = results.read(tmp_path / "profile-fp8-8bit.json")
    assert content["inputs"]["variant"] == variants.FP8_8BIT and "cudnn-fp8" in content["rows"][0]["reason"]


def test_gradients_are_the_same_with_checkpointing(everything):
    row = rows_of(everything, "training")["with gradient checkpointing"]
    assert row["equal"] and row["gradient_difference"] < 1e-5


def test_16_bit_errors(tmp_path):
    run("exactness", tmp_path, "--dtype", "bfloat16", "--no-fp8", "--no-plots")
    rows = rows_of(tmp_path, "exactness")
    plain = rows[variants.EAGER]["error"]
    assert 1e-4 < plain < 0.1 and rows[variants.EXACT]["ratio"] == pytest.approx(rows[variants.EXACT]["error"] / plain)
    assert not list(tmp_path.glob("*.png"))


def test_the_page_comes_from_results_alone(everything, tmp_path, capsys):
    page = tmp_path / "docs" / "performance.md"
    assert cli.main(["bench", "report", str(everything), "--output", str(page)]) == 0
    text = page.read_text(encoding="utf-8")
    for title in ("What each optimization is worth", "Memory", "Exactness", "Gradient checkpointing"):
        assert f"## {title}\n" in text
    exact = rows_of(everything, "paths")[variants.EXACT]
    assert f"| {results.shown(exact['ms'])} |" in text and results.machine(torch.device("cpu"))["cpu"] in text
    # No file of targets lies beside the page.
    assert "## Targets" not in text and "published guess" not in text
    images = [part.split(")")[0] for part in text.split("](")[1:]]
    assert len(images) == len(list(everything.glob("*.png")))
    assert all(is_picture((page.parent / name).read_bytes()) for name in images)


def sample_paths(**changes):
    head = {
        "schema": results.SCHEMA,
        "kind": "paths",
        "date": "2026-01-01T00:00:00+00:00",
        "command": "longcat bench all",
    }
    machine = {"cpu": "C", "gpu": "G", "gpu_memory_gib": 80, "torch": "2", "packages": {}}
    inputs = {"size": "480x832x93", "tokens": 37440, "batch": 2, "blocks": 48, "steps": 50}
    numbers = {"first_s": 11.0, "peak_gib": 29.0, "times_ms": [1.0], "status": "ok"}
    rows = [
        {"name": variants.EAGER, "ms": 11900.0, "phase": "baseline", **numbers},
        {"name": variants.COMPILED, "ms": 9500.0, "phase": "baseline", **numbers},
        {"name": variants.EXACT, "ms": 6100.0, "phase": "path", "ratio": 1.95, **numbers},
        {"name": f"{variants.EXACT}, distilled", "ms": 3000.0, "phase": "distilled", **numbers},
        {"name": variants.FP8, "phase": "fp8", "status": "failed", "reason": "RuntimeError: no"},
    ]
    return {**head, "machine": machine, "commit": "abc", "inputs": inputs | changes, "rows": rows}


def test_targets_are_met_or_missed():
    text = report.page({"paths": sample_paths()}, {}, targets=PUBLISHED)
    assert "| exact | step with guidance | <= 6 s | 6.10 s | missed |" in text
    assert "| exact | speedup over the compiled baseline | >= 1.55 x | 1.56 x | met |" in text
    assert "| exact, distilled | 16 steps, no guidance | <= 50 s | 48.00 s | met |" in text
    assert "| fp8 | step with guidance | <= 5 s | - | not measured (failed) |" in text
    assert "- fp8: RuntimeError: no" in text and "11.88 s | 11.90 s | +0.2% | within 5%" in text
    other = report.page({"paths": sample_paths(blocks=4)}, {}, targets=PUBLISHED)
    assert "| met |" not in other and "this run was another" in other


def test_malformed_results_are_named(tmp_path):
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(LongCatError, match="not a file of results"):
        report.write_page([tmp_path], tmp_path / "page.md")
    (tmp_path / "other.json").unlink()
    with pytest.raises(LongCatError, match="run longcat bench"):
        report.write_page([tmp_path], tmp_path / "page.md")


def test_nothing_begins_once_the_budget_is_used_up(tmp_path):
    run("ablation", tmp_path, "--budget", "1e-9", "--no-plots")
    rows = rows_of(tmp_path, "ablation")
    assert len(rows) > 10 and {row["status"] for row in rows.values()} == {"not run"}


def test_a_failing_variant_is_reported_and_the_others_run(tmp_path, monkeypatch):
    original = OptimizedTransformer.set_optimizations

    def broken(self, optimizations):
        if not optimizations.fused_ffn and optimizations.compile == "blocks":
            raise RuntimeError("kernel\n exploded")
        original(self, optimizations)

    monkeypatch.setattr(OptimizedTransformer, "set_optimizations", broken)
    run("ablation", tmp_path, "--no-fp8", "--no-plots")
    rows = rows_of(tmp_path, "ablation")
    failed = [row for row in rows.values() if row["status"] == "failed"]
    assert [row["name"] for row in failed] == ["without fused gate and up"]
    assert failed[0]["reason"] == "RuntimeError: kernel exploded"


def test_results_survive_an_interrupt(tmp_path, monkeypatch):
    original = variants.Bench.network

    def interrupted(self, name, values, *args, **row):
        if name == variants.EXACT:
            raise KeyboardInterrupt
        return original(self, name, values, *args, **row)

    monkeypatch.setattr(variants.Bench, "network", interrupted)
    arguments = ["bench", "paths", *SMALL, "--device", "cpu", "--output", str(tmp_path), "--no-plots"]
    assert cli.main(arguments) == cli.INTERRUPTED
    assert list(rows_of(tmp_path, "paths")) == [variants.EAGER, variants.COMPILED]


def test_a_size_that_does_not_fit_ends_the_scale(tmp_path, monkeypatch):
    original = workload.network_forward

    def full(model, inputs):
        if inputs.size.frames == 9:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(model, inputs)

    monkeypatch.setattr(workload, "network_forward", full)
    run("scale", tmp_path, "--no-plots")
    rows = list(rows_of(tmp_path, "scale").values())
    assert [row["status"] for row in rows] == ["ok", "failed", "not run", "not run"]


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--frames", "6"], "4k+1"),
        (["--size", "30x48"], "multiple"),
        (["--repeats", "0"], "--repeats"),
        (["--budget", "0"], "--budget"),
        (["--attention", "nothing"], "attention backend"),
        (["--variant", "fp9"], "fp8+8bit"),
        (["--parts", "paths,nothing"], "no part 'nothing'"),
        (["--model", "/no/such/model"], "--model"),
        (["--blocks", "99"], "--blocks 99"),
    ],
)
def test_bad_input_is_one_sentence(arguments, word, tmp_path, capsys):
    assert (
        cli.main(["bench", "paths", *SMALL, "--device", "cpu", "--output", str(tmp_path), *arguments]) == cli.BAD_INPUT
    )
    error = capsys.readouterr().err.strip()
    assert word in error and "\n" not in error and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("place", "said"), [("file", "is not a folder"), ("file/in", "is not a folder"), ("/proc/x", "/proc")]
)
def test_an_unwritable_output_is_an_error_before_any_work(place, said, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(workload, "load_model", lambda *_: pytest.fail("a model was made first"))
    (tmp_path / "file").touch()
    assert cli.main(["bench", "paths", *SMALL, "--device", "cpu", "--output", str(tmp_path / place)]) == cli.BAD_INPUT
    error = capsys.readouterr().err.strip()
    assert said in error and "choose another" in error and "\n" not in error


def test_missing_pillow_is_an_error_before_any_work(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "PIL", None)
    monkeypatch.setitem(__import__("sys").modules, "PIL.Image", None)
    assert cli.main(["bench", "paths", *SMALL, "--device", "cpu", "--output", str(tmp_path)]) == cli.BAD_INPUT
    assert "pip install 'pillow" in capsys.readouterr().err


def test_random_weights_are_made_in_their_dtype():
    config = tiny_config(depth=1, caption_channels=16, ffn_hidden=256, adaln_dim=16)
    model = workload.random_model(config, torch.device("cpu"), torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16} and not any(p.is_meta for p in model.parameters())
    assert bool((model.blocks[0].attn.q_norm.weight == 1).all())
    assert model.blocks[0].ffn.gate_up.weight.float().std().item() == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize(
    ("kernel", "what"),
    [
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128>>", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7", "attention"),
        ("kernel_cutlass_kernel_flash_attncuteflash_fwd_sm90FlashAttentionForwardSm90", "attention"),
        ("quant_query_per_thread_int8_kernel", "attention"),
        ("void TransposePadPermuteKernel<128u, 64u, true, __nv_bfloat16>", "attention"),
        ("_attend", "attention"),
        ("nvjet_tst_256x128_64x4_2x1_v_bz_coopA_bias_TNT", "GEMM"),
        ("void cutlass::device_kernel<cutlass::gemm::kernel::GemmUniversal>", "GEMM"),
        ("triton_red_fused__to_copy_add_mul_native_layer_norm_3", "element-wise"),
        ("_gated_product", "element-wise"),
        ("_quantize", "element-wise"),
        ("void at::native::vectorized_elementwise_kernel<4, silu>", "element-wise"),
        ("Memcpy DtoD (Device -> Device)", "copies"),
        ("void at::native::(anonymous namespace)::CatArrayBatchedCopy", "copies"),
        ("ncclKernel", "other"),
    ],
)
def test_families_of_kernels(kernel, what):
    assert family(kernel) == what


def test_cards_offload_what_does_not_fit(everything):
    rows = rows_of(everything, "cards")
    limits = ("no limit", "80 % of the need", "60 % of the need", "45 % of the need")
    names = [f"{path}, {limit}" for path in ("fp8", "exact") for limit in limits]
    assert [name for name in rows if name != "quantizing the weights"] == names
    for path in ("exact", "fp8"):
        first, *others = (rows[f"{path}, {limit}"] for limit in limits)
        assert first["plan"] == "all on the device" and first["transfer_ms"] == 0 and "ratio" not in first
        assert [row["given_gib"] for row in others] == sorted((row["given_gib"] for row in others), reverse=True)
        # Smaller and smaller, and never more than before.
        assert [row["streamed"] for row in others] == sorted(row["streamed"] for row in others)
        for row in others:
            assert row["ratio"] == pytest.approx(row["ms"] / first["ms"])
            assert row["floor_ms"] == max(first["ms"], row["transfer_ms"])
            assert (row["transfer_ms"] > 0) == (row["streamed"] > 0)
            assert row["difference"] < (1e-5 if path == "exact" else 0.1)
    assert results.read(everything / "cards.json")["inputs"]["copy_gb_s"] > 0


@pytest.mark.parametrize(
    ("path", "gib", "ms", "met"),
    [("fp8", 24.0, 1029, True), ("fp8", 24.0, 1031, False), ("fp8", 12.0, 2290, True), ("fp8", 12.0, 2310, False)],
)
def test_targets_of_cards(path, gib, ms, met):
    slowdown, over_floor = ms / 1000, ms / 2000
    assert cards.verdict(path, gib, slowdown, over_floor)["met"] == met
    assert cards.verdict("exact", gib, slowdown, over_floor) == {} == cards.verdict(path, None, slowdown, over_floor)


def test_a_card_of_another_size_than_it_was_asked_for():
    """On a GPU the released model meets real cards' sizes, another model shares of its need."""
    shares = [f"{share} % of the need" for share in (80, 60, 45)]
    for config, device, names in (
        (ModelConfig(), "cuda", ["24 GiB", "16 GiB", "12 GiB"]), (tiny_config(), "cuda", shares),
        (ModelConfig(), "cpu", shares),
    ):  # fmt: skip
        found = [limit.name for limit in cards.limits(config, torch.device(device), 1 << 35)]
        assert found == ["no limit", *names]


def test_loading_beside_reading(everything):
    rows = rows_of(everything, "load")
    assert list(rows) == ["reading the file", "loading", "loading to fp8"]
    inputs = results.read(everything / "load.json")["inputs"]
    raw = rows["reading the file"]
    assert raw["gb_s"] == pytest.approx(inputs["file_gb"] / raw["seconds"])
    for name in ("loading", "loading to fp8"):
        assert rows[name]["share"] == pytest.approx(raw["seconds"] / rows[name]["seconds"])
    # The file of the model was there for that time alone.
    assert not list(everything.rglob("*.safetensors"))


@pytest.mark.parametrize("size", [0, 1, 5, (1 << 24) + 3, (3 << 24) + 7])
def test_reading_reads_all(tmp_path, monkeypatch, size):
    path, counted = tmp_path / "x", []
    path.write_bytes(b"a" * size)

    class Counted(io.FileIO):
        def readinto(self, buffer):
            counted.append(super().readinto(buffer))
            return counted[-1]

    monkeypatch.setattr(load, "open", lambda *args, **options: Counted(path), raising=False)
    load.read_whole(path)
    assert sum(counted) == size


def test_the_published_page_matches_the_results_beside_it():
    docs = Path(__file__).parents[2] / "docs"
    found = {results.name_of(r): r for r in map(results.read, sorted((docs / "performance").glob("*.json")))}
    named = {name: b"" for content in found.values() for name in bench.part(content["kind"]).chart_names(content)}
    text = (docs / "performance.md").read_text(encoding="utf-8")
    assert len(found) >= 18 and report.page(found, named, targets=PUBLISHED) == text
    assert named and all((docs / f"performance-{name}").read_bytes()[:4] == b"\x89PNG" for name in named)


def test_worth_is_drawn_for_lossy_optimizations_and_beside_guesses():
    row = {"status": "ok", "phase": "added", "share": 0.1, "name": "fused q, k, v"}
    lossy = row | {"name": "fp8", "phase": "fp8", "share": 0.2}

    def drawn(*rows, targets=None):
        results = {"kind": "ablation", "name": "ablation", "inputs": {}, "rows": list(rows)}
        return bench.part("ablation").draw(results, targets)["ablation-worth.png"]

    charts = [drawn(row), drawn(row, lossy), drawn(row, lossy | {"share": 0.05}), drawn(row, targets=PUBLISHED)]
    assert len(set(charts)) == 4


def test_worth_within_the_spread_of_the_times_is_not_distinguishable():
    row = {"status": "ok", "phase": "added", "name": "before", "ms": 100.0, "times_ms": [99.0, 100.0, 103.0]}
    worth = {"share": 0.02, "over": "before", "worth_ms": 2.0}
    noise = row | worth | {"name": "noise", "ms": 101.0, "times_ms": [98.0, 101.0, 102.0]}
    gain = row | worth | {"name": "gain", "ms": 90.0, "times_ms": [89.0, 90.0, 91.0]}
    lines = bench.part("ablation").table({"rows": [row, noise, gain]}, None).splitlines()
    cells = {line.split(" | ")[0]: line for line in lines}
    assert "+2.0 %, not distinguishable" in cells["| + noise"]
    assert "+2.0 %" in cells["| + gain"] and "not" not in cells["| + gain"]
