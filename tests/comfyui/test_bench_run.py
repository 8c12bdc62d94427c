"""`longcat bench run --comfyui` on the embedded model, in the real server."""

from __future__ import annotations

import json
import subprocess
import sys

from .server import PACK


def test_two_prompts_by_stages(installation, tmp_path):
    options = ["--comfyui", installation.path, "--comfyui-python", installation.python, "--device", "cpu"]
    size = ["--frames", "9", "--steps", "2", "--output", tmp_path / "out"]
    before = {file.name for file in installation.path.iterdir()}
    run = subprocess.run(
        [sys.executable, "-m", "longcat_core", "bench", "run", *map(str, options), *map(str, size)],
        cwd=PACK,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert {file.name for file in installation.path.iterdir()} == before
    results = json.loads((tmp_path / "out" / "comfyui_run.json").read_text(encoding="utf-8"))
    start, first, second = ({each["name"] for each in row["stages"]} for row in results["rows"])
    assert start == {"starting: server", "starting: this pack"}
    assert {"loading the model", "encoding", "first step", "steps", "decoding", "saving"} <= first
    assert {"encoding", "first step", "steps", "decoding", "saving"} <= second
    assert not {"loading the model", "loading the text encoder", "loading the VAE"} & second, "kept from the first one"
    for row in results["rows"]:
        assert abs(sum(stage["s"] for stage in row["stages"]) - row["wall_s"]) < 1e-6
    assert [row["steps"] for row in results["rows"]] == [0, 2, 2]
    assert (tmp_path / "out" / "comfyui_run.png").is_file()
