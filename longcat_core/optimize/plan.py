"""Memory plans: where weights and caches lie, so that a video fits in memory at the highest speed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from ..errors import LongCatError, is_whole, plain_fields
from ..model.config import ModelConfig
from ..model.transformer import LongCatTransformer
from .memory import audio_rows, forward_bytes, kv_cache_bytes, text_bytes
from .optimized import OptimizedTransformer
from .quantization import Policy
from .streaming import SLOTS, spread

GIB = 1 << 30
# Memory of libraries, and the share of memory that an allocator wastes.
WORKSPACE, WASTE = 1 << 29, 0.04
# The most keys that a prompt has.
TEXT_ROWS = 512


@dataclass(frozen=True)
class Plan:
    """What is moved off the device.

    streamed: number of blocks whose weights are offloaded to CPU memory. split_guidance: the halves of guidance run one
    after the other. offload_kv_cache: the KV cache of conditioning frames lies in CPU memory. stream_text_encoder: the
    text encoder's weights stay in its file and are read whenever it encodes. sharded: number of other blocks of whose
    weights each of several GPUs holds a share.
    """

    streamed: int = 0
    split_guidance: bool = False
    offload_kv_cache: bool = False
    stream_text_encoder: bool = False
    sharded: int = 0

    def __post_init__(self) -> None:
        plain_fields(self)
        for name, count in (("streamed", self.streamed), ("sharded", self.sharded)):
            if not is_whole(count) or count < 0:
                raise LongCatError(f"{name} blocks cannot be {count!r}; give a whole number of at least 0")

    def describe(self, depth: int) -> str:
        """The plan in words, or "" if everything lies on the device as usual."""
        offloaded = {
            f"{self.streamed} of {depth} blocks": self.streamed,
            "the KV cache": self.offload_kv_cache,
        }
        *names, last = [name for name, moved in offloaded.items() if moved] or [""]
        places = f"{', '.join(names)} and {last}" if names else last
        parts = [f"{places} in CPU memory"] if places else []
        parts += ["the text encoder in its file"] * self.stream_text_encoder
        if self.sharded:
            parts.append(f"the weights of {self.sharded} of {depth} blocks divided among the GPUs")
        return ", ".join(parts + ["guidance in halves"] * self.split_guidance)

    def places(self, depth: int) -> tuple[list[int], list[int]]:
        """Which of `depth` blocks are streamed and which are sharded: evenly spread, so that every copy has time."""
        waiting = spread(depth, self.streamed + self.sharded)
        streamed = [waiting[at] for at in spread(len(waiting), self.streamed)]
        return streamed, [i for i in waiting if i not in streamed]


@dataclass(frozen=True)
class Work:
    """What is sampled: the shape [B, C, T, H, W] of latents, cond_latents conditioning frames included.

    guided: with guidance, in two halves, or in the parts of an avatar's. speakers: how many voices an avatar hears;
    several make the parts run one after the other. parts: how many evaluations a guided step takes; None: as many as
    guidance has, which are three of an avatar. A reference frame counts as one of the latents and of the conditioning
    frames. density: the share of tokens that a token attends to in block-sparse attention.
    """

    latents: Sequence[int]
    guided: bool = True
    cond_latents: int = 0
    speakers: int = 1
    parts: int | None = None
    density: float = 1.0

    def __post_init__(self) -> None:
        shape = self.latents
        if not isinstance(shape, list | tuple) or len(shape) != 5 or not all(is_whole(n) and n > 0 for n in shape):
            raise LongCatError(f"work cannot be latents {shape!r}; give the shape [B, C, T, H, W], or use work_of")

    def evaluations(self, audio: bool) -> int:
        """How many a step of one video takes. audio: the network hears."""
        return (self.parts or (3 if audio else 2)) if self.guided else 1

    def samples(self, audio: bool, split: bool) -> int:
        """How many one pass has. split: evaluations run one after the other."""
        return self.latents[0] * (1 if split or self.speakers > 1 else self.evaluations(audio))


@dataclass(frozen=True)
class Weights:
    """Bytes of a network's weights: of every block, and of the rest. eight_bit: some layers are 8-bit."""

    block: int
    rest: int
    eight_bit: bool = False

    @classmethod
    def of(cls, config: ModelConfig, dtype: torch.dtype, fp8: Policy | None = None) -> Weights:
        """Weights as they lie on a device, 8-bit layers with a scale for each row.

        If fp8 keeps some blocks in 16 bits, every block counts as the average.
        """
        with torch.device("meta"):
            one = LongCatTransformer(replace(config, depth=1), dtype=dtype)
        block = {f"blocks.0.{name}": parameter for name, parameter in one.blocks[0].named_parameters()}
        rest = sum(parameter.nbytes for parameter in one.parameters()) - sum(p.nbytes for p in block.values())
        whole = sum(parameter.nbytes for parameter in block.values())
        small = 0
        for name in Policy(fp8.layers).names(1, config.audio is not None) if fp8 else ():
            weight = block[f"{name}.weight"]
            small += weight.numel() + 4 * weight.shape[0] - weight.nbytes
        share = len(fp8.names(config.depth)) / (len(fp8.layers) * config.depth) if fp8 and fp8.layers else 0.0
        return cls(math.ceil(whole + share * small), rest, share > 0)


def needed_bytes(
    plan: Plan,
    config: ModelConfig,
    weights: Weights,
    work: Work,
    itemsize: int,
    own: bool,
    others: int,
    ranks: int = 1,
    decoding: int = 0,
) -> int:
    """Device memory that sampling `work` takes. own: with our kernels (see `forward_bytes`).

    others: bytes of other models on the device, the text encoder excluded. ranks: GPUs that share the work, as
    `parallel.division` does; what they save by sharing a sample's tokens is not counted. decoding: bytes that the VAE
    takes afterwards, when no block is on its way.
    """
    batch, channels, frames, height, width = work.latents
    parts = work.evaluations(config.audio is not None)
    waiting = plan.streamed + plan.sharded
    blocks, slots = config.depth - waiting + plan.sharded / ranks, min(SLOTS, waiting)
    resident = weights.rest + blocks * weights.block + others
    at_once = work.samples(config.audio is not None, plan.split_guidance)
    at_once //= math.gcd(at_once, ranks)
    activations = forward_bytes(config, (at_once, channels, frames, height, width), itemsize, own, weights.eight_bit)
    rows = TEXT_ROWS + audio_rows(config, frames, work.speakers)
    activations += text_bytes(config, parts * batch, rows, itemsize)
    if work.cond_latents:
        cache = kv_cache_bytes(config, work.cond_latents, height, width, itemsize)
        activations += math.ceil(SLOTS * cache / config.depth) if plan.offload_kv_cache else cache
    most = resident + max(slots * weights.block + activations, decoding)
    return math.ceil(most * (1 + WASTE)) + WORKSPACE


def plans(depth: int, work: Work, least: Plan, sharding: bool = False) -> Iterator[Plan]:
    """Plans from the fastest to the smallest; all include `least`, but streamed blocks take the place of sharded ones.

    Splitting guidance costs next to nothing if a half keeps the device busy. Blocks that are not on the device cost
    transfers that are hidden only behind enough work, so they come last. For the same memory, sharded blocks transfer
    as many bytes as streamed ones. sharding: other GPUs send them at least as fast as CPU memory.
    """
    splits = dict.fromkeys((least.split_guidance, least.split_guidance or work.guided))
    offloads = dict.fromkeys((least.offload_kv_cache, least.offload_kv_cache or work.cond_latents > 0))
    most = max(least.sharded, depth - least.streamed) if sharding else least.sharded
    counts = [(least.streamed, sharded) for sharded in range(least.sharded, most)]
    counts += [(streamed, min(most, depth - streamed)) for streamed in range(least.streamed, depth + 1)]
    for streamed, sharded in counts:
        for split in splits:
            for offload in offloads:
                yield replace(least, streamed=streamed, sharded=sharded, split_guidance=split, offload_kv_cache=offload)


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
    ranks: int = 1,
    sharding: bool = False,
    decoding: int = 0,
) -> tuple[Plan, int]:
    """The fastest plan that fits in `free` bytes, or the smallest one, and the bytes that it takes.

    text_encoder: bytes of its weights, which are streamed if the rest leaves no room for them. least: what the plan
    must include. ranks: GPUs that share the work, each with `free` bytes. sharding: see `plans`. decoding: see
    `needed_bytes`.
    """
    least = least or Plan()
    plan, needed = least, 0
    for plan in plans(config.depth, work, least, sharding):
        needed = needed_bytes(plan, config, weights, work, itemsize, own, others, ranks, decoding)
        if needed <= free:
            break
    if text_encoder and not plan.stream_text_encoder and needed + text_encoder > free:
        return replace(plan, stream_text_encoder=True), needed
    return plan, needed if plan.stream_text_encoder else needed + text_encoder


def smaller(plan: Plan, depth: int, guided: bool) -> Plan | None:
    """The next plan if `plan` did not fit: split guidance, then offload another quarter of the blocks; or None."""
    if guided and not plan.split_guidance:
        return replace(plan, split_guidance=True)
    if plan.streamed < depth:
        return replace(plan, streamed=min(depth, max(plan.streamed + math.ceil(depth / 4), SLOTS + 1)))
    return None


def free_bytes(device: torch.device, memory: int | None = None) -> int:
    """Bytes that this process can still allocate on a CUDA device, where it may use `memory` bytes in all."""
    free, _ = torch.cuda.mem_get_info(device)
    reserved, used = torch.cuda.memory_reserved(device), torch.cuda.memory_allocated(device)
    free += reserved - used
    return free if memory is None else min(free, memory - used)


def limit_memory(device: torch.device, size: int | None) -> None:
    """Limit PyTorch to `size` bytes of a CUDA device's memory from now on; None: no limit."""
    share = 1.0 if size is None else min(1.0, size / torch.cuda.get_device_properties(device).total_memory)
    # Unlike PyTorch's other functions, this one does not accept "cuda" without a number.
    index = torch.cuda.current_device() if device.index is None else device.index
    torch.cuda.set_per_process_memory_fraction(share, index)


def apply_plan(model: OptimizedTransformer, plan: Plan) -> None:
    """Make a loaded network run as `plan` says; offloaded blocks do not come back to the device.

    The blocks to offload are spread evenly among those on the device.
    """
    if plan.split_guidance != model.optimizations.split_guidance:
        model.set_optimizations(replace(model.optimizations, split_guidance=plan.split_guidance))
    offloaded = () if model.stream is None else model.stream.streamed
    resident = [i for i in range(model.config.depth) if i not in offloaded]
    more = spread(len(resident), max(0, plan.streamed - len(offloaded)))
    if more:
        model.stream_blocks(model.patch_embed.weight.device, [resident[i] for i in more])


def plan_table(
    sizes: Sequence[float], config: ModelConfig, work: Work, dtype: torch.dtype, text_encoder: int, own: bool = True
) -> list[tuple[str, str, str]]:
    """For each number of free GiB: the size, the plan in 16 bits, and the plan with fp8."""
    rows = []
    for gib in sizes:
        cells = []
        for fp8 in (None, Policy()):
            weights, free = Weights.of(config, dtype, fp8), int(gib * GIB)
            plan, needed = choose_plan(
                config, weights, work, dtype.itemsize, free=free, own=own, text_encoder=text_encoder
            )
            described = plan.describe(config.depth) or "everything on the GPU"
            cells.append(f"{described} ({needed / GIB:.1f} GiB{'' if needed <= free else ', too much'})")
        rows.append((f"{gib:g} GiB", cells[0], cells[1]))
    return rows
