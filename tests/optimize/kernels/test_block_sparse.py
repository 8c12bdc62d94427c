"""The kernels of block-sparse attention against the plain version, in Triton's interpreter where there is no GPU.

In fp16: the interpreter rounds bf16 toward zero.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from longcat_core.optimize import block_sparse as plain
from longcat_core.optimize.block_sparse import BlockSparse, chunk_layout
from longcat_core.optimize.kernels import block_sparse as kernels
from longcat_core.optimize.kernels.block_sparse import Tiles
from longcat_core.optimize.requirement import Inputs

from ...support.python_path import python_path

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DIVIDED, PADDED = (4, 8, 8), (5, 6, 5)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, torch.float16)


def projected(layout: plain.ChunkLayout, batch: int = 2, heads: int = 3, dim: int = 64) -> tuple[Tensor, ...]:
    """q, k and v as slices of one projection, laid out."""
    tokens = randn(batch, len(layout.places), 3 * heads * dim)
    return tuple(x.unflatten(-1, (heads, dim)) for x in layout.arrange(tokens).chunk(3, dim=-1))


@pytest.mark.parametrize("grid", [DIVIDED, PADDED])
@pytest.mark.parametrize("query", [None, (4, 4, 8)])
def test_pool(grid, query):
    layout = chunk_layout(grid, (4, 4, 4), query, 0, DEVICE)
    _, k, _ = projected(layout)
    found = kernels.pool_chunks(k, layout.sizes, layout.q_chunk)
    wanted = plain.pool_chunks(k, layout.sizes, layout.q_chunk)
    assert found.shape == wanted.shape == (2, 3, layout.slots // layout.q_chunk, 64)
    torch.testing.assert_close(found, wanted, rtol=2e-3, atol=1e-4)


def test_pool_of_chunks_that_are_not_a_multiple_of_16():
    layout = chunk_layout((3, 7, 8), (3, 3, 3), None, 0, DEVICE)
    _, k, _ = projected(layout, heads=1)
    torch.testing.assert_close(
        kernels.pool_chunks(k, layout.sizes, 27), plain.pool_chunks(k, layout.sizes, 27), rtol=2e-3, atol=1e-4
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("keep", [1, 5, 21])
@pytest.mark.parametrize("padded", [False, True])
def test_top_chunks_with_ties_and_zeros(dtype, keep, padded):
    scores = (randn(2, 2, 9, 27) * 3).round().div(3).to(dtype)  # many equal ones
    scores[0, 0, 0] = 0
    scores[0, 0, 0, ::2] = -0.0
    scores[0, 0, 1] = -scores[0, 0, 1].abs()
    scores[1, 1, 2, 3], scores[1, 1, 2, 4] = torch.inf, -torch.inf
    sizes = torch.full((27,), 64, dtype=torch.int32, device=DEVICE)
    if padded:
        sizes[[0, 5, 11, 26]] = 0
    used = int((sizes > 0).sum())
    settings = BlockSparse(sparsity=1 - (keep + 0.5) / used)
    wanted, counts = plain.select_chunks(scores, settings, sizes, used, 1.0)
    assert wanted.shape[-1] == keep and (counts == keep).all()
    found = kernels.top_chunks(scores, sizes, keep, padded)
    assert found.dtype == torch.int32
    assert torch.equal(found, wanted)
    assert (found.diff(dim=-1) > 0).all()
    if padded:
        assert not torch.isin(found, torch.tensor([0, 5, 11, 26], device=DEVICE)).any()


@pytest.mark.parametrize("chunks", [1, 2, 64, 300])
def test_top_chunks_of_any_numbers(chunks):
    """Of both signs and every magnitude; a row of NaN still names chunks that exist."""
    generator = torch.Generator().manual_seed(chunks)
    bits = torch.randint(-(1 << 15), 1 << 15, (1, 2, 4, chunks), generator=generator, dtype=torch.int16)
    scores = bits.view(torch.bfloat16).nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf).to(DEVICE)
    sizes = torch.full((chunks,), 64, dtype=torch.int32, device=DEVICE)
    for keep in sorted({1, chunks // 2 or 1, chunks}):
        settings = BlockSparse(sparsity=1 - keep / chunks)
        assert settings.kept(chunks) == keep
        wanted, _ = plain.select_chunks(scores, settings, sizes, chunks, 1.0)
        assert torch.equal(kernels.top_chunks(scores, sizes, keep, False), wanted)
        spoiled = torch.full_like(bits, -1).view(torch.bfloat16).to(DEVICE)
        assert (kernels.top_chunks(spoiled, sizes, keep, False) == torch.arange(keep, device=DEVICE)).all()


TILES = {
    "as on other GPUs": None,
    "half chunks": Tiles(32, 32, 4, 2, False),
    "half chunks of keys": Tiles(64, 32, 4, 2, False),
    "fetched by TMA": Tiles(64, 64, 4, 2, True),
    "half chunks of keys, fetched by TMA": Tiles(64, 32, 4, 2, True),
}


@pytest.mark.parametrize("tiles", TILES.values(), ids=TILES)
@pytest.mark.parametrize("grid", [DIVIDED, PADDED])
def test_attend(tiles, grid):
    """Lists of different lengths, two videos, several heads, scores that need a running maximum."""
    layout = chunk_layout(grid, (4, 4, 4), None, 0, DEVICE)
    q, k, v = projected(layout, heads=2)
    q = q * 4
    n, generator = len(layout.sizes), torch.Generator().manual_seed(3)
    indices = torch.rand(2, 2, n, n, generator=generator).argsort(-1).to(DEVICE, torch.int32)
    counts = torch.randint(1, n + 1, (2, 2, n), generator=generator).to(DEVICE, torch.int32)
    assert len(counts.unique()) > 2
    wanted = plain.attend_plain(*(x.float() for x in (q, k, v)), indices, counts, layout.sizes, 64, layout.padded)
    args = (q, k, v, indices, counts, layout.sizes, 64, layout.padded)
    found = kernels.attend_chunks(*args) if tiles is None else kernels.launch_attend(*args, tiles)
    assert found.is_contiguous()
    torch.testing.assert_close(found.float(), wanted, rtol=4e-3, atol=4e-3)


@pytest.mark.parametrize(
    "chunk, query, dim",
    [((4, 4, 8), None, 128), ((4, 4, 4), (4, 4, 8), 64), ((8, 4, 4), None, 64), ((2, 4, 6), None, 64)],
)
def test_chunks_of_other_sizes(chunk, query, dim):
    """The whole of it, on a padded grid: means, choice and attention by kernels and by the plain version."""
    settings = BlockSparse(sparsity=0.5, chunk=chunk, query_chunk=query)
    layout = chunk_layout(PADDED, chunk, query, 0, DEVICE)
    q, k, v = projected(layout, batch=1, heads=2, dim=dim)
    scores = plain.chunk_scores(
        kernels.pool_chunks(q, layout.sizes, layout.q_chunk), kernels.pool_chunks(k, layout.sizes, layout.k_chunk)
    )
    indices = kernels.top_chunks(scores, layout.sizes, settings.kept(layout.used), layout.padded)
    counts = torch.full(indices.shape[:-1], indices.shape[-1], dtype=torch.int32, device=DEVICE)
    found = kernels.attend_chunks(q, k, v, indices, counts, layout.sizes, layout.q_chunk, layout.padded)
    plainly = BlockSparse(sparsity=0.5, chunk=chunk, query_chunk=query, kernel="plain")
    wanted = plain.block_sparse_attend(layout, plainly)(q, k, v)
    torch.testing.assert_close(found.float(), wanted.float(), rtol=4e-3, atol=4e-3)


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)])
@pytest.mark.parametrize("q_chunk, k_chunk", [(64, 64), (128, 128), (128, 64), (256, 256), (96, 48)])
def test_tiles_fit_the_chunks_and_the_shared_memory(capability, q_chunk, k_chunk):
    tiles = kernels.choose_tiles(capability, q_chunk, k_chunk)
    assert q_chunk % tiles.rows == 0 and k_chunk % tiles.columns == 0
    limit = 227 << 10 if capability in ((9, 0), (10, 0)) else kernels.CONSUMER_SHARED_BYTES
    assert tiles.shared_bytes(128) <= limit
    assert not tiles.tma or capability >= (9, 0)


def test_reasons():
    half = Inputs(torch.device("cuda"), torch.float16, 64, False)
    for needs in (kernels.NEEDS[name] for name in ("triton", "fa4")):
        assert needs.refuses(half) == ""
        assert "bfloat16" in needs.refuses(half._replace(dtype=torch.float32))
        assert "head dims 64, 128, not 32" in needs.refuses(half._replace(head_dim=32))
        assert "backward" in needs.refuses(half._replace(grad=True))
    assert kernels.refuses("triton", 64, 64, True) == ""
    assert "16" in kernels.refuses("triton", 27, 27, False)
    assert kernels.refuses("fa4", 64, 64, False) == kernels.refuses("fa4", 128, 128, False) == ""
    assert "mask" in kernels.refuses("fa4", 64, 64, True)
    assert "multiples of 64" in kernels.refuses("fa4", 32, 32, False)
    assert "bfloat16, not float16" in kernels.NEEDS["cudnn-fp8"].refuses(half)
    assert kernels.refuses("cudnn-fp8", 64, 64, False) == "" and "mask" in kernels.refuses("cudnn-fp8", 64, 64, True)
    assert "not 128 and 64" in kernels.refuses("cudnn-fp8", 128, 64, False)
    if DEVICE.type == "cpu":
        assert kernels.NEEDS["triton"].missing() == "no CUDA device" and kernels.NEEDS["fa4"].missing()


def test_all_of_it_in_a_graph(monkeypatch):
    """Means, scores, choice and attention in one graph that nothing breaks, on a padded grid."""
    monkeypatch.setattr(plain, "choose_kernel", lambda *_: "triton")
    layout = chunk_layout(PADDED, (4, 4, 4), None, 0, DEVICE)
    q, k, v = projected(layout, batch=1, heads=1)
    for settings in (BlockSparse(sparsity=0.6), BlockSparse(sparsity=None, cdf_threshold=0.5)):
        attend = plain.block_sparse_attend(layout, settings)
        found = torch.compile(attend, fullgraph=True, backend="eager")(q, k, v)
        assert torch.equal(found, attend(q, k, v))


def test_they_stand_in_a_graph_as_operators():
    """Nothing breaks the graph, and the operators' shapes are those of their results."""
    layout = chunk_layout(DIVIDED, (4, 4, 4), None, 0, DEVICE)
    q, k, v = projected(layout, batch=1, heads=1)
    sizes = layout.sizes

    def function(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        scores = kernels.pool_chunks(q, sizes, 64) @ kernels.pool_chunks(k, sizes, 64).transpose(-1, -2)
        indices = kernels.top_chunks(scores, sizes, 2, False)
        counts = torch.full(indices.shape[:-1], 2, dtype=torch.int32, device=q.device)
        return indices, kernels.attend_chunks(q, k, v, indices, counts, sizes, 64, False)

    indices, wanted = function(q, k, v)
    found = torch.compile(function, fullgraph=True, backend="eager")(q, k, v)
    assert torch.equal(found[0], indices) and torch.equal(found[1], wanted)
    checks = ("test_schema", "test_faketensor")
    counts = torch.full(indices.shape[:-1], 2, dtype=torch.int32, device=q.device)
    torch.library.opcheck(kernels.pool_chunks.operator, (k, sizes, 64), test_utils=checks)
    torch.library.opcheck(kernels.top_chunks.operator, (randn(2, 5), sizes, 2, False), test_utils=checks)
    torch.library.opcheck(kernels._attend_op.operator, (q, k, v, indices, counts, sizes, 64, False), test_utils=checks)


def test_tokens_of_a_head_stay_side_by_side_in_8_bits(monkeypatch):
    """The 8-bit kernel's output is not copied, in a graph either; its rows are quantized as they lie."""
    q = randn(1, 128, 2, 64)
    lists = torch.zeros((1, 2, 2, 1), dtype=torch.int32, device=DEVICE)
    out = q.transpose(1, 2).contiguous()
    monkeypatch.setattr(kernels.sparse_fp8, "attend_fp8", lambda *_: (out.clone(), None, None))
    args = (q, q, q, lists, lists[..., 0], lists[0, 0, 0], 64, False)
    found = kernels.attend_chunks(*args, kernel="cudnn-fp8")
    assert torch.equal(found, q) and found.stride() == out.transpose(1, 2).stride()
    torch.library.opcheck(kernels._cudnn_fp8_op.operator, args, test_utils=("test_schema", "test_faketensor"))


def test_they_compile_without_a_gpu(tmp_path):
    """To machine code of several GPUs within their shared memory; on Hopper with its own instructions."""
    program = Path(__file__).with_name("compile_kernels.py")
    run = subprocess.run(
        [sys.executable, str(program)],
        env={**os.environ, "TRITON_CACHE_DIR": str(tmp_path), **python_path(program.parents[3])},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    rows = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(rows) == 36 and all(row["bytes"] for row in rows)
    for row in rows:
        hopper = row["capability"] == [9, 0]
        assert row["shared"] <= (227 << 10 if hopper else kernels.CONSUMER_SHARED_BYTES)
        if row["kernel"] in ("_text_attention", "_short_text_attention"):
            assert row["wgmma"] == hopper
        if row["kernel"] == "_attend":
            assert row["tma"] == row["wgmma"] == hopper
            assert row["shared"] <= row["wanted"] + 1024, "beside the tiles there are but barriers and lists"
