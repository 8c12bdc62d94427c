"""Whole runs in ComfyUI's server: the prompt made of a workflow, the stages, and one sentence for what goes wrong."""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path

import pytest

from longcat_core.benchmark import comfyui_server
from longcat_core.benchmark.comfyui_server import Events, Server, free_port
from longcat_core.benchmark.parts import comfyui_run
from longcat_core.cli.main import BAD_INPUT, main
from longcat_core.errors import LongCatError
from longcat_core.generate.paths import ModelPaths
from longcat_core.generate.request import RELEASED, GenerateRequest

WORKFLOWS = comfyui_server.PACK / "workflows"
ANSWERS = """
import http.server, json, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers(); self.wfile.write(json.dumps({"SaveVideo": {}}).encode())
    def log_message(self, *args): pass
print("Import times for custom nodes:\\n   0.2 seconds: /somewhere/longcat-video", flush=True)
http.server.HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""


def checkout(folder: Path, main: str) -> Path:
    folder.mkdir()
    (folder / "main.py").write_text(main, encoding="utf-8")
    (folder / "comfyui_version.py").write_text('__version__ = "0.33.0"\n', encoding="utf-8")
    return folder


def wanted(**options) -> comfyui_run.Wanted:
    request = GenerateRequest("x", height=64, width=96, frames=9, steps=3, seed=7).filled(RELEASED)
    return comfyui_run.wanted_of(request, ModelPaths(), ("one", "two"), **options)


def rows(path: Path, **options) -> list:
    pytest.importorskip("websocket")
    return list(comfyui_run.rows(path, wanted(), cpu=True, python=Path(sys.executable), **options))


@pytest.mark.parametrize("file", sorted(WORKFLOWS.glob("*.json")), ids=lambda file: file.stem)
def test_every_link_of_a_workflow_leads_to_a_node_of_the_prompt(file):
    prompt = comfyui_run.to_prompt(json.loads(file.read_text(encoding="utf-8")))
    links = [value for node in prompt.values() for value in node["inputs"].values() if isinstance(value, list)]
    assert links and all(source in prompt for source, _ in links)


def test_the_workflow_takes_files_size_and_sampling():
    given = wanted(lora=(Path("loras/step.safetensors"), 0.5), fp8=True, speed="fast")
    prompt = comfyui_run.to_prompt(json.loads(given.workflow.read_text(encoding="utf-8")))
    assert set(given.files) <= {node["class_type"] for node in prompt.values()}
    comfyui_run._set(prompt, given)
    inputs = {node["class_type"]: node["inputs"] for node in prompt.values()}
    assert inputs["LongCatModelLoader"] == {"model_name": ModelPaths().model.name, "weight_dtype": "fp8 rowwise"}
    assert inputs["LoraLoaderModelOnly"]["lora_name"] == "step.safetensors"
    assert inputs["LoraLoaderModelOnly"]["strength_model"] == 0.5
    assert inputs["LongCatEmptyLatent"] == {"width": 96, "height": 64, "length": 9, "batch_size": 1}
    sampler = inputs["LongCatSampler"]
    assert (sampler["seed"], sampler["steps"], sampler["mode"], sampler["speed"]) == (7, 3, "base", "fast")
    assert comfyui_run._positive(prompt)["class_type"] == "CLIPTextEncode"


def test_stages_add_up_to_what_a_prompt_took():
    prompt = {
        "1": {"class_type": "CLIPTextEncode", "inputs": {}},
        "2": {"class_type": "LongCatSampler", "inputs": {}},
        "3": {"class_type": "LongCatVAEDecode", "inputs": {}},
        "4": {"class_type": "SaveVideo", "inputs": {}},
    }
    events = Events(
        nodes=[(0.5, "1"), (1.0, "2"), (9.0, "3"), (10.5, "4")],
        progress=[(4.0, "2", 1, 3), (6.0, "2", 2, 3), (8.0, "2", 3, 3), (9.25, "3", 1, 9), (10.0, "3", 9, 9)],
        words=[(1.0, "2", "loading the model"), (1.5, "2", "step 1 of 3"), (4.0, "2", "step 2 of 3")],
        end=11.0,
    )
    row = comfyui_run.row("ComfyUI, second prompt", "warm", prompt, events)
    assert {stage["name"]: stage["s"] for stage in row["stages"]} == {
        "queue": 0.5,
        "encoding": 0.5,
        "moving the model": 0.5,
        "first step": 2.5,
        "steps": 4.0,
        "after sampling": 1.0,
        "decoding": 1.5,
        "saving": 0.5,
    }
    assert row["wall_s"] == 11 and row["steps"] == 3 and row["first_frames_s"] == 0.25
    assert row["sampling_s"] == 6 and row["less_sampling_s"] == 5
    assert [work["name"] for work in row["beside"]] == ["file"]


def test_no_comfyui_at_the_path(tmp_path):
    with pytest.raises(LongCatError, match=r"is not ComfyUI, because it has no main\.py; give"):
        rows(tmp_path)


def test_a_port_that_is_taken(tmp_path):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(LongCatError, match=f"port {port} is taken; give another one"):
            rows(checkout(tmp_path / "ComfyUI", ANSWERS), port=port)


def test_a_server_that_dies_is_quoted(tmp_path):
    died = checkout(tmp_path / "ComfyUI", "print('no torch here')\nraise SystemExit(3)\n")
    with pytest.raises(LongCatError, match="ComfyUI ended with exit code 3; its last lines: no torch here"):
        rows(died)


def test_a_node_that_is_missing_is_named_and_the_folder_is_gone(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(comfyui_server.tempfile, "tempdir", None)
    path, seen = checkout(tmp_path / "ComfyUI", ANSWERS), []
    before = {file: file.read_bytes() for file in path.iterdir()}
    pytest.importorskip("websocket")
    with pytest.raises(LongCatError, match=r"this ComfyUI has no node CLIPTextEncode; update ComfyUI"):
        for row in comfyui_run.rows(path, wanted(), cpu=True, python=Path(sys.executable)):
            seen.append(row)
    assert [stage["name"] for stage in seen[0]["stages"]] == ["starting: server", "starting: this pack"]
    assert seen[0]["stages"][1]["s"] == 0.2 and seen[0]["steps"] == 0
    assert {file: file.read_bytes() for file in path.iterdir()} == before
    assert [each.name for each in tmp_path.iterdir()] == ["ComfyUI"]


def test_what_a_prompt_fails_of_is_said():
    error = {"type": "execution_error", "data": {"prompt_id": "p", "node_type": "KSampler", "exception_message": "no "}}
    with pytest.raises(LongCatError, match=r"the prompt failed in ComfyUI at KSampler: no$"):
        Server._read(json.dumps(error), "p", 1.0, Events())


def test_any_port_that_is_free():
    assert free_port(None) > 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--attention", "sdpa"], "--attention"),
        (["--image", "a.png", "--no-text-cache"], "--image, --no-text-cache"),
        (["--runs", "2"], "one server"),
        (["--lora", "a.safetensors", "--lora", "b.safetensors"], "one --lora"),
    ],
)
def test_options_without_an_input_in_the_workflow_are_refused(tmp_path, capsys, words, said):
    words = ["bench", "run", "--comfyui", str(tmp_path), "--device", "cpu", *words, "--output", str(tmp_path / "out")]
    assert main(words) == BAD_INPUT
    assert said in capsys.readouterr().err and not list(tmp_path.iterdir())
