"""The public face does not change by accident: commands, file names, workflows, folders, tensor names, results.

Each test compares one surface with a JSON file in data/public_face. `python tests/public_face.py --write` rewrites
these files. The nodes are tested in tests/nodes/inside/test_public_face.py, which needs ComfyUI.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from longcat_core.checkpoints.formats import FORMATS, targets
from longcat_core.checkpoints.load import load_transformer
from longcat_core.cli.main import build_parser, main
from longcat_core.files.safetensors_io import read_metadata, read_tensors
from longcat_core.measure.results import ResultsFile

from .public_face import COMPARE, DATA, GENERATE, KEEPING, KEPT, ROOT, assert_frozen, schema

SEGMENT = ("latents.safetensors", "frames.mkv", "segment.json")
GOLDEN = Path(__file__).parent / "data" / "golden"
# A converter of option values is identified by what it returns for these texts, so that it may be renamed.
PROBES = ("7", "0.5", "16x32", "some/file:0.5")
KINDS = {
    # Text, as without a converter.
    PROBES: None,
    (7, None, None, None): "whole number",
    (7.0, 0.5, None, None): "number",
    (None, None, (16, 32), None): "size",
    tuple(Path(text) for text in PROBES): "path",
    (*((Path(text), 1.0) for text in PROBES[:3]), (Path("some/file"), 0.5)): "path and strength",
}


# --- the command -----------------------------------------------------------------------------------------------------


def kind_of(convert: Callable[[str], Any]) -> str | None:
    """The kind of value that an option takes; None for text."""
    found = []
    for text in PROBES:
        try:
            found.append(convert(text))
        except (ValueError, argparse.ArgumentTypeError):
            found.append(None)
    return KINDS[tuple(found)]


def plain(value: Any) -> Any:
    """A default as JSON; paths inside the repository are relative to it."""
    if isinstance(value, Path):
        value = value.relative_to(ROOT) if value.is_absolute() else value
        return value.as_posix()
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def described(action: argparse.Action) -> dict[str, Any]:
    found = {
        "action": type(action).__name__.strip("_").removesuffix("Action"),
        "choices": None if action.choices is None else list(action.choices),
        "default": plain(action.default),
        "metavar": action.metavar,
        "nargs": action.nargs,
        "required": action.required or None,
        "type": None if action.type is None else kind_of(action.type),
    }
    implied = (None, argparse.SUPPRESS) if action.nargs != 0 else (None, argparse.SUPPRESS, 0)
    return {name: value for name, value in found.items() if not any(value is other for other in implied)}


def command_line(parser: argparse.ArgumentParser) -> dict[str, Any]:
    """Options by all their spellings, positional arguments in order, and the same of every sub-command."""
    found: dict[str, Any] = {"abbreviations": parser.allow_abbrev, "arguments": [], "options": {}, "commands": {}}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found["arguments"].append({"metavar": action.metavar, "required": action.required})
            found["commands"] = {name: command_line(sub) for name, sub in action.choices.items()}
        elif action.option_strings:
            found["options"][", ".join(sorted(action.option_strings))] = described(action)
        else:
            found["arguments"].append({"name": action.dest} | described(action))
    return {name: value for name, value in found.items() if value not in ([], {})}


def test_commands_and_their_options():
    found, training = command_line(build_parser()), "train-nano"
    found["commands"][training] = command_line(build_parser([training]))["commands"][training]
    assert_frozen("commands", found)


def code_of(*arguments: str) -> int:
    """The exit code; argparse raises SystemExit after --help and --version."""
    try:
        return main(arguments)
    except SystemExit as stopped:
        return int(stopped.code or 0)


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--version"], 0),
        (["--help"], 0),
        *(([name, "--help"], 0) for name in build_parser()._subparsers._group_actions[0].choices),
        ([], 2),
        (["dream"], 2),
        (["generate", "a", "--bogus"], 2),
        (["generate", "a", "--vers"], 2),
        (["generate", ""], 2),
        (["verify", "missing"], 2),
    ],
)
def test_exit_codes(arguments, code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert code_of(*arguments) == code
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt, 130), (BrokenPipeError, 141), (MemoryError, 2)])
def test_exit_codes_of_interrupted_commands(error, code, monkeypatch):
    def stop(*_: Any) -> None:
        raise error

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    # A broken pipe makes `main` redirect stdout, which pytest still needs.
    monkeypatch.setattr(os, "dup2", lambda *_: None)
    assert code_of("backends") == code


# --- files that commands write ---------------------------------------------------------------------------------------


@pytest.fixture
def kept(tmp_path, monkeypatch) -> Path:
    """A copy of the files that earlier code wrote; it is the working folder."""
    path = Path(shutil.copytree(KEPT, tmp_path / "kept"))
    monkeypatch.chdir(path)
    return path


def files(path: Path) -> dict[str, tuple[int, bytes]]:
    """Path -> modification time and content of every file except locks."""
    found = sorted(item for item in path.rglob("*") if item.is_file() and item.name != ".lock")
    return {item.relative_to(path).as_posix(): (item.stat().st_mtime_ns, item.read_bytes()) for item in found}


def test_finished_work_of_earlier_code_is_reused(kept):
    before = files(kept)
    written = {}
    for name, command in KEEPING.items():
        there = files(kept)
        assert code_of(*command) == 0
        written[name] = sorted(files(kept).keys() - there.keys())
    after = files(kept)
    assert {name: after[name] for name in before} == before
    assert_frozen("outputs", written)


def test_commands_continue_from_files_of_earlier_code(kept):
    before = files(kept)
    longer = [*KEEPING["long"], "--segments", "3"]
    assert code_of(*longer) == 0
    after = files(kept)
    assert {name: after[name] for name in before} == before
    assert {f"longcat-long-segments/segment-003/{name}" for name in SEGMENT} < after.keys()
    assert code_of(*KEEPING["train-lora"], "--steps", "2") == 0
    assert read_metadata(kept / "lora.safetensors")["steps"] == "2"
    trained = described_files(kept, "lora.")
    # Earlier code wrote no checksum.
    assert trained["lora.state.safetensors"]["metadata"].pop("checksum") == "text"
    assert trained == described_files(KEPT, "lora.")
    wanted = {
        name.replace("-002", "-003"): found
        for name, found in described_files(KEPT, "longcat-long-segments/segment-002").items()
    }
    record = wanted["longcat-long-segments/segment-003/segment.json"]
    # Newer than the folder.
    record["notes"]["threads"] = "number"
    # No longer stored where it is exact, and never where it does not change the result.
    for name in ("attention", "compile", "dtype", "fp8", "kv_cache", "lora_mode", "step_cache"):
        record["settings"].pop(name, None)
    record["settings"]["lossy"] = {"LoRA mode": "text"}
    assert described_files(kept, "longcat-long-segments/segment-003") == wanted


def described_files(path: Path, start: str = "") -> dict[str, Any]:
    """Path -> JSON keys, or tensors and metadata, of the files in a folder whose path begins with `start`."""
    found: dict[str, Any] = {}
    for name in files(path):
        file = path / name
        if not name.startswith(start):
            continue
        if file.suffix == ".json":
            content = json.loads(file.read_text(encoding="utf-8"))
            found[name] = schema(content) | {"version": content["version"]}
        elif file.suffix == ".safetensors":
            metadata = {key: _parsed(value) for key, value in (read_metadata(file) or {}).items()}
            found[name] = {"metadata": schema(metadata), "tensors": tensors(read_tensors(file))}
        else:
            found[name] = {}
    return found


def _parsed(text: str) -> Any:
    """Metadata is text, but settings in it are JSON."""
    return json.loads(text) if text.startswith("{") else text


def tensors(state: dict[str, torch.Tensor]) -> dict[str, str]:
    """Name -> dtype and shape of the tensors of the first block and outside the blocks."""
    return {
        name: f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
        for name, tensor in state.items()
        if not name.partition("blocks.")[2] or name.partition("blocks.")[2].startswith("0.")
    }


def test_folders_and_training_states_on_disk():
    assert_frozen("kept", described_files(KEPT))


@pytest.fixture
def empty(tmp_path, monkeypatch) -> Path:
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_names_of_new_files(empty):
    """Default names, with a number where the file exists, and the keys in the report of a comparison."""
    (empty / "longcat.mp4").touch()
    assert code_of(*GENERATE) == 0 and code_of(*COMPARE) == 0
    assert code_of("lesson-nano", "lesson", "--clips", "2") == 0
    assert_frozen("new_files", sorted(files(empty)))
    report = json.loads((empty / "longcat-compare" / "report.json").read_text(encoding="utf-8"))
    assert_frozen("comparison", results_schema(report))


# --- files that are read ---------------------------------------------------------------------------------------------


def test_names_in_checkpoints_and_loras():
    """Names in the first block and outside the blocks, for every form of checkpoint and LoRA."""
    forms = {
        form.name: {"prefix": form.block_prefix, "modules": {own: list(names) for own, names in form.modules(1)}}
        for form in FORMATS
    }
    loras = {name: list(target) for name, target in targets(1).items()}
    own = sorted(tensors(load_transformer(GOLDEN / "dit.safetensors").state_dict()))
    assert_frozen("names", {"checkpoints": forms, "loras": loras, "own": own})


@pytest.mark.parametrize("form", ["bf16", "comfyui-fp8", "int8"])
def test_names_in_converted_checkpoints(form, empty):
    assert code_of("convert", str(GOLDEN / "dit.safetensors"), "made.safetensors", "--to", form) == 0
    written = read_metadata("made.safetensors") or {}
    found = {"metadata": sorted(written), "tensors": tensors(read_tensors("made.safetensors"))}
    assert_frozen(f"converted_{form}", found)


def test_workflows():
    """The content counts, not the layout of the file."""
    found = {}
    for path in sorted((ROOT / "workflows").glob("*.json")):
        content = json.dumps(json.loads(path.read_text(encoding="utf-8")), sort_keys=True, ensure_ascii=True)
        found[path.name] = hashlib.sha256(content.encode()).hexdigest()
    assert_frozen("workflows", found)


def test_every_node_has_a_help_page():
    nodes = json.loads((DATA / "nodes.json").read_text(encoding="utf-8"))
    assert sorted(path.stem for path in (ROOT / "web" / "docs").glob("*.md")) == sorted(nodes)


# --- results ---------------------------------------------------------------------------------------------------------


def results_schema(content: dict[str, Any]) -> Any:
    """Keys of a result file; package names depend on the machine and are left out."""
    assert all(isinstance(version, str) for version in content["machine"]["packages"].values())
    return schema(content | {"machine": content["machine"] | {"packages": "version by name"}})


def test_results_that_are_published():
    paths = sorted((ROOT / "docs" / "performance").glob("*.json"))
    assert_frozen(
        "performance", {path.name: results_schema(json.loads(path.read_text(encoding="utf-8"))) for path in paths}
    )


def test_results_that_are_written(tmp_path):
    report = ResultsFile("memory", tmp_path, torch.device("cpu"), {"size": "16x32x5"}, name="memory")
    report.add({"name": "a", "ms": math.inf})
    assert report.path == tmp_path / "memory.json"
    content = json.loads(report.path.read_text(encoding="utf-8"))
    assert content["schema"] == 1 and content["rows"] == [{"name": "a", "ms": None}]
    published = json.loads((DATA / "performance.json").read_text(encoding="utf-8"))["memory.json"]
    assert content.keys() == published.keys()
    of_a_gpu = {"gpu", "gpu_memory_gib", "driver", "cuda", "cudnn"}
    assert published["machine"].keys() - content["machine"].keys() == of_a_gpu
