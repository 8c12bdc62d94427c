"""Where weights and activations lie, so that a video fits the memory there is: the fastest way that does."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from ..model.config import ModelConfig
from ..model.transformer import LongCatTransformer
from .execution import OptimizedTransformer
from .memory import forward_bytes, kv_cache_bytes, text_bytes
from .quantization import Policy
from .streaming import SLOTS, spread

GIB = 1 << 30
# What libraries take for themselves, and what an allocator cannot use of what it has.
WORKSPACE, WASTE = 1 << 29, 0.04
# Rows of keys and values a prompt may come to, at the most.
TEXT_ROWS = 512


@dataclass(frozen=True)
class Plan:
    """streamed: how many blocks' weights wait in CPU memory. split_guidance: halves one after the other.
    offload_kv_cache: given frames' keys and values in CPU memory. stream_text_encoder: its blocks' weights, too.
    """

    streamed: int = 0
    split_guidance: bool = False
    offload_kv_cache: bool = False
    stream_text_encoder: bool = False

    def told(self, depth: int) -> str:
        """In words, or "" where everything lies on the device as usual."""
        waiting = {
            f"{self.streamed} of {depth} blocks": self.streamed,
            "keys of given frames": self.offload_kv_cache,
            "the text encoder": self.stream_text_encoder,
        }
        *names, last = [name for name, waits in waiting.items() if waits] or [""]
        places = f"{', '.join(names)} and {last}" if names else last
        parts = [f"{places} in CPU memory"] if places else []
        return ", ".join(parts + ["guidance in halves"] * self.split_guidance)


@dataclass(frozen=True)
class Work:
    """What will be sampled: latents [B, C, T, H, W]; guided: as two halves; cond_latents: given frames among them."""

    latents: Sequence[int]
    guided: bool = True
    cond_latents: int = 0


@dataclass(frozen=True)
class Weights:
    """Bytes of a network: of every block, and of the rest. eight_bit: some of its layers are."""

    block: int
    rest: int
    eight_bit: bool = False

    @classmethod
    def of(cls, config: ModelConfig, dtype: torch.dtype, fp8: Policy | None = None) -> Weights:
        """As they lie on a device, 8-bit layers with a scale for each row. Blocks that fp8 leaves out are not told
        apart: each counts as the average."""
        with torch.device("meta"):
            one = LongCatTransformer(replace(config, depth=1), dtype=dtype)
        block = {f"blocks.0.{name}": parameter for name, parameter in one.blocks[0].named_parameters()}
        rest = sum(parameter.nbytes for parameter in one.parameters()) - sum(p.nbytes for p in block.values())
        whole = sum(parameter.nbytes for parameter in block.values())
        small = 0
        for name in Policy(fp8.layers).names(1) if fp8 else ():
            weight = block[f"{name}.weight"]
            small += weight.numel() + 4 * weight.shape[0] - weight.nbytes
        share = len(fp8.names(config.depth)) / (len(fp8.layers) * config.depth) if fp8 and fp8.layers else 0
        return cls(math.ceil(whole + share * small), rest, share > 0)


def needed_bytes(
    plan: Plan, config: ModelConfig, weights: Weights, work: Work, itemsize: int, own: bool, others: int
) -> int:
    """Of device memory for a sampling of `work`. own: with kernels of our own (see `forward_bytes`).

    others: of models that lie on the device beside the network, the text encoder not among them.
    """
    batch, channels, *grid = work.latents
    halves = 2 if work.guided else 1
    blocks = config.depth - plan.streamed + min(SLOTS, plan.streamed)
    lying = weights.rest + blocks * weights.block + others
    at_once = batch * (1 if plan.split_guidance else halves)
    activations = forward_bytes(config, (at_once, channels, *grid), itemsize, own, weights.eight_bit)
    activations += text_bytes(config, halves * batch, TEXT_ROWS, itemsize)
    if work.cond_latents:
        cache = kv_cache_bytes(config, work.cond_latents, *grid[1:], itemsize)
        activations += math.ceil(SLOTS * cache / config.depth) if plan.offload_kv_cache else cache
    return math.ceil((lying + activations) * (1 + WASTE)) + WORKSPACE


def plans(depth: int, work: Work, least: Plan) -> Iterator[Plan]:
    """From the fastest to the smallest; `least` is in all of them.

    Halves of guidance cost next to nothing where a half keeps the device busy, and blocks that wait cost a transfer
    that is hidden behind the ones that run, if there is enough to run: so that comes after.
    """
    splits = dict.fromkeys((least.split_guidance, least.split_guidance or work.guided))
    offloads = dict.fromkeys((least.offload_kv_cache, least.offload_kv_cache or work.cond_latents > 0))
    for streamed in range(least.streamed, depth + 1):
        for split in splits:
            for offload in offloads:
                yield replace(least, streamed=streamed, split_guidance=split, offload_kv_cache=offload)


def choose_plan(
    config: ModelConfig,
    weights: Weights,
    work: Work,
    itemsize: int,
    *,
    free: int,
    own: bool,
    others: int = 0,
    text_encoder: int = 0,
    least: Plan | None = None,
) -> tuple[Plan, int]:
    """The fastest plan whose needs fit `free` bytes, or the smallest there is; and what it needs.

    text_encoder: bytes of its weights, which are streamed where the rest leaves no room for them. least: what is asked
    for in any case.
    """
    least = least or Plan()
    plan, needed = least, 0
    for plan in plans(config.depth, work, least):
        needed = needed_bytes(plan, config, weights, work, itemsize, own, others)
        if needed <= free:
            break
    if text_encoder and not plan.stream_text_encoder and needed + text_encoder > free:
        return replace(plan, stream_text_encoder=True), needed
    return plan, needed if plan.stream_text_encoder else needed + text_encoder


def smaller(plan: Plan, depth: int, guided: bool) -> Plan | None:
    """What to do where `plan` did not fit after all: halve the activations, then a quarter of all blocks less."""
    if guided and not plan.split_guidance:
        return replace(plan, split_guidance=True)
    if plan.streamed < depth:
        return replace(plan, streamed=min(depth, max(plan.streamed + math.ceil(depth / 4), SLOTS + 1)))
    return None


def free_bytes(device: torch.device, memory: int | None = None) -> int:
    """What this process may still take of a CUDA device's memory, of `memory` bytes at most in all."""
    free, _ = torch.cuda.mem_get_info(device)
    own, used = torch.cuda.memory_reserved(device), torch.cuda.memory_allocated(device)
    free += own - used
    return free if memory is None else min(free, memory - used)


def limit_memory(device: torch.device, size: int | None) -> None:
    """PyTorch takes no more than `size` bytes of a CUDA device's memory from now on; None: all there is."""
    share = 1.0 if size is None else min(1.0, size / torch.cuda.get_device_properties(device).total_memory)
    # This alone of PyTorch's functions takes no "cuda" without a number.
    index = torch.cuda.current_device() if device.index is None else device.index
    torch.cuda.set_per_process_memory_fraction(share, index)


def apply_plan(model: OptimizedTransformer, plan: Plan) -> None:
    """Have a network that lies on the device, or streams already, run as `plan` says; nothing comes back to the device.

    Blocks that begin to wait are spread among those that did not.
    """
    if plan.split_guidance != model.optimizations.split_guidance:
        model.set_optimizations(replace(model.optimizations, split_guidance=plan.split_guidance))
    waiting = () if model.stream is None else model.stream.streamed
    resident = [i for i in range(model.config.depth) if i not in waiting]
    more = spread(len(resident), max(0, plan.streamed - len(waiting)))
    if more:
        model.stream_blocks(model.patch_embed.weight.device, [resident[i] for i in more])


def plan_table(
    sizes: Sequence[float], config: ModelConfig, work: Work, dtype: torch.dtype, text_encoder: int, own: bool = True
) -> list[tuple[str, str, str]]:
    """Rows of what is chosen with so many GiB free: the size, in 16 bits, with fp8."""
    rows = []
    for gib in sizes:
        cells = []
        for fp8 in (None, Policy()):
            weights, free = Weights.of(config, dtype, fp8), int(gib * GIB)
            settings = {"free": free, "own": own, "text_encoder": text_encoder}
            plan, needed = choose_plan(config, weights, work, dtype.itemsize, **settings)
            told = plan.told(config.depth) or "everything on the GPU"
            cells.append(f"{told} ({needed / GIB:.1f} GiB{'' if needed <= free else ', too much'})")
        rows.append((f"{gib:g} GiB", *cells))
    return rows
