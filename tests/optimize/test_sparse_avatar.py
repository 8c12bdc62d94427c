"""Sparse attention in the avatar network: frames still hear their own audio, and a reference frame is exact where it is
seen."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from longcat_core.checkpoints.load import load_transformer
from longcat_core.model.attention import Groups
from longcat_core.model.block import run_block
from longcat_core.model.config import ModelConfig
from longcat_core.model.kv_cache import Reference
from longcat_core.model.ops import PlainOps
from longcat_core.model.text import TextTokens
from longcat_core.model.transformer import FrameLayout, LongCatTransformer, ReferenceLayout
from longcat_core.optimize.compilation import Regional
from longcat_core.optimize.optimized import OptimizedTransformer
from longcat_core.optimize.sparse.layout import SparseLayout
from longcat_core.optimize.sparse.plain import attend_sparse_plain
from longcat_core.optimize.sparse.settings import Densities, Sparse
from longcat_core.optimize.switches import Optimizations
from longcat_core.optimize.text_keys import TokenTexts

GOLDEN = Path(__file__).parents[1] / "data" / "golden-avatar" / "v1_5"
CONFIG = ModelConfig.from_json(GOLDEN / "config.json")
PLAIN = Optimizations(attention="sdpa")
ROWS, COLUMNS = 9, 15
FRAME = ROWS * COLUMNS
# Noise frames 3 to 5 of those behind three clean ones do not see the reference; the others do. One that hides nothing.
INSIDE, NOWHERE = Reference(6, 1), Reference(-3, 1)
LAYERS = Densities((1.0,), (((0.2, 0.4, 0.1, 1.0), (0.3, 0.3, 0.3, 0.3)),))


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def error(got: Tensor, wanted: Tensor) -> float:
    return ((got - wanted).abs().max() / wanted.std()).item()


def loaded(**options) -> OptimizedTransformer:
    model = load_transformer(GOLDEN / "dit.safetensors", config=CONFIG, optimizations=PLAIN, **options)
    model.said = []
    model.announce = model.said.append
    return model


@pytest.fixture
def model() -> OptimizedTransformer:
    return loaded()


class Case:
    """Latents of `frames` frames, of which `cond` are clean, in front of x or in a cache, and what is heard."""

    def __init__(
        self, cond: int, reference: Reference | None = None, cached: bool = False, people: int = 0, frames: int = 12
    ) -> None:
        self.cond, self.reference, self.cached, self.people = cond, reference, cached, people
        batch = 1 if people else 2
        self.x = randn(batch, 16, frames, 2 * ROWS, 2 * COLUMNS)
        self.x[:, :, :cond] = self.x[:1, :, :cond]
        self.t = torch.full((1, frames if cond else 1), 700.0)
        self.t[:, :cond] = 0
        heard = frames - (reference is not None)
        self.windows = randn(people or batch, 4 * (heard - 1) + 1, 5, 5, 16, seed=2)
        side = torch.arange(COLUMNS).repeat(ROWS)
        classes = torch.stack((side < 6, side > 8, (side >= 6) & (side <= 8)), dim=1)
        self.classes = classes if people else None
        self.words = randn(batch, 7, CONFIG.caption_channels, seed=1)

    def text(self, model: OptimizedTransformer) -> TextTokens:
        return replace(model.embed_text(self.words), audio=model.embed_audio(self.windows, self.classes))

    @torch.no_grad()
    def __call__(self, model: OptimizedTransformer, text: TextTokens | None = None, progress: float = 0.5) -> Tensor:
        """The network's output for the noise frames."""
        text, cond = text or self.text(model), self.cond
        if not self.cached:
            out = model(*(self.x, self.t, text), num_cond_latents=cond, reference=self.reference, progress=progress)
            return out[:, :, cond:]
        cache = model.fill_kv_cache(self.x[:1, :, :cond], reference=self.reference)
        options = {"kv_cache": cache, "reference": self.reference, "progress": progress}
        return model(self.x[:, :, cond:], self.t[:, cond:], text, **options)


CASES = {
    "text": Case(0),
    "image": Case(1),
    "image, two people": Case(1, people=2),
    "continuation": Case(3, INSIDE),
    "cached": Case(3, INSIDE, cached=True),
    "cached, seen by all": Case(3, NOWHERE, cached=True),
    "cached, two people": Case(3, INSIDE, cached=True, people=2),
}


class Ordered(PlainOps):
    """Sparse attention of tokens in the order of frames, which are permuted within every attention and put back."""

    def __init__(self, case: Case, hidden: tuple[int, int]) -> None:
        frames = case.x.shape[2]
        self.hidden, self.clean, self.keys, self.calls = hidden, case.cond, frames * FRAME, 0
        self.first, self.apart = case.cond * FRAME, FRAME * (case.reference is not None)
        layout = SparseLayout((frames, ROWS, COLUMNS), case.cond, torch.device("cpu"), 0, case.reference)
        assert layout.hidden == hidden
        self.order = layout.order
        self.parts = 3 if any(hidden) else 1

    def attend(self, q, k, v, reader=None):
        without = self.keys - k.shape[1]
        if without not in (0, self.apart):
            return super().attend(q, k, v, reader)
        layer, part = divmod(self.calls, self.parts)
        self.calls += 1
        begin = 0 if not part else self.hidden[part - 1]
        own = self.order[self.first + begin * FRAME :][: q.shape[1]] - self.first - begin * FRAME
        assert sorted(own.tolist()) == list(range(q.shape[1])), "a group of queries stays together"
        seen = self.order[without:] - without
        sink = -(-(self.first - without) // 64)
        keep = torch.tensor([max(1, round(share * (len(seen) // 64 - sink))) for share in LAYERS.values[0][layer]])
        found = attend_sparse_plain(q[:, own], k[:, seen], v[:, seen], keep, sink=sink, query_block=128, tail=True)
        return torch.empty_like(found).index_copy_(1, own, found).flatten(-2)


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_equals_the_definition_in_the_order_of_frames(model, name):
    case = CASES[name]
    dense = case(model)
    layout = FrameLayout() if case.reference is None else ReferenceLayout(case.reference)
    hidden = layout.groups(case.cond, 0, case.x.shape[2]).hidden
    assert hidden == ((3, 6) if case.reference == INSIDE else (0, 0))
    ops, text = Ordered(case, hidden), case.text(model)
    noisy = case.x.shape[2] - case.cond
    texts = TokenTexts(text, ops.text_form(text, len(case.x)), text.audio.block(noisy))
    wanted = LongCatTransformer.forward(
        *(model, case.x, case.t, texts, ops), num_cond_latents=case.cond, layout=layout
    )[:, :, case.cond :]
    assert ops.calls == CONFIG.depth * ops.parts
    model.sparse = Sparse(densities=LAYERS, dense_steps=0.0)
    got = case(model)
    assert error(got, wanted) <= 1e-4 < 1e-3 < error(got, dense)
    model.sparse = Sparse(1.0, dense_steps=0.0)
    assert error(case(model), dense) <= 1e-4
    assert not model.said


@pytest.mark.parametrize("name", ["image", "cached", "cached, two people"])
def test_one_graph_for_dense_and_sparse_steps(name):
    case, settings = CASES[name], Sparse(densities=LAYERS, dense_steps=0.25)
    torch._dynamo.reset()
    plain, compiled = loaded(), loaded()
    counter = CompileCounterWithBackend("eager")
    compiled.compiled_block = Regional(run_block, "the block", counter, slow=False)
    compiled.set_optimizations(replace(PLAIN, compile="blocks"))
    plain.sparse = compiled.sparse = settings
    texts = case.text(plain), case.text(compiled)
    try:
        for progress in (0.0, 0.5, 0.1, 0.9):
            assert error(case(compiled, texts[1], progress), case(plain, texts[0], progress)) <= 1e-4
        assert counter.frame_count == 1 and not compiled.said
    finally:
        torch._dynamo.reset()


def test_a_group_of_frames_is_ordered_by_itself():
    grid = (10, ROWS, COLUMNS)
    layout = SparseLayout(grid, 0, torch.device("cpu"), 3, INSIDE)
    assert layout.groups(0, 3, 10) == Groups(0, 1, (3, 6)) == ReferenceLayout(INSIDE).groups(0, 3, 10)
    frames = layout.order // FRAME
    for first, past in ((0, 3), (3, 6), (6, 10)):
        part = frames[first * FRAME : past * FRAME]
        assert {*part.tolist()} == {*range(first, past)} and (part.diff() < 0).any()
    tables = (each.rope(48, grid, 3, torch.device("cpu"))[0] for each in (layout, ReferenceLayout(INSIDE)))
    mine, plain = tables
    assert torch.equal(mine, plain[layout.order])
