"""Decoding latents to frames: our network beside that of diffusers, with the same weights, at 480p and 720p."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...errors import LongCatError
from ...measure.charts import BLUE, GRAY
from ...measure.clock import measure, synchronize
from ...measure.results import markdown, shown
from ...vae.network import VAEConfig, WanVAE, channels_last
from ...vae.parts import decoded
from .. import workload
from ..part import Part, Results, bars, measured_rows, met_or_missed, spread
from ..variants import Bench, Row

# The second size on a GPU, and how many times as fast as diffusers our decoder has to be there.
LARGE = workload.Size(704, 1280, 185, 1)
AIMED, TIMES = str(LARGE), 2.0
THEIRS, OURS = "diffusers", "ours"


def run(bench: Bench) -> None:
    """Rows of both decoders at both sizes, with random weights. ratio: the time of diffusers' over ours; difference:
    the largest between their frames, in 255ths."""
    device, size = bench.device, replace(bench.size, batch=1)
    second = replace(size, frames=size.frames + 4) if device.type == "cpu" else LARGE
    config = workload.vae_config(device)
    torch.manual_seed(workload.SEED)
    vae = WanVAE(config).eval().requires_grad_(False)
    for parameter in vae.parameters():
        if parameter.ndim > 2:
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    weights = vae.state_dict()
    vae = vae.to(device, bench.model.dtype)
    if device.type == "cuda":
        channels_last(vae)
    for each in dict.fromkeys((size, second)):
        latents = torch.randn(each.latents(), device=device, dtype=bench.model.dtype)
        theirs = bench.add(_head(THEIRS, each), _diffusers, bench, config, weights, latents, vae)
        ours = bench.add(_head(OURS, each), _own, bench, vae, latents)
        if "ms" in theirs and "ms" in ours:
            ours["ratio"] = theirs["ms"] / ours["ms"]


def _head(decoder: str, size: workload.Size) -> Row:
    return {"name": f"{size}, {decoder}", "decoder": decoder, "video": str(size), "phase": "path"}


@torch.no_grad()
def _own(bench: Bench, vae: WanVAE, latents: Tensor) -> Row:
    """Our decoder, whose frames come part by part. first_frames_s: seconds until the first part."""

    def parts() -> Iterator[Tensor]:
        yield from decoded(vae, latents)

    row = _timed(bench, lambda: sum(part.shape[1] for part in parts()))
    began = time.perf_counter()
    next(parts())
    synchronize(bench.device)
    return row | {"first_frames_s": time.perf_counter() - began}


@torch.no_grad()
def _diffusers(bench: Bench, config: VAEConfig, weights: dict[str, Tensor], latents: Tensor, own: WanVAE) -> Row:
    """Diffusers' AutoencoderKLWan, which returns all frames at once."""
    try:
        from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
    except ImportError as error:
        raise LongCatError("comparing with diffusers needs the package; run: pip install diffusers") from error
    other = AutoencoderKLWan(base_dim=config.base_dim, z_dim=config.z_dim)
    other.load_state_dict(weights)
    other = other.to(bench.device, bench.model.dtype).eval().requires_grad_(False)
    few = latents[:, :, :2]
    same = torch.cat(list(decoded(own, few)), dim=1).permute(0, 4, 1, 2, 3).clamp(-1, 1)
    difference = float((same.float() - other.decode(few).sample.float()).abs().max()) * 255 / 2
    return _timed(bench, lambda: other.decode(latents)) | {"difference": difference}


def _timed(bench: Bench, decode: Callable[[], Any]) -> Row:
    return measure(decode, bench.device, bench.repeats, bench.budget, 0).as_row()


def table(results: Results, _: Any) -> str:
    """Rows as measured, and what is to be reached at 720p on a GPU."""
    rows = measured_rows(results)
    lines = [
        (row["name"], row.get("ms"), spread(row), row.get("ratio"), row.get("first_frames_s"), row.get("peak_gib"),
         row.get("difference"), row["status"])
        for row in rows
    ]  # fmt: skip
    head = "", "ms", "from, to", "x diffusers", "first frames s", "peak GiB", "difference", ""
    text = markdown(head, lines)
    for row in rows:
        if row["video"] == AIMED and row.get("ratio") and results["machine"].get("gpu"):
            verdict = met_or_missed(row["ratio"] >= TIMES)
            text += f"\n\n{AIMED}: {shown(row['ratio'])} times as fast as diffusers (>= {TIMES:g} times: {verdict})."
    return text


PART = Part(
    text="""## Decoding

A whole clip from latents to frames on the device, with random weights of the released VAE's shape: diffusers'
AutoencoderKLWan, and our network with the same weights, whose frames leave it part by part. *First frames* are the
seconds until the first part. *Difference* is the largest between the pictures of both, in 255ths, over two latent
frames; in 16 bits both round.""",
    run=run,
    table=table,
    charts=(bars("Decoding a clip", "ms", "ms", color=lambda row: GRAY if row["decoder"] == THEIRS else BLUE),),
)
