"""What loading the pack does to the program around it: nothing beyond registration."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys

import pytest

from ..checkout import PACK

LOADS = """
import asyncio, logging, os, socket, sys
sys.path.insert(0, os.environ["COMFYUI_PATH"])
import comfy.cli_args
comfy.cli_args.args.cpu = True
import utils.extra_config
import torch, nodes, latent_preview, comfy_extras.nodes_video, comfy_config.config_parser, tomllib
def state():
    settings = torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled()
    kernels = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.benchmark
    return settings, kernels, logging.getLogger().level, sorted(os.environ.items()), sys.path[:], os.getcwd()
def refuse(*args):
    raise AssertionError("the network is used")
socket.socket.connect = refuse
before, modules = state(), set(sys.modules)
sys.stdout.write("--- loading\\n"); sys.stdout.flush(); sys.stderr.write("--- loading\\n")
assert asyncio.run(nodes.load_custom_node(sys.argv[1]))
sys.stdout.write("--- loaded\\n"); sys.stdout.flush(); sys.stderr.write("--- loaded\\n")
assert state() == before, (state(), before)
own = {name.split(".longcat_core.")[-1] for name in sys.modules if ".longcat_core." in name}
print(sorted(name for name in own if name.startswith(("model.", "checkpoints.", "measure.", "vae.", "generate."))))
print(sorted({name.split(".")[0] for name in set(sys.modules) - modules if not name.startswith(sys.argv[1])}))
"""


# What declarations read of the core's larger rooms.
LIGHT = ["generate.options", "generate.speeds", "model.audio_tokens", "model.config", "model.text"]


def test_loading_is_quiet_and_light():
    run = subprocess.run([sys.executable, "-P", "-c", LOADS, PACK], capture_output=True, text=True, cwd=os.sep)
    assert run.returncode == 0, run.stderr[-3000:]
    for stream in (run.stdout, run.stderr):
        said = stream.split("--- loading\n")[1].split("--- loaded\n")[0]
        assert not said, f"loading the pack prints {said!r}"
    heavy, foreign = run.stdout.splitlines()[-2:]
    assert foreign == "[]", f"and imports {foreign}, which ComfyUI does not"
    assert heavy == str(LIGHT), f"and imports {heavy}; only nodes that run need others than {LIGHT}"


def test_errors_are_named_without_the_packs_path(comfy):
    """ComfyUI puts class and module before the sentence that it shows."""
    kinds = [value for value in vars(comfy.core("errors")).values() if isinstance(value, type)]
    errors = [kind for kind in kinds if issubclass(kind, Exception)]
    assert len(errors) >= 3 and {error.__module__ for error in errors} == {"longcat_core.errors"}


def test_one_family_that_fails_hides_no_other(comfy, monkeypatch):
    """Families are imported by nodes that are checked or run: only those of the broken one say what it lacks."""
    monkeypatch.setitem(sys.modules, f"{comfy.pack}.nodes.conditioning", None)
    nodes = asyncio.run(comfy.node("extension").LongCatExtension().get_node_list())
    assert [node.GET_SCHEMA().node_id for node in nodes] == [node.ID for node in nodes]
    broken = next(node for node in nodes if node.ID == "LongCatImageToVideo")
    with pytest.raises(ImportError, match="conditioning"):
        broken.execute(vae=None)
    assert next(node for node in nodes if node.ID == "LongCatEmptyLatent").execute(width=64, height=64, length=5)


def test_every_declared_node_is_one_of_a_family(comfy):
    extension, declared = comfy.node("extension"), comfy.node("declarations").NODES
    in_families = [node for nodes in extension.FAMILIES.values() for node in nodes]
    assert sorted(in_families) == sorted(declared)
    for family, nodes in extension.FAMILIES.items():
        assert sorted(node.ID for node in comfy.node(family).NODES) == sorted(nodes)
