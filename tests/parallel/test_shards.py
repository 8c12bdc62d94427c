"""Blocks whose weights are divided among 2 and 4 ranks, real processes over gloo, against one process."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from longcat_core.errors import LongCatError
from longcat_core.model.kv_cache import Reference
from longcat_core.optimize.adapters import adapt
from longcat_core.optimize.optimized import OptimizedTransformer
from longcat_core.optimize.quantization import quantize
from longcat_core.parallel import mirror
from longcat_core.parallel.group import Group
from longcat_core.parallel.mirror import share
from longcat_core.parallel.start import gathers_fast, start
from longcat_core.sampling.avatar import Audio, ReferenceFrame
from longcat_core.sampling.sampler import sample
from longcat_core.sampling.schedules import make_schedule

from .measured import MEASURED, held
from .test_passes import EVEN, ODD, avatar, continued, group, heard, network, randn, video

__all__ = ["group", "heard"]
CPU = torch.device("cpu")


def agree(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, atol=1e-5 * float(wanted.std()), rtol=1e-5)


def check(
    group: Group,
    model: OptimizedTransformer,
    run: Callable[..., Tensor],
    *args: Any,
    sharded: Iterable[int] = (0, 1),
    **options: Any,
) -> None:
    """`run` gives on all ranks, twice, what it gives on one."""
    wanted = run(model, *args, **options)
    share(group, model, sharded)
    assert model.stream is not None and set(model.stream.shards) == set(sharded)
    for _ in range(2):
        agree(run(model, *args, **options), wanted)


@pytest.mark.parametrize("size", [EVEN, ODD])
@pytest.mark.parametrize("batch", [1, 2])
def test_the_result_is_that_of_one_process(group, batch, size):
    check(group, network(depth=5), video, batch, size, sharded=range(5))


@pytest.mark.parametrize("streamed", [(), (0,), (2, 4)])
def test_other_blocks_may_be_streamed_or_stay(group, streamed):
    model = network(depth=5)
    if streamed:
        model.stream_blocks("cpu", streamed)
    check(group, model, video, 2, sharded=(1, 3))


def test_continuation_with_a_cache(group):
    check(group, network(), continued, 2)


def test_eight_bit_layers_and_loras_beside_weights(group):
    """As with whole weights on each rank, bit for bit: quantized activations may differ from those of one process."""
    model = network(depth=3)
    quantize(model)
    outs = []
    for sharded in ((), range(3)):
        share(group, model, sharded)
        layer = adapt(model.blocks[1].ffn.down, 4)
        for number, name in enumerate(("lora_up", "lora_down")):
            getattr(layer, name).copy_(randn(*getattr(layer, name).shape, seed=number))
        for scale in (0.5, 1.0):
            layer.lora_scale.fill_(scale)
            outs.append(video(model, 2))
    assert torch.equal(outs[0], outs[2]) and torch.equal(outs[1], outs[3])
    assert (outs[1] - outs[0]).abs().max() > 1e-3


@pytest.mark.parametrize("eight_bit", [False, True])
def test_weights_that_change_reach_all_shares(group, eight_bit):
    """In both blocks, the first of which has been gathered when a pass ends."""
    model, other = network(), network()
    for one in (model, other):
        if eight_bit:
            quantize(one)
    share(group, model, (0, 1))
    before = video(model)
    for one in (model, other):
        for block in one.blocks:
            # Keys of the text are kept, for as long as the second layer's weights stay.
            for layer in (block.attn.qkv, block.cross_attn.kv):
                (layer.weight_scale if eight_bit else layer.weight).mul_(0.5)
    if eight_bit:
        share(group, other)
    wanted = video(other)
    assert (wanted - before).abs().max() > 1e-2
    agree(video(model), wanted)


def test_two_networks_take_turns(group):
    models = [network(depth=depth) for depth in (2, 3)]
    wanted = [video(model) for model in models]
    for model, sharded in zip(models, ((0, 1), (2,)), strict=True):
        share(group, model, sharded)
    for _ in range(2):
        for model, one in zip(models, wanted, strict=True):
            agree(video(model), one)


def test_a_pass_of_rank_0_alone_reads_its_own_memory(group):
    model = network(depth=3)
    model.announce = lambda sentence: None
    wanted = video(model)
    share(group, model, range(3))
    agree(video(model), wanted)
    torch.testing.assert_close(video(model, around_block=lambda i, run, x: run(x)), wanted)
    agree(video(model), wanted)


@pytest.mark.parametrize("group", [2], indirect=True)
def test_compiled_blocks(group):
    said: list[str] = []
    model = network(compile="blocks")
    model.announce = said.append
    check(group, model, video)
    assert not any("uncompiled" in sentence for sentence in said)


def test_an_avatar(group, heard):
    def run(model: OptimizedTransformer) -> Tensor:
        given = {name: heard[f"{side}.{part}"] for name, side, part in (
            ("negative_context", "neg", "embeds"), ("negative_mask", "neg", "mask"))}  # fmt: skip
        return sample(
            model,
            heard["noise0"],
            make_schedule("base", 2),
            heard["pos.embeds"],
            heard["pos.mask"],
            guidance_scale=3.0,
            audio=Audio(heard["one.segment0"], None, 4.5),
            cond_latents=heard["image.latent"],
            reference=ReferenceFrame(heard["image.latent"], Reference(5, 1)),
            **given,
        )

    check(group, avatar(), run)


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_rank_holds_its_share_and_two_blocks(ranks):
    depth, model = 12, network(depth=12)
    block = sum(p.nbytes for p in model.blocks[0].parameters())
    with start([CPU] * ranks, MEASURED) as group, torch.no_grad():
        share(group, model)
        video(model)
        whole = held(group, ranks - 1)
        share(group, model, range(depth))
        video(model)
        divided = held(group, ranks - 1)
        shards, slots = model.stream.shards.values(), model.stream._slots
        own = sum(shard.share.nbytes for shard in shards) + sum(slot.buffer.nbytes for slot in slots)
    # Alignment adds a little to each weight.
    wanted = (depth / ranks + 2) * block
    assert wanted <= own < 1.05 * wanted
    assert divided == pytest.approx(whole - depth * block + own, abs=block / 10)


def test_an_exception_in_a_pass_ends_the_group_and_the_network_can_join_another():
    def fails(i: int, run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        if i == 1:
            raise ZeroDivisionError
        return run(x)

    fails.changes = False  # type: ignore[attr-defined]
    model = network(depth=3)
    with torch.no_grad():
        wanted = video(model)
        with pytest.raises(ZeroDivisionError), start([CPU] * 2) as group:
            share(group, model, range(3))
            video(model, around_block=fails)
        with pytest.raises(LongCatError, match="were ended"):
            video(model)
        with start([CPU] * 2) as group:
            share(group, model, (0, 2))
            agree(video(model), wanted)


def test_ranks_gather_fast_between_gpus_of_one_host_by_nccl(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    gpus = [torch.device("cuda", at) for at in range(2)]
    assert gathers_fast(gpus) and not gathers_fast(gpus[:1]) and not gathers_fast([CPU, CPU])
    for local, fast in (("2", True), ("1", False)):
        for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": local}.items():
            monkeypatch.setenv(name, value)
        assert gathers_fast(gpus) == fast
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    assert not gathers_fast(gpus)


def test_another_network_takes_the_place_of_the_first(monkeypatch):
    """Both at once would not fit."""
    monkeypatch.setattr(mirror.Division, "of", lambda group: None)
    follower, build = mirror.Follower(cast(Group, None)), mirror.Build(network().config, torch.float32, (), ())
    gc.disable()
    try:
        follower.build(build)
        first = weakref.ref(follower.network)
        follower.build(build)
    finally:
        gc.enable()
    assert first() is None
