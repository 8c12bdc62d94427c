"""LongCat-mini's VAE: nano's, trained further on the richer world."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import LongCatError
from ...files.safetensors_io import read_tensors, write_safetensors
from ...generate.paths import NANO_VAE
from ...generate.vae import load_vae, save_vae
from ...training.step import captured
from ..autoencoder import decode_whole, encode_whole, fold_latents, moments, recolor, training_step
from .clock import Clock
from .drawing import Placements, place, render
from .scenes import sample_scene

POOL = 4096
LEARNING_RATE = 4e-4
WEIGHTS = (5, 3, 1)
AHEAD = 8  # steps whose clips are drawn at once
TICK, LOG_EVERY = 50, 500  # steps
FOLDED, MEASURED = 24, 8  # clips
UNSEEN = 12345  # the seed of the clips that are measured


def _draw(pool: Placements, shape: Sequence[int], clips: int, rng: random.Random, device: torch.device) -> Tensor:
    """Clips [clips, F, H, W, 3] in 0..1 of `shape` (F, H, W): cut out of larger pictures where they are smaller."""
    frames, height, width = shape
    rows = torch.randint(len(pool), (clips,), device=device)
    # Half the sides of a window: the world as the full picture shows it, at a quarter of the cost.
    cut = frames > 9
    factor = 2 if cut else 1
    video = render(
        pool[rows], frames, height * factor, width * factor, start_frame=rng.randrange(64),
        compiled=device.type == "cuda",
    )  # fmt: skip
    if cut:
        top, left = rng.randrange(height + 1), rng.randrange(width + 1)
        video = video[:, :, top : top + height, left : left + width]
    return video


# Draws clips [clips, F, H, W, 3] in 0..1 of a shape (F, H, W): draw(shape, clips, rng).
Draw = Callable[[Sequence[int], int, random.Random], Tensor]


def mini_clips(seed: int, device: torch.device) -> Draw:
    """Clips of mini's world, of scenes that depend on the seed."""
    rng = random.Random(f"mini vae {seed}")
    pool = place([sample_scene(rng) for _ in range(POOL)], seed).to(device)
    return lambda shape, clips, rng: _draw(pool, shape, clips, rng, device)


def train_vae(
    path: Path,
    state: Path,
    shapes: Sequence[tuple[int, int, int, int]],
    clock: Clock,
    until: float,
    seed: int,
    device: torch.device,
    clips_of: Callable[[int, torch.device], Draw] = mini_clips,
) -> str:
    """Train until `until` of the clock's budget is spent, write `path` (bf16); returns the PSNR of clips it never saw.

    shapes: frames, height, width and clips of the kinds of steps. state: folder of what a run leaves for the next.
    clips_of: what draws clips of a world, by seed.
    """
    torch.manual_seed(seed)
    vae = load_vae(NANO_VAE, device=device).model.requires_grad_(True).train()
    saved, step = state / "vae.safetensors", 0
    rate = torch.tensor(0.0, device=device)
    parameters = list(vae.parameters())
    cuda = device.type == "cuda"
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.99), weight_decay=0.0, capturable=cuda, fused=cuda)
    if saved.exists():
        step = _load(read_tensors(saved), parameters, optimizer, device)
        print(f"vae: resuming after step {step}", flush=True)
    rng = random.Random(f"mini vae {seed} {step}")
    draw = clips_of(seed + step, device)
    statistics = moments(vae, device)
    graphs = torch.cuda.graph_pool_handle() if cuda else None
    kinds = []
    for *shape, clips in shapes:
        video = draw(shape, clips, rng) * 2 - 1
        run = partial(training_step, vae, optimizer, statistics, video)
        kinds.append((shape, video, captured(run, optimizer, rate, device, graphs)))
    begin = clock.spent - clock.seconds.get("vae", 0.0)
    end = until * clock.budget
    clock.tick("vae")
    drawn = None
    while clock.spent < end or step == 0:
        # A run that goes on may begin between two multiples.
        if drawn is None or step % AHEAD == 0:
            shape, video, train = rng.choices(kinds, WEIGHTS[: len(kinds)])[0]
            drawn = recolor(draw(shape, len(video) * AHEAD, rng)) * 2 - 1
        share = min(1.0, (clock.spent - begin) / max(1.0, end - begin))
        rate.fill_(LEARNING_RATE * min(1.0, (step + 1) / 200) * (0.505 + 0.495 * math.cos(math.pi * share)))
        video.copy_(drawn[step % AHEAD :: AHEAD])
        loss, squared, penalty = train()
        step += 1
        if step % TICK == 0 or clock.budget < 120:
            value = loss.item()
            clock.tick("vae")
            if not math.isfinite(value):
                raise LongCatError(f"VAE training diverged at step {step}; try another --seed")
            if step % LOG_EVERY == 0:
                shown = f"loss {value:.4f} squared error {squared.item():.6f} moments {penalty.item():.4f}"
                print(f"vae step {step}, {clock.spent:.0f} of {end:.0f} s: {shown}", flush=True)
            if clock.due or clock.used_up:
                write_safetensors(saved, _state(parameters, optimizer, step))
                clock.save()
                clock.pause_if_due()
    sample = partial(draw, shapes[0][:3], 1, rng)
    fold_latents(vae, moments(vae, device), [sample() * 2 - 1 for _ in range(FOLDED)])
    save_vae(path, vae)
    values = reconstruction(path, shapes[0][:3], device, clips_of(UNSEEN, device))
    return f"{step} steps, PSNR {min(values):.1f} to {max(values):.1f}, mean {sum(values) / len(values):.1f} dB"


@torch.no_grad()
def reconstruction(path: Path, shape: Sequence[int], device: torch.device, draw: Draw) -> list[float]:
    """PSNR in dB of clips (F, H, W), each decoded from its own latents."""
    vae = load_vae(path, device=device).model
    rng = random.Random("pictures unseen")
    values = []
    for _ in range(MEASURED):
        video = draw(shape, 1, rng)
        back = (decode_whole(vae, encode_whole(vae, video * 2 - 1)) + 1) / 2
        values.append(-10 * math.log10((back.clamp(0, 1) - video).square().mean().item()))
    return values


def _state(parameters: Sequence[Tensor], optimizer: Any, step: int) -> dict[str, Tensor]:
    tensors = {"step": torch.tensor(step)}
    for i, parameter in enumerate(parameters):
        tensors[f"{i}.weight"] = parameter.detach()
        # Adam knows nothing of a weight without gradients so far: steps on single pictures leave out those along time.
        tensors |= {f"{i}.{key}": value for key, value in optimizer.state.get(parameter, {}).items()}
    return tensors


@torch.no_grad()
def _load(tensors: dict[str, Tensor], parameters: Sequence[Tensor], optimizer: Any, device: torch.device) -> int:
    for i, parameter in enumerate(parameters):
        parameter.copy_(tensors[f"{i}.weight"])
        if f"{i}.step" not in tensors:
            continue
        moved = {key: tensors[f"{i}.{key}"].to(device) for key in ("exp_avg", "exp_avg_sq")}
        count = tensors[f"{i}.step"].to(device if device.type == "cuda" else "cpu")
        optimizer.state[parameter] = {"step": count, **moved}
    return int(tensors["step"])
