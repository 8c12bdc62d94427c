"""Before anything imports Triton: without a GPU its kernels run in its interpreter, which the tests of them need."""

from __future__ import annotations

import atexit
import os
import shutil
import sys
import tempfile
from importlib.util import find_spec
from types import ModuleType
from typing import Any, NoReturn

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def _without_kornia(*_: Any, **__: Any) -> NoReturn:
    pytest.skip("the package kornia is not installed")


# A machine of `make test-gpu` may lack it; whatever computes SSIM there, in a command or a node too, is skipped.
if find_spec("kornia") is None:
    sys.modules["kornia.metrics"] = metrics = ModuleType("kornia.metrics")
    metrics.ssim = _without_kornia


# The user's own encodings of prompts stay as they are; commands that tests start inherit this.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="longcat-tests-")
atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)


# Each of these takes minutes.
LONG = ("test_nodes_inside_comfyui", "test_follows_fresh_prompts_and_shuffled_ones_are_at_chance")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long ones first, so that the other workers have something to do meanwhile."""
    items.sort(key=lambda item: item.name not in LONG)
