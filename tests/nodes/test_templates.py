"""The templates as files: what the page reads from them to offer downloads, and what their notes say."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from PIL import Image

from workflows.weights import ALL, BASE, TALKING, table

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "workflows").glob("*.json"))
REAL = [file for file in FILES if " real " in file.stem]
BLUEPRINTS = sorted((ROOT / "subgraphs").glob("*.json"))
WEIGHTS = {weight.name: weight for weight in ALL}
LOADERS = ("LongCatModelLoader", "LongCatTextEncoderLoader", "LongCatAudioEncoderLoader", "VAELoader",
           "LoraLoaderModelOnly")  # fmt: skip
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]


def nodes_of(file: Path) -> Iterator[dict[str, Any]]:
    """The nodes of a file, those inside of its subgraphs included."""
    content = json.loads(file.read_text(encoding="utf-8"))
    yield from content["nodes"]
    for graph in content.get("definitions", {}).get("subgraphs", ()):
        yield from graph["nodes"]


def names_in(node: dict[str, Any]) -> list[str]:
    values = node.get("widgets_values") or ()
    return [value for value in values if isinstance(value, str) and value.endswith(".safetensors")]


def test_nano_comes_first_and_names_say_which_is_which():
    names = [file.stem for file in FILES]
    assert names == [*(name for name in names if "nano" in name), *(file.stem for file in REAL)]
    assert all(name.startswith(("LongCat nano ", "LongCat real ")) for name in names) and len(REAL) == 14
    for file in FILES:
        with Image.open(file.with_suffix(".jpg")) as picture:
            assert picture.format == "JPEG" and picture.width == picture.height >= 256


@pytest.mark.parametrize("file", [*REAL, *BLUEPRINTS], ids=lambda file: file.stem)
def test_page_can_offer_every_file_that_a_template_loads(file):
    offered = set()
    for node in nodes_of(file):
        models = {model["name"]: model for model in node.get("properties", {}).get("models", ())}
        for name in names_in(node) if node["type"] in LOADERS else ():
            # The page takes an entry only if its name is a value of the node.
            assert models[name] == WEIGHTS[name].model
            assert models[name]["url"].startswith("https://huggingface.co/") and models[name]["url"].endswith(name)
            offered.add(name)
        assert models.keys() <= WEIGHTS.keys()
    assert {weight.directory for weight in BASE} <= {WEIGHTS[name].directory for name in offered}


@pytest.mark.parametrize("file", REAL, ids=lambda file: file.stem)
def test_note_has_the_table_of_the_files(file):
    (note,) = (node["widgets_values"][0] for node in nodes_of(file) if node["type"] == "MarkdownNote")
    wanted = {name for node in nodes_of(file) for name in names_in(node)}
    base, folder = BASE, "LongCat-Video/dit"
    if "avatar" in file.stem:
        base, folder = TALKING, "LongCat-Video-Avatar-1.5/base_model"
        assert wanted == {weight.name for weight in TALKING}
    assert table([weight for weight in ALL if weight in base or weight.name in wanted]) in note
    assert f"diffusion_models/{folder}" in note
    assert len(note.split()) < 200


@pytest.mark.parametrize("file", [*FILES, *BLUEPRINTS], ids=lambda file: file.stem)
def test_nodes_say_which_pack_they_come_from(file):
    for node in nodes_of(file):
        pack, version = node["properties"].get("cnr_id"), node["properties"].get("ver")
        if node["type"].startswith("LongCat") or len(node["type"]) == len(str(uuid4())):
            assert (pack, version) == ("longcat-video", VERSION)
        elif node["type"] != "MarkdownNote":
            assert pack == "comfy-core" and version, node["type"]


def test_readme_has_the_table_of_the_files():
    assert table(ALL) in (ROOT / "README.md").read_text(encoding="utf-8")
