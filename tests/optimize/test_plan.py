"""What is chosen for how much memory, at the released model's sizes."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from longcat_core.model.config import AudioConfig, ModelConfig
from longcat_core.optimize.kv_offload import OffloadableKVCache
from longcat_core.optimize.memory import kv_cache_bytes
from longcat_core.optimize.optimized import OptimizedTransformer
from longcat_core.optimize.plan import (
    GIB,
    Plan,
    Weights,
    Work,
    choose_plan,
    needed_bytes,
    plans,
    smaller,
)
from longcat_core.optimize.quantization import Policy, quantize

from ..support.tiny import tiny_config

FULL = ModelConfig()
SMALL = tiny_config(depth=5)
# Text and image to video at 480p, 93 frames; continuation; what refining makes of it.
T2V = Work((1, 16, 24, 60, 104))
VC = Work((1, 16, 24, 60, 104), cond_latents=4)
REFINE = Work((1, 16, 48, 88, 160), guided=False)
UMT5 = int(10.6 * GIB)


def chosen(gib: float, work: Work = T2V, fp8: bool = False, **options: object) -> tuple[Plan, float]:
    weights = Weights.of(FULL, torch.bfloat16, Policy() if fp8 else None)
    plan, needed = choose_plan(FULL, weights, work, 2, free=int(gib * GIB), own=True, **options)
    return plan, needed / GIB


@pytest.mark.parametrize("fp8", [None, Policy(), Policy(("ffn.down", "attn.qkv")), Policy(keep_first=2, keep_last=1)])
@pytest.mark.parametrize("audio", [None, AudioConfig(channels=8, hidden=16, width=48, tokens=4)])
def test_weights_are_counted_as_they_lie(fp8, audio):
    config = replace(SMALL, audio=audio)
    model = OptimizedTransformer(config, dtype=torch.bfloat16).requires_grad_(False)
    if fp8 is not None:
        quantize(model, fp8)
    blocks = sum(p.nbytes for p in model.blocks.parameters())
    weights = Weights.of(config, torch.bfloat16, fp8)
    assert weights.rest == sum(p.nbytes for p in model.parameters()) - blocks
    assert blocks <= SMALL.depth * weights.block <= blocks + SMALL.depth


def test_a_cache_is_counted_as_it_lies():
    cache = OffloadableKVCache(SMALL, 3, 4, 6, dtype=torch.bfloat16)
    assert kv_cache_bytes(SMALL, 3, 8, 12, 2) == cache.nbytes


def test_with_room_for_all_nothing_is_done():
    assert chosen(80, VC, text_encoder=UMT5) == (Plan(), pytest.approx(51, abs=4))
    assert Plan().describe(48) == ""


@pytest.mark.parametrize(
    ("gib", "fp8", "split", "at_least", "at_most"),
    [
        # Exact: 25.3 GiB of weights. 8 bits: 13.3.
        (32, False, False, 0, 0),
        (24, False, True, 8, 16),
        (16, False, True, 15, 28),
        (12, False, True, 23, 36),
        (8, False, True, 30, 48),
        (24, True, False, 0, 0),
        (16, True, True, 1, 12),
        (12, True, True, 6, 24),
        (8, True, True, 20, 40),
    ],
)
def test_480p(gib, fp8, split, at_least, at_most):
    plan, needed = chosen(gib, fp8=fp8, text_encoder=UMT5)
    assert needed <= gib and plan.split_guidance == split and at_least <= plan.streamed <= at_most
    assert plan.stream_text_encoder
    # No more waits than has to.
    if plan.streamed:
        weights = Weights.of(FULL, torch.bfloat16, Policy() if fp8 else None)
        fewer = Plan(plan.streamed - 1, True)
        assert needed_bytes(fewer, FULL, weights, T2V, 2, True, 0) > gib * GIB


def test_keys_of_given_frames_go_before_weights_do():
    plan, _ = chosen(36, VC)
    assert plan == Plan(offload_kv_cache=True)
    plan, needed = chosen(12, VC, fp8=True)
    assert plan.offload_kv_cache and plan.split_guidance and 0 < plan.streamed < 48 and needed <= 12


def test_without_guidance_there_is_nothing_to_split():
    plan, needed = chosen(16, REFINE, fp8=True)
    assert not plan.split_guidance and plan.streamed and needed <= 16


def test_the_smallest_plan_where_nothing_fits():
    plan, needed = chosen(4, VC, text_encoder=UMT5)
    assert plan == Plan(48, True, True, True) and needed > 4


def test_what_is_asked_for_stays():
    least = Plan(streamed=10, split_guidance=True, offload_kv_cache=True)
    assert chosen(80, least=least)[0] == least
    assert all(plan.streamed >= 10 and plan.split_guidance and plan.offload_kv_cache for plan in plans(48, VC, least))
    assert chosen(80, least=Plan(stream_text_encoder=True))[0] == Plan(stream_text_encoder=True)
    assert chosen(20, least=Plan(streamed=10))[0].streamed > 10


def test_several_gpus_divide_weights_before_they_stream_them():
    for ranks in (2, 4):
        plan, needed = chosen(24, ranks=ranks, sharding=True)
        assert plan == Plan(sharded=plan.sharded) and 2 < plan.sharded < 48 and needed <= 24
        weights = Weights.of(FULL, torch.bfloat16)
        fewer = Plan(sharded=plan.sharded - 1)
        assert needed_bytes(fewer, FULL, weights, T2V, 2, True, 0, ranks) > 24 * GIB
    assert chosen(24, ranks=2)[0].sharded == 0
    # What the shares leave too little room for waits in CPU memory.
    plan, needed = chosen(12, ranks=2, sharding=True)
    assert plan.streamed and plan.streamed + plan.sharded == 48 and needed <= 12
    assert chosen(4, ranks=2, sharding=True)[0] == Plan(48, True)
    assert chosen(80, least=Plan(sharded=10), ranks=2)[0] == Plan(sharded=10)


def test_each_half_of_guidance_has_a_gpu():
    """What two GPUs need is what one needs for a half."""
    split, weights = Plan(split_guidance=True), Weights.of(FULL, torch.bfloat16)
    half = needed_bytes(split, FULL, weights, T2V, 2, True, 0)
    assert needed_bytes(Plan(), FULL, weights, T2V, 2, True, 0, 2) == half
    assert needed_bytes(split, FULL, weights, T2V, 2, True, 0, 2) == half


@pytest.mark.parametrize("plan", [Plan(), Plan(3), Plan(sharded=48), Plan(7, sharded=20)])
def test_every_block_has_one_place(plan):
    streamed, sharded = plan.places(48)
    assert (len(streamed), len(sharded)) == (plan.streamed, plan.sharded)
    assert len({*streamed, *sharded}) == plan.streamed + plan.sharded


def test_other_models_take_room_too():
    assert chosen(34)[0] == Plan() and chosen(34, others=4 * GIB)[0] != Plan()


def test_smaller_and_smaller_until_there_is_nothing_left():
    plan, seen = Plan(), []
    while plan is not None:
        seen.append((plan.split_guidance, plan.streamed))
        plan = smaller(plan, 48, True)
    assert seen == [(False, 0), (True, 0), (True, 12), (True, 24), (True, 36), (True, 48)]
    assert smaller(Plan(), 2, False) == Plan(2) and smaller(Plan(2), 2, False) is None


def test_what_was_chosen_is_reported():
    said = Plan(12, True, True, True).describe(48)
    assert re.search("12 of 48 blocks", said) and "guidance" in said and "the KV cache" in said and "text" in said
    assert Plan(sharded=3).describe(48) == "the weights of 3 of 48 blocks divided among the GPUs"


def test_an_avatar_hears_in_three_parts():
    """Keys and values of 24 frames of 32 audio tokens for each part and speaker, beside those of the text."""
    avatar = replace(FULL, audio=AudioConfig())
    weights = Weights.of(avatar, torch.bfloat16)

    def needed(work: Work, plan: Plan, config: ModelConfig = avatar) -> float:
        return (needed_bytes(plan, config, weights, work, 2, own=True, others=0) - 2**29) / 1.04

    split = Plan(split_guidance=True)
    keys = 2 * 48 * 4096 * 2
    heard = 24 * 32 * keys
    assert needed(T2V, split) - needed(T2V, split, FULL) == pytest.approx(3 * heard + 512 * keys, rel=1e-6)
    # Guidance with two equal scales evaluates two parts.
    assert needed(T2V, split) - needed(replace(T2V, parts=2), split) == pytest.approx(heard + 512 * keys, rel=1e-6)
    # Several speakers run part by part in any plan, with as many more tokens.
    duo = replace(T2V, speakers=2)
    assert needed(duo, Plan()) == needed(duo, split) == pytest.approx(needed(T2V, split) + 3 * heard, rel=1e-6)
