"""What a probe says of sparse attention is what the definition does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from longcat_core.measure.probe import LADDER, price
from longcat_core.optimize.sparse.plain import attend_sparse_plain
from longcat_core.optimize.sparse.settings import BLOCK, kept

HEADS, DIM = 3, 16


def random_attention(queries: int, keys: int, seed: int = 0, sharp: float = 2.0) -> tuple[Tensor, Tensor, Tensor]:
    """q [Nq, H, D], k and v [Nk, H, D] of tokens that resemble their neighbors, as those of a video do."""
    generator = torch.Generator().manual_seed(seed)
    walk = torch.randn(keys, HEADS, DIM, generator=generator).cumsum(0)
    k = walk / walk.norm(dim=-1, keepdim=True) * DIM**0.5
    q = sharp * k[-queries:] + torch.randn(queries, HEADS, DIM, generator=generator)
    return q, k, torch.randn(keys, HEADS, DIM, generator=generator)


@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize(("queries", "keys", "query_block"), [(640, 640, 64), (512, 1000, 64), (512, 1003, 128)])
def test_prices_are_what_the_definition_changes(queries: int, keys: int, query_block: int, tail: bool) -> None:
    q, k, v = (x.double() for x in random_attention(queries, keys))
    sink = -(-(keys - queries) // BLOCK)
    found = price(q.unflatten(0, (-1, query_block)), k, v, LADDER, sink=sink, query_block=query_block, tail=tail)

    def sparse(density: float) -> Tensor:
        keep = torch.full((HEADS,), kept((density,), keys // BLOCK - sink)[0], dtype=torch.int32)
        return attend_sparse_plain(q[None], k[None], v[None], keep, sink=sink, query_block=query_block, tail=tail)[0]

    exact = sparse(1.0)
    torch.testing.assert_close(found.size, exact.square().sum((0, 2)))
    for i, density in enumerate(LADDER):
        error = (sparse(density) - exact).square().sum((0, 2))
        torch.testing.assert_close(found.error[:, i], error, msg=lambda said, d=density: f"density {d}: {said}")
    assert (found.mass.diff(dim=1) >= 0).all() and found.mass.min() > 0 and found.mass.max() <= 1
    assert found.error[:, 0].min() > 1e-3 * found.size.max(), "otherwise there is nothing to compare"


def test_no_blocks_hold_more_than_the_best_ones() -> None:
    """Of the softmax, written out: as many blocks for each query block as a density takes, the sink and the rest."""
    q, k, v = (x.double() for x in random_attention(512, 1000))
    # In this order the means of blocks say little of their keys.
    k = 3 * k[torch.randperm(1000, generator=torch.Generator().manual_seed(1))]
    sink, blocks = 8, 1000 // BLOCK
    found = price(q.unflatten(0, (-1, 64)), k, v, LADDER, sink=sink, query_block=64, tail=True)
    weights = torch.einsum("qhd,khd->hqk", q, k).mul(DIM**-0.5).softmax(-1).unflatten(1, (-1, 64)).mean(2)
    each = weights[..., : blocks * BLOCK].unflatten(-1, (-1, BLOCK)).sum(-1)
    always = each[..., :sink].sum(-1) + weights[..., blocks * BLOCK :].sum(-1)
    for i, count in enumerate(kept(LADDER, blocks - sink)):
        best = always + each[..., sink:].topk(count).values.sum(-1)
        torch.testing.assert_close(found.best[:, i], best.mean(1))
    assert (found.best >= found.mass - 1e-12).all() and (found.best > found.mass + 0.01).any()


def test_prices_do_not_depend_on_how_heads_are_grouped(monkeypatch: Any) -> None:
    q, k, v = random_attention(256, 700)
    whole = price(q.unflatten(0, (-1, 64)), k, v, LADDER, sink=2, query_block=64, tail=True)
    monkeypatch.setattr("longcat_core.measure.probe.BYTES", 1)
    apart = price(q.unflatten(0, (-1, 64)), k, v, LADDER, sink=2, query_block=64, tail=True)
    for one, other in zip(whole, apart, strict=True):
        torch.testing.assert_close(one, other)


def test_keys_may_lie_in_another_order() -> None:
    q, k, v = random_attention(256, 700)
    order = torch.randperm(700, generator=torch.Generator().manual_seed(1))
    places = torch.empty_like(order).scatter_(0, order, torch.arange(700))
    settings = {"sink": 2, "query_block": 64, "tail": True}
    expected = price(q.unflatten(0, (-1, 64)), k, v, LADDER, **settings)
    found = price(q.unflatten(0, (-1, 64)), k[places], v[places], LADDER, **settings, order=order)
    for one, other in zip(found, expected, strict=True):
        assert one.equal(other)
