"""Runs the tests of the folder `inside` in the Python of a ComfyUI checkout, all in one process."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings

import pytest

from ..support.python_path import comfyui_packages, python_path
from .checkout import INSIDE, PACK, Checkout

TESTS = PACK / "tests" / "nodes" / "inside"


@pytest.mark.skipif(bool(os.environ.get(INSIDE)), reason="this is that process")
def test_nodes_inside_comfyui(tmp_path):
    try:
        checkout = Checkout.find()
    except FileNotFoundError as error:
        # A warning as well, since quiet runs do not print why a test is skipped.
        warnings.warn(f"the nodes are not tested in ComfyUI: {error}", stacklevel=1)
        pytest.skip(str(error))
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTEST_ADDOPTS")}
    environment |= {INSIDE: "1", "COMFYUI_PATH": str(checkout.path), "LONGCAT_PYTHON": sys.executable}
    environment |= python_path(*comfyui_packages(), inherited=False)
    environment.setdefault("OMP_NUM_THREADS", "1")
    probe = subprocess.run([checkout.python, "-c", "import aiohttp, torchsde, pytest"], capture_output=True, text=True)
    if probe.returncode:
        lacking = probe.stderr.strip().splitlines()[-1]
        reason = (
            f"{checkout.python} cannot run ComfyUI and pytest ({lacking}); set COMFYUI_PYTHON or install what lacks"
        )
        warnings.warn(f"the nodes are not tested in ComfyUI: {reason}", stacklevel=1)
        pytest.skip(reason)
    # -P: the checkout's own nodes.py, not the folder of that name here, is what ComfyUI means by `nodes`.
    options = ["-q", "-p", "no:cacheprovider", "--durations=8", f"--basetemp={tmp_path / 'inside'}"]
    config = ["-c", str(PACK / "pyproject.toml"), f"--rootdir={PACK}"]
    command = [str(checkout.python), "-P", "-m", "pytest", *options, *config, str(TESTS)]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, errors="replace")
    print(run.stdout[-20000:])
    assert run.returncode == 0, f"{run.stdout[-20000:]}\n{run.stderr[-4000:]}"
