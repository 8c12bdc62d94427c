"""Training of LongCat-nano's VAE: Wan 2.1 architecture, eight base channels, on the procedural world."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoints.safetensors_io import write_safetensors
from ..checkpoints.wan_vae import to_wan
from .world import Placements, place, render, sample_scene

BASE_DIM = 8
# (frames, height, width, clips a step): the causal VAE then works at any size and length.
SHAPES = ((17, 64, 96, 8), (9, 96, 96, 10), (1, 64, 96, 64))
WEIGHTS = (6, 2, 1)
POOL = 16384
LATENT_NOISE = 0.12
MOMENT_WEIGHT = 0.02
LEARNING_RATE = 2e-3
CHANNELS_LAST = True
AHEAD = 8  # steps whose clips are drawn at once


def new_autoencoder() -> Any:
    """A fresh diffusers AutoencoderKLWan of the nano size (0.9 M parameters)."""
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan(base_dim=BASE_DIM, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=2)


def _resample(layer: Any, x: Tensor) -> Tensor:
    """Spatial and temporal resampling of a whole clip; the first frame stands outside temporal resampling."""
    if layer.mode == "upsample3d" and x.shape[2] > 1:
        doubled = layer.time_conv(x[:, :, 1:]).unflatten(1, (2, -1))
        doubled = torch.stack(doubled.unbind(1), dim=3).flatten(2, 3)
        x = torch.cat((x[:, :, :1], doubled), dim=2)
    x = layer(x)
    if layer.mode == "downsample3d" and x.shape[2] > 1:
        x = torch.cat((x[:, :, :1], layer.time_conv(x)), dim=2)
    return x


def encode_whole(vae: Any, video: Tensor) -> Tensor:
    """Mean latents [B, 16, T, H/8, W/8] of video [B, 3, F, H, W] in -1..1, all frames at once.

    The same numbers as diffusers' encoder, which walks through a clip four frames at a time with caches to save
    memory; without caches a training step launches a fifth of the kernels.
    """
    x = vae.encoder.conv_in(video)
    for layer in vae.encoder.down_blocks:
        x = _resample(layer, x) if hasattr(layer, "mode") else layer(x)
    x = vae.encoder.mid_block(x)
    x = vae.encoder.conv_out(vae.encoder.nonlinearity(vae.encoder.norm_out(x)))
    return vae.quant_conv(x).chunk(2, dim=1)[0]


def decode_whole(vae: Any, latents: Tensor) -> Tensor:
    """Video [B, 3, F, H, W] of latents [B, 16, T, h, w], all frames at once and without the final clamp."""
    decoder = vae.decoder
    x = decoder.mid_block(decoder.conv_in(vae.post_quant_conv(latents)))
    for block in decoder.up_blocks:
        for layer in block.resnets:
            x = layer(x)
        if block.upsamplers is not None:
            x = _resample(block.upsamplers[0], x)
    return decoder.conv_out(decoder.nonlinearity(decoder.norm_out(x)))


def moments(vae: Any, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and deviation of Wan 2.1 latents, each [1, 16, 1, 1, 1]."""
    shape = (1, -1, 1, 1, 1)
    mean = torch.tensor(vae.config.latents_mean, device=device).view(shape)
    return mean, torch.tensor(vae.config.latents_std, device=device).view(shape)


def recolour(video: Tensor) -> Tensor:
    """Another random gain and offset per clip and channel, so that the VAE knows more than the world's palette.

    video [B, F, H, W, 3] in 0..1; every third clip or so changes.
    """
    gain = torch.empty(video.shape[0], 1, 1, 1, 3, device=video.device).uniform_(0.4, 1.0)
    offset = torch.rand_like(gain) * (1 - gain)
    keep = torch.rand(video.shape[0], 1, 1, 1, 1, device=video.device) < 0.7
    return torch.where(keep, video, video * gain + offset)


def _training_step(
    vae: Any, optimizer: torch.optim.Optimizer, video: Tensor, device: torch.device
) -> Callable[[], tuple[Tensor, Tensor, Tensor]]:
    """A function that trains on what is in `video` and returns loss, squared error and moment penalty.

    On CUDA it is one captured graph: the network is so small that launching its kernels costs more than they do.
    """
    mean, std = moments(vae, device)
    parameters = list(vae.parameters())

    def step() -> tuple[Tensor, Tensor, Tensor]:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda", cache_enabled=False):
            latents = (encode_whole(vae, video).float() - mean) / std
            noisy = latents + LATENT_NOISE * torch.randn_like(latents)
            decoded = decode_whole(vae, noisy * std + mean).float()
        squared = (decoded - video).square().mean()
        penalty = latents.mean((0, 2, 3, 4)).square().mean() + (latents.std((0, 2, 3, 4)) - 1).square().mean()
        loss = (decoded - video).abs().mean() + 0.5 * squared + MOMENT_WEIGHT * penalty
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        return loss.detach(), squared.detach(), penalty.detach()

    def eager() -> tuple[Tensor, Tensor, Tensor]:
        optimizer.zero_grad(set_to_none=True)
        return step()

    if device.type != "cuda":
        return eager
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            eager()
    torch.cuda.current_stream().wait_stream(stream)
    optimizer.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()

    def replay() -> tuple[Tensor, Tensor, Tensor]:
        graph.replay()
        return results

    return replay


def _draw(pool: Placements, clips: int, shape: tuple[int, int, int], start_frame: int, device: torch.device) -> Tensor:
    rows = torch.randint(len(pool), (clips,), device=device)
    video = recolour(render(pool[rows], *shape, start_frame=start_frame))
    return video.permute(0, 4, 1, 2, 3) * 2 - 1


def train_autoencoder(
    path: Path, *, steps: int, seed: int, device: torch.device, log_every: int = 500
) -> dict[str, float]:
    """Train for `steps` steps, fold the latents to zero mean and unit variance, write `path` (bf16, Wan names).

    Noise on the latents makes the decoder forgiving to a sampler's small errors; a penalty on each channel's moments
    keeps the normalised latents near a standard normal, as ComfyUI's Wan 2.1 latent format expects.
    Returns the last losses.
    """
    torch.manual_seed(seed)
    rng = random.Random(seed)
    vae = new_autoencoder().to(device).train()
    if CHANNELS_LAST:
        for parameter in vae.parameters():
            if parameter.ndim == 5:
                parameter.data = parameter.data.to(memory_format=torch.channels_last_3d)
    rate = torch.tensor(LEARNING_RATE, device=device)
    optimizer = torch.optim.AdamW(
        vae.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=0.0, capturable=device.type == "cuda"
    )
    pool = place([sample_scene(rng) for _ in range(POOL)], seed).to(device)
    shapes = []
    for frames, height, width, clips in SHAPES:
        video = _draw(pool, clips, (frames, height, width), 0, device)
        video = video.contiguous(memory_format=torch.channels_last_3d if CHANNELS_LAST else torch.contiguous_format)
        shapes.append((video, _training_step(vae, optimizer, video, device)))
    started = time.monotonic()
    for step in range(steps):
        if step % AHEAD == 0:
            video, train = rng.choices(shapes, WEIGHTS)[0]
            shape = (video.shape[2], video.shape[3], video.shape[4])
            drawn = _draw(pool, len(video) * AHEAD, shape, rng.randrange(64), device)
        rate.fill_(LEARNING_RATE * min(1, (step + 1) / 200) * (0.505 + 0.495 * math.cos(math.pi * step / steps)))
        video.copy_(drawn[step % AHEAD :: AHEAD])
        loss, squared, penalty = train()
        if step % log_every == log_every - 1 or step == steps - 1:
            psnr = -10 * math.log10(squared.item() / 4)
            result = {"loss": loss.item(), "psnr": psnr, "moments": penalty.item()}
            shown = " ".join(f"{k} {v:.4f}" for k, v in result.items())
            print(f"vae step {step + 1}/{steps} {time.monotonic() - started:.0f} s: {shown}", flush=True)
    _fold_moments(vae, pool, rng, device)
    write_safetensors(path, {k: v.to(torch.bfloat16) for k, v in to_wan(vae.state_dict()).items()}, {"format": "pt"})
    return result


@torch.no_grad()
def _fold_moments(vae: Any, pool: Placements, rng: random.Random, device: torch.device) -> None:
    """Move the measured mean and deviation of every latent channel into the 1x1 convolutions around the latents."""
    mean, std = moments(vae, device)
    samples = []
    for _ in range(16):
        rows = torch.randint(len(pool), (32,), device=device)
        video = render(pool[rows], 33, 64, 96, start_frame=rng.randrange(64)).permute(0, 4, 1, 2, 3) * 2 - 1
        samples.append((encode_whole(vae, video) - mean) / std)
    latents = torch.cat(samples)
    m, s = latents.mean((0, 2, 3, 4)), latents.std((0, 2, 3, 4))
    mean, std = mean.flatten(), std.flatten()
    channels = len(mean)
    quant, post = vae.quant_conv, vae.post_quant_conv
    # Before: normalised n = (mu - mean) / std. Wanted: (n - m) / s, which is mu' = (mu - mean - std m) / s + mean.
    quant.weight[:channels] /= s.view(-1, 1, 1, 1, 1)
    quant.bias[:channels] = (quant.bias[:channels] - mean - std * m) / s + mean
    quant.weight[channels:] = 0
    quant.bias[channels:] = 2 * torch.log(LATENT_NOISE * std)
    # The decoder gets mu back: mu = s mu' + (mean + std m - s mean).
    post.bias += post.weight.flatten(1) @ (mean + std * m - s * mean)
    post.weight *= s.view(1, -1, 1, 1, 1)
