"""Sparse attention with everything else that a sampling may have, against a loop written out in plain PyTorch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import pytest
import torch
from torch import Tensor

from longcat_core.checkpoints.load import load_transformer
from longcat_core.model.kv_cache import KVMode
from longcat_core.model.transformer import LongCatTransformer
from longcat_core.optimize.adapters import adapt
from longcat_core.optimize.optimized import OptimizedTransformer
from longcat_core.optimize.sparse.settings import Densities, Sparse
from longcat_core.optimize.text_keys import TokenTexts
from longcat_core.sampling.guidance import cfg_zero, guided_steps
from longcat_core.sampling.sampler import Step, sample
from longcat_core.sampling.schedules import make_schedule

from .test_sparse_network import CONFIG, GOLDEN, PLAIN, SHAPE, Reference, error, randn

STEPS = 6
RANGES = Densities((0.6, 1.0), (((0.2, 0.4), (1.0, 1.0)), ((0.6, 1.0), (0.1, 0.1))))


@dataclass(frozen=True)
class Case:
    sparse: Sparse = Sparse(0.3, dense_steps=0.3, query_block=64)  # noqa: RUF009 - it is frozen
    given: int = 0
    batch: int = 1
    kv_cache: KVMode = "exact"
    guidance: float = 4.0
    until: float = 1.0
    lora: Literal["", "merged", "runtime"] = ""
    split: bool = False


CASES = {
    "text": Case(),
    "two videos, ends of guidance and ranges": Case(Sparse(densities=RANGES, dense_steps=0.2), batch=2, until=0.5),
    "one after the other": Case(Sparse(0.2, dense_layers=(0,), tail=False), given=1, split=True, until=0.7),
    "image": Case(given=1, lora="merged"),
    "clip, official": Case(given=3, kv_cache="official", lora="runtime", until=0.5),
    "clip, no cache": Case(given=3, kv_cache="off", batch=2),
    "without guidance": Case(Sparse(0.1, dense_steps=0.0), given=3, guidance=1.0, lora="runtime"),
}


class Setting:
    """Networks, latents and texts of a case."""

    def __init__(self, case: Case) -> None:
        self.case, self.schedule = case, make_schedule("base", STEPS)
        self.model, self.plain = (
            load_transformer(
                GOLDEN / "dit.safetensors", config=CONFIG, optimizations=replace(PLAIN, split_guidance=case.split)
            )
            for _ in range(2)
        )
        if case.lora:
            self._add_lora(merged=(case.lora == "merged", True))
        frames = SHAPE[0] + case.given
        self.noise = randn(case.batch, 16, frames, *SHAPE[1:])
        self.given = randn(1, 16, case.given, *SHAPE[1:], seed=5) if case.given else None
        self.texts = [randn(1, 7, CONFIG.caption_channels, seed=seed) for seed in (1, 2)]

    def _add_lora(self, merged: tuple[bool, bool]) -> None:
        for model, whole in zip((self.model, self.plain), merged, strict=True):
            for i, name in enumerate(("attn.qkv", "ffn.down")):
                layer = model.blocks[i].get_submodule(name)
                down, up = randn(4, layer.in_features, seed=i), randn(layer.out_features, 4, seed=9) * 0.02
                if whole:
                    layer.weight.data += up @ down
                    continue
                adapt(layer, 4)
                for parameter, value in ((layer.lora_down, down), (layer.lora_up, up), (layer.lora_scale, 1.0)):
                    parameter.data.copy_(torch.as_tensor(value))

    def sampled(self, sparse: Sparse | None, cache: float = 0.0) -> tuple[Tensor, list[Step]]:
        self.model.sparse = sparse
        steps: list[Step] = []
        out = sample(
            self.model, self.noise, self.schedule, self.texts[0], None, negative_context=self.texts[1],
            guidance_scale=self.case.guidance, guidance_until=self.case.until, cond_latents=self.given,
            kv_cache=self.case.kv_cache, step_cache=cache, callback=steps.append,
        )  # fmt: skip
        return out, steps

    def _evaluate(self, x: Tensor, timestep: Tensor, text: Tensor, progress: float) -> Tensor:
        case, model = self.case, self.plain
        dense = case.sparse.dense_at(progress)
        layers = [(1.0, 1.0) if dense else case.sparse.of(progress, i, 2) for i in range(CONFIG.depth)]
        ops = Reference(layers, x.shape[2], case.given, case.sparse.queries, case.sparse.tail)
        embedded = model.embed_text(text.expand(len(x), -1, -1), None)
        texts = TokenTexts(embedded, ops.text_form(embedded, len(x)))
        return LongCatTransformer.forward(model, x, timestep, texts, ops, num_cond_latents=case.given)

    @torch.no_grad()
    def expected(self) -> Tensor:
        """Euler steps with guidance; given frames are a part of the input at every step."""
        case, x, sigmas = self.case, self.noise.clone(), self.schedule.sigmas.tolist()
        if self.given is not None:
            x[:, :, : case.given] = self.given
        guided = 0 if case.guidance == 1 else guided_steps(case.until, STEPS)
        for i, level in enumerate(self.schedule.timesteps.tolist()):
            timestep = torch.full((1, x.shape[2]), level)
            timestep[:, : case.given] = 0
            texts = self.texts if i < guided else self.texts[:1]
            outs = [self._evaluate(x, timestep, text, i / STEPS) for text in texts]
            if case.kv_cache == "official":
                outs = [out.index_fill(2, torch.arange(case.given), 0) for out in outs]
            out = cfg_zero(*outs, case.guidance) if len(outs) == 2 else outs[0]
            x[:, :, case.given :] -= (sigmas[i + 1] - sigmas[i]) * out[:, :, case.given :]
        return x


@pytest.mark.parametrize("name", CASES)
def test_sampling_equals_the_loop_written_out(name):
    case = CASES[name]
    setting = Setting(case)
    assert isinstance(setting.model, OptimizedTransformer)
    full, _ = setting.sampled(None)
    got, every = setting.sampled(case.sparse)
    assert error(got, setting.expected()) <= 1e-3 < error(got, full)
    # A cache whose threshold nothing keeps looks on and changes nothing.
    assert error(setting.sampled(case.sparse, 1e-9)[0], got) <= 1e-5
    some, steps = setting.sampled(case.sparse, 1.0)
    assert some.isfinite().all() and sum(step.computed for step in steps) < sum(step.computed for step in every)
    assert error(some, got) > 1e-4
    assert torch.equal(setting.sampled(replace(case.sparse, dense_steps=1.0))[0], full)
    given = 0 if setting.given is None else case.given
    assert given == 0 or torch.equal(some[:, :, :given], setting.given.expand(case.batch, -1, -1, -1, -1))
