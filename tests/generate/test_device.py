"""Commands on a GPU that the CPU plays: every tensor is where it has to be, and the videos are the CPU's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from longcat_core.cli.main import main
from longcat_core.files.media import read_video

from ..support.pretend_cuda import pretended

COMMAND = ["generate", "a red circle moves right", "--steps", "2", "--size", "32x48", "--dtype", "float32"]
WAITING = ["--stream-blocks", "4", "--stream-text-encoder", "--offload-kv-cache"]


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("cpu")
    clip, longer = folder / "clip.mkv", folder / "longer.mkv"
    # A machine with a GPU would choose it.
    command = [*COMMAND, "--device", "cpu"]
    assert main([*command, "--frames", "9", "--output", str(clip)]) == 0
    continued = ["--frames", "17", "--video", str(clip), "--cond-frames", "5"]
    assert main([*command, *continued, "--output", str(longer)]) == 0
    return {"clip": clip, "longer": longer}


@pytest.mark.parametrize("more", [[], WAITING, ["--memory", "0.52"]])
@pytest.mark.parametrize("what", ["clip", "longer"])
def test_videos_are_those_of_the_cpu(videos, tmp_path, what, more):
    given = ["--video", str(videos["clip"]), "--cond-frames", "5", "--frames", "17"] if what == "longer" else []
    output = tmp_path / "gpu.mkv"
    with pretended() as gpu:
        options = [*(given or ["--frames", "9"]), *more]
        assert main([*COMMAND, *options, "--device", "cuda", "--output", str(output)]) == 0
        assert not gpu.errors
    (found, rate), (wanted, expected) = read_video(output), read_video(videos[what])
    assert (found.shape, rate) == (wanted.shape, expected)
    # The VAE has another memory format on a GPU, in which the convolutions of some CPUs round otherwise.
    assert np.abs(found.astype(int) - wanted.astype(int)).max() <= 1
    assert not gpu.registered, "nothing stays pinned"


def test_8_bit_layers_and_halves_of_guidance(tmp_path):
    with pretended():
        options = ["--fp8", "--split-guidance", "--tiled-vae", *WAITING, "--frames", "9", "--device", "cuda"]
        assert main([*COMMAND, *options, "--output", str(tmp_path / "gpu.mkv")]) == 0
