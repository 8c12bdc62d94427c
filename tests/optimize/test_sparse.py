"""Sparse attention by itself: the order of tokens, the definition against a masked softmax in fp64, and its kernels."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from longcat_core.errors import BackendUnavailable
from longcat_core.model.rope import rope_table
from longcat_core.optimize.requirement import Inputs
from longcat_core.optimize.sparse import choose, plain
from longcat_core.optimize.sparse.choose import attend_sparse, check_sparse, choose_sparse
from longcat_core.optimize.sparse.layout import SparseLayout, choose_box, lane_order
from longcat_core.optimize.sparse.plain import attend_sparse_plain
from longcat_core.optimize.sparse.settings import SPARSE_KERNELS, Sparse

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
GRIDS = [(24, 30, 52), (21, 30, 40), (23, 30, 52), (13, 9, 11), (7, 17, 23), (5, 45, 80), (24, 15, 26), (2, 16, 16)]


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# --- the order of tokens ---------------------------------------------------------------------------------------------


def places(grid: tuple[int, int, int]) -> Tensor:
    """Frame, row and column of every token in its order, [N, 3]."""
    return torch.stack(torch.unravel_index(lane_order(grid, choose_box(grid)), grid), dim=1)


def test_a_grid_that_boxes_divide_becomes_these_boxes():
    assert choose_box((24, 30, 52)) == (8, 2, 4)
    blocks = places((24, 30, 52)).unflatten(0, (585, 64))
    corner = blocks.min(1).values
    assert torch.equal(blocks.max(1).values - corner, torch.tensor([7, 1, 3]).expand(585, 3))
    assert not (corner % torch.tensor([8, 2, 4])).any() and len(corner.unique(dim=0)) == 585
    assert choose_box((16, 12, 20)) == (4, 4, 4)
    # A column of 64 tokens would divide this grid as well.
    assert choose_box((1, 64, 47)) == (1, 8, 8)


@pytest.mark.parametrize("grid", GRIDS)
def test_consecutive_tokens_are_neighbors(grid):
    at = places(grid)
    # 64 tokens anywhere, not only those of a block: cached keys and conditioning frames shift where blocks begin.
    windows = at.unfold(0, 64, 1)
    sides = windows.max(2).values - windows.min(2).values + 1
    # A box of 8x2x4 has sides of 14 in all; of these frames in their own order 64 tokens span more than a row.
    assert sides.sum(1).max() <= 22 and sides.sum(1).float().mean() <= 16
    assert (at[1:] - at[:-1]).abs().max() <= 8


@pytest.mark.parametrize("grid", [*GRIDS, (1, 1, 1), (1, 3, 5), (40, 1, 3), (3, 5, 200)])
@pytest.mark.parametrize("cond", [0, 1, 3])
def test_layout_is_a_permutation_that_restore_inverts(grid, cond):
    cond = min(cond, grid[0])
    layout = SparseLayout(grid, cond, torch.device("cpu"))
    n, before = math.prod(grid), cond * grid[1] * grid[2]
    assert torch.equal(layout.order.sort().values, torch.arange(n))
    assert torch.equal(layout.order[:before], torch.arange(before)), "conditioning frames keep their order"
    assert n - before < 64 or not torch.equal(layout.order, torch.arange(n))
    tokens = torch.arange(2 * n * 3).view(2, grid[0], grid[1] * grid[2], 3)
    arranged = layout.arrange(tokens)
    assert arranged.shape == tokens.shape and arranged.is_contiguous()
    assert torch.equal(arranged.flatten(1, 2)[0], tokens.flatten(1, 2)[0, layout.order])
    assert torch.equal(layout.restore(arranged), tokens)
    assert torch.equal(layout.restore_rows(arranged.flatten(1, 2)), tokens.flatten(1, 2))
    assert layout.sizes(grid) == (grid[0], grid[1] * grid[2]) and layout.leading(cond) == cond


def test_positions_move_with_their_tokens():
    grid = (13, 9, 11)
    layout = SparseLayout(grid, 2, torch.device("cpu"))
    for table, plain_table in zip(
        layout.rope(24, grid, 5, torch.device("cpu")), rope_table(24, *grid, 5, torch.device("cpu")), strict=True
    ):
        assert torch.equal(table, plain_table[layout.order]) and not torch.equal(table, plain_table)


# --- the definition --------------------------------------------------------------------------------------------------


def inputs(
    n_q: int, n_k: int, batch: int = 2, heads: int = 3, dim: int = 16, dtype=torch.float64
) -> tuple[Tensor, ...]:
    return tuple(randn(batch, n, heads, dim, seed=seed, dtype=dtype) for seed, n in enumerate((n_q, n_k, n_k)))


def masked_softmax(q, k, v, keep, sink, query_block, tail) -> Tensor:
    """Sparse attention query by query from its definition: one softmax over all keys and all means, in fp64."""
    q, k, v = (x.double() for x in (q, k, v))
    out, n = torch.empty_like(q), k.shape[1] // 64
    own = torch.arange(k.shape[1]) // 64
    for b in range(q.shape[0]):
        for h in range(q.shape[2]):
            means_k = torch.stack([k[b, own == j, h].mean(0) for j in range(n)]) if n else k.new_zeros(0, q.shape[3])
            means_v = torch.stack([v[b, own == j, h].mean(0) for j in range(n)]) if n else means_k
            for i in range(q.shape[1]):
                block = i // query_block * query_block
                scores = means_k @ q[b, block : block + query_block, h].mean(0)
                best = sorted(range(sink, n), key=lambda j: (-float(scores[j]), j))[: int(keep[h])]
                near = {*range(min(sink, n)), *best}
                logits = k[b, :, h] @ q[b, i, h] / q.shape[3] ** 0.5
                logits[[j not in near and j < n for j in own.tolist()]] = -math.inf
                pooled = means_k @ q[b, i, h] / q.shape[3] ** 0.5 + math.log(64)
                pooled[[j in near or not tail for j in range(n)]] = -math.inf
                weights = torch.cat((logits, pooled)).softmax(0)
                out[b, i, h] = weights @ torch.cat((v[b, :, h], means_v))
    return out


CASES = {
    "whole blocks": (320, 320, 0, 64),
    "a remainder": (350, 350, 0, 64),
    "query blocks of 128": (350, 350, 0, 128),
    "conditioning frames in front": (250, 350, 2, 64),
    "few queries": (10, 340, 1, 64),
    "more sink than blocks": (70, 340, 9, 64),
    "keys of less than a block": (30, 40, 1, 64),
}


@pytest.mark.parametrize("tail", [True, False], ids=["tail", "no tail"])
@pytest.mark.parametrize("case", CASES)
def test_definition_equals_a_masked_softmax(case, tail):
    n_q, n_k, sink, query_block = CASES[case]
    q, k, v = inputs(n_q, n_k)
    others = max(0, n_k // 64 - sink)
    keep = torch.tensor([min(others, kept) for kept in (1, 2, 5)], dtype=torch.int32)
    out = attend_sparse_plain(q, k, v, keep, sink=sink, query_block=query_block, tail=tail)
    assert out.dtype == q.dtype and out.shape == q.shape
    assert torch.allclose(out, masked_softmax(q, k, v, keep, sink, query_block, tail), atol=1e-12)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("tail", [True, False])
def test_all_blocks_are_dense_attention(device, dtype, tolerance, tail):
    q, k, v = (x.to(device) for x in inputs(260, 350, dtype=dtype))
    keep = torch.full((3,), 4, dtype=torch.int32)
    out = attend_sparse_plain(q, k, v, keep, sink=1, query_block=64, tail=tail)
    expected = scaled_dot_product_attention(*(x.double().transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    assert (out.double() - expected).norm() <= tolerance * expected.norm()


def test_a_tail_keeps_the_denominator_whole():
    """Of equal keys within blocks nothing is lost; without a tail the weights of the others are missing."""
    q, k, v = inputs(320, 384)
    k, v = (x[:, :6].repeat_interleave(64, dim=1) for x in (k, v))
    keep = torch.ones(3, dtype=torch.int32)
    expected = scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    outs = [attend_sparse_plain(q, k, v, keep, sink=0, query_block=64, tail=tail) for tail in (True, False)]
    assert torch.allclose(outs[0], expected, atol=1e-12) and not torch.allclose(outs[1], expected, atol=0.1)


def test_pieces_of_any_size_give_the_same(monkeypatch):
    q, k, v = inputs(350, 350, dtype=torch.float32)
    keep = torch.tensor([1, 2, 3], dtype=torch.int32)
    options = {"sink": 1, "query_block": 64, "tail": True}
    whole = attend_sparse_plain(q, k, v, keep, **options)
    monkeypatch.setattr(plain, "_GATHERED_BYTES", 1)
    assert torch.allclose(attend_sparse_plain(q, k, v, keep, **options), whole, atol=1e-6)


# --- kernels ---------------------------------------------------------------------------------------------------------


def test_kernels_are_chosen_by_name_or_auto():
    on_cpu = Inputs(torch.device("cpu"), torch.float32, 16, False)
    assert choose_sparse("auto", on_cpu, 64, True).name == "plain"
    assert {"auto", *(backend.name for backend in choose.BACKENDS)} == {*SPARSE_KERNELS}
    q, k, v = inputs(350, 350, dtype=torch.float32)
    keep = torch.tensor([1, 2, 3], dtype=torch.int32)
    options = {"sink": 1, "query_block": 128, "tail": False}
    out = attend_sparse(q, k, v, keep, **options)
    assert torch.equal(out, attend_sparse_plain(q, k, v, keep, **options))


def sol_attn(q: Tensor, k: Tensor, v: Tensor, keep: int, sink: int) -> Tensor:
    """Sol-Attn's rule (arXiv 2607.24027): beside the sink and the best blocks, a block's neighbors are exact, and the
    others count by the mean query."""
    blocks, scale = q.shape[1] // 64, q.shape[-1] ** -0.5
    means = [x.unflatten(1, (blocks, 64)).mean(2).transpose(1, 2) for x in (q, k, v)]
    scores = scale * means[0] @ means[1].mT
    ranked = scores.clone()
    ranked[..., :sink] = -torch.inf
    at = torch.arange(blocks)
    exact = (ranked >= ranked.topk(keep).values[..., -1:]) | (at < sink) | ((at[:, None] - at).abs() <= 1)
    exact, scores = (x.repeat_interleave(64, 2) for x in (exact, scores))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    near = (scale * q @ k.mT).masked_fill(~exact.repeat_interleave(64, 3), -torch.inf)
    logits = torch.cat([near, (scores + math.log(64)).masked_fill(exact, -torch.inf)], -1)
    return (logits.softmax(-1) @ torch.cat([v, means[2]], 2)).transpose(1, 2)


def test_sol_attn_is_tried_with_tokens_for_which_it_is_the_definition():
    q, k, v = (randn(1, 9 * 64, 2, 128, seed=seed, dtype=torch.float64) for seed in range(3))
    keep = torch.tensor([3, 3], dtype=torch.int32)
    options = {"sink": 1, "query_block": 64, "tail": True}
    near = *choose.neighborly(q, k), v
    torch.testing.assert_close(sol_attn(*near, 3, 1), attend_sparse_plain(*near, keep, **options))
    random = sol_attn(q, k, v, 3, 1) - attend_sparse_plain(q, k, v, keep, **options)
    assert random.norm() > 0.25 * v.mean(1).norm()


def test_what_runs_in_words():
    inputs = Inputs(torch.device("cpu"), torch.float32, 64, False)
    assert choose.in_use(Sparse(0.3, dense_steps=0.5), inputs) == "density 0.3, dense steps 0.5, kernel plain"
    refused = choose.in_use(Sparse(0.3, kernel="sol"), inputs)
    assert refused.startswith("density 0.3 (sparse kernel 'sol' cannot run here: ")


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernel may run")
def test_a_kernel_that_cannot_run_is_refused_by_name():
    with pytest.raises(BackendUnavailable, match="sparse kernel 'fa4' cannot run here"):
        choose_sparse("fa4", Inputs(torch.device("cpu"), torch.bfloat16, 128, False), 64, True)
    with pytest.raises(BackendUnavailable, match="sparse kernel 'fa4' is unavailable"):
        check_sparse("fa4")
    check_sparse("auto")
    check_sparse("plain")


class OneKernel:
    """Kernels of a GPU whose kernels were not measured, without the GPU."""

    def __init__(self, monkeypatch, able: set[str]) -> None:
        self.calls: list[tuple[str, ...]] = []
        monkeypatch.setattr(
            choose.SparseBackend, "why_not", lambda own, *_: "" if own.name in able else f"no {own.name}"
        )
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (12, 0))
        monkeypatch.setattr(choose.kernels, "attend_fastest", self.fastest)

    def fastest(self, q, k, v, keep, *, kernels, **options):
        self.calls.append(kernels)
        return attend_sparse_plain(q, k, v, keep, **options)


def test_auto_measures_where_nobody_did(monkeypatch):
    given = Inputs(torch.device("cuda"), torch.bfloat16, 128, False)
    kernels = OneKernel(monkeypatch, {"cudnn", "triton", "sol", "plain"})
    chosen = choose_sparse("auto", given, 64, True)
    q, k, v = inputs(350, 350, dtype=torch.float32)
    chosen.attend(q, k, v, torch.tensor([1, 2, 3]), sink=0, query_block=64, tail=True)
    assert chosen.name == "auto" and kernels.calls == [("cudnn", "triton")], "no lossy one"
    assert choose_sparse("triton", given, 64, True).name == "triton"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert choose_sparse("auto", given, 64, True).name == "cudnn", "the first one where they were measured"
    OneKernel(monkeypatch, {"fa4", "cudnn", "triton", "plain"})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert [choose_sparse("auto", given, block, True).name for block in (64, 128)] == ["cudnn", "fa4"]
    OneKernel(monkeypatch, {"triton", "plain"})
    assert choose_sparse("auto", given, 64, True).name == "triton"
    OneKernel(monkeypatch, {"sol", "plain"})
    assert choose_sparse("auto", given, 64, True).name == "plain"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="kernels run on CUDA")
@pytest.mark.parametrize("name", [backend.name for backend in choose.BACKENDS])
@pytest.mark.parametrize("case", ["whole blocks", "a remainder", "conditioning frames in front", "few queries"])
@pytest.mark.parametrize("tail", [True, False], ids=["tail", "no tail"])
def test_kernels_that_are_offered_equal_the_definition(name, case, tail):
    n_q, n_k, sink, query_block = CASES[case]
    q, k, v = (x.cuda() for x in inputs(n_q, n_k, heads=4, dim=128, dtype=torch.bfloat16))
    backend = next(backend for backend in choose.BACKENDS if backend.name == name)
    if backend.uniform or (reason := backend.why_not(Inputs.of(q), query_block, tail)):
        pytest.skip("it takes other inputs" if backend.uniform else reason)
    keep = torch.tensor([1, 2, 3, 2], dtype=torch.int32)
    options = {"sink": sink, "query_block": query_block, "tail": tail}
    out, expected = backend.attend(q, k, v, keep, **options), attend_sparse_plain(q, k, v, keep, **options)
    error = (out.double() - expected.double()).norm() / expected.double().norm()
    assert error <= (0.02 if backend.exact else 0.25)
