"""What the registry and ComfyUI's installers read: the package's files, pyproject.toml, the pictures."""

from __future__ import annotations

import re
import subprocess
import tomllib
import zipfile

import pytest
from PIL import Image

from .packing import ROOT, packed, tracked

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
COMFY = PROJECT["tool"]["comfy"]
REPOSITORY = "https://github.com/OWNER/longcat-video"
RAW = "https://raw.githubusercontent.com/OWNER/longcat-video/main/"
MOST_BYTES = 22_000_000
# Folders that ComfyUI reads beside our code, and what of them only writes the rest.
READ_BY_COMFYUI = ("nodes", "longcat_core", "web", "workflows", "locales", "subgraphs")
WRITERS = re.compile(r"workflows/.*\.py")


def test_package_is_small_and_whole(tmp_path):
    names = packed()
    with zipfile.ZipFile(tmp_path / "node.zip", "w", zipfile.ZIP_DEFLATED) as file:
        for name in names:
            file.write(ROOT / name, name)
    assert (tmp_path / "node.zip").stat().st_size <= MOST_BYTES
    wanted = {"__init__.py", "pyproject.toml", "README.md", "LICENSE"}
    wanted |= {n for n in tracked() if n.startswith(tuple(f"{f}/" for f in READ_BY_COMFYUI)) and not WRITERS.match(n)}
    assert not wanted - {*names}
    weights = [name for name in names if name.endswith(".safetensors")]
    assert {name.split("/")[3] for name in weights} == {"audio_encoders", "diffusion_models", "text_encoders", "vae"}
    assert len(weights) == 6, "nano's and those of its avatar, and no golden data"
    assert not [name for name in names if name.startswith(("tests/", ".")) or WRITERS.match(name)]


def test_links_of_the_readme_lead_to_files_of_the_package():
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert links and not {*links} - {*packed()}


def test_rules_are_read_alike_by_git_and_the_registry():
    """A negation below an excluded folder is read in two ways."""
    rules = (ROOT / ".comfyignore").read_text(encoding="utf-8").splitlines()
    assert not [rule for rule in rules if rule.startswith("!")]


def test_installers_replace_nothing_of_comfyui():
    """They install requirements.txt, else the dependencies of pyproject.toml, and run install.py."""
    assert PROJECT["project"]["dependencies"] == []
    assert not {"requirements.txt", "install.py", "setup.py", "setup.cfg"} & {*tracked()}
    headless = {re.match(r"[\w-]+", line)[0] for line in PROJECT["project"]["optional-dependencies"]["headless"]}
    assert {"torch", "numpy", "safetensors", "einops", "filelock", "pydantic"} <= headless


def test_project_keeps_the_rules_of_the_registry():
    project = PROJECT["project"]
    assert re.fullmatch(r"[a-z](?:[-_.]?[a-z0-9])*", project["name"]) and "comfyui" not in project["name"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", project["version"]) and project["description"]
    assert (ROOT / project["license"]["file"]).is_file() and project["requires-python"] == ">=3.11"
    assert all(url.startswith(REPOSITORY) for url in project["urls"].values()) and "Repository" in project["urls"]
    assert re.fullmatch(r">=\d+\.\d+\.\d+", COMFY["requires-comfyui"]) and COMFY["DisplayName"]


@pytest.mark.parametrize("field", ["Icon", "Banner"])
def test_pictures_are_in_the_repository_and_fit(field):
    name = COMFY[field].removeprefix(RAW)
    assert name in tracked()
    with Image.open(ROOT / name) as picture:
        width, height = picture.size
        assert picture.format == "PNG"
    if field == "Icon":
        assert width == height <= 400
    else:
        assert width * 9 == height * 21


def test_two_words_are_left_to_fill_in():
    """And CONTRIBUTING.md names them, with the files that hold them."""
    found = subprocess.run(
        ["git", "grep", "-lwE", "github(usercontent)?.com/OWNER|publisher-id"], cwd=ROOT, capture_output=True, text=True
    ).stdout.split()
    files = [name for name in found if not name.startswith("tests/")]
    assert files == ["pyproject.toml"] and COMFY["PublisherId"] == "publisher-id"
    guide = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert "`OWNER`" in guide and "`PublisherId`" in guide and "only two" in guide
