"""Trainings that kill themselves: a process that has everything loaded forks one for each line that it reads.

A line is JSON: folder, name, moment ("step N": after it, "write N": before the Nth file takes its name). The answer is
how the run ended. A process that has computed before must not fork: threads of OpenMP would be missing in its child.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from longcat_core.generate.paths import ModelPaths
from longcat_core.training import lora as train_lora
from longcat_core.training.clips import Clip, Sample
from longcat_core.training.lora import Recipe

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
PATHS = ModelPaths(GOLDEN / "dit.safetensors", GOLDEN / "vae.safetensors", GOLDEN / "dit.safetensors")
RECIPE = Recipe(64, 96, 9, rank=4, alpha=2.0, steps=6, batch=2, learning_rate=1e-2, cond_share=0.5, save_every=2)


def samples() -> tuple[dict[int, list[Sample]], torch.Tensor]:
    """Three clips of three latent frames, and a picture."""
    generator = torch.Generator().manual_seed(0)

    def sample(frames: int) -> Sample:
        latents = torch.randn(16, frames, 8, 12, generator=generator)
        return Sample(latents, torch.randn(3 + frames, 48, generator=generator))

    return {3: [sample(3) for _ in range(3)], 1: [sample(1)]}, torch.randn(1, 48, generator=generator)


def train(folder: Path, name: str, recipe: Recipe = RECIPE, **options: Any) -> Path:
    """One training on clips that are encoded already, which `train_lora._encode` must have been replaced for."""
    path = folder / f"{name}.safetensors"
    (folder / "clip.mkv").touch()
    train_lora.train_lora(PATHS, [Clip(folder / "clip.mkv", "a clip", 9)], recipe, path, **options)
    return path


def run(folder: str, name: str, moment: str) -> None:
    kind, number = moment.split()
    replaced, count = os.replace, 0

    def replace(*paths: Any) -> None:
        nonlocal count
        count += 1
        if kind == "write" and count == int(number):
            os.kill(os.getpid(), signal.SIGKILL)
        replaced(*paths)

    def report(what: str, done: int, of: int, loss: float) -> None:
        if kind == "step" and done == int(number):
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = replace
    train_lora._encode = lambda *_: samples()
    train(Path(folder), name, report=report)


def main() -> None:
    torch.set_num_threads(1)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            try:
                run(**json.loads(line))
            finally:
                os._exit(0)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
