"""Error of every path against the same weights in fp32: the exact one may have no more than the plain 16-bit one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import LongCatError
from ..measure.clock import attempt, clean_up
from ..measure.fidelity import relative_error, tensor_psnr
from ..measure.results import Report
from ..optimize.execution import OptimizedTransformer
from ..optimize.quantization import policies as choices
from ..optimize.quantization import quantize
from ..optimize.switches import Optimizations
from . import workload
from .ablation import EAGER, EXACT, FP8, NO_KERNELS, Bench, eight_bit
from .baseline import BaselineTransformer

# fp32 takes twice the memory and ten times the time.
DEPTH = 4


class Captured:
    """Tokens after every block, in fp32: `around` for a network's `around_block`, `hook` for a forward hook."""

    def __init__(self) -> None:
        self.blocks: list[Tensor] = []

    def around(self, i: int, run: Callable[[Tensor], Tensor], tokens: Tensor) -> Tensor:
        out = run(tokens)
        # A copy: the next block may write into its input.
        self.blocks.append(out.float().flatten(1, -2) if out.dtype != torch.float32 else out.flatten(1, -2).clone())
        return out

    def hook(self, module: Any, args: Any, out: Tensor) -> None:
        self.blocks.append(out.float().flatten(1, -2))


def _forward(model: OptimizedTransformer, inputs: workload.Inputs, around: Any) -> Tensor:
    text = model.embed_text(inputs.context, inputs.mask)
    timestep = torch.full((1, 1), workload.TIMESTEP, device=inputs.device)
    return model(inputs.given(), timestep, text, around_block=around)


def _errors(out: Tensor, blocks: list[Tensor], reference: tuple[Tensor, list[Tensor]]) -> dict[str, Any]:
    if not out.isfinite().all():
        raise RuntimeError("the output is not finite")
    expected, expected_blocks = reference
    per_block = [relative_error(a, b) for a, b in zip(blocks, expected_blocks, strict=True)]
    return {"error": relative_error(out, expected), "psnr": tensor_psnr(out, expected), "per_block": per_block}


@torch.no_grad()
def exactness(bench: Bench, report: Report, depth: int = DEPTH, fp8: bool = True) -> None:
    """Rows of the baseline, the plain network, the exact path and fp8, each with its error and the ratio to the first.

    On the first `depth` blocks of the bench's model and its inputs. Rows are written as they come.
    """
    model = workload.first_blocks(bench.model, min(depth, bench.model.config.depth))
    inputs, device = bench.inputs(), bench.device
    captured = Captured()

    def reference() -> dict[str, Any]:
        wide = copy.deepcopy(model).float()
        workload.exactly(wide, Optimizations(attention="sdpa", fp8=False))
        captured.out = _forward(wide, inputs, captured.around)
        return {"error": 0.0, "dtype": "float32"}

    row = report.add(attempt({"name": "fp32", "depth": model.config.depth}, bench.budget, reference))
    clean_up(device)
    bench.say(f"exactness, fp32: {row['status']}: {row.get('error', row.get('reason'))}")
    if row["status"] != "ok":
        return
    expected = captured.out, captured.blocks

    def baseline() -> dict[str, Any]:
        plain, seen = BaselineTransformer(model), Captured()
        for block in plain.blocks:
            block.register_forward_hook(seen.hook)
        out = workload.baseline_forward(plain, inputs)()
        return _errors(out, seen.blocks, expected)

    first = _add(bench, report, EAGER, baseline, None)
    name, values = bench.other_way(EXACT)
    variants = {"plain, eager": bench.plain(), EXACT: bench.path(EXACT), name: values}
    variants |= {f"{EXACT}{NO_KERNELS}": bench.full() | {"fused_kernels": False}}
    for name, values in variants.items():
        _add(bench, report, name, _network(bench, model, values, inputs, expected), first)
    if fp8:
        _quantised(bench, report, model, inputs, expected, first)


def _quantised(
    bench: Bench, report: Report, model: OptimizedTransformer, inputs: Any, expected: Any, first: Any
) -> None:
    try:
        model = copy.deepcopy(model)
        quantize(model)
    except Exception as error:  # told as the row of fp8
        reason = str(error)

        def failed() -> dict[str, Any]:
            raise LongCatError(reason)

        _add(bench, report, FP8, failed, first)
        return
    values = bench.path(FP8)
    wide = "fp8 weights, 16-bit GEMMs", values | {"fp8": False}
    for name, chosen in ((FP8, values), wide, *bench.eight_bit_paths().items()):
        _add(bench, report, name, _network(bench, model, chosen, inputs, expected), first)


def _network(bench: Bench, model: OptimizedTransformer, values: dict, inputs: Any, expected: Any) -> Callable[[], dict]:
    def run() -> dict[str, Any]:
        seen, chosen = Captured(), Optimizations(**values)
        with workload.Notes(model) as notes:
            workload.exactly(model, chosen)
            out = _forward(model, inputs, seen.around)
        if model.optimizations != chosen:
            raise LongCatError("; ".join(notes))
        return _errors(out, seen.blocks, expected) | {"notes": notes}

    return run


def _add(bench: Bench, report: Report, name: str, run: Callable[[], dict], first: dict | None) -> dict[str, Any]:
    row = attempt({"name": name}, bench.budget, run)
    clean_up(bench.device)
    if row["status"] == "ok" and first is not None and first["status"] == "ok":
        row["ratio"] = row["error"] / first["error"] if first["error"] else None
    bench.say(f"exactness, {name}: {row['status']}: {row.get('error', row.get('reason'))}")
    return report.add(row)


@torch.no_grad()
def generation(report: Report, device: torch.device, dtype: torch.dtype, steps: int, budget: Any, say: Any) -> None:
    """A whole video of the embedded model by each path, against fp32: error and PSNR of the latents."""
    from ..sampling.conditioning import latent_shape, seeded_noise
    from ..sampling.sampler import sample
    from ..sampling.schedules import make_schedule

    def latents(model: OptimizedTransformer) -> Tensor:
        size = workload.Size(64, 96, 33)
        inputs = workload.Inputs(model.config, size, device)
        noise = seeded_noise((1, *latent_shape(size.frames, size.height, size.width)), workload.SEED).to(device)
        text = {"context": inputs.context[1:], "mask": inputs.mask[1:]}
        negative = {"negative_context": inputs.context[:1], "negative_mask": inputs.mask[:1]}
        return sample(model, noise, make_schedule("base", steps), **text, **negative)

    expected = latents(workload.load_model(workload.NANO, device, torch.float32))

    def path(quantised: bool, attention: str) -> Callable[[], dict[str, Any]]:
        def run() -> dict[str, Any]:
            model = workload.load_model(workload.NANO, device, dtype)
            if quantised:
                quantize(model)
            with workload.Notes(model) as notes:
                model.set_optimizations(Optimizations(attention=attention))
                given = latents(model)
            # A first step that was not finite falls back to an exact backend.
            if attention not in ("auto", model.optimizations.attention):
                raise LongCatError("; ".join(notes))
            return {"error": relative_error(given, expected), "psnr": tensor_psnr(given, expected), "steps": steps}

        return run

    plain = "nano video, 16-bit" if dtype != torch.float32 else "nano video"
    variants = {plain: (False, "auto"), "nano video, fp8": (True, "auto")}
    variants |= {f"nano video, fp8, 8-bit attention ({name})": (True, name) for name in eight_bit()}
    for name, variant in variants.items():
        row = report.add(attempt({"name": name, "phase": "generation"}, budget, path(*variant)))
        say(f"{name}: {row['status']}: {row.get('error', row.get('reason'))}")


@torch.no_grad()
def policies(bench: Bench, report: Report, depth: int = DEPTH) -> None:
    """A row for every choice of layers in fp8: error of the output against the 16-bit network, on the first blocks."""
    model = workload.first_blocks(bench.model, min(depth, bench.model.config.depth))
    inputs, eager = bench.inputs(), Optimizations(**(bench.full() | {"compile": "off", "fp8": True}))

    def output(network: OptimizedTransformer) -> Tensor:
        workload.exactly(network, eager)
        return _forward(network, inputs, None)

    expected = output(model)
    for name, policy in choices(model.config.depth).items():

        def run(policy: Any = policy) -> dict[str, Any]:
            lossy = copy.deepcopy(model)
            quantize(lossy, policy)
            out = output(lossy)
            return {"error": relative_error(out, expected), "psnr": tensor_psnr(out, expected)}

        row = report.add(attempt({"name": name}, bench.budget, run))
        clean_up(bench.device)
        bench.say(f"fp8, {name}: {row.get('error', row.get('reason'))}")
