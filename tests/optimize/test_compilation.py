"""One graph of a block serves all blocks, steps and prompts: graphs are counted."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from longcat_core.checkpoints.load import load_transformer
from longcat_core.checkpoints.lora import merge_lora
from longcat_core.model.block import run_block
from longcat_core.model.config import ModelConfig
from longcat_core.optimize import attention as backends
from longcat_core.optimize import fused, operators
from longcat_core.optimize.compilation import NOTICE, Regional
from longcat_core.optimize.compiled_blocks import COMPILED_BLOCK
from longcat_core.optimize.switches import Optimizations

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
CONFIG = ModelConfig.from_json(GOLDEN / "config.json")
SAID = NOTICE.format("the block")
COMPILED = Optimizations(attention="sdpa", compile="blocks")


class Run:
    """A small model whose blocks are compiled by a backend that counts graphs, against the same model uncompiled."""

    def __init__(self, dtype: torch.dtype = torch.float32, backend: str = "eager", **switches: object) -> None:
        torch._dynamo.reset()
        self.counter = CompileCounterWithBackend(backend)
        self.switches = replace(COMPILED, **switches)
        self.model, self.plain = (
            load_transformer(GOLDEN / "dit.safetensors", config=CONFIG, dtype=dtype, optimizations=o)
            for o in (self.switches, replace(self.switches, compile="off"))
        )
        self.model.compiled_block = Regional(run_block, "the block", self.counter)
        self.said: list[str] = []
        self.model.announce = self.said.append

    @property
    def graphs(self) -> int:
        return self.counter.frame_count

    @torch.no_grad()
    def step(
        self,
        batch: int = 2,
        tokens: int = 5,
        grid: tuple[int, int, int] = (3, 4, 6),
        seed: int = 0,
        cond: int = 0,
        cached: int = 0,
        kernels: backends.Kernels | None = None,
        tolerance: float = 1e-5,
    ) -> int:
        """One forward of both, as `sample` makes it; returns how many graphs there are."""
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(batch, 16, *grid, generator=generator)
        given = torch.randn(1, 16, cached, *grid[1:], generator=generator)
        context = torch.randn(batch, 40, CONFIG.caption_channels, generator=generator)
        mask = (torch.arange(40)[None] < torch.tensor([tokens, 3])[:batch, None]).long()
        t = torch.full((1, grid[0] if cond else 1), 10.0 * seed + 300)
        t[:, :cond] = 0
        outs = []
        for model in (self.model, self.plain):
            cache = model.fill_kv_cache(given) if cached else None
            text = model.embed_text(context, mask)
            outs.append(model(x, t, text, num_cond_latents=cond, kv_cache=cache, kernels=kernels))
        error = ((outs[0] - outs[1]).abs().max() / outs[1].std()).item()
        assert error <= tolerance
        assert not [sentence for sentence in self.said if sentence != SAID]
        return self.graphs


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    yield
    torch._dynamo.reset()


# In half precision padding is written out to a fixed length, in fp32 it is folded into one key with a bias.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.1)])
@pytest.mark.parametrize("mode", ["exact", "padded", "packed"])
def test_one_graph_for_blocks_steps_and_prompts(mode, dtype, tolerance):
    run = Run(dtype, text_mode=mode)
    assert CONFIG.depth > 1
    for seed, tokens in enumerate((5, 5, 9, 1, 40, 17)):
        assert run.step(tokens=tokens, seed=seed, tolerance=tolerance) == 1
    assert run.said == [SAID]


def test_guidance_on_and_off_is_one_graph_more():
    run = Run()
    assert run.step() == 1
    assert run.step(batch=1) == 2
    for batch in (2, 1, 2):
        assert run.step(batch=batch, seed=batch, tokens=7) == 2


def test_first_without_guidance_then_with():
    run = Run()
    assert [run.step(batch=batch) for batch in (1, 2, 1, 2)] == [1, 2, 2, 2]


def test_a_new_size_is_one_graph_more_for_all_sizes():
    run = Run()
    assert run.step() == 1
    for grid in ((3, 6, 8), (5, 4, 6), (2, 8, 10), (4, 10, 4)):
        assert run.step(grid=grid) == 2
    assert run.step() == 2, "the first size keeps its own"
    assert run.step(grid=(5, 6, 6), tokens=20) == 2


@pytest.mark.parametrize("way", ["cond", "cached"])
def test_given_frames_are_one_graph_more(way):
    run = Run()
    assert run.step() == 1
    assert run.step(**{way: 1}) == 2
    counts = [run.step(seed=seed, tokens=3 + seed, **{way: 1}) for seed in range(3)]
    assert counts == [2, 2, 2]
    other = [run.step(**{way: 2}), run.step(**{way: 2}, seed=1), run.step(**{way: 1}), run.step()]
    assert other == [3, 3, 3, 3], "another number of them at most one more"
    if way == "cached":
        assert run.step(cached=3, grid=(4, 4, 6)) == 3, "symbolic by now"


def test_sizes_that_one_kind_has_met_are_new_to_another():
    run = Run()
    other = (5, 4, 6)
    steps = [{}, {"cond": 1, "grid": other}, {"grid": other}, {"cond": 1, "grid": other}, {"grid": other}]
    assert [run.step(**step) for step in steps] == [1, 2, 3, 3, 3]


def test_lora_does_not_recompile(tmp_path):
    run = Run()
    assert run.step() == 1
    for strength in (1.0, -0.5):
        for model in (run.model, run.plain):
            merge_lora(model, GOLDEN / "lora.safetensors", strength)
        assert run.step() == 1


def test_toggling_does_not_recompile():
    run = Run()
    run.step()
    run.model.set_optimizations(run.plain.optimizations)
    assert run.step() == 1
    run.model.set_optimizations(run.switches)
    assert run.step() == 1 and len(run.said) == 1
    run.model.set_optimizations(replace(run.switches, reuse_text=False))
    assert run.step() == 2, "keys are made in the block then"


def test_more_kinds_than_the_compiler_allows_by_default():
    run = Run()
    with torch._dynamo.config.patch(recompile_limit=2):
        assert [run.step(batch=batch, **more) for batch in (1, 2) for more in ({}, {"cond": 1}, {"cached": 1})][-1] == 6
        assert torch._dynamo.config.recompile_limit == 2


@pytest.mark.parametrize("batch", [1, 2])
def test_an_ffn_in_pieces(monkeypatch, batch):
    run = Run()
    monkeypatch.setattr(fused, "_WHOLE_FFN_BYTES", 0)
    sizes = []
    run.plain.blocks[0].ffn.gate_up.register_forward_pre_hook(lambda _, args: sizes.append(args[0].shape[:2]))
    assert run.step(batch=batch) == 1
    assert sizes == [(1, n) for n in ([1, 1, 1] if batch == 1 else [1, 2, 1, 2])]
    assert run.step(batch=batch, grid=(5, 4, 6)) == 2
    assert run.step(batch=batch, grid=(3, 4, 6), cond=1) == 3


def test_any_kernel_is_an_operator_in_the_graph():
    """Kernels that the compiler cannot look into, and strange ones that are another object at every step."""
    run = Run(attention="sdpa-math")
    assert run.step() == 1
    graph = run.counter.graphs[0]
    assert "attend" in {getattr(node.target, "__name__", "").split(".")[0] for node in graph.graph.nodes}
    sdpa = run.plain.choose_kernels(torch.device("cpu"))
    calls = []

    def strange(seed: int) -> backends.Kernels:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            calls.append(seed)
            return sdpa.attend(q, k, v)

        return sdpa._replace(attend=attend)

    for seed in range(3):
        assert run.step(seed=seed, kernels=strange(seed)) == 2
    assert calls == [seed for seed in range(3) for _ in range(2 * CONFIG.depth)]


def test_packed_text_in_the_graph():
    """The kernel for texts of different lengths, with the padding's key added from the log-sum-exp."""
    from tests.optimize.test_attention import plain_varlen

    run = Run()
    varlen = operators.opaque_varlen("test", plain_varlen)
    kernels = run.plain.choose_kernels(torch.device("cpu"))._replace(varlen=varlen)
    for tokens in (5, 9, 12):
        assert run.step(tokens=tokens, kernels=kernels) == 1


def test_a_block_that_does_not_compile_runs_as_it_is():
    def broken(graph, inputs):
        raise ValueError("no code for you")

    run = Run()
    run.model.compiled_block = Regional(run_block, "the block", broken)
    with pytest.raises(AssertionError):
        run.step()
    assert run.said[0] == SAID and "does not compile here" in run.said[1] and "no code for you" in run.said[1]
    run.said.clear()
    run.step()
    assert not run.said, "said once"


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_through_compiled_blocks(checkpointing):
    grads = []
    for compiled in (False, True):
        run = Run(backend="aot_eager", gradient_checkpointing=checkpointing)
        model = (run.model if compiled else run.plain).requires_grad_(True)
        torch.manual_seed(0)
        x, context = torch.randn(2, 16, 3, 4, 6), torch.randn(2, 8, CONFIG.caption_channels)
        model(x, torch.tensor([100.0, 900.0]), context).square().mean().backward()
        assert run.graphs == (1 if compiled else 0)
        grads.append({name: p.grad for name, p in model.named_parameters()})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-4, atol=1e-7)


@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler")
def test_generated_code(tmp_path, monkeypatch):
    """The real code generator, and its cache on disk: the same graph is not generated twice."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    counts = []
    for _ in range(2):
        run = Run()  # forgets all graphs
        torch._dynamo.utils.counters.clear()
        run.model.compiled_block = Regional(run_block, "the block")
        run.step()
        counts.append(dict(torch._dynamo.utils.counters["inductor"]))
    assert counts[0]["fxgraph_cache_miss"] == 1 and "fxgraph_cache_hit" not in counts[0]
    assert counts[1]["fxgraph_cache_hit"] == 1 and "fxgraph_cache_miss" not in counts[1]
    assert COMPILED_BLOCK.backend == "inductor"
