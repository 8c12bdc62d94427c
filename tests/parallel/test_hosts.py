"""`torchrun` as on two machines: two of them on this one, which only know each other's address."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

from longcat_core.cli import main as cli
from longcat_core.files.media import read_video

from ..support.python_path import python_path

ROOT = Path(__file__).parents[2]
GENERATE = ["generate", "a red circle moves right on a blue background", "--steps", "1", "--frames", "5"]
GENERATE += ["--device", "cpu", "--guidance", "1"]
TORCHRUN = ["torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--master-addr", "127.0.0.1"]


def test_a_video_of_two_machines_is_that_of_one_process(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | python_path(ROOT)

    def machine(rank: int) -> subprocess.Popen[str]:
        own = ["--master-port", str(port), "--node-rank", str(rank)]
        command = [sys.executable, "-m", *TORCHRUN, *own, "-m", "longcat_core", *GENERATE, "-o", "two.mkv"]
        return subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)

    machines = [machine(rank) for rank in range(2)]
    try:
        assert cli.main([*GENERATE, "-o", str(tmp_path / "one.mkv")]) == 0
        said = [each.communicate(timeout=100)[1] for each in machines]
    finally:
        for each in machines:
            each.kill()
            each.wait()
    assert [each.returncode for each in machines] == [0, 0], said
    assert "2 processes share the tokens of each video" in said[0]
    one, two = (read_video(tmp_path / name)[0].astype(int) for name in ("one.mkv", "two.mkv"))
    assert abs(one - two).max() <= 1
