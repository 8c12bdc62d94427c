"""Blocks that wait in CPU memory: the same numbers, copied when they are needed and not more often."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from longcat_core.errors import LongCatError
from longcat_core.model.block import run_block
from longcat_core.optimize import streaming
from longcat_core.optimize.compilation import Regional
from longcat_core.optimize.optimized import OptimizedTransformer
from longcat_core.optimize.quantization import Fp8Linear, quantize
from longcat_core.optimize.streaming import ALIGN, SLOTS, BlockStream, spread
from longcat_core.optimize.switches import Optimizations
from longcat_core.sampling.sampler import sample
from longcat_core.sampling.schedules import make_schedule

from ..support.tiny import tiny_config

CONFIG = tiny_config(depth=6)
SWITCHES = Optimizations(attention="sdpa")


def late(name: str) -> bool:
    return name.startswith("cross_attn.kv")


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def model() -> OptimizedTransformer:
    torch.manual_seed(0)
    model = OptimizedTransformer(CONFIG, SWITCHES).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        # Fresh gates and the final layer could hide a wrong block.
        parameter.copy_(randn(*parameter.shape, seed=len(name)) * parameter[0].numel() ** -0.5 / 2)
    return model


def streamed(model: OptimizedTransformer, blocks: tuple[int, ...]) -> OptimizedTransformer:
    other = copy.deepcopy(model)
    other.stream = BlockStream(other.blocks, "cpu", blocks, late)
    return other


@torch.no_grad()
def step(model: OptimizedTransformer, text: object, seed: int = 0) -> Tensor:
    return model(randn(2, 16, 3, 4, 6, seed=seed), torch.tensor([700.0]), text)


def text_of(model: OptimizedTransformer) -> object:
    return model.embed_text(randn(2, 8, 32, seed=1), torch.tensor([[1] * 5 + [0] * 3, [1] * 8]))


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, bool]]:
    """(block, whole) of every copy to the device."""
    seen: list[tuple[int, bool]] = []
    fetch = BlockStream._fetch

    def watched(self: BlockStream, i: int, whole: bool, keep: object = None) -> object:
        before = [(slot.holds, slot.whole) for slot in self._slots]
        slot = fetch(self, i, whole, keep)
        if (slot.holds, slot.whole) not in before:
            seen.append((i, slot.whole))
        return slot

    monkeypatch.setattr(BlockStream, "_fetch", watched)
    return seen


@pytest.mark.parametrize(
    ("depth", "count", "wanted"),
    [(48, 0, []), (48, 1, [24]), (48, 4, [6, 18, 30, 42]), (6, 6, [0, 1, 2, 3, 4, 5]), (7, 3, [1, 3, 5])],
)
def test_blocks_that_wait_are_evenly_spread(depth, count, wanted):
    assert spread(depth, count) == wanted
    for n in range(depth + 1):
        found = spread(depth, n)
        assert len(set(found)) == n and all(0 <= i < depth for i in found)


@pytest.mark.parametrize("blocks", [(0,), (5,), (2, 4), (1, 3, 5), (0, 1, 2, 3, 4, 5)])
def test_the_result_is_the_same_bit_for_bit(model, blocks):
    other = streamed(model, blocks)
    assert other.stream.streamed == blocks
    texts = [text_of(m) for m in (model, other)]
    for seed in range(3):
        assert torch.equal(step(other, texts[1], seed), step(model, texts[0], seed))
    # And the weights are where they were.
    for (name, mine), (_, theirs) in zip(other.state_dict().items(), model.state_dict().items(), strict=True):
        assert torch.equal(mine, theirs), name


def test_weights_are_on_the_device_only_while_their_block_runs(model):
    other = streamed(model, (1, 4))
    waiting = {i: [p.data_ptr() for p in other.blocks[i].parameters()] for i in (1, 4)}
    seen = {}

    def watched(i: int, run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        seen[i] = [p.data_ptr() for p in other.blocks[i].parameters()]
        return run(x)

    with torch.no_grad():
        other(randn(1, 16, 2, 4, 6), torch.tensor([5.0]), randn(1, 8, 32), around_block=watched)
    slots = [(s.buffer.data_ptr(), s.buffer.data_ptr() + s.buffer.nbytes) for s in other.stream._slots]
    for i, before in waiting.items():
        assert [p.data_ptr() for p in other.blocks[i].parameters()] == before
        assert any(all(low <= p < high for p in seen[i]) for low, high in slots)
        assert all(p % 16 == 0 for p in (x - slots[0][0] for x in seen[i] if slots[0][0] <= x < slots[0][1]))


def test_one_copy_a_block_and_step_and_the_next_one_beside(model, copies):
    other = streamed(model, (0, 2, 3, 5))
    text = text_of(other)
    step(other, text)
    # The text's keys are made in the first step and need their weights then.
    assert copies == [(0, True), (2, True), (3, True), (5, True), (0, True)]
    copies.clear()
    step(other, text)
    # What came for the first step with all weights is there already.
    assert copies == [(2, False), (3, False), (5, False), (0, False)]
    copies.clear()
    step(other, text_of(other))
    assert copies == [(0, True), (2, True), (3, True), (5, True), (0, True)]


def test_as_many_blocks_as_there_is_room_for_stay(model, copies):
    other = streamed(model, tuple(range(SLOTS)))
    text = text_of(other)
    for _ in range(3):
        step(other, text)
    assert copies == [(i, True) for i in range(SLOTS)]


def test_what_is_copied_without_the_late_weights_is_less(model):
    stream = streamed(model, (1, 2)).stream
    block = model.blocks[1]
    sizes = {name: -(-p.nbytes // ALIGN) * ALIGN for name, p in block.named_parameters()}
    assert stream.nbytes == 2 * sum(size for name, size in sizes.items() if not late(name))
    assert 0 < stream.nbytes < 2 * sum(sizes.values())


def test_weights_written_to_are_copied_again(model):
    other = streamed(model, (0, 1, 4))
    text = [text_of(m) for m in (model, other)]
    assert torch.equal(step(other, text[1]), step(model, text[0]))
    for m in (model, other):
        # Block 0 is the one that has been fetched ahead.
        for i in (0, 4):
            m.blocks[i].ffn.down.weight.mul_(2)
    assert torch.equal(step(other, text[1]), step(model, text[0]))


def test_a_model_that_was_loaded_in_inference_mode(model):
    """ComfyUI's nodes run in it: tensors made there do not count what is written to them."""
    plain = copy.deepcopy(model)
    with torch.inference_mode():
        for block in model.blocks:
            for module in block.modules():
                for name, parameter in list(module.named_parameters(recurse=False)):
                    setattr(module, name, nn.Parameter(parameter.clone(), requires_grad=False))
        assert model.blocks[0].ffn.down.weight.is_inference()
        model.stream = BlockStream(model.blocks, "cpu", (0, 1, 4), late)
        assert torch.equal(step(model, text_of(model)), step(plain, text_of(plain)))
        with torch.inference_mode(False):
            # As functions that merge LoRAs do.
            for m in (model, plain):
                for i in (0, 4):
                    m.blocks[i].ffn.down.weight.mul_(2)
        assert torch.equal(step(model, text_of(model)), step(plain, text_of(plain)))
    assert torch.equal(step(model, text_of(model)), step(plain, text_of(plain)))
    assert not model.blocks[0].ffn.down.weight.is_inference()


def test_the_room_is_given_back_until_the_next_run(model):
    other = streamed(model, (0, 2))
    text = text_of(other)
    first = step(other, text)
    assert other.stream._slots
    other.stream.rest()
    assert not other.stream._slots
    assert torch.equal(step(other, text), first)


def test_an_error_in_a_block_leaves_the_weights_in_place(model):
    other = streamed(model, (0, 1, 2))
    before = [p.data_ptr() for p in other.blocks[1].parameters()]

    def fails(i: int, run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        if i == 1:
            raise RuntimeError("here")
        return run(x)

    with torch.no_grad(), pytest.raises(RuntimeError, match="here"):
        other(randn(1, 16, 2, 4, 6), torch.tensor([5.0]), randn(1, 8, 32), around_block=fails)
    assert [p.data_ptr() for p in other.blocks[1].parameters()] == before
    texts = [text_of(m) for m in (model, other)]
    assert torch.equal(step(other, texts[1]), step(model, texts[0]))


def test_eight_bit_layers(model):
    quantize(model)
    other = streamed(model, (0, 3))
    assert isinstance(other.blocks[3].ffn.down, Fp8Linear)
    texts = [text_of(m) for m in (model, other)]
    assert torch.equal(step(other, texts[1]), step(model, texts[0]))


def test_layers_learn_the_device_they_will_run_on(model):
    told = []

    class Told(nn.Linear):
        def run_on(self, device: torch.device) -> None:
            told.append(device)

    model.blocks[1].ffn.down = Told(96, 64, bias=False).requires_grad_(False)
    BlockStream(model.blocks, "cpu", (1,), late)
    assert told == [torch.device("cpu")]


def test_gradients_are_refused(model):
    other = streamed(model, (1,))
    other.requires_grad_(True)
    with pytest.raises(LongCatError, match="streamed blocks have no backward pass"):
        other(randn(1, 16, 2, 4, 6), torch.tensor([5.0]), randn(1, 8, 32))
    with torch.no_grad():
        other(randn(1, 16, 2, 4, 6), torch.tensor([5.0]), randn(1, 8, 32))


def test_one_graph_serves_blocks_that_wait_and_those_that_do_not(model):
    torch._dynamo.reset()
    other = streamed(model, (1, 2, 5))
    counter = CompileCounterWithBackend("eager")
    other.compiled_block = Regional(run_block, "the block", counter)
    other.set_optimizations(replace(SWITCHES, compile="blocks"))
    other.announce = lambda sentence: None
    texts = [text_of(m) for m in (model, other)]
    for seed in range(3):
        torch.testing.assert_close(step(other, texts[1], seed), step(model, texts[0], seed))
    assert counter.frame_count == 1
    torch._dynamo.reset()


def test_whole_samplings_agree(model):
    other = streamed(model, (0, 1, 2, 3, 4, 5))
    clean, noise = randn(1, 16, 1, 4, 6, seed=5), randn(1, 16, 3, 4, 6, seed=6)
    texts = {"negative_context": randn(1, 8, 32, seed=7), "cond_latents": clean}
    context = randn(1, 8, 32, seed=8)
    for mode in ("exact", "official", "off"):
        outs = [
            sample(m, noise, make_schedule("base", 3), context, None, kv_cache=mode, **texts) for m in (model, other)
        ]
        assert torch.equal(*outs)


def test_pinned_memory_is_ordinary_memory_without_cuda():
    buffer = streaming.pinned(1000)
    assert buffer.dtype == torch.uint8 and buffer.shape == (1000,) and buffer.device.type == "cpu"
