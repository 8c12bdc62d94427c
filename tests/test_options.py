"""Every option is one row of the table: commands, nodes, requests and pages agree with it."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import json
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from typing import Any, get_args

import pytest

from longcat_core.checkpoints.convert import TARGETS
from longcat_core.cli.main import COMMANDS, build_parser
from longcat_core.cli.options import help_of, without_effect
from longcat_core.generate import options
from longcat_core.generate.avatar import FPS
from longcat_core.generate.long_video import HandOff, LongVideoRequest
from longcat_core.generate.options import OPTIONS, Option, of_command, option
from longcat_core.generate.refine import RefineRequest
from longcat_core.generate.request import NANO, RELEASED, GenerateRequest
from longcat_core.model.kv_cache import KV_MODES
from longcat_core.optimize.block_sparse import BlockSparse
from longcat_core.optimize.switches import CompileMode, Exchange, Optimizations
from longcat_core.sampling.conditioning import SPATIAL_FACTOR, TEMPORAL_FACTOR
from longcat_core.sampling.schedules import DISTILLED_GRID, DMD_STEPS, MODES
from longcat_core.training.lora import Recipe

from .public_face import DATA, ROOT

# Their options are declared where they run.
OWN = ("bench", "train-nano")
# Fields of a request -> rows of other names.
RENAMED = {"guidance_scale": "guidance", "num_cond_frames": "cond_frames"}
# What has no row: frames that scripts hand in directly, what filling notes, and positional arguments.
WITHOUT_ROW = {"given", "source", "prompt", "chosen"}
# Options of `generate` about the video that no node has: sockets and nodes take their place.
WITHOUT_INPUT = {"size", "image", "video", "schedule", "distilled", "prompts_file", "gpus"}


def load_pages() -> Any:
    """docs/build.py, which is a script."""
    spec = spec_from_file_location("longcat_docs_build", ROOT / "docs" / "build.py")
    assert spec and spec.loader
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


PAGES = load_pages()
DECLARED = PAGES.load("nodes.declarations").NODES


def commands() -> dict[str, argparse.ArgumentParser]:
    return build_parser()._subparsers._group_actions[0].choices


# --- commands --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", [row for row in OPTIONS if row.needs], ids=lambda row: row.name)
def test_what_an_option_works_on_is_an_option_or_something_that_a_run_has(row: Option) -> None:
    names = [name for need in row.needs for name in need.split(" or ")]
    known = {options.A_GPU, options.SEVERAL, options.GUIDANCE, options.MORE, options.TWO}
    for command in row.commands:
        assert set(names) <= known | {other.name for other in of_command(command)} or command == "refine"


GIVEN = {"lora": None, "video": None, "image": None, "command": "generate"}


@pytest.mark.parametrize(
    ("argv", "values", "there", "notes"),
    [
        ("--cond-frames 13", {}, (), ["--cond-frames has no effect without --video"]),
        ("--cond-frames=5", {"image": "a.png"}, (), ["--cond-frames has no effect without --video"]),
        ("--cond-frames 5", {"video": "a.mp4"}, (), []),
        ("--lora-mode merged", {}, (), ["--lora-mode has no effect without --lora"]),
        ("--lora-mode runtime", {"lora": [("a", 1.0)]}, (), []),
        ("--kv-cache off", {}, (), ["--kv-cache has no effect without --image or --video or a second segment"]),
        ("--kv-cache off", {"image": "a.png"}, (), []),
        ("--kv-cache off --hand-off latents", {"command": "long"}, (options.MORE,), []),
        ("--overlap 5", {"command": "long"}, (), ["--overlap has no effect without a second segment"]),
        ("--stream-blocks 2 --stream-text-encoder", {}, (options.A_GPU,), []),
        ("--stream-blocks 2", {}, (), ["--stream-blocks has no effect without a GPU"]),
        ("--split-guidance", {}, (), ["--split-guidance has no effect without guidance"]),
        ("--exchange int8", {"gpus": None}, (), ["--exchange has no effect without a second GPU"]),
        ("--exchange int8", {"gpus": "1"}, (), ["--exchange has no effect without a second GPU"]),
        ("--exchange int8", {"gpus": "2"}, (), []),
        ("--guidance-until 0.5", {}, (), ["--guidance-until has no effect without guidance"]),
        ("--split-guidance", {"guidance": 1.0}, (), ["--split-guidance has no effect without guidance"]),
        ("--split-guidance", {}, (options.GUIDANCE,), []),
        ("--mode add", {"command": "avatar"}, (), ["--mode has no effect without a second sound"]),
        ("", {}, (), []),
    ],
)
def test_options_without_effect_are_noted(
    argv: str, values: dict[str, Any], there: tuple[str, ...], notes: list
) -> None:
    args = argparse.Namespace(**GIVEN | values, argv=argv.split())
    assert list(without_effect(args, there)) == notes


@pytest.mark.parametrize("command", sorted(commands().keys() - set(OWN)))
def test_every_option_of_a_command_has_a_row(command):
    found = {action.dest: action for action in commands()[command]._actions if action.option_strings}
    del found["help"]
    rows = {row.name: row for row in of_command(command)}
    assert found.keys() == rows.keys()
    for name, row in rows.items():
        assert found[name].help == help_of(row)
        assert found[name].option_strings[-1] == row.flag


def test_every_row_belongs_to_a_command():
    known = commands().keys()
    for row in OPTIONS:
        assert row.commands and set(row.commands) <= known, row


def test_a_command_has_one_row_of_a_name():
    for command in commands():
        names = [row.name for row in of_command(command)]
        assert len(names) == len(set(names)), command


@pytest.mark.parametrize("row", OPTIONS, ids=lambda row: f"{row.name}-{row.commands[0]}")
def test_rows_are_well_formed(row):
    assert row.help and not row.help.endswith(".")
    for value in (row.default, row.nano):
        if isinstance(value, int | float) and row.kind in ("whole", "number"):
            assert row.least is None or row.least <= value
            assert row.most is None or value <= row.most
    if row.kind == "choice":
        assert row.choices and (row.required or row.default in row.choices)


def test_the_table_needs_no_torch():
    code = "import sys, longcat_core.generate.options; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


HELP = """
import sys
from longcat_core.cli.main import COMMANDS, main
for argv in (["--help"], ["--version"], *([name, "--help"] for name in COMMANDS if name != "train-nano")):
    try:
        main(argv)
    except SystemExit as ended:
        assert not ended.code, argv
heavy = {"asyncio", "av", "filelock", "numpy", "PIL", "pydantic", "safetensors", "torch", "tqdm", "transformers"}
sys.exit(", ".join(sorted(heavy & sys.modules.keys())) or 0)
"""


def test_help_imports_nothing_heavy():
    run = subprocess.run([sys.executable, "-c", HELP], cwd=ROOT, capture_output=True, text=True)
    assert not run.returncode, run.stderr
    assert run.stdout.count("usage: ") == len(COMMANDS), "and every page is printed"


# --- what runs -------------------------------------------------------------------------------------------------------


def test_choices_and_limits_are_those_of_the_code():
    assert options.KV_CACHE == KV_MODES
    assert get_args(HandOff) == options.HAND_OFFS
    assert get_args(CompileMode) == options.COMPILE
    assert get_args(Exchange) == options.EXCHANGES
    assert (*options.SCHEDULES, "refine") == MODES
    assert set(options.CHECKPOINT_FORMS) == set(TARGETS)
    assert options.SIDE_MULTIPLE == 2 * SPATIAL_FACTOR and options.FRAME_MULTIPLE == TEMPORAL_FACTOR


def test_every_field_of_a_request_has_a_row():
    names = {RENAMED.get(field.name, field.name) for field in dataclasses.fields(GenerateRequest)} - WITHOUT_ROW
    assert names <= {row.name for row in of_command("generate")}


def test_defaults_of_models_are_those_of_requests():
    for name in ("height", "width", "frames"):
        assert (option(name).default, option(name).nano) == (getattr(RELEASED, name), getattr(NANO, name))
    assert option("size").default == (RELEASED.height, RELEASED.width)
    assert option("size").nano == (NANO.height, NANO.width)
    filled = GenerateRequest("a").filled(RELEASED)
    assert (option("steps").default, option("guidance").default) == (filled.steps, filled.guidance_scale)
    assert option("schedule").default == filled.schedule


def test_defaults_of_schedules_are_those_of_requests():
    distilled = GenerateRequest("a", schedule="distilled").filled(RELEASED)
    steps, guidance = (option(name).schedules["distilled"] for name in ("steps", "guidance"))
    assert (steps[0], guidance[0]) == (distilled.steps, distilled.guidance_scale)
    assert steps[1] == DISTILLED_GRID


def test_the_page_knows_the_steps_of_a_distilled_avatar():
    declared = PAGES.load("nodes.widgets")
    assert set(declared.VERSIONS) == FPS.keys()
    assert declared.DISTILLED_NEWER == {"distilled 1.5": (DMD_STEPS, DMD_STEPS)}
    for node in ("LongCatSampler", "LongCatScheduler", "LongCatAvatarLongVideo"):
        (steps,) = (field.row for field in DECLARED[node].inputs if field.name == "steps")
        assert declared.DISTILLED_NEWER.items() <= steps.schedules.items()


@pytest.mark.parametrize(
    ("command", "kind"),
    [("generate", GenerateRequest), ("long", LongVideoRequest), ("refine", RefineRequest), ("train-lora", Recipe)],
)
def test_defaults_of_options_are_those_of_the_code(command, kind):
    """Where the request is not filled in from the model."""
    rows = {row.name: row for row in of_command(command) if not row.filled}
    shared = {
        row.name: (row.default, field.default)
        for field in dataclasses.fields(kind)
        if (row := rows.get(RENAMED.get(field.name, field.name))) and field.default is not dataclasses.MISSING
    }
    assert shared and all(one == other for one, other in shared.values()), shared


def test_sparsity_is_the_released_models():
    assert option("sparsity", "refine").default == BlockSparse().sparsity


# --- nodes -----------------------------------------------------------------------------------------------------------


def test_declared_nodes_are_the_public_ones():
    """ComfyUI's schemas are compared in tests/nodes/inside; this test runs without ComfyUI."""
    frozen = json.loads((DATA / "nodes.json").read_text(encoding="utf-8"))
    assert frozen.keys() == DECLARED.keys()
    for node_id, node in DECLARED.items():
        found = [(field["id"], field.get("default")) for field in frozen[node_id]["inputs"]]
        assert found == [(field.name, field.row.default if hasattr(field, "row") else None) for field in node.inputs]
        assert [output["name"] for output in frozen[node_id]["outputs"]] == [out.name or None for out in node.outputs]


def test_nodes_take_what_they_declare():
    found = {}
    for path in sorted((ROOT / "nodes").glob("*.py")):
        for kind in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(kind, ast.ClassDef) and "execute" in (methods := methods_of(kind)):
                node_id = next(item.value.value for item in kind.body if isinstance(item, ast.Assign))
                arguments = methods["execute"].args
                found[node_id] = {argument.arg for argument in arguments.args[1:]}
                if arguments.kwarg:
                    found[node_id] |= {field.name for field in dataclasses.fields(Optimizations)}
    assert found == {node_id: {field.name for field in node.inputs} for node_id, node in DECLARED.items()}


def methods_of(kind: ast.ClassDef) -> dict[str, ast.FunctionDef]:
    return {item.name: item for item in kind.body if isinstance(item, ast.FunctionDef)}


def test_options_of_a_video_are_inputs_of_a_node():
    """By their name, or by the name that a node gives them."""
    names = {field.name for node in DECLARED.values() for field in node.inputs}
    renamed = {
        "frames": "length",
        "sparse": "density",
        "sparse_kernel": "kernel",
        "step_cache": "threshold",
    }
    rows = of_command("generate", options.WHAT, options.SAMPLING)
    assert {renamed.get(row.name, row.name) for row in rows if row.name not in WITHOUT_INPUT} <= names


def test_a_tooltip_is_a_sentence_and_names_nanos_default():
    tooltips = {(node_id, field.name): field.tooltip for node_id, node in DECLARED.items() for field in node.inputs}
    assert all(text.endswith(".") and text[0] == text[0].upper() for text in tooltips.values())
    assert tooltips["LongCatImageToVideo", "length"].endswith("For LongCat-nano: 33.")


# --- pages -----------------------------------------------------------------------------------------------------------


def test_pages_are_up_to_date():
    differing = [str(path.relative_to(ROOT)) for path in PAGES.outdated()]
    assert not differing, f"run: python docs/build.py, which writes {', '.join(differing)}"


def test_a_missing_row_is_found(monkeypatch):
    row = Option("sharpness", "number", "how sharp", 1.0, commands=("generate",), heading=options.WHAT, common=True)
    table = PAGES.load("longcat_core.generate.options")
    monkeypatch.setattr(table, "OPTIONS", (*table.OPTIONS, row))
    assert {path.name for path in PAGES.outdated()} == {"README.md", "options.md"}


def test_a_help_page_has_the_meaning_in_its_second_and_last_column():
    """ComfyUI's panel is so narrow that a third column lies beyond its edge."""
    for node_id, node in DECLARED.items():
        page = (ROOT / "web" / "docs" / f"{node_id}.md").read_text(encoding="utf-8")
        rows = [line.strip("| ").split(" | ") for line in page.split("**Outputs**")[0].splitlines() if line[:1] == "|"]
        assert rows[0] == ["input", "meaning"] and {len(row) for row in rows} == {2}
        for field, (name, meaning) in zip(node.inputs, rows[2:], strict=True):
            assert name == f"`{field.name}`" and meaning.startswith(field.sentence)
            assert field.default_words in meaning


def test_notes_of_a_help_page_are_kept(monkeypatch, tmp_path):
    folder = tmp_path / "web" / "docs"
    folder.mkdir(parents=True)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "cli.md").write_text(f"above\n{PAGES.START}\n{PAGES.END}\nbelow\n", encoding="utf-8")
    (tmp_path / "README.md").write_text(f"before\n{PAGES.START}\nold\n{PAGES.END}\nafter\n", encoding="utf-8")
    (folder / "LongCatGuider.md").write_text(f"old\n\n{PAGES.NOTES}\n\nby hand\n", encoding="utf-8")
    monkeypatch.setattr(PAGES, "ROOT", tmp_path)
    found = PAGES.pages()
    page, readme = found[folder / "LongCatGuider.md"], found[tmp_path / "README.md"]
    assert page.startswith("# LongCat Guider\n") and page.endswith("by hand\n") and "old" not in page
    assert readme.startswith("before\n") and readme.endswith("after\n") and "old" not in readme.splitlines()
    sets = found[tmp_path / "docs" / "cli.md"]
    assert sets.startswith("above\n") and sets.endswith("below\n") and "| `fast` | base | step cache" in sets
