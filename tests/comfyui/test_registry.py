"""The package that the registry would publish, installed as a copy in the real program: what the server and its page
find of it, LongCat Benchmark as a prompt, and comfy-lint on every template as the page would send it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest

from ..registry.packing import ROOT, copy, packed, tool
from .browser import open_page
from .client import Client
from .prompts import node, text_to_video
from .server import PACK_NAME, Server

WORKFLOWS = sorted(path for path in (ROOT / "workflows").glob("*.json"))
# Inputs whose choices are the user's own files.
USERS_FILES = {"model_name", "unet_name", "text_encoder_name", "clip_name", "vae_name", "lora_name", "image", "file",
               "audio", "audio_encoder_name"}  # fmt: skip


@pytest.fixture(scope="module")
def installed(installation, tmp_path_factory) -> Iterator[Server]:
    """A server whose pack is nothing but the package."""
    server = Server(installation, tmp_path_factory.mktemp("packed"), pack=False)
    copy(packed(), server.base / "custom_nodes" / PACK_NAME)
    try:
        yield server.start()
    finally:
        server.stop()
        # The server removes a link, not a folder.
        shutil.rmtree(server.base / "custom_nodes" / PACK_NAME)
        server.remove()


@pytest.fixture
def client(installed) -> Iterator[Client]:
    with Client(installed.url) as client:
        yield client


def test_server_finds_everything_of_the_package(installed, client):
    declared = {path.stem for path in (ROOT / "web" / "docs").glob("*.md")}
    known = client.get_json("/object_info")
    assert declared <= known.keys() and "IMPORT FAILED" not in installed.log
    for name in declared:
        page = client.get(f"/extensions/{PACK_NAME}/docs/{name}.md").decode()
        assert known[name]["display_name"] in page.splitlines()[0]
    assert sorted(client.get_json("/workflow_templates")[PACK_NAME]) == sorted(path.stem for path in WORKFLOWS)
    for path in WORKFLOWS:
        for name in (path.name, f"{path.stem}.jpg"):
            content = client.get(f"/api/workflow_templates/{PACK_NAME}/{quote(name)}")
            assert content == (installed.base / "custom_nodes" / PACK_NAME / "workflows" / name).read_bytes()


def test_step_cache_shows_the_spread_of_what_it_costs(client):
    known = client.get_json("/object_info")["LongCatStepCache"]
    page = client.get(f"/extensions/{PACK_NAME}/docs/LongCatStepCache.md").decode()
    report = (ROOT / "docs" / "fidelity-skipping.md").read_text(encoding="utf-8")
    tooltip = known["input"]["required"]["threshold"][1]["tooltip"]
    for threshold, said in (("0.05", "median {} dB, farthest {} dB"), ("0.1", "{} and {} dB")):
        row = re.search(rf"--step-cache {threshold} \|.*?\| ([\d.]+) \| [\d.]+, ([\d.]+) \|", report)
        found = [round(float(value)) for value in row.groups()]
        assert said.format(*found) in tooltip and said.format(*found) in page
        if threshold == "0.05":
            assert "{} dB against all steps, the farthest {} dB".format(*found) in known["description"]


def test_benchmark_gives_the_range_of_both_settings(client):
    switches = client.get_json("/object_info")["LongCatOptimizations"]["input"]["required"]
    defaults = {name: spec[1]["default"] for name, spec in switches.items() if name != "model"}
    prompt = {name: text_to_video("", frames=5)[name] for name in ("model", "latent")} | {
        "b": node("LongCatOptimizations", **defaults | {"model": ["model", 0], "fused_qkv": False}),
        "benchmark": node("LongCatBenchmark", model=["model", 0], model_b=["b", 0], latent_image=["latent", 0],
                          steps=3, guidance=4.0),
        "show": node("PreviewAny", source=["benchmark", 1]),
    }  # fmt: skip
    run = client.run(prompt)
    assert run.status == "success"
    # A, B, B, A, A, B: four turns, each with a step of its own before the timed ones.
    steps = [(step, total) for name, step, total in run.progress if name == "benchmark"]
    assert steps == sorted(steps) and steps[-1] == (10, 10)
    (report,) = run.outputs["show"]["text"]
    assert re.search(r"\n(A|B) is [\d.]+ times as fast as (A|B) \([\d.]+ to [\d.]+\)\.\n", report) or re.search(
        r"\nA and B are not distinguishable: B takes [\d.]+ to [\d.]+ times as long\.\n", report
    )
    assert re.search(r"\| least to most \(ms\) \| [\d.]+ to [\d.]+ \| [\d.]+ to [\d.]+ \|", report)
    assert "| fused_qkv | on | off |" in report and run.outputs["benchmark"]["images"]


def test_templates_pass_comfy_lint(installed, client, artifacts, chromium):
    command = tool("comfy-lint")
    if command is None:
        pytest.skip("make test-registry installs comfy-lint")
    folder = artifacts / "prompts"
    folder.mkdir(exist_ok=True)
    prompts: list[Path] = []
    with open_page(installed.url) as page:
        for path in WORKFLOWS:
            graph = json.loads(path.read_text(encoding="utf-8"))
            page.tab.evaluate("async graph => { await window.app.loadGraphData(graph) }", graph)
            page.settle(500)
            prompts.append(folder / path.name)
            prompts[-1].write_text(json.dumps(page.prompt()), encoding="utf-8")
    schema = folder / "object_info"
    schema.write_bytes(client.get("/object_info"))
    arguments = ["--schema-cache", str(schema), "--json", *map(str, prompts)]
    done = subprocess.run([command, *arguments], capture_output=True, text=True)
    found = json.loads(done.stdout)
    assert found["summary"]["files"] == len(WORKFLOWS) and not found["unreadable"]
    said = [(Path(file["path"]).stem, one) for file in found["files"] for one in file["diagnostics"]]
    assert not [(name, one["class_type"], one["message"]) for name, one in said if not excused(one)]


def excused(said: dict[str, str]) -> bool:
    """Whether a finding is a file that is not on this machine, or something of ComfyUI that comfy-lint does not know:
    inputs that depend on a choice, such as `format.codec`, and sockets of several types."""
    if said["rule"] == "type-mismatch":
        expected, produced = re.fullmatch(r".* expects (\S+) but .* produces (\S+)", said["message"]).groups()
        return produced in expected.split(",")
    if said["rule"] == "extraneous-input":
        return "." in said["field"]
    return said["rule"] == "invalid-enum" and said["field"] in USERS_FILES
