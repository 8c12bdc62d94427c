"""The registry's package, unpacked beside nothing else, in ComfyUI."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from ...registry.packing import ROOT, copy, packed

# Loads the package as ComfyUI does, reads its pyproject.toml as ComfyUI does, and loads nano through its nodes.
LOADS = """
import asyncio, json, os, sys
sys.path.insert(0, os.environ["COMFYUI_PATH"])
import comfy.cli_args
comfy.cli_args.args.cpu = True
import utils.extra_config
import nodes, folder_paths
from comfy_config import config_parser
from app.custom_node_manager import CustomNodeManager
assert asyncio.run(nodes.load_custom_node(sys.argv[1]))
config = config_parser.extract_node_configuration(sys.argv[1])
def run(name, **inputs):
    kind = nodes.NODE_CLASS_MAPPINGS[name]
    return kind.PREPARE_CLASS_CLONE(None).EXECUTE_NORMALIZED(**inputs).result[0]
files = {kind: folder_paths.get_filename_list(kind) for kind in ("diffusion_models", "vae", "text_encoders")}
model = run("LongCatModelLoader", model_name="longcat_nano_bf16.safetensors", weight_dtype="default")
clip = run("LongCatTextEncoderLoader", text_encoder_name="longcat_nano_umt5_bf16.safetensors", device="default")
vae, = nodes.VAELoader().load_vae("longcat_nano_vae_bf16.safetensors")
print(json.dumps({
    "nodes": sorted(name for name in nodes.NODE_CLASS_MAPPINGS if name.startswith("LongCat")),
    "web": nodes.EXTENSION_WEB_DIRS,
    "tokens": clip.encode_from_tokens_scheduled(clip.tokenize("a red circle"))[0][0].shape[2],
    "accelerators": config.project.supported_accelerators, "systems": config.project.supported_os,
    "dependencies": config.project.dependencies, "name": config.project.name,
    "versions": [config.project.supported_comfyui_version, config.project.version],
    "icon": config.tool_comfy.icon,
}))
"""


def test_package_works_in_comfyui(comfy, tmp_path):
    folder = copy(packed(), tmp_path / "custom_nodes" / "longcat-video")
    command = [sys.executable, "-P", "-c", LOADS, str(folder)]
    # Elsewhere, so that nothing of the repository is found by chance.
    run = subprocess.run(command, capture_output=True, text=True, cwd=os.sep)
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["nodes"] == sorted(name for name in comfy.mappings if name.startswith("LongCat"))
    (web,) = (path for path in found["web"].values() if path.startswith(str(folder)))
    assert sorted(os.listdir(os.path.join(web, "docs"))) == sorted(os.listdir(ROOT / "web" / "docs"))
    assert found["tokens"] > 0 and found["name"] == "longcat-video" and found["dependencies"] == []
    # One classifier that ComfyUI does not know would empty the whole list.
    assert found["accelerators"] == ["GPU :: NVIDIA CUDA"] and found["systems"] == ["OS Independent"]
    assert found["versions"] == [">=0.8.0", "0.1.0"] and found["icon"].endswith("/icon.png")
