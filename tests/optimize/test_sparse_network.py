"""Sparse attention in the network: layers, steps, caches, compiled blocks, and the passes that stay dense."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from longcat_core.checkpoints.load import load_transformer
from longcat_core.errors import BackendUnavailable, LongCatError
from longcat_core.files.safetensors_io import read_tensors
from longcat_core.model.block import run_block
from longcat_core.model.config import ModelConfig
from longcat_core.model.ops import PlainOps
from longcat_core.model.text import TextTokens
from longcat_core.model.transformer import LongCatTransformer
from longcat_core.optimize import fused, operators
from longcat_core.optimize.block_sparse import BlockSparse
from longcat_core.optimize.compilation import Regional
from longcat_core.optimize.optimized import OptimizedTransformer
from longcat_core.optimize.quantization import quantize
from longcat_core.optimize.sparse import choose
from longcat_core.optimize.sparse.layout import SparseLayout
from longcat_core.optimize.sparse.plain import attend_sparse_plain
from longcat_core.optimize.sparse.settings import Densities, Sparse
from longcat_core.optimize.switches import Optimizations
from longcat_core.optimize.text_keys import TokenTexts
from longcat_core.sampling.sampler import sample
from longcat_core.sampling.schedules import make_schedule

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
CONFIG = ModelConfig.from_json(GOLDEN / "config.json")
PLAIN = Optimizations(attention="sdpa")
# Latents whose 9 frames are 9x15 tokens each: 18 blocks of 64 and a remainder of 63.
SHAPE = (9, 18, 30)
FRAME = 9 * 15
TWO_RANGES = Densities((0.5, 1.0), (((0.2, 0.4), (1.0, 1.0)), ((0.6, 1.0), (0.1, 0.1))))
ALWAYS = Sparse(0.2, dense_steps=0.0)


@pytest.fixture
def model() -> OptimizedTransformer:
    model = load_transformer(GOLDEN / "dit.safetensors", config=CONFIG, optimizations=PLAIN)
    model.said = []
    model.announce = model.said.append
    return model


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def error(got: Tensor, wanted: Tensor) -> float:
    return ((got - wanted).abs().max() / wanted.std()).item()


class Case:
    """Latents and text; `cond` of the frames are clean, in front of x or in a cache."""

    def __init__(self, batch: int = 1, cond: int = 0, cached: bool = False, frames: int = SHAPE[0]) -> None:
        self.cond, self.cached = cond, cached
        self.x = randn(batch, 16, frames, *SHAPE[1:])
        self.x[:, :, :cond] = self.x[:1, :, :cond]
        self.t = torch.full((1, frames if cond else 1), 700.0)
        self.t[:, :cond] = 0
        self.text = randn(batch, 7, CONFIG.caption_channels, seed=1), torch.ones(batch, 7, dtype=torch.long)

    def __call__(self, model: OptimizedTransformer, **more) -> Tensor:
        if not self.cached:
            return model(self.x, self.t, *self.text, num_cond_latents=self.cond, **more)
        cache = model.fill_kv_cache(self.x[:1, :, : self.cond])
        return model(self.x[:, :, self.cond :], self.t[:, self.cond :], *self.text, kv_cache=cache, **more)


CASES = {
    "text": Case(),
    "batch": Case(batch=2),
    "image": Case(cond=1),
    "continuation": Case(cond=3, batch=2, frames=12),
    "cache": Case(cond=3, cached=True, frames=12),
    "cache of one for two": Case(cond=1, cached=True, batch=2, frames=10),
}


class Reference(PlainOps):
    """Sparse attention of tokens in the order of frames, which are permuted within every layer and put back."""

    def __init__(self, layers: list[tuple[float, float]], frames: int, cond: int, query_block: int, tail: bool) -> None:
        self.layers, self.calls, self.query_block, self.tail = layers, 0, query_block, tail
        self.keys, self.clean = frames * FRAME, cond * FRAME
        layout = SparseLayout((frames, 9, 15), cond, torch.device("cpu"))
        self.order, self.places = layout.order, layout.places

    def attend(self, q, k, v, reader=None):
        if k.shape[1] != self.keys:
            return super().attend(q, k, v, reader)
        densities = self.layers[self.calls]
        self.calls += 1
        own = self.order[self.keys - q.shape[1] :] - (self.keys - q.shape[1])
        sink = -(-self.clean // 64)
        keep = torch.tensor([max(1, round(share * (self.keys // 64 - sink))) for share in densities])
        options = {"sink": sink, "query_block": self.query_block, "tail": self.tail}
        out = attend_sparse_plain(q[:, own], k[:, self.order], v[:, self.order], keep, **options)
        return torch.empty_like(out).index_copy_(1, own, out).flatten(-2)


def reference(model: OptimizedTransformer, case: Case, layers, query_block: int = 128, tail: bool = True) -> Tensor:
    ops = Reference(layers, case.x.shape[2], case.cond, query_block, tail)
    text: TextTokens = model.embed_text(*case.text)
    texts = TokenTexts(text, ops.text_form(text, len(case.x)))
    out = LongCatTransformer.forward(model, case.x, case.t, texts, ops, num_cond_latents=case.cond)
    assert ops.calls == CONFIG.depth
    return out[:, :, case.cond :]


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_layers_and_steps_have_their_densities(model, name):
    case = CASES[name]
    dense = case(model)[:, :, 0 if case.cached else case.cond :]
    model.sparse = Sparse(densities=TWO_RANGES, dense_steps=0.0)
    for progress, layers in ((0.0, TWO_RANGES.values[0]), (0.5, TWO_RANGES.values[1]), (None, TWO_RANGES.values[1])):
        out = case(model, progress=progress)[:, :, 0 if case.cached else case.cond :]
        assert error(out, reference(model, case, layers)) <= 1e-4
        assert error(out, dense) > 1e-3
    model.sparse = Sparse(0.3, dense_steps=0.0, dense_layers=(0,), query_block=64, tail=False)
    out = case(model, progress=0.3)[:, :, 0 if case.cached else case.cond :]
    assert error(out, reference(model, case, [(1.0, 1.0), (0.3, 0.3)], 64, False)) <= 1e-4
    assert not model.said


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_first_steps_are_those_without_it(model, name):
    wanted = CASES[name](model)
    model.sparse = Sparse(0.2, dense_steps=0.3)
    assert torch.equal(CASES[name](model, progress=0.29), wanted)
    assert not torch.equal(CASES[name](model, progress=0.3), wanted)
    model.sparse = Sparse(1.0, dense_steps=0.0)
    assert error(CASES[name](model, progress=0.5), wanted) <= 1e-4


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("split", [False, True])
def test_a_cache_changes_nothing(model, guidance, split):
    model.sparse = Sparse(0.1, dense_steps=0.3)
    model.set_optimizations(replace(PLAIN, split_guidance=split))
    noise, clean = randn(1, 16, 11, *SHAPE[1:]), randn(1, 16, 2, *SHAPE[1:], seed=1)
    words = [randn(1, 5, CONFIG.caption_channels, seed=seed) for seed in (2, 3)]

    def video(kv_cache: str) -> Tensor:
        options = {"negative_context": words[1], "cond_latents": clean, "kv_cache": kv_cache}
        return sample(model, noise, make_schedule("base", 3), words[0], None, guidance_scale=guidance, **options)

    exact, off, official = video("exact"), video("off"), video("official")
    assert error(exact, off) <= 2e-5
    assert (error(official, off) <= 1e-4) == (guidance == 1.0)
    model.sparse = None
    assert error(video("exact"), exact) > 20 * error(exact, off)


def test_sampling_says_how_far_it_is(model, monkeypatch):
    seen: list[float | None] = []
    call = type(model.execution).__call__
    monkeypatch.setattr(
        type(model.execution), "__call__", lambda *a, **k: seen.append(k.get("progress")) or call(*a, **k)
    )
    words = randn(1, 5, CONFIG.caption_channels)
    options = {"negative_context": words, "cond_latents": randn(1, 16, 1, 4, 4)}
    sample(model, randn(1, 16, 3, 4, 4), make_schedule("base", 4), words, None, **options)
    assert seen == [None, 0.0, 0.25, 0.5, 0.75], "the first pass fills the cache"


# --- what it works with ----------------------------------------------------------------------------------------------


class Compiled:
    """The model with compiled blocks, whose graphs are counted."""

    def __init__(self, model: OptimizedTransformer, **switches) -> None:
        torch._dynamo.reset()
        self.model, self.counter = model, CompileCounterWithBackend("eager")
        model.compiled_block = Regional(run_block, "the block", self.counter, slow=False)
        model.set_optimizations(replace(PLAIN, compile="blocks", **switches))

    @property
    def graphs(self) -> int:
        return self.counter.frame_count


@pytest.fixture
def plain() -> OptimizedTransformer:
    return load_transformer(GOLDEN / "dit.safetensors", config=CONFIG, optimizations=PLAIN)


@pytest.mark.parametrize("fp8", [False, True], ids=["16 bits", "fp8"])
@torch.no_grad()
def test_one_graph_for_dense_and_sparse_steps_and_all_layers(model, plain, fp8):
    if fp8:
        quantize(model)
        quantize(plain)
    settings = Sparse(densities=TWO_RANGES, dense_steps=0.25)
    model.sparse = plain.sparse = settings
    compiled = Compiled(model)
    try:
        for case, graphs in (("text", 1), ("image", 2), ("cache", 3)):
            for progress in (0.0, 0.3, 0.6, None, 0.1):
                out, wanted = (CASES[case](each, progress=progress) for each in (model, plain))
                assert error(out, wanted) <= 1e-4
                assert compiled.graphs == graphs
        model.sparse = plain.sparse = replace(settings, densities=None, dense_layers=(1,), tail=False)
        assert error(CASES["text"](model, progress=0.9), CASES["text"](plain, progress=0.9)) <= 1e-4
        assert compiled.graphs == 3 and not model.said
    finally:
        torch._dynamo.reset()


@pytest.mark.skipif(not hasattr(torch.Tag, "cudagraph_unsafe"), reason="this PyTorch has no such tag")
def test_graphs_are_not_captured_with_the_attention_in_them():
    found = getattr(torch.ops, operators.NAMESPACE).attend_foreign.default
    assert torch.Tag.cudagraph_unsafe in found.tags
    assert torch.Tag.cudagraph_unsafe not in getattr(torch.ops, operators.NAMESPACE).attend.default.tags


@torch.no_grad()
def test_streamed_blocks_and_an_ffn_in_pieces(model, plain, monkeypatch):
    model.sparse = plain.sparse = Sparse(densities=TWO_RANGES, dense_steps=0.0)
    wanted = CASES["image"](plain, progress=0.5)
    model.stream_blocks("cpu", [0, 1])
    assert torch.equal(CASES["image"](model, progress=0.5), wanted)
    monkeypatch.setattr(fused, "_WHOLE_FFN_BYTES", 0)
    assert error(CASES["image"](model, progress=0.5), wanted) <= 1e-5


@torch.no_grad()
def test_a_hook_around_blocks(model):
    model.sparse = Sparse(densities=TWO_RANGES, dense_steps=0.0)
    seen = []

    def around(i, run, tokens):
        seen.append((i, tuple(tokens.shape)))
        return run(tokens)

    case = CASES["continuation"]
    assert torch.equal(case(model, progress=0.5, around_block=around), case(model, progress=0.5))
    assert seen == [(i, (2, 12, FRAME, CONFIG.hidden_size)) for i in range(CONFIG.depth)]


# --- passes that stay dense ------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_small_video_is_dense_and_says_so_once(model):
    small = Case(frames=7)
    wanted = small(model)
    model.sparse = ALWAYS
    for _ in range(2):
        assert torch.equal(small(model), wanted)
    (sentence,) = model.said
    assert sentence == (
        "this video has 945 tokens to generate, too few for sparse attention, which needs 1024; "
        "it attends to all tokens"
    )


MIXED = {"last": [(0, 8)], "first and last": [(0, 0), (0, 8)], "of one video": [(0, 0)]}


@pytest.mark.parametrize("clean", MIXED.values(), ids=MIXED)
@torch.no_grad()
def test_clean_frames_elsewhere_are_dense_and_say_so_once(model, clean):
    """Such timesteps come from masks in ComfyUI; a permuted row of tokens would hold frames of several."""
    case = Case(batch=2)
    case.t = torch.full((2, SHAPE[0]), 700.0)
    for video, frame in clean:
        case.t[video, frame] = 0
    wanted = case(model)
    model.sparse = ALWAYS
    for _ in range(2):
        assert torch.equal(case(model, progress=0.5), wanted)
    (sentence,) = model.said
    assert "frames without noise" in sentence
    case.t[:] = 700.0
    assert not torch.equal(case(model, progress=0.5), wanted)


def test_gradients_are_dense_and_say_so_once(model):
    x, t, text = randn(1, 16, *SHAPE), torch.full((1, 1), 500.0), CASES["text"].text
    grads = []
    for settings in (None, ALWAYS):
        model.sparse = settings
        own = x.clone().requires_grad_(True)
        for _ in range(2):
            model(own, t, *text, progress=0.5).square().sum().backward()
        grads.append(own.grad)
    assert torch.equal(*grads)
    assert model.said == ["sparse attention has no gradients; passes with gradients attend to all tokens"]


@torch.no_grad()
def test_block_sparse_attention_takes_precedence(model):
    model.block_sparse = BlockSparse(0.5, chunk=(3, 3, 3))
    wanted = CASES["image"](model)
    model.sparse = ALWAYS
    assert torch.equal(CASES["image"](model, progress=0.9), wanted)


@torch.no_grad()
def test_a_cache_is_filled_densely(model):
    caches = []
    for settings in (None, ALWAYS):
        model.sparse = settings
        caches.append(model.fill_kv_cache(randn(1, 16, *SHAPE)))
    assert torch.equal(caches[0].k, caches[1].k) and torch.equal(caches[0].out, caches[1].out)


# --- the guard and bad settings --------------------------------------------------------------------------------------


class Spoiled:
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, q, k, v, keep, *, sink, query_block, tail):
        self.calls += 1
        return torch.full_like(q, float("nan"))


@pytest.fixture
def spoiled(monkeypatch) -> Spoiled:
    kernel = Spoiled()
    backend = replace(choose.BACKENDS[-1], attend=kernel)
    assert backend.name == "plain"
    monkeypatch.setattr(choose, "BACKENDS", (backend,))
    return kernel


@pytest.mark.parametrize("dense_steps", [0.0, 0.25])
@torch.no_grad()
def test_spoiled_output_turns_it_off(model, spoiled, dense_steps):
    wanted = CASES["image"](model)
    model.set_optimizations(PLAIN)
    model.sparse = replace(ALWAYS, dense_steps=dense_steps)
    for progress in (0.0, 0.25, 0.5):
        assert torch.equal(CASES["image"](model, progress=progress), wanted)
    assert model.said == ["sparse attention gave NaN or a black picture at the first step; going on without it"]
    assert model.sparse is None and spoiled.calls == CONFIG.depth
    # Whoever sets it again gets another trial.
    model.sparse = ALWAYS
    CASES["image"](model, progress=0.5)
    assert len(model.said) == 2


def test_settings_that_do_not_fit_are_refused_when_they_are_set(model):
    model.sparse = ALWAYS
    with pytest.raises(LongCatError, match="densities are for 1 layers of 2 heads, and the network has 2 of 2"):
        model.sparse = Sparse(densities=Densities((1.0,), (((0.5, 0.5),),)))
    with pytest.raises(LongCatError, match="has layer 2; the network has layers 0 to 1"):
        model.sparse = Sparse(dense_layers=(2,))
    if not torch.cuda.is_available():
        with pytest.raises(BackendUnavailable, match="sparse kernel 'fa4' is unavailable"):
            model.sparse = Sparse(kernel="fa4")
    assert model.sparse == ALWAYS


def test_golden_text_is_untouched(model):
    """A text as long as the video's tokens would not be taken for them."""
    data = read_tensors(GOLDEN / "forward.safetensors")
    model.sparse = ALWAYS
    with torch.no_grad():
        out = model(data["x"], data["t"], data["context"], data["mask"], progress=0.9)
    assert error(out, data["t2v.out"]) <= 2e-5
