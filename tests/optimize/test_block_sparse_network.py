"""Block-sparse attention in the network: the goldens with nothing left out, caches, compiled blocks, small sizes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from longcat_core.checkpoints.load import load_transformer
from longcat_core.files.safetensors_io import read_tensors
from longcat_core.model.block import run_block
from longcat_core.model.config import ModelConfig
from longcat_core.optimize import fused
from longcat_core.optimize.block_sparse import BlockSparse
from longcat_core.optimize.compilation import Regional
from longcat_core.optimize.optimized import OptimizedTransformer
from longcat_core.optimize.sparse.passes import MIXED
from longcat_core.optimize.switches import Optimizations
from longcat_core.sampling.conditioning import seeded_noise
from longcat_core.sampling.sampler import sample
from longcat_core.sampling.schedules import make_schedule

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
CONFIG = ModelConfig.from_json(GOLDEN / "config.json")
# Nothing is left out: the result is that of full attention, also where chunks overhang the grid.
WHOLE = BlockSparse(0.0, chunk=(2, 3, 2))
HALF = BlockSparse(0.5, chunk=(2, 2, 2))


@pytest.fixture
def model() -> OptimizedTransformer:
    return load_transformer(GOLDEN / "dit.safetensors", config=CONFIG, optimizations=Optimizations(attention="sdpa"))


@pytest.fixture(scope="module")
def data() -> dict[str, Tensor]:
    return read_tensors(GOLDEN / "forward.safetensors")


def error(got: Tensor, wanted: Tensor) -> float:
    return ((got - wanted).abs().max() / wanted.std()).item()


def forward(model: OptimizedTransformer, data: dict[str, Tensor], case: str, **more) -> Tensor:
    cond = int((data["vc.t"][0] == 0).sum())
    t = data["t" if case in ("t2v", "vc_cached") else f"{case}.t"]
    text = data["context"], data["mask"]
    if case == "vc_cached":
        cache = model.fill_kv_cache(data["x"][:1, :, :cond])
        return model(data["x"][:, :, cond:], t, *text, kv_cache=cache, **more)
    return model(data["x"], t, *text, num_cond_latents={"t2v": 0, "i2v": 1, "vc": cond}[case], **more)


@torch.no_grad()
def test_a_threshold_of_all_is_full_attention(model, data):
    model.block_sparse = BlockSparse(None, 1.0, chunk=(2, 2, 2))
    assert error(forward(model, data, "t2v"), data["t2v.out"]) <= 2e-5


@pytest.mark.parametrize("case", ["t2v", "i2v", "vc", "vc_cached"])
@torch.no_grad()
def test_with_nothing_left_out_it_is_full_attention(model, data, case):
    model.block_sparse = WHOLE
    assert error(forward(model, data, case), data[f"{case}.out"]) <= 2e-5
    model.block_sparse = HALF
    assert error(forward(model, data, case), data[f"{case}.out"]) > 1e-3
    model.block_sparse = None
    assert error(forward(model, data, case), data[f"{case}.out"]) <= 2e-5


@pytest.mark.parametrize("given", [1, 2])
def test_cached_frames_change_nothing(model, given):
    """Given frames are attended to block by block too, in the cache as without it."""
    text = read_tensors(GOLDEN / "generate.safetensors")
    model.block_sparse = HALF
    noise, clean = seeded_noise((1, 16, 5, 8, 12), 0), seeded_noise((1, 16, given, 8, 12), 1)
    embeds = {"negative_context": text["neg.embeds"], "negative_mask": text["neg.mask"]}
    outs = [
        sample(
            *(model, noise, make_schedule("base", 3), text["pos.embeds"], text["pos.mask"]),
            **embeds,
            cond_latents=clean,
            kv_cache=cache,
        )
        for cache in ("off", "exact")
    ]
    assert error(*outs) <= 1e-4


@pytest.mark.parametrize("batch", [1, 2])
@torch.no_grad()
def test_compiled_blocks(model, data, batch):
    model.block_sparse = HALF
    rows = {name: data[name][:batch] for name in ("x", "context", "mask")}
    wanted = model(rows["x"], data["t"][:batch], rows["context"], rows["mask"])
    torch._dynamo.reset()
    graphs = []
    model.compiled_block = Regional(run_block, "the block", lambda graph, inputs: graphs.append(graph) or graph.forward)
    model.set_optimizations(replace(model.optimizations, compile="blocks"))
    said = []
    model.announce = said.append
    for _ in range(2):
        assert error(model(rows["x"], data["t"][:batch], rows["context"], rows["mask"]), wanted) <= 1e-5
    assert len(graphs) == 1 and len(said) == 1
    torch._dynamo.reset()


@torch.no_grad()
def test_an_ffn_in_pieces(model, data, monkeypatch):
    model.block_sparse = HALF
    wanted = forward(model, data, "vc")
    monkeypatch.setattr(fused, "_WHOLE_FFN_BYTES", 0)
    assert error(forward(model, data, "vc"), wanted) <= 1e-5


@torch.no_grad()
def test_a_picture_is_attended_to_in_full(model, data):
    one = data["x"][:, :, :1], data["t"], data["context"], data["mask"]
    wanted = model(*one)
    model.block_sparse = HALF
    assert torch.equal(model(*one), wanted)


def test_gradients(model, data):
    model.block_sparse = WHOLE
    grads = []
    for sparse in (None, WHOLE):
        model.block_sparse = sparse
        x = data["x"].clone().requires_grad_(True)
        model(x, data["t"], data["context"], data["mask"]).square().sum().backward()
        grads.append(x.grad)
    assert error(*grads) <= 1e-4


@pytest.mark.parametrize(("clean", "slabs_hold"), [([0, -1], False), ([-1], False), ([2, 3], True)])
@torch.no_grad()
def test_clean_frames_behind_noisy_ones(model, data, clean, slabs_hold):
    """Masks in ComfyUI give such timesteps. Where a slab would mix them, all tokens are attended to, which is said."""
    x, text = data["x"][:, :, :4], (data["context"], data["mask"])
    t = torch.full((len(x), x.shape[2]), 700.0)
    t[0, clean] = 0
    said: list[str] = []
    model.announce = said.append
    wanted = model(x, t, *text)
    for settings in (WHOLE, HALF):
        model.block_sparse = settings
        for _ in range(2):
            found = model(x, t, *text)
        assert (error(found, wanted) <= 2e-5) is (settings is WHOLE or not slabs_hold)
    assert said == ([] if slabs_hold else [MIXED])
