"""The addition that docs/architecture.md sketches, run as it stands there on a small network."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from longcat_core.model.ops import PlainOps
from longcat_core.model.text import BlockText, TextTokens
from longcat_core.model.transformer import FrameLayout, LongCatTransformer
from longcat_core.optimize.attention import Inputs, resolve_kernels
from longcat_core.optimize.fused import TorchOps

from .support.tiny import tiny_config

PAGE = Path(__file__).parents[1] / "docs" / "architecture.md"
SKETCHES = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
CONFIG = tiny_config(num_heads=4, caption_channels=24)
KERNELS = resolve_kernels("sdpa", Inputs(torch.device("cpu"), torch.float32, CONFIG.head_dim, False))
FRAMES, TOKENS = 3, 3 * 2 * 4


def sketch(name: str, **names: Any) -> dict[str, Any]:
    """What the page's code block with class `name` defines. FusedOps needs a GPU; its base runs in its place."""
    (code,) = (code for code in SKETCHES if f"class {name}(" in code)
    found = {"FrameLayout": FrameLayout, "FusedOps": TorchOps, **names}
    exec(code, found)
    return found


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def network(**options: Any) -> LongCatTransformer:
    model = LongCatTransformer(CONFIG, **options).requires_grad_(False)
    for i, parameter in enumerate(model.parameters()):
        parameter.copy_(randn(*parameter.shape, seed=i) * 0.2)
    return model


def words(count: int = 5, seed: int = 7) -> BlockText:
    tokens = randn(1, count, CONFIG.hidden_size, seed=seed)
    return PlainOps().text_form(TextTokens(tokens), 1).tokens(tokens)


def run(model: LongCatTransformer, ops: PlainOps, num_cond: int = 0, texts: Any = None, **options: Any) -> Tensor:
    steps = torch.full((1, FRAMES), 500.0)
    steps[:, :num_cond] = 0
    latents = randn(1, CONFIG.in_channels, FRAMES, 4, 8, seed=1)
    with torch.no_grad():
        return model(latents, steps, texts or (lambda i: words()), ops, num_cond_latents=num_cond, **options)


class Collectives:
    """The collectives of `gpus` threads: every one waits for what the others hand in."""

    def __init__(self, gpus: int) -> None:
        self.barrier, self.handed = threading.Barrier(gpus, timeout=30), [torch.empty(0)] * gpus

    def all(self, rank: int, x: Tensor) -> list[Tensor]:
        self.handed[rank] = x
        self.barrier.wait()
        found = list(self.handed)
        self.barrier.wait()
        return found

    def of(self, rank: int) -> dict[str, Callable[..., Tensor]]:
        gpus = len(self.handed)
        return {
            "gather": lambda x, dim: torch.cat(self.all(rank, x), dim),
            "exchange": lambda x, split, join: torch.cat([o.chunk(gpus, split)[rank] for o in self.all(rank, x)], join),
        }


@pytest.mark.parametrize("num_cond", [0, 1])
@pytest.mark.parametrize("gpus", [2, 4])
def test_several_gpus_compute_what_one_computes(gpus, num_cond):
    model, collectives = network(), Collectives(gpus)
    expected = run(model, TorchOps(KERNELS), num_cond)
    sizes = []

    def one(rank: int) -> Tensor:
        found = sketch("ShardedOps", GPUS=gpus, RANK=rank, **collectives.of(rank))

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            sizes.append((k.shape[1], k.shape[2]))
            return KERNELS.attend(q, k, v)

        ops = found["ShardedOps"](KERNELS._replace(attend=attend))
        return run(model, ops, num_cond, layout=found["ShardedLayout"]())

    with ThreadPoolExecutor(gpus) as pool:
        outs = list(pool.map(one, range(gpus)))
    for out in outs:
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    assert (TOKENS, CONFIG.num_heads // gpus) in sizes, "attention sees all tokens and a share of the heads"
