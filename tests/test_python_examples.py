"""Every example of docs/python.md runs, in order and in one namespace, as a reader would type it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import longcat_core

PAGE = Path(__file__).parents[1] / "docs" / "python.md"


def examples() -> list[tuple[int, str]]:
    """Line and text of every Python block of the page."""
    page = PAGE.read_text(encoding="utf-8")
    return [(page[: m.start(1)].count("\n"), m[1]) for m in re.finditer(r"^```python\n(.*?)^```$", page, re.M | re.S)]


@pytest.fixture(scope="module")
def ran(tmp_path_factory) -> dict:
    """The namespace after the last example."""
    folder = tmp_path_factory.mktemp("examples")
    name = "lora___lorahyphen___blocks___lorahyphen___0___lorahyphen___attn___lorahyphen___proj"
    rows = longcat_core.Pipeline.load().model.config.hidden_size
    parts = {"lora_down.weight": torch.ones(2, rows) * 0.1, "lora_up.weight": torch.ones(rows, 2) * 0.1}
    parts |= {"alpha_scale": torch.tensor(1.0)}
    save_file({f"{name}.{part}": tensor for part, tensor in parts.items()}, folder / "style.safetensors")
    namespace: dict = {"__name__": "examples"}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for line, text in examples():
            # Blank lines in front give tracebacks the page's own line numbers.
            exec(compile("\n" * line + text, str(PAGE), "exec"), namespace)
    return namespace | {"folder": folder}


def test_every_example_runs(ran):
    assert {path.name for path in ran["folder"].iterdir()} >= {"circle.mp4", "long.mp4", "segments"}
    frames, _ = longcat_core.read_video(ran["folder"] / "long.mp4")
    assert len(frames) == 29
    assert (ran["one"].frames == ran["videos"][ran["request"].prompt, 1]).all()
    assert (ran["two"].frames == ran["videos"][ran["request"].prompt, 2]).all()


def test_the_page_names_the_whole_interface():
    page = PAGE.read_text(encoding="utf-8")
    unnamed = {"BlockSparse", "Generation", "Plan", "Schedule", "Work", "__version__", "read_image", "read_video"}
    assert {name for name in longcat_core.__all__ if not re.search(rf"\b{name}\b", page)} <= unnamed
