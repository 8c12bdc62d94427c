"""Weights and keys that are copied to a GPU beside what runs there: who waits for whom, and what is pinned."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from longcat_core.optimize.kv_offload import OffloadableKVCache
from longcat_core.optimize.optimized import OptimizedTransformer
from longcat_core.optimize.streaming import BlockWeights, Slot, pinned
from longcat_core.optimize.switches import Optimizations
from longcat_core.sampling.sampler import sample
from longcat_core.sampling.schedules import make_schedule

from ..support.pretend_cuda import CUDA, Event, Stream, WrongOrder, pretended
from ..support.tiny import tiny_config

CONFIG = tiny_config(depth=4)


@pytest.fixture
def gpu() -> Iterator[object]:
    with pretended() as runtime, torch.no_grad():
        yield runtime


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


class Gathered(BlockWeights):
    """Weights that a collective brings, on a stream of its own that waits for what is queued."""

    kept = False

    def __init__(self, block: torch.nn.Module, stream: Stream) -> None:
        super().__init__(block)
        self.stream, self.home = stream, [parameter.data for parameter in self.parameters]
        self.bytes = torch.zeros(self.nbytes, dtype=torch.uint8)
        for view, weight in zip(self.views(self.bytes), self.home, strict=True):
            view.copy_(weight.cpu())

    def rest(self) -> None:
        self.use(self.home)

    def bring(self, slot: Slot, whole: bool) -> bool:
        slot.wait()
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            slot.buffer[: self.nbytes].copy_(self.bytes, non_blocking=True)
        arrived = self.stream.record_event()
        slot.work = SimpleNamespace(wait=lambda: torch.cuda.current_stream().wait_event(arrived))
        return True


def sampled(streamed: tuple[int, ...] = (), offload: bool = False, sharded: tuple[int, ...] = ()) -> Tensor:
    torch.manual_seed(0)
    model = OptimizedTransformer(CONFIG, Optimizations(attention="sdpa")).eval().requires_grad_(False).to(CUDA)
    for parameter in model.parameters():
        parameter.copy_(randn(*parameter.shape).to(CUDA) * parameter[0].numel() ** -0.5)
    if streamed or sharded:
        gathering = Stream()
        model.stream_blocks(CUDA, streamed, {i: Gathered(model.blocks[i], gathering) for i in sharded})
    given = {"cond_latents": randn(1, 16, 1, 4, 6), "negative_context": randn(1, 8, 32)}
    out = sample(
        model, randn(1, 16, 3, 4, 6), make_schedule("base", 3), randn(1, 8, 32), None, offload_kv_cache=offload, **given
    )
    return out.cpu()


@pytest.mark.parametrize("streamed", [(2,), (0, 3), (0, 1, 3), (0, 1, 2, 3)])
def test_copies_and_kernels_wait_for_each_other(gpu, streamed):
    assert torch.equal(sampled(streamed), sampled())
    assert torch.equal(sampled(streamed, offload=True), sampled())


@pytest.mark.parametrize("sharded", [(2,), (0, 3), (0, 1, 3), (0, 1, 2, 3)])
def test_gathered_blocks_and_copies_share_their_room(gpu, sharded):
    assert torch.equal(sampled(sharded=sharded), sampled())
    others = tuple(i for i in range(CONFIG.depth) if i not in sharded)
    assert torch.equal(sampled(others, sharded=sharded), sampled())


@pytest.mark.parametrize("left_out", ["wait_event", "wait_stream"])
@pytest.mark.parametrize("copies", [{"streamed": (0, 1, 3)}, {"offload": True}, {"sharded": (0, 1, 3)}])
def test_without_waiting_the_pretended_gpu_notices(gpu, monkeypatch, left_out, copies):
    """Of the stream that copies, or of the one that computes."""
    if left_out == "wait_stream" and "streamed" in copies:
        wait = Stream.wait_event
        monkeypatch.setattr(Stream, "wait_event", lambda self, e: wait(self, e) if self is Stream.main else None)
    elif left_out == "wait_stream":
        monkeypatch.setattr(Stream, "wait_stream", lambda self, stream: None)
    else:
        wait = Stream.wait_event
        monkeypatch.setattr(Stream, "wait_event", lambda self, e: None if self is Stream.main else wait(self, e))
    with pytest.raises(WrongOrder):
        sampled(**copies)


def test_keys_are_read_into_the_same_room_block_after_block(gpu):
    """However far the host is ahead of the GPU, two blocks' keys are there at the most."""
    cache = OffloadableKVCache(CONFIG, 1, 2, 3, device="cpu")
    cache.k.copy_(randn(*cache.k.shape))
    cache.v.copy_(-cache.k)
    cache.rotated = True
    like, places = torch.empty(2, device=CUDA), set()
    for block in (0, 1, 2, 3, 0, 1, 3, 2):
        k, v = cache.read(block, like)
        assert k.device == CUDA and torch.equal(k[0].cpu(), cache.k[block, 0]) and torch.equal(v.cpu(), -k.cpu())
        places.add((k.data_ptr(), v.data_ptr()))
    assert len(places) == 2


def test_keys_that_change_are_fetched_again(gpu):
    cache = OffloadableKVCache(CONFIG, 1, 2, 3, device="cpu")
    like, one = torch.empty(1, device=CUDA), torch.ones(1, 6, 2, 32, device=CUDA)
    for number in (1.0, 2.0):
        for block in range(CONFIG.depth):
            cache.store(block, number * one, number * one)
        cache.rotated = True
        assert all(cache.read(block, like)[1].eq(number).all() for block in (1, 2, 1))


def test_every_pinned_buffer_has_pages_of_its_own(gpu):
    buffers = [pinned(size) for size in (1, 100, 4096, 5000, 100, 70_000, 1)]
    assert [len(buffer) for buffer in buffers] == [1, 100, 4096, 5000, 100, 70_000, 1]
    assert not gpu.errors and len(gpu.registered) == len(buffers)
    part = buffers.pop()[:1].view(torch.int8)
    gc.collect()
    assert len(gpu.registered) == len(buffers) + 1, "a view keeps it"
    del part
    buffers.clear()
    gc.collect()
    assert not gpu.registered and not gpu.errors


def test_nothing_is_unpinned_while_it_is_being_copied(gpu):
    source, target, beside = pinned(64).fill_(7), torch.zeros(64, dtype=torch.uint8, device=CUDA), Stream()
    with torch.cuda.stream(beside):
        beside.wait_stream(Stream.main)
        target.copy_(source, non_blocking=True)
    assert beside.waiting
    beside.waiting[0] = lambda: None  # it holds the source
    del source
    gc.collect()
    assert not beside.waiting and not gpu.registered


def test_a_refusal_to_pin_is_not_an_error_of_the_next_kernel(gpu):
    gpu.refuses = True
    buffer = pinned(1000)
    assert not gpu.registered and not gpu.pending
    assert torch.equal(buffer.fill_(3).to(CUDA).cpu(), buffer)


def test_events_of_another_stream_count_only_once_they_were_waited_for(gpu):
    beside, x = Stream(), torch.zeros(3, device=CUDA)
    event = Event()
    event.record(Stream.main)
    with torch.cuda.stream(beside), pytest.raises(WrongOrder):
        x.add(1)
    beside.wait_event(event)
    with torch.cuda.stream(beside):
        x.add(1)
