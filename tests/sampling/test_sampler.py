"""The sampler loop: callbacks, seeds, batches, given frames with and without their cache."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from longcat_core.checkpoints.load import load_transformer
from longcat_core.errors import LongCatError
from longcat_core.files.safetensors_io import read_tensors
from longcat_core.model.block import run_block
from longcat_core.model.config import ModelConfig
from longcat_core.model.kv_cache import KV_MODES, KVCache
from longcat_core.model.layers import linear_fp32
from longcat_core.model.text import TextTokens
from longcat_core.optimize.compilation import Regional
from longcat_core.optimize.execution import Execution
from longcat_core.optimize.fused import TorchOps
from longcat_core.optimize.optimized import OptimizedTransformer
from longcat_core.optimize.switches import Optimizations
from longcat_core.optimize.text_keys import CachedTexts
from longcat_core.sampling import step as steps
from longcat_core.sampling.conditioning import seeded_noise
from longcat_core.sampling.network import Network
from longcat_core.sampling.sampler import Interrupted, Step, sample
from longcat_core.sampling.schedules import make_schedule
from longcat_core.sampling.step import euler_step

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
SHAPE = (1, 16, 4, 4, 6)
STEPS = 3
GIVEN = 2


@pytest.fixture(scope="module")
def model() -> OptimizedTransformer:
    config = ModelConfig.from_json(GOLDEN / "config.json")
    return load_transformer(GOLDEN / "dit.safetensors", config=config, optimizations=Optimizations(attention="sdpa"))


@pytest.fixture(scope="module")
def data() -> dict[str, Tensor]:
    return read_tensors(GOLDEN / "generate.safetensors")


@pytest.fixture(scope="module")
def text(data) -> dict[str, Tensor]:
    return {
        "context": data["pos.embeds"],
        "mask": data["pos.mask"],
        "negative_context": data["neg.embeds"],
        "negative_mask": data["neg.mask"],
    }


@pytest.fixture(scope="module")
def given() -> Tensor:
    return seeded_noise((1, 16, GIVEN, *SHAPE[3:]), 99)


def run(model: Network, noise: Tensor, text: dict[str, Tensor], steps: int = STEPS, **options) -> Tensor:
    return sample(model, noise, make_schedule("base", steps), **{**text, **options})


def error(got: Tensor, wanted: Tensor) -> float:
    assert got.shape == wanted.shape
    return ((got - wanted).abs().max() / wanted.std()).item()


class StraightFlow:
    """A `Network` and nothing else: it knows the clean latents, and what it returns leads there in a straight line."""

    device, optimizations = torch.device("cpu"), Optimizations()

    def __init__(self, clean: Tensor, noise: Tensor) -> None:
        self.out = clean - noise

    def embed_text(self, context: Tensor, mask: Tensor | None) -> TextTokens:
        return TextTokens(context)

    def fill_kv_cache(self, cond_latents: Tensor, device: str | None) -> KVCache:
        cache = KVCache(ModelConfig.from_json(GOLDEN / "config.json"), *cond_latents.shape[2:])
        cache.out = torch.zeros_like(cond_latents)
        return cache

    def __call__(
        self,
        x: Tensor,
        timestep: Tensor,
        text: TextTokens,
        *,
        num_cond_latents: int,
        kv_cache: KVCache | None,
        **_: object,
    ) -> Tensor:
        assert kv_cache is None or x.shape[2] == self.out.shape[2] - kv_cache.num_latents
        return self.out[:, :, -x.shape[2] :].repeat(len(x) // len(self.out), 1, 1, 1, 1)


@pytest.mark.parametrize("cache", KV_MODES)
@pytest.mark.parametrize("guidance", [4.0, 1.0])
def test_a_network_needs_what_the_protocol_says(text, given, guidance, cache):
    clean, noise = seeded_noise(SHAPE, 1), seeded_noise(SHAPE, 2)
    network: Network = StraightFlow(clean, noise)
    got = run(network, noise, text, cond_latents=given, guidance_scale=guidance, kv_cache=cache)
    torch.testing.assert_close(got, torch.cat((given, clean[:, :, GIVEN:]), dim=2), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("cache", KV_MODES)
@pytest.mark.parametrize("guidance", [4.0, 1.0])
@pytest.mark.parametrize("cond", [0, GIVEN])
def test_callback_after_every_step(model, text, given, cond, guidance, cache):
    seen: list[tuple[Step, Tensor]] = []
    out = run(
        model,
        seeded_noise(SHAPE, 0),
        text,
        cond_latents=given if cond else None,
        guidance_scale=guidance,
        kv_cache=cache,
        callback=lambda step: seen.append((step, step.latents.clone())),
    )
    schedule = make_schedule("base", STEPS)
    assert [step.index for step, _ in seen] == list(range(STEPS))
    assert {step.total for step, _ in seen} == {STEPS}
    assert [step.timestep for step, _ in seen] == schedule.timesteps.tolist()
    assert [step.sigma for step, _ in seen] == schedule.sigmas[:-1].tolist()
    for step, latents in seen:
        assert step.denoised.shape == latents.shape == out.shape == SHAPE
        assert step.denoised.dtype == latents.dtype == torch.float32
        assert torch.equal(latents[:, :, :cond], given[:, :, :cond])
        assert torch.equal(step.denoised[:, :, :cond], given[:, :, :cond])
    last, latents = seen[-1]
    # The last step goes all the way to sigma 0: what it estimates is what it leaves.
    torch.testing.assert_close(last.denoised, latents)
    assert torch.equal(latents, out)


def test_steps_are_eulers(model, text):
    """One step at a time: the latents move along the line to the estimate of the clean ones."""
    noise = seeded_noise(SHAPE, 0)
    schedule = make_schedule("base", STEPS)
    before = noise
    steps = []
    run(model, noise, text, callback=lambda s: steps.append((s.latents.clone(), s.denoised.clone())))
    for i, (latents, denoised) in enumerate(steps):
        share = schedule.sigmas[i + 1] / schedule.sigmas[i]
        torch.testing.assert_close(latents, denoised + share * (before - denoised), atol=1e-5, rtol=1e-5)
        before = latents


def test_a_first_step_that_is_not_finite_is_the_last(model, text):
    evaluated = []

    class Overflows:
        device, optimizations = model.device, model.optimizations

        def embed_text(self, *given, **options):
            return model.embed_text(*given, **options)

        def __call__(self, x, *given, **options):
            evaluated.append(len(x))
            return torch.full_like(x, torch.inf)

    with pytest.raises(LongCatError, match=r"the result of the transformer is not finite.*--dtype"):
        run(Overflows(), seeded_noise(SHAPE, 0), text, callback=lambda step: pytest.fail("the step is shown"))
    assert evaluated == [2], "both halves of one step"


def test_interrupting_stops(model, text):
    seen = []

    def stop(step: Step) -> None:
        seen.append(step.index)
        if step.index == 1:
            raise Interrupted

    with pytest.raises(Interrupted):
        run(model, seeded_noise(SHAPE, 0), text, steps=5, callback=stop)
    assert seen == [0, 1]


@pytest.mark.parametrize("cond", [0, GIVEN])
def test_a_seed_is_a_result_bit_for_bit(model, text, given, cond):
    options = {"cond_latents": given if cond else None}
    noise = seeded_noise(SHAPE, 5)
    kept = noise.clone()
    first = run(model, noise, text, **options)
    assert torch.equal(noise, kept) and torch.equal(given, seeded_noise((1, 16, GIVEN, *SHAPE[3:]), 99))
    torch.rand(3)
    assert torch.equal(run(model, seeded_noise(SHAPE, 5), text, **options), first)
    assert not torch.equal(run(model, seeded_noise(SHAPE, 6), text, **options), first)


@pytest.mark.parametrize("cache", KV_MODES)
@pytest.mark.parametrize("shared", [True, False], ids=["one clip", "a clip each"])
def test_two_videos_at_once_are_two_videos(model, text, given, cache, shared):
    noise = torch.cat([seeded_noise(SHAPE, seed) for seed in (1, 2)])
    clips = given if shared else torch.cat([given, given.flip(2)])
    both_text = {
        "context": torch.cat([text["context"], text["context"].flip(2)]),
        "mask": torch.cat([text["mask"], torch.ones_like(text["mask"])]),
        "negative_context": text["negative_context"],
        "negative_mask": text["negative_mask"],
    }
    both = run(model, noise, both_text, cond_latents=clips, kv_cache=cache)
    for i in range(2):
        row = slice(i, i + 1)
        one = {k: v[row] if len(v) == 2 else v for k, v in both_text.items()}
        alone = run(model, noise[row], one, cond_latents=clips[row] if not shared else given, kv_cache=cache)
        assert error(both[row], alone) <= 1e-5


def test_the_exact_cache_is_the_uncached_result_and_the_official_one_another(model, text, given):
    exact, official, off = (
        run(model, seeded_noise(SHAPE, 0), text, cond_latents=given, kv_cache=cache) for cache in KV_MODES
    )
    assert error(exact, off) <= 1e-5 < 1e-3 < error(official, off)


def test_an_unknown_cache_is_named(model, text, given):
    with pytest.raises(LongCatError, match="unknown KV cache mode 'on'; choose one of exact, official, off"):
        run(model, seeded_noise(SHAPE, 0), text, cond_latents=given, kv_cache="on")


def test_cache_in_cpu_memory_gives_the_same(model, text, given):
    outputs = [
        run(model, seeded_noise(SHAPE, 0), text, cond_latents=given, offload_kv_cache=offload)
        for offload in (False, True)
    ]
    assert torch.equal(*outputs)


def test_without_guidance_the_cache_changes_nothing(model, text, given):
    outputs = [
        run(model, seeded_noise(SHAPE, 0), text, cond_latents=given, guidance_scale=1.0, kv_cache=cache)
        for cache in KV_MODES
    ]
    assert max(error(outputs[-1], other) for other in outputs[:-1]) <= 1e-5


def test_without_guidance_the_negative_prompt_is_not_asked(model, text):
    noise = seeded_noise(SHAPE, 0)
    alone = {"context": text["context"], "mask": text["mask"]}
    assert torch.equal(run(model, noise, alone, guidance_scale=1.0), run(model, noise, text, guidance_scale=1.0))
    assert error(run(model, noise, text, guidance_scale=1.5), run(model, noise, alone, guidance_scale=1.0)) > 1e-3


def test_without_masks_every_token_counts(model, text):
    noise = seeded_noise(SHAPE, 0)
    bare = run(model, noise, {**text, "mask": None, "negative_mask": None})
    ones = torch.ones_like(text["mask"])
    assert error(run(model, noise, {**text, "mask": ones, "negative_mask": ones}), bare) <= 1e-5


def test_no_gradient_is_kept(model, text):
    model.requires_grad_(True)
    try:
        assert not run(model, seeded_noise(SHAPE, 0), text).requires_grad
    finally:
        model.requires_grad_(False)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"negative_context": None}, "guidance scale 4.0 needs a negative prompt"),
        ({"negative_mask": None}, "has a mask and the other has none"),
        ({"cond_latents": torch.zeros(1, 16, 4, 4, 6)}, "4 conditioning latent frames leave nothing to generate of 4"),
        ({"cond_latents": torch.zeros(1, 16, 1, 4, 4)}, r"\(1, 16, 1, 4, 4\) do not fit latents \(1, 16, 4, 4, 6\)"),
        ({"cond_latents": torch.zeros(1, 4, 1, 4, 6)}, r"\(1, 4, 1, 4, 6\) do not fit"),
        ({"cond_latents": torch.zeros(3, 16, 1, 4, 6)}, r"\(3, 16, 1, 4, 6\) do not fit"),
    ],
)
def test_bad_input_is_named(model, text, options, said):
    with pytest.raises(LongCatError, match=said):
        run(model, seeded_noise(SHAPE, 0), text, **options)


def test_odd_latents_are_named(model, text):
    with pytest.raises(LongCatError, match=r"\(2, 16, 2, 3, 6\).*2x2"):
        run(model, torch.zeros(1, 16, 2, 3, 6), text)


def test_one_prompt_serves_several_videos_under_guidance():
    model = load_transformer(GOLDEN / "dit.safetensors")
    data = read_tensors(GOLDEN / "generate.safetensors")
    noise = torch.cat((data["noise"], data["noise"].flip(-1)))
    kwargs = {"negative_context": data["neg.embeds"], "negative_mask": data["neg.mask"]}
    schedule = make_schedule("base", 2)
    both = sample(model, noise, schedule, data["pos.embeds"], data["pos.mask"], **kwargs)
    for i in range(2):
        one = sample(model, noise[i : i + 1], schedule, data["pos.embeds"], data["pos.mask"], **kwargs)
        torch.testing.assert_close(both[i : i + 1], one, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("cond", [0, GIVEN])
def test_a_compiled_run_is_the_same_run(model, text, given, cond, monkeypatch):
    """Blocks and sampler step compiled, with two graphs for all steps."""
    counter = CompileCounterWithBackend("eager")
    torch._dynamo.reset()
    options = {"cond_latents": given if cond else None}
    plain = run(model, seeded_noise(SHAPE, 0), text, **options)
    monkeypatch.setattr(model, "compiled_block", Regional(run_block, "the block", counter, slow=False))
    monkeypatch.setattr(steps, "STEP", Regional(euler_step, "the step", counter, slow=False))
    before = model.optimizations
    model.set_optimizations(replace(before, compile="blocks"))
    try:
        assert error(run(model, seeded_noise(SHAPE, 0), text, **options), plain) <= 1e-4
    finally:
        model.set_optimizations(before)
        torch._dynamo.reset()
    assert counter.frame_count == 2


def test_text_and_timesteps_are_worked_up_once(model, text, monkeypatch):
    """Keys of the text once for all steps, modulation once for both halves of guidance and all frames; off: as often
    as they are used. Both give the same latents."""
    before, latents = model.optimizations, {}
    keys, rows = [], []
    for block in model.blocks:
        block.cross_attn.kv.register_forward_hook(lambda *_: keys.append(1))
    monkeypatch.setattr(model.blocks[0], "linear_fp32", lambda m, x: rows.append(x.shape[:2]) or linear_fp32(m, x))
    for on in (True, False):
        keys.clear(), rows.clear()
        model.set_optimizations(replace(before, reuse_text=on, reuse_modulation=on))
        latents[on] = run(model, seeded_noise(SHAPE, 0), text)
        assert len(keys) == len(model.blocks) * (1 if on else STEPS)
        assert rows == [(1, 1) if on else (2, SHAPE[1 + 1])] * STEPS
    model.set_optimizations(before)
    for block in model.blocks:
        block.cross_attn.kv._forward_hooks.clear()
    assert error(latents[True], latents[False]) <= 1e-5


def test_kept_keys_are_those_of_the_weights(model, text):
    """A LoRA merged in, other switches, another dtype: keys and values of a text are recomputed."""
    read = model.embed_text(text["context"], text["mask"])
    layer = model.blocks[0].cross_attn.kv

    def keys() -> list:
        ops = TorchOps(model.choose_kernels(read.tokens.device))
        texts = CachedTexts(read, ops.text_form(read, len(text["context"])), model.blocks, ops, None)
        return [texts(i).keys[0] for i in range(len(model.blocks))]

    calls = []
    layer.register_forward_hook(lambda *_: calls.append(1))
    first = keys()
    assert all(torch.equal(a, b) for a, b in zip(first, keys(), strict=True)) and len(calls) == 1
    with torch.no_grad():
        layer.weight += 1
        changed = keys()[0]
        layer.weight -= 1
    assert not torch.allclose(changed, first[0])
    torch.testing.assert_close(keys()[0], first[0], atol=1e-4, rtol=1e-4)
    assert len(calls) == 3
    layer._forward_hooks.clear()


@pytest.mark.parametrize("cache", KV_MODES)
@pytest.mark.parametrize("masked", [True, False])
def test_halves_of_guidance_one_after_the_other(model, text, given, cache, masked, monkeypatch):
    words = text if masked else {name: value for name, value in text.items() if "mask" not in name} | {"mask": None}
    batches: list[int] = []
    hook = model.final_layer.register_forward_pre_hook(lambda _, inputs: batches.append(len(inputs[0])))
    outs = {}
    for split in (False, True):
        batches.clear()
        monkeypatch.setattr(model, "optimizations", replace(model.optimizations, split_guidance=split))
        outs[split] = run(model, seeded_noise(SHAPE, 0), words, cond_latents=given, kv_cache=cache)
        filled = [1] if cache != "off" else []
        assert batches == filled + ([1, 1] if split else [2]) * STEPS
    hook.remove()
    assert error(outs[True], outs[False]) <= 1e-5


class Short:
    """Runs out of memory at the named forwards, counted over all."""

    def __init__(self, model: OptimizedTransformer, monkeypatch: pytest.MonkeyPatch, *fails: int) -> None:
        self.calls, self.asked = 0, 0
        forward = Execution.__call__

        def limited(execution: Execution, *args: object, **options: object) -> Tensor:
            self.calls += 1
            if self.calls - 1 in fails:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return forward(execution, *args, **options)

        monkeypatch.setattr(Execution, "__call__", limited)

    def room(self) -> bool:
        self.asked += 1
        return True


@pytest.mark.parametrize("fails", [(0,), (1,), (STEPS,), (1, 3), (0, 1, 2)])
def test_a_forward_that_runs_out_of_memory_is_tried_again(model, text, given, fails, monkeypatch):
    """The first forward fills the cache, which goes to CPU memory when room is made."""
    wanted = run(model, seeded_noise(SHAPE, 0), text, cond_latents=given)
    short = Short(model, monkeypatch, *fails)
    seen = []
    got = run(
        model,
        seeded_noise(SHAPE, 0),
        text,
        cond_latents=given,
        make_room=short.room,
        callback=lambda step: seen.append(step.index),
    )
    assert torch.equal(got, wanted)
    assert seen == [0, 1, 2] and short.asked == len(fails) and short.calls == 1 + STEPS + len(fails)


def test_room_that_is_made_counts_at_once(model, text, monkeypatch):
    """Guidance is split from the step on that failed, which is computed once."""
    wanted = run(model, seeded_noise(SHAPE, 0), text)
    short, before = Short(model, monkeypatch, 1), model.optimizations

    def room() -> bool:
        model.set_optimizations(replace(before, split_guidance=True))
        return True

    got = run(model, seeded_noise(SHAPE, 0), text, make_room=room)
    model.set_optimizations(before)
    assert error(got, wanted) <= 1e-5
    # One whole, one that failed, and two halves for each of the steps from there on.
    assert short.calls == 2 + 2 * (STEPS - 1)


def test_without_more_room_the_error_stands(model, text, given, monkeypatch):
    Short(model, monkeypatch, 1)
    with pytest.raises(torch.OutOfMemoryError, match="ask for a smaller size"):
        run(model, seeded_noise(SHAPE, 0), text, make_room=lambda: False)
    Short(model, monkeypatch, 1, 2, 3)
    room = iter((True, True, False))
    with pytest.raises(torch.OutOfMemoryError, match="ask for a smaller size"):
        run(model, seeded_noise(SHAPE, 0), text, make_room=lambda: next(room))
    Short(model, monkeypatch, 1)
    with pytest.raises(torch.OutOfMemoryError, match="CUDA"):
        run(model, seeded_noise(SHAPE, 0), text)
    # A cache that can go is room enough; after that there is no more.
    short = Short(model, monkeypatch, 1)
    run(model, seeded_noise(SHAPE, 0), text, cond_latents=given, make_room=lambda: False)
    assert short.calls == 2 + STEPS
