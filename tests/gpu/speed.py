"""How fast the network of the full size runs in the real server: LongCat Benchmark on random weights, mode by mode.

Nothing is judged here, because a figure belongs to its machine; the report shows the node's own text.
"""

from __future__ import annotations

import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from longcat_core.benchmark.workload import random_model
from longcat_core.checkpoints.formats import OFFICIAL
from longcat_core.checkpoints.load import official_state
from longcat_core.files.safetensors_io import write_safetensors
from longcat_core.model.config import ModelConfig

from ..comfyui.prompts import node
from ..comfyui.server import Installation
from .cells import COMPILE, CPU, DYNAMIC, HELD, STATIC
from .fleet import Booted, Fleet
from .graphs import Prompt
from .report import SPEED
from .weights import FOLDER, OWN
from .wide import TINY, Size

FILE = f"{FOLDER}/full.safetensors"
FULL = Size(ModelConfig(), 832, 480, 93)
# Of each setting in each of its turns, after the first.
STEPS = 3
BF16, E4M3, ROWWISE = "default", "fp8_e4m3fn", "fp8 rowwise"


@dataclass(frozen=True)
class Comparison:
    """The bf16 file as it is (A) against a weight_dtype or TorchCompileModel (B)."""

    mode: str
    b: str

    @property
    def name(self) -> str:
        b = self.b if self.b == COMPILE else f"weight_dtype {self.b}"
        return f"{self.mode}: bf16 (A), {b} (B)"


COMPARISONS = (
    Comparison(DYNAMIC, COMPILE),
    Comparison(DYNAMIC, E4M3),
    Comparison(DYNAMIC, ROWWISE),
    Comparison(STATIC, ROWWISE),
    Comparison(HELD, ROWWISE),
)


def prompt(compared: Comparison, size: Size) -> Prompt:
    """Times both settings; node "report" shows the text."""
    other = node(OWN, model_name=FILE, weight_dtype=compared.b)
    if compared.b == COMPILE:
        other = node(COMPILE, model=["a", 0], backend="inductor")
    return {
        "a": node(OWN, model_name=FILE, weight_dtype=BF16),
        "b": other,
        "latent": node(
            "EmptyHunyuanLatentVideo", width=size.width, height=size.height, length=size.frames, batch_size=1
        ),
        "benchmark": node("LongCatBenchmark", model=["a", 0], model_b=["b", 0], latent_image=["latent", 0],
                          steps=STEPS, guidance=4.0),
        "report": node("PreviewAny", source=["benchmark", 1]),
    }  # fmt: skip


def measured(booted: Booted, compared: Comparison, size: Size) -> str:
    """The text of the node, or the sentence with which the prompt failed."""
    try:
        run = booted.ready().run(prompt(compared, size))
    except (OSError, RuntimeError) as error:
        booted.drop()
        return f"did not run: {' '.join(str(error).split())[-300:]}"
    if run.status != "success":
        return f"did not run: {' '.join(str(run.end.get('exception_message', run.status)).split())[:300]}"
    return run.outputs["report"]["text"][0]


def main(device: torch.device, deadline: float, output: Path, machine: dict[str, Any]) -> None:
    """Measure what can be begun before the deadline, and keep the texts in `output`."""
    size, total, work = FULL, 0, COMPARISONS
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
    else:
        size, work = TINY, tuple(Comparison(CPU, each) for each in (COMPILE, E4M3, ROWWISE))
    rows = []
    with tempfile.TemporaryDirectory(prefix="longcat-speed-") as folder:
        models = Path(folder) / "models"
        for kind in (f"diffusion_models/{FOLDER}", "loras"):
            (models / kind).mkdir(parents=True)
        network = random_model(size.config, device, torch.bfloat16)
        write_safetensors(models / "diffusion_models" / FILE, official_state(network, OFFICIAL))
        del network
        if device.type == "cuda":
            torch.cuda.empty_cache()
        fleet = Fleet(Installation.find(), Path(folder), models, total)
        try:
            for number, compared in enumerate(work):
                if time.monotonic() > deadline:
                    break
                booted = fleet.made.get(compared.mode) or fleet.server(compared.mode, compared.mode)
                rows.append({"name": compared.name, "text": measured(booted, compared, size)})
                print(f"{rows[-1]['name']}\n{rows[-1]['text']}\n", flush=True)
                if number + 1 == len(work) or work[number + 1].mode != compared.mode:
                    # The next server has the card for itself.
                    booted.drop()
                kept = {"identity": machine["identity"], "of": len(work), "rows": rows}
                (output / SPEED).write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
        finally:
            fleet.end(output)
