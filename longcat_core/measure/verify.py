"""`longcat verify`: run every case of a folder of golden data through this code.

The folder holds inputs and outputs of the public LongCat-Video code on a tiny random model; its sizes and seed are
arbitrary. A missing case fails.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoints.lora import merge_lora
from ..errors import LongCatError
from ..model.kv_cache import KVMode
from ..optimize.block_sparse import BlockSparse, Kernel, attend_grid
from ..optimize.kernels.elementwise import missing
from ..sampling.conditioning import to_pixels
from ..sampling.guidance import cfg_zero, cfg_zero_scale
from ..sampling.sampler import sample
from ..sampling.schedules import make_schedule
from .golden import Case, Golden, Pair, check
from .verify_avatar import avatar_cases

# For attention in bf16, beyond the rounding of its output.
BSA_TOLERANCE = 2e-2
GUIDANCE_SCALE = 4.0
STEPS, DISTILLED_STEPS = 6, 4
SCHEDULES = {"base": (12, 50), "distill": (8, 12, 16), "enhance_hf": (6, 50), "refine": (50,)}
BSA_CASES = "abcd"


def _forward(
    golden: Golden, name: str, timestep: str = "t", mask: bool = True, cond: int = 0, model: Any = None, kv: Any = None
) -> Pair:
    """The network's output; kv: the keys and values of conditioning frames, which are then left out of the input."""
    data, model = golden.read("forward"), model or golden.model
    x = data["x"] if kv is None else data["x"][:, :, _cond_latents(golden) :]
    options = {"num_cond_latents": cond, "kv_cache": kv}
    return model(x, data[timestep], data["context"], data["mask"] if mask else None, **options), data[f"{name}.out"]


def _skip_padding(golden: Golden) -> Pair:
    return _forward(golden, "skip_padding", model=golden.load("dit.safetensors", text_tokens_zero_pad=False))


def _lora(golden: Golden) -> Pair:
    model = golden.load("dit.safetensors")
    merge_lora(model, golden.folder / "lora.safetensors")
    return _forward(golden, "lora", model=model)


def _cond_latents(golden: Golden) -> int:
    """The number of conditioning frames in the continuation cases: frames at timestep 0."""
    return int((golden.read("forward")["vc.t"][0] == 0).sum())


def _filled(golden: Golden) -> tuple[Any, Tensor]:
    """The KV cache of the conditioning frames, and the network's output on them."""
    clean = golden.read("forward")["x"][:1, :, : _cond_latents(golden)]
    cache = golden.model.new_kv_cache(*clean.shape[2:])
    return cache, golden.model(clean, torch.zeros(1), None, fill=cache)


def _cached(golden: Golden, block: int, kind: str) -> Pair:
    # Golden layout: [1, heads, tokens, head_dim].
    given = getattr(_filled(golden)[0], kind)[block].transpose(1, 2)
    return given, golden.read("forward")[f"kv.{block}.{kind}"]


def _schedule(golden: Golden, name: str, steps: int, kind: str) -> Pair:
    schedule = make_schedule({"distill": "distilled"}.get(name, name), steps)
    return getattr(schedule, kind), golden.read("schedule")[f"{name}.{steps}.{kind}"]


def _sampled(
    golden: Golden,
    name: str,
    mode: str = "base",
    steps: int = STEPS,
    cond: str = "",
    kv_cache: KVMode = "off",
    guidance: float = GUIDANCE_SCALE,
) -> Pair:
    data, schedule = golden.read("generate"), make_schedule(mode, steps)
    latents = sample(
        golden.model,
        data["noise"],
        schedule,
        data["pos.embeds"],
        data["pos.mask"],
        negative_context=data["neg.embeds"],
        negative_mask=data["neg.mask"],
        guidance_scale=guidance,
        cond_latents=data[f"{cond}.cond_latents"] if cond else None,
        kv_cache=kv_cache,
    )
    return latents, data[f"{name}.latents"]


def _cfg(golden: Golden) -> Pair:
    data = golden.read("generate")
    return cfg_zero(data["cfg.cond"], data["cfg.uncond"], GUIDANCE_SCALE), data["cfg.out"]


def _cfg_scale(golden: Golden) -> Pair:
    data = golden.read("generate")
    return cfg_zero_scale(data["cfg.cond"], data["cfg.uncond"]).flatten(), data["cfg.scale"].flatten()


def _encoded(golden: Golden, frames: str, task: str) -> Pair:
    data = golden.read("generate")
    pixels = data[frames] if data[frames].ndim == 4 else data[frames][None]
    return golden.vae.encode(to_pixels(pixels)), data[f"{task}.cond_latents"]


def _decoded(golden: Golden) -> Pair:
    data = golden.read("generate")
    return golden.vae.decode(data["t2v.latents"]), data["t2v.video"]


def _bsa(golden: Golden, case: str, kernel: Kernel) -> Pair:
    data = golden.read("bsa")
    # Golden layout: [1, heads, tokens, head_dim], tokens in (frames, rows, columns) order.
    device = "cpu" if kernel == "plain" else "cuda"
    q, k, v = (data[f"{case}.{name}"].transpose(1, 2).to(device) for name in "qkv")
    # Stored in fp32, but int((1 - sparsity) * n) is defined for the decimal number.
    sparsity = round(data[f"{case}.sparsity"].item(), 6)
    settings = BlockSparse(sparsity=sparsity, chunk=tuple(data[f"{case}.chunk"].tolist()), kernel=kernel)
    out = attend_grid(q, k, v, tuple(data[f"{case}.grid"].tolist()), settings)
    return out.transpose(1, 2).cpu(), data[f"{case}.o"]


def cases(depth: int) -> Iterator[Case]:
    """Every case of a golden folder whose model has `depth` blocks."""
    yield Case("t2v", partial(_forward, name="t2v"))
    yield Case("nomask", partial(_forward, name="nomask", mask=False))
    yield Case("skip_padding", _skip_padding)
    yield Case("i2v", partial(_forward, name="i2v", timestep="i2v.t", cond=1))
    yield Case("vc", lambda g: _forward(g, "vc", "vc.t", cond=_cond_latents(g)))
    yield Case("kv.cond_out", lambda g: (_filled(g)[1], g.read("forward")["kv.cond_out"]))
    for block in range(depth):
        for kind in ("k", "v"):
            yield Case(f"kv.{block}.{kind}", partial(_cached, block=block, kind=kind))
    yield Case("vc_cached", lambda g: _forward(g, "vc_cached", kv=_filled(g)[0]))
    yield Case("lora", _lora)
    yield Case("int8", lambda g: _forward(g, "int8", model=g.load("dit_int8.safetensors")))
    for name, counts in SCHEDULES.items():
        for steps in counts:
            for kind in ("timesteps", "sigmas"):
                yield Case(f"{name}.{steps}.{kind}", partial(_schedule, name=name, steps=steps, kind=kind))
    yield Case("cfg.out", _cfg)
    yield Case("cfg.scale", _cfg_scale)
    yield Case("generate t2v", partial(_sampled, name="t2v"))
    distilled = partial(_sampled, name="t2v_distill", mode="distilled", steps=DISTILLED_STEPS, guidance=1.0)
    yield Case("generate t2v_distill", distilled)
    # The exact cache must reproduce the golden data without a cache.
    modes: tuple[tuple[int, KVMode, str], ...] = ((0, "off", ""), (0, "exact", ", exact cache"), (1, "official", ""))
    for _, kv_cache, suffix in modes[:2]:
        yield Case(f"generate i2v{suffix}", partial(_sampled, name="i2v", cond="i2v", kv_cache=kv_cache))
    for number, kv_cache, suffix in modes:
        for hf, mode in enumerate(("base", "enhance_hf")):
            name = f"vc.cache{number}.hf{hf}"
            run = partial(_sampled, name=name, mode=mode, cond="vc", kv_cache=kv_cache)
            yield Case(f"generate {name}{suffix}", run)
    yield Case("vae decode", _decoded)
    yield Case("vae encode image", partial(_encoded, frames="image", task="i2v"))
    yield Case("vae encode clip", partial(_encoded, frames="clip", task="vc"))
    for case in BSA_CASES:
        yield Case(f"bsa {case}", partial(_bsa, case=case, kernel="plain"), BSA_TOLERANCE)
        if not missing():
            yield Case(f"bsa {case} triton", partial(_bsa, case=case, kernel="triton"), BSA_TOLERANCE)


def run_verify(directory: Path) -> int:
    """Print the table for a golden folder; returns 1 if any case fails or is missing, else 0.

    Raises LongCatError if `directory` is not a folder with a config.json.
    """
    if not directory.is_dir():
        raise LongCatError(f"{directory} is not a folder; give a folder of golden data with its config.json")
    golden = Golden(directory)
    failed = passed = 0
    print(f"{'case':46} {'max error / std':>16} {'tolerance':>10}  result")
    avatar = golden.config.audio is not None
    for case in avatar_cases(golden) if avatar else cases(golden.config.depth):
        error, verdict = check(case, golden)
        failed, passed = failed + (verdict != "pass"), passed + (verdict == "pass")
        number = "-" if math.isnan(error) else f"{error:.2e}"
        print(f"{case.name:46} {number:>16} {case.tolerance:>10.0e}  {verdict}", flush=True)
    print(f"{passed} passed, {failed} failed")
    return 1 if failed else 0
