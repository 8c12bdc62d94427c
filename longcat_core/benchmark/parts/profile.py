"""Kernels of one step under the PyTorch profiler, by family, and the trace."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from ...errors import LongCatError
from ...files.atomic import atomic_path
from ...measure.clock import attempt, clean_up, synchronize, timed
from ...measure.results import markdown, shown
from ...optimize.block_sparse import BlockSparse
from ...optimize.quantization import quantize, quantized_layers
from ...optimize.switches import Optimizations
from .. import workload
from ..baseline import BaselineTransformer
from ..part import Part, Results, Row, bars
from ..variants import EXACT, FP8, FP8_8BIT, Bench
from . import refine, sparse
from .refine import SPARSE_EXACT, SPARSE_FP8

# Values of --variant and the paths they stand for; each has files of its own.
PLAIN, BASELINE = "plain", "baseline"
VARIANTS = {"exact": EXACT, "fp8": FP8, "fp8+8bit": FP8_8BIT, "plain": PLAIN, "baseline": BASELINE}
# Variants of the refinement, with block-sparse attention.
REFINING = {"refine": SPARSE_EXACT, "refine+fp8": SPARSE_FP8}
# Variants of a step with sparse attention.
SPARSE = {"sparse": f"{sparse.SPARSE}, {EXACT}", "sparse+fp8": f"{sparse.SPARSE}, {FP8}"}
VARIANTS |= REFINING | SPARSE
_PATHS = {SPARSE_EXACT: EXACT, SPARSE_FP8: FP8, SPARSE["sparse"]: EXACT, SPARSE["sparse+fp8"]: FP8}
# The first match wins. The second line of attention has the kernels of block-sparse attention, the third those that
# prepare SageAttention's inputs. Triton's fused kernels are element-wise, though other words occur in their names.
FAMILIES = (
    ("attention", r"flash|fmha|attention|sparse|sdpa|sage|qk_int8|attn"),
    ("attention", r"^_(attend|pool|top_k)$"),
    ("attention", r"(thread|warp|block)_int8|quantint8|submean|meanscale|transposepadpermute"),
    ("element-wise", r"^triton_|_kernel_0d1d|norm_|rope_|^_(residual_norm|norm_rope|gated_product|quanti[sz]e)"),
    ("GEMM", r"gemm|nvjet|cutlass|cublas|xmma|wgmma|scaled_mm|^aten::(add)?mm$|^aten::b?mm$|conv|mkl"),
    ("copies", r"memcpy|memset|copy|^aten::(cat|clone|contiguous|to)$|catarray"),
    ("element-wise", r"elementwise|vectorized|reduce|norm|softmax|silu|gelu|triton|^aten::|^graph_|cpp_fused"),
)
OTHER = "other"
SHOWN = 25
ANNOTATIONS = ("ProfilerStep", "## Call", "Torch-Compiled Region", "TorchDynamo", "CompiledFunction")


def family(kernel: str) -> str:
    """The family of a kernel or, without a GPU, of an operator."""
    name = kernel.lower()
    return next((what for what, pattern in FAMILIES if re.search(pattern, name)), OTHER)


def _kernels(prof: Any, cuda: bool) -> list[tuple[str, float, int]]:
    """(name, ms, calls) of everything that took time, the longest first."""
    found = []
    for event in prof.key_averages():
        us = event.self_device_time_total if cuda else event.self_cpu_time_total
        # Annotations span kernels, which would be counted twice.
        spans = getattr(event, "is_user_annotation", False) or event.key.startswith(ANNOTATIONS)
        if cuda == (event.device_type == torch.autograd.DeviceType.CUDA) and us > 0 and not spans:
            found.append((event.key, us / 1000, event.count))
    return sorted(found, key=lambda item: -item[1])


def check(variant: str) -> None:
    """Raise LongCatError for a variant that is not one of VARIANTS."""
    if variant not in VARIANTS:
        raise LongCatError(f"--variant {variant} is unknown; choose one of {', '.join(VARIANTS)}")


def refines(name: str, variant: str) -> bool:
    """Whether a part, or `profile` of this variant, measures the refinement and its larger video."""
    return name == "refine" or (name == "profile" and variant in REFINING)


def file_name(variant: str) -> str:
    """The name of a variant's results, without suffix: `profile` for the exact path."""
    return "profile" if VARIANTS[variant] == EXACT else f"profile-{variant.replace('+', '-')}"


def sized(bench: Bench) -> Bench:
    if bench.variant in SPARSE:
        return sparse.sized(bench)
    return refine.sized(bench) if bench.variant in REFINING else bench


def run(bench: Bench) -> None:
    """Rows of kernel families of one step, after warm-up; the longest kernels and the variant's name in the results.

    For fp8 the weights are quantized in place, unless they are already.
    """
    variant, report = bench.variant, bench.report
    name = VARIANTS[variant]
    settings = BlockSparse() if variant in REFINING else sparse.SETTINGS if variant in SPARSE else None
    with workload.attending(bench.model, settings):
        row = attempt({"name": name, "phase": "total"}, bench.budget, _profiled, bench, variant)
    clean_up(bench.device)
    kernels = row.pop("kernels", [])
    report.content["inputs"]["variant"] = name
    report.content["kernels"] = [
        {"name": kernel[:200], "family": family(kernel), "ms": ms, "calls": calls}
        for kernel, ms, calls in kernels[:SHOWN]
    ]
    busy = sum(ms for _, ms, _ in kernels)
    sums: dict[str, Row] = {}
    for kernel, ms, calls in kernels:
        total = sums.setdefault(family(kernel), {"name": family(kernel), "phase": "family", "ms": 0.0, "calls": 0})
        total |= {"ms": total["ms"] + ms, "calls": total["calls"] + calls}
    for total in sorted(sums.values(), key=lambda total: -total["ms"]):
        report.rows.append(total | {"share": total["ms"] / busy, "status": "ok"})
    bench.keep(row | {"busy_ms": busy})


def _profiled(bench: Bench, variant: str) -> Row:
    """A step's time, its kernels, and the name of the trace that lies beside the results."""
    name, inputs, cuda = VARIANTS[variant], bench.inputs(), bench.device.type == "cuda"
    path = _PATHS.get(name, name)
    if path in (FP8, FP8_8BIT) and not quantized_layers(bench.model):
        quantize(bench.model)
    chosen = Optimizations(**(bench.plain() if name in (PLAIN, BASELINE) else bench.path(path)))
    with workload.switched(bench.model, chosen, name) as notes:
        if name == BASELINE:
            forward = workload.baseline_forward(BaselineTransformer(bench.model), inputs)
            step = workload.step_of(forward, inputs, Optimizations(fused_step=False))
        else:
            step = workload.step_of(workload.network_forward(bench.model, inputs), inputs, chosen)
        step()
        step()
        ms = 1000 * timed(step, bench.device)
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as prof:
        step()
        synchronize(bench.device)
    trace = bench.report.path.with_name(f"trace-{variant.replace('+', '-')}.json.gz")
    trace.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(trace) as temporary:
        prof.export_chrome_trace(str(temporary))
    return {"ms": ms, "kernels": _kernels(prof, cuda), "trace": trace.name, "notes": notes}


def families(rows: list[Row]) -> list[Row]:
    return [row for row in rows if row.get("phase") == "family"]


def table(results: Results, _: Any) -> str:
    whole: Row = next((r for r in results["rows"] if r.get("phase") == "total"), {})
    lines = [(r["name"], r["ms"], f"{100 * r['share']:.1f} %", r["calls"]) for r in families(results["rows"])]
    longest = [
        (k["name"].replace("`", "'")[:90], k["family"], k["ms"], k["calls"]) for k in results.get("kernels", [])[:12]
    ]
    busy = f"Kernels take {shown(whole.get('busy_ms'))} ms of a step of {shown(whole.get('ms'))} ms."
    tables = markdown(("family", "ms", "share", "calls"), lines), markdown(("kernel", "family", "ms", "calls"), longest)
    return f"{busy}\n\n{tables[0]}\n\nThe longest:\n\n{tables[1]}"


CHART = bars(
    "Where one step goes: {variant}",
    "ms on the device",
    "ms",
    "{:.1f}",
    label=lambda row: f"{row['name']} ({100 * row['share']:.0f} %)",
    rows=families,
)

PART = Part(
    text="## Where the time goes: {variant}\n\nKernels of one step under the PyTorch profiler, by family.",
    run=run,
    table=table,
    charts=(CHART,),
    sized=sized,
)
