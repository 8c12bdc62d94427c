"""Where the time of one step goes: kernels of the PyTorch profiler, by family, and the trace."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from ..errors import LongCatError
from ..files.media import atomic_path
from ..measure.clock import attempt, clean_up, timed
from ..measure.results import Report
from ..optimize.block_sparse import BlockSparse
from ..optimize.quantization import quantised_layers, quantize
from ..optimize.switches import Optimizations
from . import workload
from .ablation import EXACT, FP8, FP8_8BIT, Bench
from .baseline import BaselineTransformer
from .refine_step import SPARSE_EXACT, SPARSE_FP8, attending

# What --variant names, with the names of the paths; each leaves files of its own.
PLAIN, BASELINE = "plain", "baseline"
VARIANTS = {"exact": EXACT, "fp8": FP8, "fp8+8bit": FP8_8BIT, "plain": PLAIN, "baseline": BASELINE}
# Of the refinement, which attends block by block.
REFINING = {"refine": SPARSE_EXACT, "refine+fp8": SPARSE_FP8}
VARIANTS |= REFINING
_PATHS = {SPARSE_EXACT: EXACT, SPARSE_FP8: FP8}
# First match wins. What Triton fuses is element-wise work, whatever words its name is made of. The third line of
# attention is what SageAttention does to its inputs, the second what block-sparse attention is made of.
FAMILIES = (
    ("attention", r"flash|fmha|attention|sdpa|sage|qk_int8|attn"),
    ("attention", r"^_(attend|pool|top_k)$"),
    ("attention", r"(thread|warp|block)_int8|quantint8|submean|meanscale|transposepadpermute"),
    ("element-wise", r"^triton_|_kernel_0d1d|norm_|rope_|^_(residual_norm|norm_rope|gated_product|quantise)"),
    ("GEMM", r"gemm|nvjet|cutlass|cublas|xmma|wgmma|scaled_mm|^aten::(add)?mm$|^aten::b?mm$|conv|mkl"),
    ("copies", r"memcpy|memset|copy|^aten::(cat|clone|contiguous|to)$|catarray"),
    ("element-wise", r"elementwise|vectorized|reduce|norm|softmax|silu|gelu|triton|^aten::|^graph_|cpp_fused"),
)
OTHER = "other"
SHOWN = 25
ANNOTATIONS = ("ProfilerStep", "## Call", "Torch-Compiled Region", "TorchDynamo", "CompiledFunction")


def family(kernel: str) -> str:
    """Which family a kernel (or, without a GPU, an operator) belongs to."""
    name = kernel.lower()
    return next((what for what, pattern in FAMILIES if re.search(pattern, name)), OTHER)


def _kernels(prof: Any, cuda: bool) -> list[tuple[str, float, int]]:
    """(name, ms, calls) of everything that took time, longest first."""
    found = []
    for event in prof.key_averages():
        on_device = event.device_type == torch.autograd.DeviceType.CUDA
        if cuda != on_device:
            continue
        us = event.self_device_time_total if cuda else event.self_cpu_time_total
        # Annotations span kernels, which would count twice.
        spans = getattr(event, "is_user_annotation", False) or event.key.startswith(ANNOTATIONS)
        if us > 0 and not spans:
            found.append((event.key, us / 1000, event.count))
    return sorted(found, key=lambda item: -item[1])


def check(variant: str) -> None:
    """Raise LongCatError for a variant that is not one of VARIANTS."""
    if variant not in VARIANTS:
        raise LongCatError(f"--variant {variant} is unknown; choose one of {', '.join(VARIANTS)}")


def refines(part: str, variant: str) -> bool:
    """Whether a part of the benchmark, or `profile` of this variant, is of the refinement and its larger video."""
    return part == "refine" or (part == "profile" and variant in REFINING)


def file_name(variant: str) -> str:
    """What the results of a variant are called, without suffix: `profile` for the exact path."""
    return "profile" if VARIANTS[variant] == EXACT else f"profile-{variant.replace('+', '-')}"


def profile_step(bench: Bench, report: Report, variant: str = "exact") -> None:
    """Rows of kernel families of one step, after warm-up; the longest kernels and the variant's name in the results.

    variant: one of VARIANTS. For fp8 the weights are quantised, in place, unless they are already.
    """
    name = VARIANTS[variant]
    path = _PATHS.get(name, name)

    def run() -> dict[str, Any]:
        if path in (FP8, FP8_8BIT) and not quantised_layers(bench.model):
            quantize(bench.model)
        chosen = Optimizations(**(bench.plain() if name in (PLAIN, BASELINE) else bench.path(path)))
        workload.exactly(bench.model, chosen)
        inputs = bench.inputs()
        if name == BASELINE:
            forward = workload.baseline_forward(BaselineTransformer(bench.model), inputs)
            step = workload.step_of(forward, inputs, Optimizations(fused_step=False))
        else:
            step = workload.step_of(workload.network_forward(bench.model, inputs), inputs, chosen)
        with workload.Notes(bench.model) as notes:
            step()
            step()
            ms = 1000 * timed(step, bench.device)
        if bench.model.optimizations != chosen:
            raise LongCatError(f"{name} was given up at its first step: {'; '.join(notes)}")
        cuda = bench.device.type == "cuda"
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
        with profile(activities=activities) as prof:
            step()
            if cuda:
                torch.cuda.synchronize(bench.device)
        kernels = _kernels(prof, cuda)
        trace = report.path.with_name(f"trace-{variant.replace('+', '-')}.json.gz")
        trace.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(trace) as temporary:
            prof.export_chrome_trace(str(temporary))
        return {"ms": ms, "kernels": kernels, "trace": trace.name, "notes": notes}

    with attending(bench.model, BlockSparse() if variant in REFINING else None):
        row = attempt({"name": name, "phase": "total"}, bench.budget, run)
    clean_up(bench.device)
    kernels = row.pop("kernels", [])
    report.content["inputs"]["variant"] = name
    report.content["kernels"] = [
        {"name": kernel[:200], "family": family(kernel), "ms": ms, "calls": calls}
        for kernel, ms, calls in kernels[:SHOWN]
    ]
    busy = sum(ms for _, ms, _ in kernels)
    sums: dict[str, list[float]] = {}
    for kernel, ms, calls in kernels:
        total = sums.setdefault(family(kernel), [0.0, 0])
        total[0] += ms
        total[1] += calls
    for what, (ms, calls) in sorted(sums.items(), key=lambda item: -item[1][0]):
        found = {"name": what, "phase": "family", "ms": ms, "calls": calls, "share": ms / busy, "status": "ok"}
        report.rows.append(found)
    report.add(row | {"busy_ms": busy})
    bench.say(f"profile of {name}: {row['status']}: {row.get('ms') or row.get('reason')}")
