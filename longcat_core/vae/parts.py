"""Clips through the encoder and the decoder in parts, so that memory does not grow with a clip's length.

The first frame stands alone, and stages need not take parts of one size: those of small pictures take many frames at
once, which keeps a GPU busy, and those of large pictures take few.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .layers import WHOLE, Rows
from .network import Decoder, WanVAE, run_stage

# What a stage may need for its activations: at most this, and at most this share of a GPU's memory. It does not depend
# on what is free, because convolutions of other sizes may round otherwise.
MOST, SHARE = 3 << 30, 16
# On a CPU smaller parts are faster, because they fit its caches.
MOST_ON_CPU = 1 << 26
# Numbers for each pixel of a picture that the decoder keeps between parts, or that any part takes.
KEPT = 4400
# Frames that the encoder makes one latent frame of, after the first.
GROUP = 4


def room(device: torch.device) -> int:
    """Bytes that the activations of a stage may take on this device."""
    if device.type != "cuda":
        return MOST_ON_CPU
    # Of what this process may use; PyTorch 2.5 does not tell. "cuda" without a number is not accepted.
    index = torch.cuda.current_device() if device.index is None else device.index
    allowed = getattr(torch.cuda, "get_per_process_memory_fraction", lambda index: 1.0)(index)
    return min(MOST, int(torch.cuda.get_device_properties(device).total_memory * allowed) // SHARE)


def needed_bytes(height: int, width: int, dtype: torch.dtype, device: torch.device) -> int:
    """About what decoding pictures of this size takes at most beside the weights; encoding takes less.

    At 480x832 and 704x1280 in bf16 and fp32, with rooms of 0.5 to 3 GiB, an H200 took 64 to 98 % of it (2026-11-29).
    """
    return 2 * room(device) + KEPT * height * width * dtype.itemsize


def decoded(vae: WanVAE, latents: Tensor, most: int | None = None, rows: Rows = WHOLE) -> Iterator[Tensor]:
    """Pictures [B, f, 8h, 8w, 3] in about -1..1 of latents [B, z_dim, T, h, w], as they leave the decoder.

    The first f is 1. most: bytes of a stage's activations; None: `room`. rows: which rows the latents are.
    """
    x = vae.post_quant_conv(latents.permute(0, 2, 3, 4, 1))
    decoder, most = vae.decoder, room(x.device) if most is None else most
    per = [
        max(1, most // (x.element_size() * x.shape[0] * decoder.live(i, x.shape[2] << i, x.shape[3] << i)))
        for i in range(decoder.stages)
    ]
    kept: list[list[Tensor | None]] = [[] for _ in per]
    yield from _through(decoder, 0, x[:, :1], per, kept, True, rows)
    if x.shape[1] > 1:
        yield from _through(decoder, 0, x[:, 1:], per, kept, False, rows)


def _through(
    decoder: Decoder,
    number: int,
    x: Tensor,
    per: list[int],
    kept: list[list[Tensor | None]],
    first: bool,
    rows: Rows,
) -> Iterator[Tensor]:
    """What comes of x behind stage `number` and those after it. per, kept: of each stage, the frames that it takes at
    once, and what it keeps between parts."""
    # Not a function within `decoded`, which would keep `kept` alive after memory ran out.
    if number == len(per):
        yield x
        return
    for part in x.split(per[number], dim=1):
        out, kept[number] = run_stage(decoder, number, part, kept[number], first, rows)
        yield from _through(decoder, number + 1, out, per, kept, first, rows)


def encoded(vae: WanVAE, video: Tensor, most: int | None = None, rows: Rows = WHOLE) -> Tensor:
    """Mean latents [B, z_dim, T, H/8, W/8] of video [B, 3, F, H, W] in -1..1; F is 4k+1.

    most, rows: see `decoded`.
    """
    x = video.permute(0, 2, 3, 4, 1)
    encoder, most = vae.encoder, room(x.device) if most is None else most
    live = max(encoder.live(i, x.shape[2] >> i, x.shape[3] >> i) for i in range(encoder.stages))
    per = GROUP * max(1, most // (x.element_size() * x.shape[0] * live * GROUP))
    kept: list[list[Tensor | None]] = [[] for _ in range(encoder.stages)]
    parts: list[Tensor] = []
    for part in (x[:, :1], *(x[:, 1:].split(per, dim=1) if x.shape[1] > 1 else ())):
        first = not parts
        for number in range(encoder.stages):
            part, kept[number] = run_stage(encoder, number, part, kept[number], first, rows)
        parts.append(vae.quant_conv(part)[..., : vae.config.z_dim])
    return torch.cat(parts, dim=1).permute(0, 4, 1, 2, 3)
