"""Block-sparse attention in plain PyTorch: layouts, choice of chunks, attention, and the golden cases."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from longcat_core.checkpoints.load import load_transformer
from longcat_core.errors import BackendUnavailable, LongCatError
from longcat_core.files.safetensors_io import read_tensors
from longcat_core.model.attention import Groups
from longcat_core.model.config import ModelConfig
from longcat_core.model.rope import rope_table
from longcat_core.optimize import block_sparse
from longcat_core.optimize.block_sparse import (
    BlockSparse,
    attend_grid,
    block_sparse_attend,
    chunk_layout,
    chunked_rope_table,
    pool_chunks,
    select_chunks,
    with_block_sparse,
)
from longcat_core.optimize.fused import TorchOps
from longcat_core.optimize.kernels import block_sparse as kernels
from longcat_core.optimize.requirement import Requirement

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
CPU = torch.device("cpu")


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tokens(grid: tuple[int, int, int], batch: int = 2, heads: int = 2, dim: int = 16) -> tuple[Tensor, ...]:
    return tuple(randn(batch, math.prod(grid), heads, dim, seed=seed) for seed in range(3))


def boxes(grid: tuple[int, int, int], chunk: tuple[int, int, int], cond: int = 0) -> list[list[int]]:
    """The tokens of every chunk, found by going through the grid."""
    found: dict[tuple, list[int]] = {}
    for i in range(math.prod(grid)):
        t, row, column = i // (grid[1] * grid[2]), i // grid[2] % grid[1], i % grid[2]
        t = (0, t // chunk[0]) if t < cond else (1, (t - cond) // chunk[0])
        found.setdefault((*t, row // chunk[1], column // chunk[2]), []).append(i)
    return [found[key] for key in sorted(found)]


def brute_force(q, k, v, grid, settings, cond=0) -> Tensor:
    """Block-sparse attention chunk by chunk from the definition, in fp32, without a layout."""
    out = torch.empty_like(q)
    ends = [cond * grid[1] * grid[2]] * (cond > 0) + [k.shape[1]] * (cond < grid[0])
    key_boxes, query_boxes = (boxes(grid, chunk, cond) for chunk in (settings.chunk, settings.queries))
    means = torch.stack([k[:, box].mean(1) for box in key_boxes])
    for own in query_boxes:
        end = next(end for end in ends if own[-1] < end)
        seen = [box for box in key_boxes if box[-1] < end]
        for b in range(q.shape[0]):
            for h in range(q.shape[2]):
                mean = q[b, own, h].mean(0)
                scores = means[: len(seen), b, h] @ mean
                order = scores.argsort(descending=True).tolist()
                keep = settings.kept(len(seen))
                if settings.cdf_threshold is not None:
                    mass = (scores[order] * q.shape[-1] ** -0.5).softmax(0).cumsum(0)
                    keep = max(keep, int((mass <= settings.cdf_threshold).sum()), 1)
                at = [i for j in order[:keep] for i in seen[j]]
                weights = (q[b, own, h] @ k[b, at, h].T * q.shape[-1] ** -0.5).softmax(-1)
                out[b, own, h] = weights @ v[b, at, h]
    return out


def attend_cond(q: Tensor, k: Tensor, v: Tensor, grid: tuple, settings: BlockSparse, cond: int) -> Tensor:
    """Attention in (frames, rows, columns) order, by queries of all frames, or of those behind `cond` clean ones."""
    layout = chunk_layout(grid, settings.chunk, settings.query_chunk, cond)
    attend, k, v = block_sparse_attend(layout, settings), layout.arrange(k), layout.arrange(v)
    slots, n = layout.cond_slots, cond * grid[1] * grid[2]
    if q.shape[1] < math.prod(grid):
        return attend(q.index_select(1, layout.order[slots:] - n), k, v).index_select(1, layout.places[n:] - slots)
    q = layout.arrange(q)
    clean = [attend(q[:, :slots], k[:, :slots], v[:, :slots])] if cond else []
    return layout.restore(torch.cat((*clean, attend(q[:, slots:], k, v)), dim=1))


SETTINGS = {
    "top-k": BlockSparse(sparsity=0.6, chunk=(2, 2, 2)),
    "cdf": BlockSparse(sparsity=None, cdf_threshold=0.5, chunk=(2, 2, 2)),
    "both": BlockSparse(sparsity=0.7, cdf_threshold=0.4, chunk=(2, 2, 2)),
    "one chunk": BlockSparse(sparsity=1.0, chunk=(2, 4, 2)),
    "larger query chunks": BlockSparse(sparsity=0.6, chunk=(2, 2, 2), query_chunk=(2, 2, 4)),
    "odd chunks": BlockSparse(sparsity=0.5, chunk=(3, 1, 3), query_chunk=(3, 2, 3)),
}


@pytest.mark.parametrize("cond", [0, 1, 2])
@pytest.mark.parametrize("grid", [(4, 4, 2), (5, 3, 5)])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_it_is_what_the_definition_says(settings, grid, cond):
    q, k, v = tokens(grid, batch=1)
    wanted = brute_force(q, k, v, grid, settings, cond)
    found = attend_cond(q, k, v, grid, settings, cond)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    # Queries of the noise frames alone, as with a cache of the conditioning frames.
    n = cond * grid[1] * grid[2]
    found = attend_cond(q[:, n:], k, v, grid, settings, cond)
    torch.testing.assert_close(found, wanted[:, n:], rtol=1e-5, atol=1e-5)


def test_cdf_keeps_different_numbers(monkeypatch):
    grid, settings = (6, 6, 6), SETTINGS["cdf"]
    layout = chunk_layout(grid, settings.chunk)
    q, k, _ = (layout.arrange(x) for x in tokens(grid, dim=64))
    pooled = (pool_chunks(x, layout.sizes, layout.q_chunk) for x in (q, k))
    scores = block_sparse.chunk_scores(*pooled)
    indices, counts = select_chunks(scores, settings, layout.sizes, layout.used, 0.5)
    assert len(counts.unique()) > 2 and counts.min() >= 1
    for row, count in zip(indices.flatten(0, -2), counts.flatten(), strict=True):
        assert (row[:count].diff() > 0).all()
    monkeypatch.setattr(block_sparse, "_SORTED_BYTES", 1 << 13)  # a few rows at a time
    for found, whole in zip(
        select_chunks(scores, settings, layout.sizes, layout.used, 0.5), (indices, counts), strict=True
    ):
        assert torch.equal(found, whole)
    nearly_all, counts = select_chunks(scores, BlockSparse(None, 1.0), layout.sizes, layout.used, 0.5)
    assert (counts >= layout.used - 1).all() and nearly_all.max() < layout.used


def test_nothing_left_out_is_full_attention():
    grid = (3, 5, 6)
    q, k, v = tokens(grid)
    full = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    found = attend_grid(q, k, v, grid, BlockSparse(sparsity=0.0, chunk=(2, 4, 4)))
    torch.testing.assert_close(found, full, rtol=1e-5, atol=1e-5)


def test_memory_is_bounded_by_parts(monkeypatch):
    grid, settings = (4, 6, 6), BlockSparse(sparsity=0.5, chunk=(2, 2, 2))
    q, k, v = tokens(grid)
    whole = attend_grid(q, k, v, grid, settings)
    sizes = []
    sdpa = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, *a: sizes.append(k.nbytes) or sdpa(q, k, *a))
    monkeypatch.setattr(block_sparse, "_GATHERED_BYTES", 1 << 17)
    torch.testing.assert_close(attend_grid(q, k, v, grid, settings), whole)
    assert len(sizes) > 2 and max(sizes) <= 1 << 16


def test_gradients_flow():
    grid = (2, 4, 4)
    q, k, v = (x.requires_grad_() for x in tokens(grid))
    attend_grid(q, k, v, grid, BlockSparse(sparsity=0.5, chunk=(2, 2, 2))).square().sum().backward()
    assert all(x.grad is not None and x.grad.isfinite().all() and x.grad.any() for x in (q, k, v))


@pytest.mark.parametrize("cond", [0, 1, 3])
@pytest.mark.parametrize("grid", [(4, 8, 8), (5, 6, 9), (6, 4, 3)])
@pytest.mark.parametrize("query", [None, (4, 4, 8)])
def test_layout(grid, query, cond):
    layout = chunk_layout(grid, (4, 4, 4), query, cond)
    n = math.prod(grid)
    x = torch.arange(n)[None]
    laid = layout.arrange(x)
    assert torch.equal(layout.restore(laid), x)
    assert laid.shape == (1, layout.slots) and layout.slots == 64 * len(layout.sizes)
    assert layout.q_chunk == (64 if query is None else 128) and layout.slots % layout.q_chunk == 0
    assert layout.padded == (layout.slots != n)
    # Real tokens of a chunk come first; they are one box of the grid.
    chunks = laid.view(-1, 64)
    found = [chunk[:size].tolist() for chunk, size in zip(chunks, layout.sizes, strict=True) if size]
    assert sorted(found) == sorted(boxes(grid, (4, 4, 4), cond)) and len(found) == layout.used
    assert sum(map(len, found)) == n
    if query:
        real = layout.sizes.view(-1, 2)
        pairs = [
            torch.cat([c[:s] for c, s in zip(cs, ss, strict=True)])
            for cs, ss in zip(chunks.view(-1, 2, 64), real, strict=True)
        ]
        assert sorted(sorted(p.tolist()) for p in pairs) == sorted(boxes(grid, query, cond))
    # Slabs stand for frames: every token of one has the timestep of its first frame, and none is of both kinds.
    frames = (laid // (grid[1] * grid[2])).view(layout.slabs, -1)
    assert (frames >= layout.slab_frames[:, None]).all() and (frames < layout.slab_frames[:, None] + 4).all()
    assert layout.cond_slots == layout.cond_slabs * layout.slots // layout.slabs
    assert (frames[: layout.cond_slabs] < cond).all() and (frames[layout.cond_slabs :] >= cond).all()
    assert layout.cond_used == sum(box[0] < cond * grid[1] * grid[2] for box in found)


def test_a_layout_is_made_once():
    assert chunk_layout((4, 4, 4), (2, 2, 2)) is chunk_layout((4, 4, 4), (2, 2, 2))


def test_a_network_may_stay_laid_out():
    """Tokens, RoPE tables and cached keys that are laid out before give what permuting around attention gives."""
    grid, cond, settings = (5, 3, 5), 2, SETTINGS["top-k"]
    q, k, v = tokens(grid)
    layout = chunk_layout(grid, settings.chunk, None, cond)
    wanted = attend_cond(q, k, v, grid, settings, cond)
    attend = block_sparse_attend(layout, settings)
    laid_q, laid_k, laid_v = (layout.arrange(x) for x in (q, k, v))
    n = layout.cond_slots
    cond_out, noise_out = attend(laid_q[:, :n], laid_k[:, :n], laid_v[:, :n]), attend(laid_q[:, n:], laid_k, laid_v)
    torch.testing.assert_close(layout.restore(torch.cat((cond_out, noise_out), dim=1)), wanted)

    # With a cache: its keys in a layout of their own, and the noise frames in theirs.
    first, rest = (
        chunk_layout((frames, *grid[1:]), settings.chunk, None, part) for frames, part in ((cond, cond), (3, 0))
    )
    cut = cond * grid[1] * grid[2]
    cached = [torch.cat((first.arrange(x[:, :cut]), rest.arrange(x[:, cut:])), dim=1) for x in (k, v)]
    out = rest.restore(attend(rest.arrange(q[:, cut:]), *cached))
    torch.testing.assert_close(out, wanted[:, cut:])

    tables = chunked_rope_table(16, layout, 3, CPU)
    for table, plain in zip(tables, rope_table(16, *grid, 3, CPU), strict=True):
        assert torch.equal(layout.restore(table, 0), plain)


class LaidOut:
    """The small network with its tokens laid out from the first block to the last."""

    def __init__(self, settings: BlockSparse) -> None:
        self.settings = settings
        self.model = load_transformer(GOLDEN / "dit.safetensors", config=ModelConfig.from_json(GOLDEN / "config.json"))
        self.data = read_tensors(GOLDEN / "forward.safetensors")

    def __call__(self, x: Tensor, timestep: Tensor, cond: int = 0, cached_frames: int = 0) -> Tensor:
        model, settings = self.model, self.settings
        patches = model.patch_embed(x)
        grid = tuple(patches.shape[2:])
        tokens = patches.flatten(2).transpose(1, 2)
        layout = chunk_layout(grid, settings.chunk, settings.query_chunk, cond)
        keys, cache, cache_layout = layout, None, None
        if cached_frames:
            clean = self.data["x"][:1, :, :cached_frames]
            cache = model.fill_kv_cache(clean)
            keys = chunk_layout(
                (cached_frames + grid[0], *grid[1:]), settings.chunk, settings.query_chunk, cached_frames
            )
            cache_layout = chunk_layout((cached_frames, *grid[1:]), settings.chunk, settings.query_chunk)
        tokens = layout.arrange(tokens).unflatten(1, (layout.slabs, -1))
        per_frame = timestep[:, None] if timestep.ndim == 1 else timestep
        temb = model.embed_time(per_frame, x.dtype)
        temb = temb if temb.shape[1] == 1 else temb[:, layout.slab_frames]
        rope = chunked_rope_table(model.config.head_dim, layout, cached_frames, CPU)
        ops = TorchOps(with_block_sparse(model.choose_kernels(CPU), keys, settings))
        text = model.embed_text(self.data["context"], self.data["mask"])
        text = ops.text_form(text, len(x)).tokens(text.tokens)
        for i, block in enumerate(model.blocks):
            cached = None if cache is None else tuple(map(cache_layout.arrange, cache.read(i, tokens)))
            tokens = block(tokens, temb, text, rope, cached, ops, Groups(layout.cond_slabs))
        tokens = layout.restore(tokens.flatten(1, 2)).unflatten(1, (grid[0], -1))
        out = model.final_layer(tokens, model.embed_time(per_frame, x.dtype), ops)
        return rearrange(out, "b t (h w) (p q c) -> b c t (h p) (w q)", h=grid[1], w=grid[2], p=2, q=2)


@pytest.mark.parametrize("settings", [BlockSparse(0.0, chunk=(2, 3, 2)), BlockSparse(0.0, None, (2, 2, 2), (2, 2, 4))])
@pytest.mark.parametrize("case", ["t2v", "i2v", "vc", "vc_cached"])
@torch.no_grad()
def test_the_network_laid_out(case, settings):
    """With no chunk left out it gives the goldens: modulation, RoPE, conditioning frames and cached keys fit."""
    run = LaidOut(settings)
    x, steps = run.data["x"], run.data["t" if case in ("t2v", "vc_cached") else f"{case}.t"]
    cond = int((run.data["vc.t"][0] == 0).sum())
    if case == "vc_cached":
        found = run(x[:, :, cond:], steps, cached_frames=cond)
    else:
        found = run(x, steps, cond={"t2v": 0, "i2v": 1, "vc": cond}[case])
    wanted = run.data[f"{case}.out"]
    assert (found - wanted).abs().max() <= 2e-5 * wanted.std()


def test_padding_is_never_a_key_and_counts_in_no_mean():
    grid, settings = (3, 3, 3), BlockSparse(sparsity=0.5, chunk=(2, 2, 2))
    layout = chunk_layout(grid, settings.chunk)
    q, k, v = (layout.arrange(x) for x in tokens(grid))
    attend = block_sparse_attend(layout, settings)
    wanted = layout.restore(attend(q, k, v))
    padding = torch.ones(layout.slots, dtype=torch.bool)
    padding[layout.places] = False
    assert padding.any()
    spoiled = [x.clone().masked_fill_(padding[:, None, None], 1e4) for x in (q, k, v)]
    assert torch.equal(layout.restore(attend(*spoiled)), wanted)


def test_ties_go_to_the_first_chunk():
    """Scores are rounded to the tokens' dtype; the goldens hold such ties."""
    scores = torch.tensor([[1.0, 3.0, 2.0, 3.0, 2.0, 2.0]], dtype=torch.bfloat16)
    sizes = torch.ones(6, dtype=torch.int32)
    indices, counts = select_chunks(scores, BlockSparse(sparsity=0.5), sizes, 6, 1.0)
    assert indices.tolist() == [[1, 2, 3]] and counts.tolist() == [3]
    assert indices.dtype == counts.dtype == torch.int32
    q = torch.full((1, 1, 1, 2), 1.0, dtype=torch.bfloat16)
    assert block_sparse.chunk_scores(q, q * 1.0078125).dtype == torch.bfloat16


def test_how_many_are_kept():
    assert BlockSparse().kept(2640) == 165
    assert BlockSparse(sparsity=0.75).kept(16) == 4
    assert BlockSparse(sparsity=0.9).kept(12) == 1
    assert BlockSparse(sparsity=0.9).kept(3) == 1
    assert BlockSparse(sparsity=None, cdf_threshold=0.5).kept(16) == 0
    assert BlockSparse.applies(2) and not BlockSparse.applies(1)


@pytest.mark.parametrize(
    "values, words",
    [
        ({"sparsity": None}, "neither"),
        ({"sparsity": 1.5}, "sparsity is 1.5"),
        ({"sparsity": math.nan}, "sparsity is nan"),
        ({"cdf_threshold": -0.1}, "cdf_threshold is -0.1"),
        ({"chunk": (4, 4)}, "three whole numbers"),
        ({"chunk": (4, 0, 4)}, "three whole numbers"),
        ({"query_chunk": (4, 4, 6)}, "must be a multiple"),
        ({"kernel": "cuda"}, "choose one of"),
    ],
)
def test_bad_settings(values, words):
    with pytest.raises(LongCatError, match=words):
        BlockSparse(**values)


def test_bad_shapes():
    grid, settings = (4, 4, 4), BlockSparse(chunk=(2, 2, 2))
    q, k, v = tokens(grid)
    attend = block_sparse_attend(chunk_layout((4, 4, 3), settings.chunk), settings)
    attend(q, k, v)  # by padding it has 64 slots, too
    with pytest.raises(LongCatError, match="do not fit a layout"):
        attend(q, k[:, :32], v[:, :32])
    with pytest.raises(LongCatError, match="do not fit a grid"):
        attend_grid(q, k, v, (4, 4, 5), settings)
    with pytest.raises(LongCatError, match="do not fit a grid"):
        attend_grid(q[:, 16:], k, v, grid, settings)
    with pytest.raises(LongCatError, match="conditioning frames"):
        chunk_layout(grid, (2, 2, 2), None, 5)


def test_kernels_by_name():
    q, k, v = tokens((2, 4, 4))
    for name in ("triton", "fa4", "cudnn-fp8"):
        with pytest.raises(BackendUnavailable, match=f"{name}.*CUDA"):
            attend_grid(q, k, v, (2, 4, 4), BlockSparse(chunk=(2, 2, 2), kernel=name))
    auto, plain = (
        attend_grid(q, k, v, (2, 4, 4), BlockSparse(chunk=(2, 2, 2), kernel=name)) for name in ("auto", "plain")
    )
    assert torch.equal(auto, plain)


def test_8_bits_only_where_layers_run_in_8_bits_and_the_kernel_serves(monkeypatch):
    """`auto` in the order of speed; a threshold, a padded grid and other chunks go to exact kernels."""
    anywhere = Requirement(None, head_dims=None, dtypes=None)
    monkeypatch.setattr(kernels, "NEEDS", dict.fromkeys(kernels.NEEDS, anywhere))
    monkeypatch.setattr(block_sparse, "tried", lambda *_: "")
    q = torch.zeros(1, 64, 1, 128)
    usual = BlockSparse()

    def chosen(settings, *chunks, padded=False, eight_bit=True):
        return block_sparse.choose_kernel(settings, q, *chunks, padded, eight_bit)

    assert chosen(usual, 64, 64) == "cudnn-fp8"
    assert chosen(usual, 64, 64, eight_bit=False) == "fa4"
    assert chosen(usual, 64, 64, padded=True) == "triton"
    assert chosen(usual, 128, 64) == "fa4"
    assert chosen(BlockSparse(sparsity=None, cdf_threshold=0.5), 64, 64) == "fa4"
    assert chosen(BlockSparse(kernel="cudnn-fp8"), 64, 64, eight_bit=False) == "cudnn-fp8"
    with pytest.raises(BackendUnavailable, match="lists of different lengths"):
        chosen(BlockSparse(cdf_threshold=0.5, kernel="cudnn-fp8"), 64, 64)
