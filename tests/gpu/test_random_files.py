"""Random files for measuring are read like released ones."""

from __future__ import annotations

from longcat_core.checkpoints.umt5 import open_umt5
from longcat_core.cli.main import main

from .random_files import E4M3, write


def test_a_video_of_random_files(tmp_path):
    write(tmp_path, small=True)
    stored = open_umt5(tmp_path / "umt5_xxl.safetensors")
    (file,) = stored.files.values()
    assert file.rows("encoder.block.1.layer.1.DenseReluDense.wo.weight").dtype == E4M3
    names = {"--model": "model", "--vae": "vae", "--text-encoder": "umt5_xxl"}
    files = [word for flag, name in names.items() for word in (flag, str(tmp_path / f"{name}.safetensors"))]
    output = tmp_path / "video.mp4"
    options = ["--distilled", "--steps", "1", "--size", "64x64", "--frames", "5", "--device", "cpu"]
    assert main(["generate", "a red circle moves right", *files, *options, "-o", str(output)]) == 0
    assert output.stat().st_size > 0
