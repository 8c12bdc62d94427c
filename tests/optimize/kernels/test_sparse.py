"""The kernels of sparse attention against their definition, in Triton's interpreter on a machine without a GPU.

In fp16: the interpreter rounds bf16 toward zero.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from longcat_core.errors import BackendUnavailable
from longcat_core.optimize.kernels import sparse, sparse_choose, sparse_exact, sparse_tail
from longcat_core.optimize.kernels.sparse_fp8 import quantize
from longcat_core.optimize.kernels.sparse_tail import TailTiles
from longcat_core.optimize.requirement import Inputs

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def qkv(queries: int, keys: int, heads: int = 2, dim: int = 64, batch: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values are slices of one projection; keys share a large part, as in video models."""
    generator = torch.Generator().manual_seed(queries + keys)
    q = torch.randn((batch, queries, heads, dim), generator=generator) * 2
    kv = torch.randn((batch, keys, 2 * heads * dim), generator=generator)
    k, v = kv.to(DEVICE, torch.float16).chunk(2, dim=-1)
    return q.to(DEVICE, torch.float16), k.unflatten(-1, (heads, dim)) + 1, v.unflatten(-1, (heads, dim))


def brute_force(q: Tensor, k: Tensor, v: Tensor, listed: Tensor, query_block: int, tail: bool) -> Tensor:
    """One softmax over all keys and all means. listed: [B, heads, query blocks, blocks] bool."""
    blocks = k.shape[1] // 64
    rows = listed.repeat_interleave(query_block, 2)[:, :, : q.shape[1]]
    q, k, v = (x.float().transpose(1, 2) for x in (q, k, v))
    means_k, means_v = (x[:, :, : 64 * blocks].unflatten(2, (-1, 64)).mean(3).half().float() for x in (k, v))
    keys = rows.repeat_interleave(64, 3)
    keys = torch.cat([keys, keys.new_ones((*keys.shape[:3], k.shape[2] - keys.shape[3]))], dim=3)
    logits = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).masked_fill(~keys, -math.inf)
    if tail:
        other = q @ means_k.transpose(-1, -2) * q.shape[-1] ** -0.5 + math.log(64)
        logits, v = torch.cat([logits, other.masked_fill(rows, -math.inf)], dim=3), torch.cat([v, means_v], dim=2)
    return (logits.softmax(-1) @ v).transpose(1, 2)


def listed_blocks(chosen: sparse_choose.Chosen, blocks: int) -> Tensor:
    """The lists as [B, heads, query blocks, blocks] bool."""
    out = torch.zeros((*chosen.counts.shape, blocks + 1), dtype=torch.bool, device=chosen.counts.device)
    there = torch.arange(chosen.indices.shape[-1], device=out.device) < chosen.counts[..., None]
    return out.scatter(3, torch.where(there, chosen.indices, blocks).long(), True)[..., :blocks]


@pytest.mark.parametrize("tokens, block", [(256, 64), (300, 64), (300, 128), (40, 64)])
def test_means_of_blocks(tokens, block):
    _, k, _ = qkv(64, tokens, batch=2)
    found = sparse_choose.block_means(k, block)
    parts = [part.float().mean(1) for part in k.split(block, dim=1)]
    torch.testing.assert_close(found.float(), torch.stack(parts, 2), rtol=2e-3, atol=1e-3)
    assert sparse_choose.block_means(k, block, whole=True).shape[2] == tokens // block


@pytest.mark.parametrize("sink", [0, 3])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_choice_with_ties_a_sink_and_heads_of_their_own(sink, dtype):
    generator = torch.Generator().manual_seed(sink)
    scores = (torch.randn((2, 3, 5, 27), generator=generator) * 3).round().div(3).to(DEVICE, dtype)
    scores[0, 0, 0] = 0
    scores[0, 0, 0, ::2] = -0.0
    scores[1, 2, 1, 5], scores[1, 2, 1, 6] = torch.inf, -torch.inf
    keep = (1, 9, 40)
    chosen = sparse_choose.choose_blocks(scores, keep, sink)
    others = scores.float()[..., sink:]
    for head, most in enumerate(min(n, 27 - sink) for n in keep):
        ranked = others[:, head].sort(dim=-1, descending=True, stable=True).indices[..., :most].sort(-1).values + sink
        wanted = torch.cat([torch.arange(sink, device=DEVICE).expand(2, 5, sink), ranked], dim=-1)
        assert (chosen.counts[:, head] == sink + most).all() and chosen.per_head[head] == sink + most
        assert torch.equal(chosen.indices[:, head, :, : sink + most].long(), wanted)
    assert chosen.mask.shape[-1] == 128 and (chosen.mask[..., 27:] == 1).all()
    assert torch.equal(chosen.mask[..., :27].bool(), listed_blocks(chosen, 27))


TILES = {
    "as on other GPUs": None,
    "two query blocks a tile": TailTiles(128, 64, 8, 2, False),
    "by TMA": TailTiles(64, 64, 4, 2, True),
    "wide, two query blocks, by TMA": TailTiles(128, 128, 8, 2, True),
}


@pytest.mark.parametrize("tiles", TILES.values(), ids=TILES)
@pytest.mark.parametrize("queries, keys, query_block", [(256, 320, 64), (200, 331, 64), (200, 331, 128)])
def test_whole_and_ragged_shapes(tiles, queries, keys, query_block, monkeypatch):
    if tiles is not None:
        monkeypatch.setattr(sparse_tail, "choose_tail_tiles", lambda _: tiles)
    q, k, v = qkv(queries, keys)
    chosen, _ = sparse.choose(q, k, (1, 2), 1, query_block)
    for tail in (True, False):
        found = sparse.attend_sparse(q, k, v, (1, 2), sink=1, query_block=query_block, tail=tail, kernel="triton")
        wanted = brute_force(q, k, v, listed_blocks(chosen, keys // 64), query_block, tail)
        assert found.shape == q.shape and found.is_contiguous()
        torch.testing.assert_close(found.float(), wanted, rtol=4e-3, atol=4e-3)


def test_shifted_scores_and_other_strides_of_the_exact_part():
    """As the 8-bit kernel leaves it: [B, heads, N, head_dim] of padded queries, keys without their mean."""
    q, k, v = qkv(200, 331)
    chosen, means = sparse.choose(q, k, (2, 2), 0, 64)
    shift = k[:, :320].transpose(1, 2).mean(2, keepdim=True, dtype=torch.float32)
    moved = (k - shift.transpose(1, 2)).to(k.dtype)
    exact = sparse_exact.attend_exact(q, moved, v, chosen, 64, "triton")
    out = torch.full((1, 2, 256, 64), torch.nan, dtype=q.dtype, device=DEVICE)
    sums = torch.full((1, 2, 256), torch.nan, device=DEVICE)
    out[:, :, :200], sums[:, :, :200] = exact.out.transpose(1, 2), exact.sums
    exact = sparse_exact.Exact(out.transpose(1, 2), sums, shift)
    found = sparse.finish(q, k, v, exact, chosen, means, 64, True)
    wanted = brute_force(q, k, v, listed_blocks(chosen, 5), 64, True)
    torch.testing.assert_close(found.float(), wanted, rtol=4e-3, atol=6e-3)


def test_the_exact_part_returns_its_log_sum_exp():
    q, k, v = qkv(200, 200)
    chosen, _ = sparse.choose(q, k, (3, 3), 0, 64)
    found = sparse_exact.attend_exact(q, k, v, chosen, 64, "triton").sums
    logits = (q.float().transpose(1, 2) @ k[:, :192].float().transpose(1, 2).transpose(-1, -2)) / 8
    torch.testing.assert_close(found, logits.logsumexp(-1), rtol=2e-3, atol=2e-3)


@pytest.mark.skipif(DEVICE.type == "cpu", reason="these kernels need a GPU")
@pytest.mark.parametrize("kernel", sparse_exact.NEEDS)
@pytest.mark.parametrize("query_block", [64, 128])
def test_every_kernel_that_runs_here(kernel, query_block):
    q, k, v = (x.bfloat16() for x in qkv(1000, 1300, 3, 128, 2))
    if reason := sparse.NEEDS[kernel].why_not(Inputs.of(q)) or sparse.refuses(kernel, query_block):
        pytest.skip(reason)
    chosen, _ = sparse.choose(q, k, (2, 5, 9), 1, query_block)
    found = sparse.attend_sparse(q, k, v, (2, 5, 9), sink=1, query_block=query_block, tail=True, kernel=kernel)
    wanted = brute_force(q, k, v, listed_blocks(chosen, 20), query_block, True)
    assert (found - wanted).norm() / wanted.norm() < (0.08 if kernel in sparse.LOSSY else 0.02)


def test_queries_keys_and_values_in_8_bits():
    """Scales by query, by 16 keys and by channel of the values; keys without their mean; queries padded."""
    q, k, v = qkv(200, 192, batch=2)
    packed, mean = quantize(q, k, v)
    q, k, v = (x.float().transpose(1, 2) for x in (q, k, v))
    torch.testing.assert_close(mean, k.mean(2, keepdim=True), rtol=1e-4, atol=1e-4)
    assert (packed.q[:, :, 200:].float() == 0).all() and packed.q.shape[2] == 256
    k = k - mean
    for found, wanted in (
        ((packed.q.float() * packed.q_scale[..., None])[:, :, :200], q),
        (packed.k.float() * packed.k_scale.repeat_interleave(16, 2)[..., None], k),
        ((packed.v.float() * packed.v_scale[..., None]).transpose(2, 3), v),
    ):
        # e4m3 has 3 bits behind the leading one. The interpreter loses the carry of what rounds up to a power of two.
        right = (found - wanted).abs() <= wanted.abs() / 16 + 1e-3
        carried = (found * 2 - wanted).abs() <= wanted.abs() / 16
        assert (right if DEVICE.type == "cuda" else right | carried).all() and right.float().mean() > 0.95
    torch.testing.assert_close(packed.q_scale[..., :200], q.abs().amax(3) / 448)
    torch.testing.assert_close(packed.k_scale, k.unflatten(2, (-1, 16)).abs().amax((3, 4)) / 448)
    torch.testing.assert_close(packed.v_scale, v.abs().amax((0, 2)) / 448)


def test_reasons():
    q, k, v = qkv(128, 192)
    assert "it runs on CUDA, the tensors are on cpu" in sparse.NEEDS["triton"].why_not(Inputs.of(q.cpu()))
    assert "64 tokens, not 128" in sparse.refuses("cudnn", 128)
    assert not sparse.refuses("fa4", 128) and not sparse.refuses("cudnn", 64)
    options = {"sink": 0, "query_block": 64, "tail": True, "kernel": "sol"}
    with pytest.raises(BackendUnavailable, match="as many queries as keys"):
        sparse.attend_sparse(q, k, v, (1, 1), **options)
    with pytest.raises(BackendUnavailable, match="one density for all heads"):
        sparse.attend_sparse(q, q, q, (1, 2), **options)


def test_the_fastest_kernel_is_found_once(monkeypatch):
    q, k, v = qkv(128, 192)
    monkeypatch.setattr(sparse, "_fastest", {})
    options = {"sink": 0, "query_block": 64, "tail": True}
    found = sparse.attend_fastest(q, k, v, torch.tensor([1, 1]), kernels=("triton",), **options)
    assert torch.equal(found, sparse.attend_sparse(q, k, v, (1, 1), kernel="triton", **options))
    assert list(sparse._fastest.values()) == ["triton"]
