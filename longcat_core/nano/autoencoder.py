"""Training of LongCat-nano's VAE: Wan 2.1 architecture, eight base channels, on the procedural world."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, autocast, nn

from ..checkpoints.wan_vae import LATENT_CHANNELS, LATENTS_MEAN, LATENTS_STD
from ..errors import LongCatError
from ..generate.vae import load_vae, save_vae
from ..training.step import captured
from ..vae.network import VAEConfig, WanVAE
from .world import Placements, place, render, sample_scene

BASE_DIM = 8
# (frames, height, width, clips a step): the causal VAE then works at any size and length.
SHAPES = ((17, 64, 96, 4), (9, 96, 96, 5), (1, 64, 96, 32))
WEIGHTS = (6, 2, 1)
POOL = 16384
LATENT_NOISE = 0.12  # deviation at most; each clip draws its own
MOMENT_WEIGHT = 0.02
LEARNING_RATE = 5e-4
AHEAD = 8  # steps whose clips are drawn at once
LOG_EVERY = 500  # steps


def new_autoencoder() -> Any:
    """A fresh VAE of the nano size.

    Convolutions over pictures see their own frame only (their taps on earlier frames are zero and stay so): frames
    interact only in the temporal resampling layers, so a clip of any length looks like a short one to the network.
    Residual branches start at zero.
    """
    vae = WanVAE(VAEConfig(BASE_DIM, LATENT_CHANNELS, LATENTS_MEAN, LATENTS_STD))
    for name, module in vae.named_modules():
        if not isinstance(module, (nn.Conv2d, nn.Conv3d)):
            continue
        # PyTorch's default shrinks a signal by 1/sqrt(3) a layer and adds biases as large: after the dozen layers of
        # the skip path, nothing of the picture would be left to learn from.
        if module.bias is not None:
            nn.init.zeros_(module.bias)
        if name.endswith((".conv2", "attentions.0.proj")):
            nn.init.zeros_(module.weight)
        elif isinstance(module, nn.Conv3d) and module.kernel_size[1] > 1:
            nn.init.zeros_(module.weight)
            nn.init.normal_(module.weight.data[:, :, -1], std=(9 * module.in_channels) ** -0.5)
        else:
            nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
    return vae


# What follows runs the VAE's modules on a whole clip at once, as a batch of pictures [B, T, H, W, C], channels last.
# `vae.parts` walks through a clip in parts, to save memory, and convolves in 3-D on a GPU, which is slow at eight
# channels; a training step here launches a fifth of the kernels, all of them 2-D.


def _pictures(x: Tensor, weight: Tensor, bias: Tensor | None, **kwargs: Any) -> Tensor:
    batch = x.shape[0]
    out = F.conv2d(x.flatten(0, 1).permute(0, 3, 1, 2), weight, bias, **kwargs)
    return out.permute(0, 2, 3, 1).unflatten(0, (batch, -1))


def _conv(layer: Any, x: Tensor) -> Tensor:
    """A causal 3-D convolution, as a 2-D one over each frame or, along time, over each frame stacked with others."""
    taps, kernel = layer.kernel_size[0], layer.kernel_size[1]
    if kernel > 1 or taps == 1:
        # All earlier taps are zero: see `new_autoencoder`.
        return _pictures(x, layer.weight[:, :, -1], layer.bias, padding=kernel // 2)
    stride = layer.stride[0]
    # A stride of 2 begins at the first frame; otherwise two frames of zeros come before it.
    x = F.pad(x, (0, 0, 0, 0, 0, 0, taps - 1 if stride == 1 else 0, 0))
    end = (x.shape[1] - taps) // stride * stride + 1
    x = torch.cat([x[:, tap : tap + end : stride] for tap in range(taps)], dim=-1)
    return F.linear(x, layer.weight[..., 0, 0].transpose(1, 2).flatten(1), layer.bias)


def _norm_silu(norm: Any, x: Tensor) -> Tensor:
    # x / |x| with the tiny addend that keeps a row of zeros.
    return F.silu(F.rms_norm(x.float(), x.shape[-1:], norm.gamma.flatten(), eps=1e-24)).to(x.dtype)


def _residual(block: Any, x: Tensor) -> Tensor:
    short = x if isinstance(block.conv_shortcut, nn.Identity) else _conv(block.conv_shortcut, x)
    h = _conv(block.conv1, _norm_silu(block.norm1, x))
    return short + _conv(block.conv2, _norm_silu(block.norm2, h))


def _middle(block: Any, x: Tensor) -> Tensor:
    x = _residual(block.resnets[0], x)
    x = block.attentions[0](x)
    return _residual(block.resnets[1], x)


def _resample(layer: Any, x: Tensor) -> Tensor:
    """Spatial and temporal resampling; the first frame stands outside temporal resampling."""
    spatial = layer.resample[1]
    if layer.mode.startswith("downsample"):
        x = _pictures(F.pad(x, (0, 0, 0, 1, 0, 1)), spatial.weight, spatial.bias, stride=2)
        if layer.mode == "downsample3d" and x.shape[1] > 1:
            x = torch.cat((x[:, :1], _conv(layer.time_conv, x)), dim=1)
        return x
    if layer.mode == "upsample3d" and x.shape[1] > 1:
        doubled = _conv(layer.time_conv, x[:, 1:]).unflatten(-1, (2, -1))
        doubled = torch.stack(doubled.unbind(-2), dim=2).flatten(1, 2)
        x = torch.cat((x[:, :1], doubled), dim=1)
    x = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    return _pictures(x, spatial.weight, spatial.bias, padding=1)


def encode_whole(vae: Any, video: Tensor) -> Tensor:
    """Mean latents [B, 16, T, H/8, W/8] of video [B, F, H, W, 3] in -1..1, all frames at once."""
    x = _conv(vae.encoder.conv_in, video)
    for layer in vae.encoder.down_blocks:
        x = _resample(layer, x) if hasattr(layer, "mode") else _residual(layer, x)
    x = _middle(vae.encoder.mid_block, x)
    x = _conv(vae.quant_conv, _conv(vae.encoder.conv_out, _norm_silu(vae.encoder.norm_out, x)))
    return x.chunk(2, dim=-1)[0].permute(0, 4, 1, 2, 3)


def decode_whole(vae: Any, latents: Tensor) -> Tensor:
    """Video [B, F, H, W, 3] of latents [B, 16, T, h, w], all frames at once and without the final clamp."""
    decoder = vae.decoder
    x = _conv(vae.post_quant_conv, latents.permute(0, 2, 3, 4, 1))
    x = _middle(decoder.mid_block, _conv(decoder.conv_in, x))
    for block in decoder.up_blocks:
        for layer in block.resnets:
            x = _residual(layer, x)
        if block.upsamplers is not None:
            x = _resample(block.upsamplers[0], x)
    return _conv(decoder.conv_out, _norm_silu(decoder.norm_out, x))


def moments(vae: Any, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and deviation of Wan 2.1 latents, each [1, 16, 1, 1, 1]."""
    shape = (1, -1, 1, 1, 1)
    mean = torch.tensor(vae.config.latents_mean, device=device).view(shape)
    return mean, torch.tensor(vae.config.latents_std, device=device).view(shape)


def recolor(video: Tensor) -> Tensor:
    """A random gain and offset per clip and channel, so that the VAE learns more than the world's palette.

    video [B, F, H, W, 3] in 0..1; about every third clip changes.
    """
    gain = torch.empty(video.shape[0], 1, 1, 1, 3, device=video.device).uniform_(0.4, 1.0)
    offset = torch.rand_like(gain) * (1 - gain)
    keep = torch.rand(video.shape[0], 1, 1, 1, 1, device=video.device) < 0.7
    return torch.where(keep, video, video * gain + offset)


def training_step(
    vae: Any, optimizer: torch.optim.Optimizer, statistics: tuple[Tensor, Tensor], video: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Train on video [B, F, H, W, 3] in -1..1; returns loss, squared error and moment penalty.

    statistics: mean and deviation of the latents, as `moments` gives them.
    """
    cuda = video.device.type == "cuda"
    mean, std = statistics
    with autocast(video.device.type, torch.bfloat16, enabled=cuda, cache_enabled=False):
        latents = (encode_whole(vae, video).float() - mean) / std
        amount = LATENT_NOISE * torch.rand(len(video), 1, 1, 1, 1, device=video.device)
        noisy = latents + amount * torch.randn_like(latents)
        decoded = decode_whole(vae, noisy * std + mean).float()
    squared = (decoded - video).square().mean()
    penalty = latents.mean((0, 2, 3, 4)).square().mean() + (latents.square().mean((0, 2, 3, 4)) - 1).square().mean()
    loss = (decoded - video).abs().mean() + 0.5 * squared + MOMENT_WEIGHT * penalty
    loss.backward()
    nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
    optimizer.step()
    return loss.detach(), squared.detach(), penalty.detach()


def _draw(pool: Placements, clips: int, shape: Sequence[int], start_frame: int, device: torch.device) -> Tensor:
    rows = torch.randint(len(pool), (clips,), device=device)
    frames, height, width = shape
    video = recolor(render(pool[rows], frames, height, width, start_frame=start_frame))
    return video * 2 - 1


def train_autoencoder(path: Path, *, steps: int, seed: int, device: torch.device, decoder_alone: bool = False) -> None:
    """Train for `steps` steps, fold the latents to zero mean and unit variance, write `path` (bf16, Wan names).

    Noise on the latents makes the decoder forgive a sampler's small errors; a penalty on each channel's moments keeps
    the normalized latents near a standard normal, as ComfyUI's Wan 2.1 latent format expects.
    decoder_alone: train the decoder of the VAE in `path` for sharper pictures of the same latents. The encoder comes
    first, because the transformer needs its latents; the decoder can continue meanwhile.
    """
    torch.manual_seed(seed)
    rng = random.Random(seed)
    if decoder_alone:
        vae = load_vae(path, device=device).model.requires_grad_(False)
        vae.post_quant_conv.requires_grad_(True)
        vae.decoder.requires_grad_(True)
    else:
        vae = new_autoencoder().to(device)
    pool = place([sample_scene(rng) for _ in range(POOL)], seed).to(device)
    _train(vae, pool, rng, steps, device)
    if not decoder_alone:
        _fold_moments(vae, moments(vae, device), pool, rng, device)
    save_vae(path, vae)


def _train(vae: Any, pool: Placements, rng: random.Random, steps: int, device: torch.device) -> None:
    """Train the parameters that require gradients."""
    vae.train()
    statistics = moments(vae, device)
    rate = torch.tensor(LEARNING_RATE / 200, device=device)
    parameters = [parameter for parameter in vae.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=rate, betas=(0.9, 0.99), weight_decay=0.0, capturable=device.type == "cuda"
    )
    pool_handle = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
    shapes = []
    for *shape, clips in SHAPES:
        video = _draw(pool, clips, shape, 0, device)
        run = partial(training_step, vae, optimizer, statistics, video)
        shapes.append((video, captured(run, optimizer, rate, device, pool_handle)))
    started = time.monotonic()
    for step in range(steps):
        if step % AHEAD == 0:
            video, train = rng.choices(shapes, WEIGHTS)[0]
            drawn = _draw(pool, len(video) * AHEAD, video.shape[1:4], rng.randrange(64), device)
        rate.fill_(LEARNING_RATE * min(1, (step + 1) / 200) * (0.505 + 0.495 * math.cos(math.pi * step / steps)))
        video.copy_(drawn[step % AHEAD :: AHEAD])
        loss, squared, penalty = train()
        if step in (10, 100) and not math.isfinite(loss.item()):
            raise LongCatError(f"VAE training diverged at step {step}; try another --seed")
        if step % LOG_EVERY == LOG_EVERY - 1 or step == steps - 1:
            shown = f"loss {loss.item():.4f} squared error {squared.item():.6f} moments {penalty.item():.4f}"
            print(f"vae step {step + 1}/{steps} {time.monotonic() - started:.0f} s: {shown}", flush=True)


def _fold_moments(
    vae: Any, statistics: tuple[Tensor, Tensor], pool: Placements, rng: random.Random, device: torch.device
) -> None:
    def clips() -> Iterator[Tensor]:
        for _ in range(16):
            rows = torch.randint(len(pool), (32,), device=device)
            yield render(pool[rows], 33, 64, 96, start_frame=rng.randrange(64)) * 2 - 1

    fold_latents(vae, statistics, clips())


@torch.no_grad()
def fold_latents(vae: Any, statistics: tuple[Tensor, Tensor], clips: Iterable[Tensor]) -> None:
    """Move the mean and deviation of every latent channel, measured on clips [B, F, H, W, 3] in -1..1, into the 1x1
    convolutions around the latents. statistics: as `moments` gives them.
    """
    mean, std = statistics
    latents = torch.cat([(encode_whole(vae, video) - mean) / std for video in clips])
    m, s = latents.mean((0, 2, 3, 4)), latents.std((0, 2, 3, 4))
    mean, std = mean.flatten(), std.flatten()
    channels = len(mean)
    quant, post = vae.quant_conv, vae.post_quant_conv
    # Before: normalized n = (mu - mean) / std. Wanted: (n - m) / s, which is mu' = (mu - mean - std m) / s + mean.
    quant.weight[:channels] /= s.view(-1, 1, 1, 1, 1)
    quant.bias[:channels] = (quant.bias[:channels] - mean - std * m) / s + mean
    quant.weight[channels:] = 0
    quant.bias[channels:] = 2 * torch.log(LATENT_NOISE * std)
    # The decoder gets mu back: mu = s mu' + (mean + std m - s mean).
    post.bias += post.weight.flatten(1) @ (mean + std * m - s * mean)
    post.weight *= s.view(1, -1, 1, 1, 1)
