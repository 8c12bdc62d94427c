"""The CPU's videos that rows on the nano model are compared with: kept in a file, so that a run computes none.

`python -m tests.gpu --references` makes those of the file that lack or are stale. A video is stale when its prompt or
the nano model's weights changed; a run computes such a video on the CPU, and test_references.py names it.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import queue
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from longcat_core.files.safetensors_io import read_metadata, read_tensors, write_safetensors
from longcat_core.generate.paths import NANO_MODEL, NANO_TEXT_ENCODER, NANO_VAE

from ..comfyui.server import PACK, Installation
from .cells import CPU
from .fleet import Booted, Fleet, Seen
from .graphs import LORA_FILE, Prompt
from .jobs import Job
from .verdicts import one_color
from .weights import lora

FILE = PACK / "tests" / "data" / "gpu_references.safetensors"
# Of each of the servers that compute videos on the CPU.
THREADS = 2


def name(job: Job) -> str:
    """The name of a job's video, which jobs with one video share."""
    return " / ".join(job.key)


@cache
def weights() -> str:
    """A fingerprint of what the prompts load: the nano model's files and the LoRA of the rows."""
    digest = hashlib.sha256()
    for path in (NANO_MODEL, NANO_TEXT_ENCODER, NANO_VAE):
        digest.update(path.read_bytes())
    with tempfile.TemporaryDirectory() as folder:
        lora(Path(folder, LORA_FILE))
        for key, tensor in sorted(read_tensors(Path(folder, LORA_FILE)).items()):
            # Random numbers of another processor may differ in their last bits.
            digest.update(f"{key} {list(tensor.shape)} {tensor.float().norm():.3g}\n".encode())
    return digest.hexdigest()


def fingerprint(prompts: Sequence[Prompt]) -> str:
    """Of prompts and of the weights that they load."""
    return hashlib.sha256((json.dumps(prompts, sort_keys=True) + weights()).encode()).hexdigest()[:16]


def encode(frames: np.ndarray) -> bytes:
    """Frames, uint8 [F, H, W, 3], one below another as a WebP picture without loss."""
    out = io.BytesIO()
    picture = Image.fromarray(frames.reshape(-1, *frames.shape[2:]))
    picture.save(out, "WEBP", lossless=True, quality=100, method=6)
    return out.getvalue()


def decode(data: bytes, count: int) -> np.ndarray:
    """The `count` frames of `encode`."""
    picture = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    return picture.reshape(count, -1, *picture.shape[1:])


def read(path: Path = FILE) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The kept videos by name, each with the fingerprint of the prompts that gave it; empty without a file."""
    if not path.exists():
        return {}, {}
    said = {key: value.split() for key, value in read_metadata(path).items()}
    videos = {key: decode(tensor.numpy().tobytes(), int(said[key][1])) for key, tensor in read_tensors(path).items()}
    return videos, {key: said[key][0] for key in videos}


def write(videos: Mapping[str, np.ndarray], fingerprints: Mapping[str, str], path: Path = FILE) -> None:
    tensors = {key: torch.frombuffer(bytearray(encode(video)), dtype=torch.uint8) for key, video in videos.items()}
    write_safetensors(path, tensors, {key: f"{fingerprints[key]} {len(video)}" for key, video in videos.items()})


def stale(work: Iterable[Job], fingerprints: Mapping[str, str]) -> dict[str, Job]:
    """By name, a job of each video that is not kept or that other prompts gave."""
    wanted = {name(job): job for job in work}
    return {key: job for key, job in wanted.items() if fingerprints.get(key) != fingerprint(job.reference)}


class References:
    """The CPU's video of each job: the kept one, else computed once, by several servers."""

    def __init__(self, work: Iterable[Job], servers: Sequence[Booted], path: Path = FILE) -> None:
        work = list(work)
        self.kept, self.fingerprints = read(path)
        self.stale = stale(work, self.fingerprints)
        self.free: queue.SimpleQueue[Booted] = queue.SimpleQueue()
        for server in servers:
            self.free.put(server)
        self.pool = ThreadPoolExecutor(len(servers))
        self.found: dict[str, Future] = {key: self.pool.submit(self._run, job) for key, job in self.stale.items()}

    def of(self, job: Job) -> Future:
        key = name(job)
        if key not in self.found:
            self.found[key] = Future()
            self.found[key].set_result(Seen("success", frames=self.kept[key]))
        return self.found[key]

    @property
    def count(self) -> str:
        """How many are made, of how many."""
        return f"{sum(self.found[key].done() for key in self.stale)} of {len(self.stale)}"

    def _run(self, job: Job) -> Seen:
        server = self.free.get()
        try:
            return server.run(job.reference)
        finally:
            self.free.put(server)

    def stop(self) -> None:
        self.pool.shutdown(wait=False, cancel_futures=True)


def main(work: Sequence[Job], path: Path = FILE) -> int:
    """Make the videos that lack or are stale, drop those that no job wants, and say what was done."""
    with tempfile.TemporaryDirectory(prefix="longcat-gpu-") as folder:
        models = Path(folder) / "models"
        (models / "diffusion_models").mkdir(parents=True)
        lora(models / "loras" / LORA_FILE)
        fleet = Fleet(Installation.find(), Path(folder), models, 0)
        count = max(1, (os.cpu_count() or 1) // THREADS)
        made = References(work, [fleet.server(CPU, f"reference-{i}", THREADS) for i in range(count)], path)
        videos = {key: made.kept[key] for key in {name(job) for job in work} - made.stale.keys()}
        fingerprints = {key: made.fingerprints[key] for key in videos}
        try:
            for key, job in made.stale.items():
                seen = made.of(job).result()
                if seen.status != "success" or seen.frames is None or one_color(seen.frames):
                    what = "a video of one color" if seen.status == "success" else f"{seen.status}: {seen.said}"
                    raise SystemExit(f"{key}: {what}; nothing is written")
                videos[key], fingerprints[key] = seen.frames, fingerprint(job.reference)
                print(f"{key}: {seen.seconds:.1f} s", flush=True)
        finally:
            made.stop()
            fleet.end(Path(folder))
    write({key: videos[key] for key in sorted(videos)}, fingerprints, path)
    print(f"{len(made.stale)} made, {len(videos)} in {path} ({path.stat().st_size / 1e6:.1f} MB)")
    return 0
