"""Error of every path against the same weights in fp32; the exact path's may not exceed the plain 16-bit network's."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ...measure.charts import BLUE, GRAY
from ...measure.fidelity import relative_error, tensor_psnr
from ...measure.results import markdown, shown
from ...optimize.quantization import quantize
from ...optimize.switches import Optimizations
from ...sampling.conditioning import seeded_noise
from ...sampling.sampler import sample
from ...sampling.schedules import make_schedule
from .. import workload
from ..baseline import BaselineTransformer
from ..part import Part, Results, bars
from ..variants import EAGER, EXACT, FP8, FP8_WEIGHTS, NO_KERNELS, Bench, Row, eight_bit

# Steps of the whole videos.
STEPS = 16


class BlockOutputs:
    """Tokens after every block, in fp32: `around` for a network's `around_block`, `hook` for a forward hook."""

    out: Tensor

    def __init__(self) -> None:
        self.blocks: list[Tensor] = []

    def around(self, i: int, run: Callable[[Tensor], Tensor], tokens: Tensor) -> Tensor:
        out = run(tokens)
        self.hook(None, None, out)
        return out

    def hook(self, module: Any, args: Any, out: Tensor) -> None:
        # A copy, since the next block may write into its input.
        self.blocks.append(out.to(torch.float32, copy=True).flatten(1, -2))


def errors(given: Tensor, expected: Tensor) -> Row:
    return {"error": relative_error(given, expected), "psnr": tensor_psnr(given, expected)}


def run(bench: Bench) -> None:
    """Rows of the baseline, the plain network, the exact path and fp8, each with its error and the ratio to the
    baseline's, on the model's first blocks; then rows of whole videos."""
    _blocks(bench)
    if bench.fp8:
        _videos(bench)


@torch.no_grad()
def _blocks(bench: Bench) -> None:
    model, inputs, expected = bench.first_blocks(), bench.inputs(), BlockOutputs()

    def reference() -> Row:
        wide = copy.deepcopy(model).float()
        with workload.switched(wide, Optimizations(attention="sdpa", fp8=False)):
            expected.out = workload.network_forward(wide, inputs, around_block=expected.around)()
        return {"error": 0.0, "dtype": "float32"}

    def compared(out: Tensor, blocks: list[Tensor]) -> Row:
        if not out.isfinite().all():
            raise RuntimeError("the output is not finite")
        per_block = [relative_error(a, b) for a, b in zip(blocks, expected.blocks, strict=True)]
        return errors(out, expected.out) | {"per_block": per_block}

    def baseline() -> Row:
        plain, seen = BaselineTransformer(model), BlockOutputs()
        for block in plain.blocks:
            block.register_forward_hook(seen.hook)
        return compared(workload.baseline_forward(plain, inputs)(), seen.blocks)

    @cache
    def quantized() -> Any:
        lossy = copy.deepcopy(model)
        quantize(lossy)
        return lossy

    def network(name: str, values: dict[str, Any], fp8: bool) -> Row:
        network, seen = quantized() if fp8 else model, BlockOutputs()
        with workload.switched(network, Optimizations(**values), name) as notes:
            row = compared(workload.network_forward(network, inputs, around_block=seen.around)(), seen.blocks)
        ratio = row["error"] / first["error"] if first.get("error") else None
        return row | {"notes": notes} | ({"ratio": ratio} if first["status"] == "ok" else {})

    if bench.add({"name": "fp32", "depth": model.config.depth}, reference)["status"] != "ok":
        return
    first = bench.add({"name": EAGER}, baseline)
    variants = {"plain, eager": bench.plain(), EXACT: bench.path(EXACT)} | dict([bench.compiled(EXACT)])
    variants[f"{EXACT}{NO_KERNELS}"] = bench.full() | {"fused_kernels": False}
    lossy = {FP8: bench.path(FP8), FP8_WEIGHTS: bench.path(FP8) | {"fp8": False}} | bench.eight_bit_paths()
    for name, values in (variants | (lossy if bench.fp8 else {})).items():
        bench.add({"name": name}, network, name, values, name in lossy)


@torch.no_grad()
def _videos(bench: Bench) -> None:
    """Rows of a whole video of the embedded model by each path: error and PSNR of its latents against fp32."""
    device, dtype, size = bench.device, bench.model.dtype, workload.Size(64, 96, 33)
    noise = seeded_noise((1, *size.latents()[1:]), workload.SEED).to(device)

    def latents(model: Any) -> Tensor:
        prompts = workload.Inputs(model.config, size, device).prompts()
        return sample(model, noise, make_schedule("base", STEPS), **prompts)

    expected = latents(workload.load_model(workload.NANO, device, torch.float32))

    def video(name: str, fp8: bool, attention: str) -> Row:
        model = workload.load_model(workload.NANO, device, dtype)
        if fp8:
            quantize(model)
        with workload.switched(model, Optimizations(attention=attention), name):
            return errors(latents(model), expected) | {"steps": STEPS}

    plain = "nano video, 16-bit" if dtype != torch.float32 else "nano video"
    variants = {plain: (False, "auto"), "nano video, fp8": (True, "auto")}
    variants |= {f"nano video, fp8, 8-bit attention ({name})": (True, name) for name in eight_bit()}
    for name, settings in variants.items():
        bench.add({"name": name, "phase": "generation"}, video, name, *settings)


def table(results: Results, _: Any) -> str:
    lines = []
    for row in results["rows"]:
        blocks = ", ".join(shown(error, 4) for error in row.get("per_block", ()))
        error = None if row.get("error") is None else f"{row['error']:.3e}"
        lines.append((row["name"], error, row.get("ratio"), row.get("psnr"), blocks or None, row["status"]))
    return markdown(("", "relative error", "x baseline's", "PSNR dB", "after each block", ""), lines)


CHART = bars(
    "Error against the reference, same weights",
    "relative error",
    "error",
    "{:.4f}",
    color=lambda row: GRAY if "baseline" in row["name"] else BLUE,
    rows=lambda rows: [row for row in rows if row["error"] > 0],
)

PART = Part(
    text="""## Exactness

Relative error of the output against an fp32 run with the same weights and inputs, for the first blocks of the network
and for the latents of whole videos of the bundled model. The ratio is to the error of the plain 16-bit baseline.""",
    run=run,
    table=table,
    charts=(CHART,),
)
