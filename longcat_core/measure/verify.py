"""`longcat verify`: run every case of a folder of golden data through this code.

The folder holds inputs and outputs of the public LongCat-Video code on a tiny random model; its sizes and seed are
arbitrary. A missing case fails.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoints.load import load_transformer
from ..checkpoints.lora import merge_lora
from ..errors import LongCatError
from ..files.safetensors_io import read_tensors
from ..model.config import ModelConfig
from ..model.kv_cache import KVMode
from ..optimize.block_sparse import BlockSparse, attend_grid
from ..optimize.execution import OptimizedTransformer
from ..optimize.kernels.elementwise import missing
from ..sampling.conditioning import to_pixels
from ..sampling.guidance import cfg_zero, cfg_zero_scale
from ..sampling.sampler import sample
from ..sampling.schedules import make_schedule

TOLERANCE = 2e-5
# For attention in bf16, beyond the rounding of its output.
BSA_TOLERANCE = 2e-2
GUIDANCE_SCALE = 4.0
STEPS = 6
DISTILLED_STEPS = 4
SCHEDULES = {"base": (12, 50), "distill": (8, 12, 16), "enhance_hf": (6, 50), "refine": (50,)}
BSA_CASES = "abcd"


class Golden:
    """A folder of golden data; each file is read when a case first needs it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @cached_property
    def config(self) -> ModelConfig:
        return ModelConfig.from_json(self.folder / "config.json")

    @cached_property
    def forward(self) -> dict[str, Tensor]:
        return read_tensors(self.folder / "forward.safetensors")

    @cached_property
    def generate(self) -> dict[str, Tensor]:
        return read_tensors(self.folder / "generate.safetensors")

    @cached_property
    def schedule(self) -> dict[str, Tensor]:
        return read_tensors(self.folder / "schedule.safetensors")

    @cached_property
    def bsa(self) -> dict[str, Tensor]:
        return read_tensors(self.folder / "bsa.safetensors")

    @cached_property
    def model(self) -> OptimizedTransformer:
        return self.load("dit.safetensors")

    @cached_property
    def vae(self) -> Any:
        from ..generate.vae import load_vae

        return load_vae(self.folder / "vae.safetensors")

    def load(self, name: str, **changes: Any) -> OptimizedTransformer:
        return load_transformer(self.folder / name, config=replace(self.config, **changes))


# What a case returns: this code's output and the golden one.
Result = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Case:
    name: str
    run: Callable[[Golden], Result]
    tolerance: float = TOLERANCE


def _forward(golden: Golden, out: str, timestep: str = "t", *, model: Any = None, mask: bool = True, cond: int = 0):
    data = golden.forward
    model = golden.model if model is None else model
    given = model(data["x"], data[timestep], data["context"], data["mask"] if mask else None, num_cond_latents=cond)
    return given, data[out]


def _lora(golden: Golden) -> Result:
    model = golden.load("dit.safetensors")
    merge_lora(model, golden.folder / "lora.safetensors")
    return _forward(golden, "lora.out", model=model)


def _cond_latents(golden: Golden) -> int:
    """The number of conditioning frames in the continuation cases: frames at timestep 0."""
    return int((golden.forward["vc.t"][0] == 0).sum())


def _filled_cache(golden: Golden) -> tuple[Any, Tensor]:
    model, count = golden.model, _cond_latents(golden)
    clean = golden.forward["x"][:1, :, :count]
    cache = model.new_kv_cache(*clean.shape[2:])
    return cache, model(clean, torch.zeros(1), None, fill=cache)


def _cached_tensor(kind: str, block: int) -> Callable[[Golden], Result]:
    def run(golden: Golden) -> Result:
        cache, _ = _filled_cache(golden)
        # Golden layout: [1, heads, tokens, head_dim].
        return getattr(cache, kind)[block].transpose(1, 2), golden.forward[f"kv.{block}.{kind}"]

    return run


def _vc_cached(golden: Golden) -> Result:
    data = golden.forward
    cache, _ = _filled_cache(golden)
    noisy = data["x"][:, :, _cond_latents(golden) :]
    return golden.model(noisy, data["t"], data["context"], data["mask"], kv_cache=cache), data["vc_cached.out"]


def _schedule(name: str, steps: int, kind: str) -> Callable[[Golden], Result]:
    def run(golden: Golden) -> Result:
        schedule = make_schedule({"distill": "distilled"}.get(name, name), steps)
        return getattr(schedule, kind), golden.schedule[f"{name}.{steps}.{kind}"]

    return run


def _generation(
    out: str, mode: str, steps: int, cond: str | None = None, cache: KVMode = "off", guided: bool = True
) -> Callable[[Golden], Result]:
    def run(golden: Golden) -> Result:
        data = golden.generate
        latents = sample(
            golden.model,
            data["noise"],
            make_schedule(mode, steps),
            data["pos.embeds"],
            data["pos.mask"],
            negative_context=data["neg.embeds"],
            negative_mask=data["neg.mask"],
            guidance_scale=GUIDANCE_SCALE if guided else 1.0,
            cond_latents=None if cond is None else data[cond],
            kv_cache=cache,
        )
        return latents, data[out]

    return run


def _cfg(golden: Golden) -> Result:
    data = golden.generate
    return cfg_zero(data["cfg.cond"], data["cfg.uncond"], GUIDANCE_SCALE), data["cfg.out"]


def _cfg_scale(golden: Golden) -> Result:
    data = golden.generate
    return cfg_zero_scale(data["cfg.cond"], data["cfg.uncond"]).flatten(), data["cfg.scale"].flatten()


def _encoded(frames: str, latents: str) -> Callable[[Golden], Result]:
    def run(golden: Golden) -> Result:
        pixels = golden.generate[frames]
        return golden.vae.encode(to_pixels(pixels if pixels.ndim == 4 else pixels[None])), golden.generate[latents]

    return run


def _decoded(golden: Golden) -> Result:
    return golden.vae.decode(golden.generate["t2v.latents"]), golden.generate["t2v.video"]


def _bsa(case: str, kernel: str) -> Callable[[Golden], Result]:
    def run(golden: Golden) -> Result:
        data = golden.bsa
        # Golden layout: [1, heads, tokens, head_dim], tokens in (frames, rows, columns) order.
        device = "cpu" if kernel == "plain" else "cuda"
        q, k, v = (data[f"{case}.{name}"].transpose(1, 2).to(device) for name in "qkv")
        # Stored in fp32, but int((1 - sparsity) * n) is defined for the decimal number.
        sparsity = round(data[f"{case}.sparsity"].item(), 6)
        settings = BlockSparse(sparsity=sparsity, chunk=tuple(data[f"{case}.chunk"].tolist()), kernel=kernel)
        out = attend_grid(q, k, v, tuple(data[f"{case}.grid"].tolist()), settings)
        return out.transpose(1, 2).cpu(), data[f"{case}.o"]

    return run


def half_units(x: Tensor) -> Tensor:
    """The largest rounding error of each number in x's dtype: half a unit in its last place; 0 for fp32."""
    if x.dtype.itemsize > 2 or not x.dtype.is_floating_point:
        return torch.zeros(())
    # frexp's mantissas lie between a half and one.
    units = torch.frexp(x.float()).exponent.float().exp2() * torch.finfo(x.dtype).eps / 4
    return units.masked_fill(x == 0, 0.0)


def cases(depth: int) -> Iterator[Case]:
    """Every case of a golden folder whose model has `depth` blocks."""
    yield Case("t2v", lambda g: _forward(g, "t2v.out"))
    yield Case("nomask", lambda g: _forward(g, "nomask.out", mask=False))
    yield Case(
        "skip_padding",
        lambda g: _forward(g, "skip_padding.out", model=g.load("dit.safetensors", text_tokens_zero_pad=False)),
    )
    yield Case("i2v", lambda g: _forward(g, "i2v.out", "i2v.t", cond=1))
    yield Case("vc", lambda g: _forward(g, "vc.out", "vc.t", cond=_cond_latents(g)))
    yield Case("kv.cond_out", lambda g: (_filled_cache(g)[1], g.forward["kv.cond_out"]))
    for block in range(depth):
        for kind in ("k", "v"):
            yield Case(f"kv.{block}.{kind}", _cached_tensor(kind, block))
    yield Case("vc_cached", _vc_cached)
    yield Case("lora", _lora)
    yield Case("int8", lambda g: _forward(g, "int8.out", model=g.load("dit_int8.safetensors")))
    for name, counts in SCHEDULES.items():
        for steps in counts:
            for kind in ("timesteps", "sigmas"):
                yield Case(f"{name}.{steps}.{kind}", _schedule(name, steps, kind))
    yield Case("cfg.out", _cfg)
    yield Case("cfg.scale", _cfg_scale)
    yield Case("generate t2v", _generation("t2v.latents", "base", STEPS))
    yield Case("generate t2v_distill", _generation("t2v_distill.latents", "distilled", DISTILLED_STEPS, guided=False))
    # The exact cache must reproduce the golden data without a cache.
    for cache, suffix in (("off", ""), ("exact", ", exact cache")):
        yield Case(f"generate i2v{suffix}", _generation("i2v.latents", "base", STEPS, "i2v.cond_latents", cache))
    for number, cache, suffix in ((0, "off", ""), (0, "exact", ", exact cache"), (1, "official", "")):
        for hf in (0, 1):
            mode = "enhance_hf" if hf else "base"
            out = f"vc.cache{number}.hf{hf}.latents"
            run = _generation(out, mode, STEPS, "vc.cond_latents", cache)
            yield Case(f"generate {out.removesuffix('.latents')}{suffix}", run)
    yield Case("vae decode", _decoded)
    yield Case("vae encode image", _encoded("image", "i2v.cond_latents"))
    yield Case("vae encode clip", _encoded("clip", "vc.cond_latents"))
    for case in BSA_CASES:
        yield Case(f"bsa {case}", _bsa(case, "plain"), tolerance=BSA_TOLERANCE)
        if not missing():
            yield Case(f"bsa {case} triton", _bsa(case, "triton"), tolerance=BSA_TOLERANCE)


@dataclass(frozen=True)
class Row:
    """One line of the table. error: largest difference beyond 16-bit rounding, over the expected output's standard
    deviation."""

    name: str
    error: float
    tolerance: float
    verdict: str

    @property
    def failed(self) -> bool:
        return self.verdict.startswith("fail")


@torch.no_grad()
def check(case: Case, golden: Golden) -> Row:
    """Run one case. Any error, such as a missing file or tensor, becomes a fail with its reason."""
    try:
        given, expected = case.run(golden)
    except KeyError as error:
        return Row(case.name, math.nan, case.tolerance, f"fail: no tensor {error.args[0]} in the folder")
    except (LongCatError, RuntimeError, OSError) as error:
        return Row(case.name, math.nan, case.tolerance, f"fail: {str(error).splitlines()[0]}")
    if given.shape != expected.shape:
        verdict = f"fail: shape {list(given.shape)} instead of {list(expected.shape)}"
        return Row(case.name, math.nan, case.tolerance, verdict)
    # A constant has no deviation; its magnitude serves instead.
    deviation = expected.float().std(correction=0).item() or expected.float().abs().max().item() or 1.0
    difference = (given.float() - expected.float()).abs() - half_units(given) - half_units(expected)
    error = difference.clamp(min=0).max().item() / deviation
    # NaN must fail, hence `<=`.
    return Row(case.name, error, case.tolerance, "pass" if error <= case.tolerance else "fail")


def run_verify(directory: Path) -> int:
    """Print the table for a golden folder; returns 1 if any case fails or is missing, else 0.

    Raises LongCatError if `directory` is not a folder with a config.json.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise LongCatError(f"{directory} is not a folder; give a folder of golden data with its config.json")
    golden = Golden(directory)
    depth, rows = golden.config.depth, []
    print(f"{'case':36} {'max error / std':>16} {'tolerance':>10}  result")
    for case in cases(depth):
        row = check(case, golden)
        rows.append(row)
        error = "-" if math.isnan(row.error) else f"{row.error:.2e}"
        print(f"{row.name:36} {error:>16} {row.tolerance:>10.0e}  {row.verdict}", flush=True)
    failed = sum(row.failed for row in rows)
    print(f"{len(rows) - failed} passed, {failed} failed")
    return 1 if failed else 0
