"""Error of every path against the same weights in fp32; the exact path's may not exceed the plain 16-bit network's."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...measure.charts import BLUE, GRAY
from ...measure.fidelity import relative_error, tensor_psnr
from ...measure.results import markdown, shown
from ...optimize.quantization import quantize
from ...optimize.switches import Optimizations
from ...sampling.conditioning import latent_shape, seeded_noise
from ...sampling.sampler import sample
from ...sampling.schedules import make_schedule
from .. import workload
from ..baseline import BaselineTransformer
from ..part import Chart, Part, Results, bars, ok_rows
from ..variants import EAGER, EXACT, FP8, NO_KERNELS, Bench, Row, eight_bit

# Steps of the whole videos.
STEPS = 16


class Captured:
    """Tokens after every block, in fp32: `around` for a network's `around_block`, `hook` for a forward hook."""

    def __init__(self) -> None:
        self.blocks: list[Tensor] = []

    def around(self, i: int, run: Callable[[Tensor], Tensor], tokens: Tensor) -> Tensor:
        out = run(tokens)
        # A copy, since the next block may write into its input.
        self.blocks.append(out.float().flatten(1, -2) if out.dtype != torch.float32 else out.flatten(1, -2).clone())
        return out

    def hook(self, module: Any, args: Any, out: Tensor) -> None:
        self.blocks.append(out.float().flatten(1, -2))


def forward(model: Any, inputs: workload.Inputs, around: Any = None) -> Tensor:
    """One forward of the network, with a hook around its blocks."""
    text = model.embed_text(inputs.context, inputs.mask)
    timestep = torch.full((1, 1), workload.TIMESTEP, device=inputs.device)
    return model(inputs.given(), timestep, text, around_block=around)


def _errors(out: Tensor, blocks: list[Tensor], reference: tuple[Tensor, list[Tensor]]) -> Row:
    if not out.isfinite().all():
        raise RuntimeError("the output is not finite")
    expected, expected_blocks = reference
    per_block = [relative_error(a, b) for a, b in zip(blocks, expected_blocks, strict=True)]
    return {"error": relative_error(out, expected), "psnr": tensor_psnr(out, expected), "per_block": per_block}


def run(bench: Bench) -> None:
    """Rows of the baseline, the plain network, the exact path and fp8, each with its error and the ratio to the
    baseline's, on the model's first blocks; then rows of whole videos."""
    _blocks(bench)
    if bench.fp8:
        _videos(bench)


@torch.no_grad()
def _blocks(bench: Bench) -> None:
    model, inputs, captured = bench.few(), bench.inputs(), Captured()

    def reference() -> Row:
        wide = copy.deepcopy(model).float()
        workload.exactly(wide, Optimizations(attention="sdpa", fp8=False))
        captured.out = forward(wide, inputs, captured.around)
        return {"error": 0.0, "dtype": "float32"}

    if bench.add({"name": "fp32", "depth": model.config.depth}, reference)["status"] != "ok":
        return
    expected = captured.out, captured.blocks

    def baseline() -> Row:
        plain, seen = BaselineTransformer(model), Captured()
        for block in plain.blocks:
            block.register_forward_hook(seen.hook)
        out = workload.baseline_forward(plain, inputs)()
        return _errors(out, seen.blocks, expected)

    first = bench.add({"name": EAGER}, baseline)

    def ratio(row: Row) -> Row:
        if first["status"] == "ok":
            row["ratio"] = row["error"] / first["error"] if first["error"] else None
        return row

    def network(name: str, values: dict[str, Any], prepared: Callable[[], Any]) -> None:
        def measured() -> Row:
            network, seen, chosen = prepared(), Captured(), Optimizations(**values)
            with workload.Notes(network) as notes:
                workload.exactly(network, chosen)
                out = forward(network, inputs, seen.around)
            workload.require(network, chosen, notes, name)
            return _errors(out, seen.blocks, expected) | {"notes": notes}

        bench.add({"name": name}, measured, ratio)

    variants = {"plain, eager": bench.plain(), EXACT: bench.path(EXACT)} | dict([bench.other_way(EXACT)])
    variants[f"{EXACT}{NO_KERNELS}"] = bench.full() | {"fused_kernels": False}
    for name, values in variants.items():
        network(name, values, lambda: model)
    if not bench.fp8:
        return
    made: list[Any] = []

    def quantized() -> Any:
        if not made:
            lossy = copy.deepcopy(model)
            quantize(lossy)
            made.append(lossy)
        return made[0]

    values = bench.path(FP8)
    wide = {"fp8 weights, 16-bit GEMMs": values | {"fp8": False}}
    for name, chosen in ({FP8: values} | wide | bench.eight_bit_paths()).items():
        network(name, chosen, quantized)


@torch.no_grad()
def _videos(bench: Bench) -> None:
    """Rows of a whole video of the embedded model by each path: error and PSNR of its latents against fp32."""
    device, dtype = bench.device, bench.model.dtype

    def latents(model: Any) -> Tensor:
        size = workload.Size(64, 96, 33)
        inputs = workload.Inputs(model.config, size, device)
        noise = seeded_noise((1, *latent_shape(size.frames, size.height, size.width)), workload.SEED).to(device)
        text = {"context": inputs.context[1:], "mask": inputs.mask[1:]}
        negative = {"negative_context": inputs.context[:1], "negative_mask": inputs.mask[:1]}
        return sample(model, noise, make_schedule("base", STEPS), **text, **negative)

    expected = latents(workload.load_model(workload.NANO, device, torch.float32))
    plain = "nano video, 16-bit" if dtype != torch.float32 else "nano video"
    variants = {plain: (False, "auto"), "nano video, fp8": (True, "auto")}
    variants |= {f"nano video, fp8, 8-bit attention ({name})": (True, name) for name in eight_bit()}
    for name, (fp8, attention) in variants.items():

        def video(name: str = name, fp8: bool = fp8, attention: str = attention) -> Row:
            model, chosen = workload.load_model(workload.NANO, device, dtype), Optimizations(attention=attention)
            if fp8:
                quantize(model)
            with workload.Notes(model) as notes:
                workload.exactly(model, chosen)
                given = latents(model)
            workload.require(model, chosen, notes, name)
            return {"error": relative_error(given, expected), "psnr": tensor_psnr(given, expected), "steps": STEPS}

        bench.add({"name": name, "phase": "generation"}, video)


def table(results: Results, _: Any) -> str:
    lines = []
    for row in results["rows"]:
        blocks = ", ".join(shown(error, 4) for error in row.get("per_block", ()))
        error = None if row.get("error") is None else f"{row['error']:.3e}"
        lines.append((row["name"], error, row.get("ratio"), row.get("psnr"), blocks or None, row["status"]))
    return markdown(("", "relative error", "x baseline's", "PSNR dB", "after each block", ""), lines)


def chart(results: Results, _: Any) -> Any:
    rows = [row for row in ok_rows(results, "error") if row["error"] > 0]
    return bars(
        rows,
        "Error against the reference, same weights",
        "relative error",
        "error",
        "{:.4f}",
        color=lambda row: GRAY if "baseline" in row["name"] else BLUE,
    )


PART = Part(
    text="""## Exactness

Relative error of the output against an fp32 run with the same weights and inputs: on the first blocks of the network,
and on the latents of whole videos of the embedded model. The ratio is to the error of the plain 16-bit baseline.""",
    run=run,
    columns=("name", "error", "ratio", "psnr", "status"),
    table=table,
    charts=(Chart(chart, ("error",)),),
)
