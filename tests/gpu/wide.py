"""Rows on a few blocks of the real width with random weights: finite, the same in every VRAM mode and headless, and
within the memory that a mode may use."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from longcat_core.benchmark.workload import random_model
from longcat_core.checkpoints.formats import OFFICIAL
from longcat_core.checkpoints.load import official_state
from longcat_core.checkpoints.wan_vae import LATENTS_MEAN, LATENTS_STD
from longcat_core.files.safetensors_io import write_safetensors
from longcat_core.generate.paths import NANO_TEXT_ENCODER, NANO_VAE, ModelPaths
from longcat_core.generate.pipeline import Pipeline
from longcat_core.generate.request import GenerateRequest
from longcat_core.model.config import ModelConfig

from ..checkpoints.written_forms import comfyui, fp8_scaled
from ..comfyui.prompts import node
from . import limits
from .cells import (
    BYPASS,
    COMPILE,
    CPU,
    DYNAMIC,
    HELD,
    KSAMPLER,
    LONGCAT,
    LORA,
    NONE,
    NOVRAM,
    SAMPLERS,
    SPARSE,
    STATIC,
    T2V,
    Cell,
)
from .fleet import HELD_GIB, SMALL, SMALL_GIB, Booted, Fleet, Seen
from .graphs import SCENE, SEED, Prompt, nano
from .memory import Meter
from .verdicts import RIGHT, WRONG, Verdict
from .weights import FOLDER, OWN, STOCK, Weights, lora

FILE, SCALED = f"{FOLDER}/wide.safetensors", f"{FOLDER}/wide_scaled.safetensors"
LORA_FILE = "matrix_wide_lora.safetensors"
FORMS = {
    "bf16": Weights(OWN, FILE, "default", NONE),
    "fp8 rowwise": Weights(OWN, FILE, "fp8 rowwise", "rowwise"),
    "weight_dtype fp8_e4m3fn": Weights(OWN, FILE, "fp8_e4m3fn", "e4m3"),
    "UNETLoader fp8_e4m3fn_fast": Weights(STOCK, FILE, "fp8_e4m3fn_fast", "fast"),
    "scaled fp8": Weights(STOCK, SCALED, "default", "scaled"),
}
PATCHES = (LORA, BYPASS, COMPILE, SPARSE)
# The mode without streaming is compared with the headless core, all others with it.
MODES = (STATIC, DYNAMIC, HELD, SMALL, NOVRAM)
STEPS = 2
# Beyond a mode's limit: the CUDA context, and what PyTorch's allocator rounds up.
SLACK_GIB = 1.5


@dataclass(frozen=True)
class Size:
    """The network and the video of these rows."""

    config: ModelConfig
    width: int
    height: int
    frames: int


# The embedded text encoder gives 128 channels.
FULL = Size(ModelConfig(depth=3, caption_channels=128), 832, 480, 17)
# What a CPU does in seconds, to try the rows themselves.
TINY = Size(ModelConfig(hidden_size=256, depth=2, num_heads=2, ffn_hidden=768, adaln_dim=64, caption_channels=128),
            96, 64, 9)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """A cell of the wide network."""

    weights: str
    sampler: str
    mode: str
    extra: str

    @property
    def name(self) -> str:
        return f"wide: {self.weights} / {self.sampler} / {self.mode} / {self.extra}"

    @property
    def key(self) -> tuple[str, str, str]:
        return self.weights, self.sampler, self.extra


def rows(modes: Sequence[str]) -> list[Row]:
    """Each form in every mode, each patch and each sampler where nothing is streamed, and where everything is."""
    chosen = [(form, LONGCAT, NONE) for form in FORMS]
    more = [("bf16", LONGCAT, patch) for patch in PATCHES]
    more += [("bf16", sampler, NONE) for sampler in SAMPLERS if sampler != LONGCAT]
    found = []
    for mode in modes:
        here = chosen + (more if mode in (STATIC, DYNAMIC, SMALL, CPU) else [])
        found += [Row(form, sampler, mode, extra) for form, sampler, extra in here]
    return found


def prompt(row: Row, size: Size, number: int) -> Prompt:
    """As a cell of the nano model, with the wide file, a larger video and its latents kept instead of a picture."""
    made = nano(Cell(row.weights, row.sampler, row.mode, row.extra, T2V), FORMS[row.weights].node(), f"wide-{number}")
    for part in made.values():
        inputs = part["inputs"]
        inputs |= {"steps": STEPS} if "steps" in inputs else {}
        inputs |= {"lora_name": LORA_FILE} if "lora_name" in inputs else {}
        if part["class_type"] == "EmptyHunyuanLatentVideo":
            inputs |= {"width": size.width, "height": size.height, "length": size.frames}
    for name in ("decode", "vae"):
        made.pop(name)
    return made | {"save": node("SaveLatent", samples=["sampler", 0], filename_prefix=f"latents/wide-{number}")}


def write(models: Path, size: Size, device: torch.device) -> None:
    """Write the wide file, made on the device, its scaled fp8 form and a LoRA."""
    network = random_model(size.config, device, torch.bfloat16)
    state = official_state(network, OFFICIAL)
    (models / "diffusion_models" / FOLDER).mkdir(parents=True, exist_ok=True)
    write_safetensors(models / "diffusion_models" / FILE, state)
    scaled = {name: tensor.contiguous() for name, tensor in fp8_scaled(comfyui(state)).items()}
    scaled["scaled_fp8"] = scaled["scaled_fp8"].to(device)
    write_safetensors(models / "diffusion_models" / SCALED, scaled)
    lora(models / "loras" / LORA_FILE, models / "diffusion_models" / FILE, strength=1.0)


def headless(models: Path, size: Size, device: torch.device) -> dict[str, np.ndarray]:
    """What the core gives for NONE and LORA in bf16 and for the form `fp8 rowwise`, as ComfyUI's latents."""
    paths = ModelPaths(models / "diffusion_models" / FILE, NANO_VAE, NANO_TEXT_ENCODER)
    request = GenerateRequest(SCENE, "", height=size.height, width=size.width, frames=size.frames, steps=STEPS,
                              guidance_scale=4.0, seed=SEED, schedule="base")  # fmt: skip
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    out = {}
    options: dict[str, dict[str, Any]] = {
        NONE: {},
        LORA: {"lora": [(models / "loras" / LORA_FILE, 1.0)]},
        "fp8 rowwise": {"fp8": True},
    }
    for name, more in options.items():
        latents = Pipeline.load(paths, dtype=dtype, device=device, **more).generate(request).latents.float().cpu()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        mean, std = (torch.tensor(values).view(1, -1, 1, 1, 1) for values in (LATENTS_MEAN, LATENTS_STD))
        out[name] = (latents * std + mean).numpy()
    return out


def relative(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def most_gib(mode: str) -> float | None:
    """GiB of the card that a mode may use at most; None: as much as it likes."""
    return {HELD: HELD_GIB + SLACK_GIB, SMALL: SMALL_GIB + SLACK_GIB}.get(mode)


def judge(row: Row, seen: Seen, wanted: np.ndarray | None, limit: float, peak: float | None) -> Verdict:
    """Latents that are finite and near enough to those wanted, within the mode's memory. wanted: None for the first of
    KSampler, whose noise levels the core does not have; the other modes are compared with it."""
    if seen.status != "success":
        at = f" at node {seen.node}" if seen.node else ""
        return Verdict(WRONG, f"{seen.status}{at}: {seen.said}")
    found = seen.frames
    if found is None or not np.isfinite(found).all():
        return Verdict(WRONG, "latents that are not finite")
    if found.std() < 0.1:
        return Verdict(WRONG, "latents that are all alike")
    if wanted is not None and found.shape != wanted.shape:
        return Verdict(WRONG, f"latents of {list(found.shape)} instead of {list(wanted.shape)}")
    off = None if wanted is None else relative(found, wanted)
    said = ("finite" if off is None else f"{off:.4f} off") + ("" if peak is None else f", {peak:.1f} GiB")
    if off is not None and off > limit:
        return Verdict(WRONG, f"{said}; {limit:g} at most")
    most = most_gib(row.mode)
    if peak is not None and most is not None and peak > most:
        return Verdict(WRONG, f"{said}; {most:g} GiB at most")
    return Verdict(RIGHT, said)


class WideRun:
    """All rows, a server for each mode, side by side. `poll` gives what is judged since it was called last."""

    def __init__(self, fleet: Fleet, work: Sequence[Row], size: Size, device: torch.device) -> None:
        self.fleet, self.work, self.size, self.device = fleet, list(work), size, device
        self.modes = list(dict.fromkeys(row.mode for row in work))
        self.core: dict[str, np.ndarray] = {}
        self.first: dict[tuple, np.ndarray] = {}
        self.finished: queue.SimpleQueue[tuple[Row, Seen, float | None, list[str]]] = queue.SimpleQueue()
        self.waiting: list[tuple[Row, Seen, float | None, list[str]]] = []
        self.threads: list[threading.Thread] = []
        self.error: Exception | None = None
        self.meter = Meter()

    def start(self, deadline: float) -> None:
        if self.work:
            self.threads = [threading.Thread(target=self._prepare, args=(deadline,), daemon=True)]
            self.threads[0].start()

    def _prepare(self, deadline: float) -> None:
        try:
            write(self.fleet.models, self.size, self.device)
            servers = {
                mode: self.fleet.server(mode, f"wide-{mode.strip('-').replace(' ', '-')}") for mode in self.modes
            }
            if self.device.type == "cuda":
                self.meter.start()
            for mode in self.modes:
                thread = threading.Thread(target=self._serve, args=(servers[mode], mode, deadline), daemon=True)
                thread.start()
                self.threads.append(thread)
            core = headless(self.fleet.models, self.size, self.device)
            if relative(core[LORA], core[NONE]) < 2 * limits.MERGED:
                raise RuntimeError("the LoRA of the wide network changes too little to be seen")
            self.core = core
        except Exception as error:  # reported as the verdict of every row that needs it
            self.error = error

    def _serve(self, booted: Booted, mode: str, deadline: float) -> None:
        for number, row in enumerate(row for row in self.work if row.mode == mode):
            if time.monotonic() > deadline:
                return
            made, peak = prompt(row, self.size, number), None
            if booted.server.process is not None:
                self.meter.reset(booted.server.process.pid)
            seen = booted.run([made])
            if booted.server.process is not None:
                peak = self.meter.peak_gib(booted.server.process.pid)
            self.finished.put((row, seen, peak, sorted({part["class_type"] for part in made.values()})))

    @property
    def busy(self) -> bool:
        return any(thread.is_alive() for thread in self.threads) or not self.finished.empty() or bool(self.waiting)

    def _ready(self, row: Row, alive: bool) -> bool:
        if not self.core and self.error is None:
            return False
        return row.mode == self.modes[0] or row.key in self.first or not alive

    def poll(self) -> Iterator[tuple]:
        """(row, verdict, limit, seconds, nodes) of each."""
        # Before the queue is read: what a thread put there last must not be missed.
        alive = any(thread.is_alive() for thread in self.threads)
        while not self.finished.empty():
            self.waiting.append(self.finished.get())
        for entry in sorted(self.waiting, key=lambda entry: entry[0].mode != self.modes[0]):
            row, seen, peak, nodes = entry
            if not self._ready(row, alive):
                continue
            self.waiting.remove(entry)
            most = limits.wide_limit(row.weights, row.extra, against_core=row.key not in self.first)
            if self.error is not None:
                verdict = Verdict(WRONG, f"nothing to compare with: {type(self.error).__name__}: {self.error}"[:400])
            else:
                verdict = judge(row, seen, self._target(row), most, peak)
            if verdict.verdict == RIGHT and row.mode == self.modes[0]:
                self.first[row.key] = seen.frames
            yield row, verdict, most, seen.seconds, nodes

    def _target(self, row: Row) -> np.ndarray | None:
        """What a row is compared with: the same in the first mode, before that the headless core."""
        if row.key in self.first:
            return self.first[row.key]
        if row.sampler == KSAMPLER:
            return None
        if row.extra in (LORA, BYPASS):
            return self.core[LORA]
        return self.core["fp8 rowwise" if row.weights == "fp8 rowwise" else NONE]
