"""The input `speed` of LongCat Sampler, Long Video and Fidelity: what it sets on a copy of the MODEL."""

from __future__ import annotations

import copy
import logging
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from .conftest import MODEL, ON_CPU
from .golden_avatar import Avatar

STEPS = 8
# 5x16x16 tokens.
SIZE = {"width": 256, "height": 256, "length": 17}


@pytest.fixture
def speeds(comfy, monkeypatch) -> Any:
    """The core's speeds; `fast` stands for everything, and sparse attention runs anywhere."""
    core, fit = comfy.core("generate.speeds"), comfy.core("generate.speed_fit")
    price = core.Price(33.3, 41.2, "a model", 2.14, "a clock", "2026-11-29")
    whole = core.SpeedSet(price, fp8=True, sparse=0.3, dense_steps=0.25, step_cache=0.1, guidance_until=0.75)
    monkeypatch.setitem(core.SETS, "fast", dict.fromkeys(core.SETS["fast"], whole))
    monkeypatch.setattr(fit, "only_plain", lambda inputs: "")
    return SimpleNamespace(core=core, fit=fit, whole=whole)


@pytest.fixture
def latent(comfy):
    return comfy("EmptyHunyuanLatentVideo", **SIZE, batch_size=1)


@pytest.fixture
def said(caplog):
    """The sentences about a speed so far."""
    caplog.set_level(logging.INFO)
    return lambda: [r.getMessage() for r in caplog.records if r.getMessage().startswith("LongCat: speed")]


def test_a_word_is_its_options(comfy, model, latent, sample, speeds, said):
    before = copy.deepcopy(model.model_options), {kind: dict(found) for kind, found in model.wrappers.items()}
    fast = sample(latent, steps=STEPS, seed=2, speed="fast")
    spelled = comfy("LongCatSparseAttention", model=model, density=0.3, dense_steps=0.25)
    spelled = comfy("LongCatStepCache", model=spelled, threshold=0.1)
    assert torch.equal(fast, sample(latent, model=spelled, steps=STEPS, seed=2, guidance_until=0.75))
    (note,) = said()
    assert "speed fast sets sparse attention 0.3 after 25% of the steps, step cache 0.1 and guidance until 0.75" in note
    assert "it leaves out fp8 (the MODEL was loaded without it; choose weight_dtype fp8 rowwise" in note
    assert "the whole set is 33.3 dB against exact, 2.14 times as fast" in note
    assert (model.model_options, {kind: dict(found) for kind, found in model.wrappers.items()}) == before


def test_exact_is_the_default_and_changes_nothing(latent, sample, speeds, said):
    exact = sample(latent, steps=2, seed=2)
    assert torch.equal(sample(latent, steps=2, seed=2, speed="exact"), exact)
    sample(latent, steps=2, seed=2, speed="fast")
    assert torch.equal(sample(latent, steps=2, seed=2), exact)
    assert len(said()) == 1


@pytest.mark.parametrize("density", [0.5, 1.0])
def test_nodes_in_front_win(comfy, model, latent, sample, speeds, said, density):
    """A density of 1 and a threshold of 0 too, which ask for exactly what there is without the node."""
    own = comfy("LongCatSparseAttention", model=model, density=density, dense_steps=0.5)
    own = comfy("LongCatStepCache", model=own, threshold=0.0)
    got = sample(latent, model=own, steps=4, seed=2, speed="fast", guidance_until=0.5)
    assert torch.equal(got, sample(latent, model=own, steps=4, seed=2, guidance_until=0.5))
    (note,) = said()
    assert "speed fast sets nothing here" in note
    assert "your own sparse attention, step cache and guidance until take precedence" in note


def test_block_sparse_attention_wins(comfy, model, speeds):
    own = comfy("LongCatBlockSparseAttention", model=model, sparsity=0.5, cdf_threshold=0.0, chunk="4x4x4")
    used, _, (note,) = comfy.node("speed").with_speed(
        own, "fast", mode="base", guidance=4.0, guidance_until=1.0, tokens=5000
    )
    assert "longcat_sparse" not in used.model_options["transformer_options"]
    assert "your own sparse attention takes precedence" in note


def options_under(comfy, model, **changes) -> tuple[Any, str]:
    """The switches of a MODEL under the word fast, and the note."""
    inputs = {"mode": "base", "guidance": 4.0, "guidance_until": 1.0, "tokens": 5000} | changes
    used, _, (note,) = comfy.node("speed").with_speed(model, "fast", **inputs)
    return comfy.node("models").switches_of(used), note


def test_attention(comfy, model, speeds, monkeypatch):
    kinds = dict.fromkeys(speeds.core.SETS["fast"], replace(speeds.whole, attention="sage"))
    monkeypatch.setitem(speeds.core.SETS, "fast", kinds)
    missing, _ = options_under(comfy, model)
    assert missing.attention == "auto"
    monkeypatch.setattr(comfy.core("optimize.attention"), "why_not", lambda name, inputs: "")
    found, note = options_under(comfy, model)
    assert found.attention == "sage" and "attention sage" in note
    chosen, _ = comfy("LongCatOptimizations", model=model, attention="sdpa")
    own, note = options_under(comfy, chosen)
    assert own.attention == "sdpa" and "your own attention takes precedence" in note
    other = model.clone()
    other.model_options["transformer_options"]["optimized_attention_override"] = lambda attend, *args, **kwargs: None
    overridden, note = options_under(comfy, other)
    assert overridden.attention == "auto" and "attention (an attention override set by another node decides)" in note


def test_a_model_in_8_bits_has_them(comfy, speeds):
    loaded = comfy("LongCatModelLoader", model_name=MODEL, weight_dtype="fp8 rowwise")
    _, note = options_under(comfy, loaded)
    assert note.startswith("speed fast sets fp8, sparse attention") and "leaves out" not in note
    without, _ = comfy("LongCatOptimizations", model=loaded, fp8=False)
    _, note = options_under(comfy, without)
    assert "your own fp8 takes precedence" in note


def test_what_the_video_does_not_allow(comfy, model, speeds):
    _, note = options_under(comfy, model, tokens=216, guidance=1.0)
    assert "sparse attention (the video has 216 tokens to generate, fewer than 1024)" in note
    assert "guidance until (the video has no guidance)" in note


@pytest.mark.skipif(not ON_CPU, reason="a GPU has kernels")
def test_nano_on_a_cpu_says_why_nothing_changes(comfy, model, latent, sample, said, monkeypatch):
    core = comfy.core("generate.speeds")
    sparse = replace(core.SETS["fastest"]["base"], sparse=0.15, step_cache=0.0, guidance_until=1.0, fp8=True)
    monkeypatch.setitem(core.SETS, "fast", {"base": sparse})
    assert torch.equal(sample(latent, steps=2, seed=2, speed="fast"), sample(latent, steps=2, seed=2))
    (note,) = said()
    assert "speed fast sets nothing here; it leaves out fp8 (" in note and "no kernel of it runs here" in note


def test_an_avatar_has_sets_of_its_own(comfy, model):
    core = comfy.core("generate.speeds")
    inputs = {"guidance": 1.0, "guidance_until": 1.0, "tokens": 5000}
    avatar = Avatar(comfy, "v1_5").model
    for mode, kind in (("base", core.AVATAR), ("distilled", core.AVATAR_DISTILLED)):
        for speed in core.SPEEDS[1:]:
            *_, (note,) = comfy.node("speed").with_speed(avatar, speed, mode=mode, **inputs)
            assert core.SETS[speed][kind].price.in_words() in note
    *_, (note,) = comfy.node("speed").with_speed(model, "near", mode="distilled", **inputs)
    assert note == "speed near sets nothing lossy for this schedule yet"


def test_an_unknown_word_is_refused(comfy, empty, sample):
    with pytest.raises(comfy.core("errors").LongCatError, match="speed is 'quick'; choose one of exact, near"):
        sample(empty, speed="quick")


def test_fidelity_prices_a_word(comfy, model, vae, prompts, empty, speeds):
    small = {"samples": empty["samples"][:, :, :3]}

    def priced(**changes):
        inputs = {"seed": 5, "steps": STEPS, "guidance": 4.0, "mode": "base", "noise_floor": False, "vae": vae}
        found = comfy("LongCatFidelity", model=model, model_b=model, latent_image=small, **prompts, **inputs | changes)
        return found[2], found[3], found[4]

    a, b, said = priced()
    assert torch.equal(a, b)
    for changes, words in (
        ({"speed": "fast"}, "B: step cache 0.1, guidance until 0.75"),
        ({"guidance_until": 0.5}, "B: guidance until 0.5"),
    ):
        reference, other, said = priced(**changes)
        assert words in said and torch.equal(reference, a) and not torch.equal(other, a)


def test_a_long_video_records_what_is_in_force(comfy, model, clip, vae, speeds, tmp_path, monkeypatch, said):
    """Under a word as with its options, so that the folder of one is resumed by the other."""
    node, requests = comfy.node("long_video"), []
    monkeypatch.setattr(node.long_video, "long_video", lambda load, request, *_: requests.append(request) or [])
    monkeypatch.setattr(node.LongVideo, "remember", lambda files: None)
    monkeypatch.setattr(node.Gathered, "output", lambda self, *_: comfy.node("inputs").io.NodeOutput())
    inputs = {"clip": clip, "vae": vae, "prompts": "a", "negative_prompt": "", "segments": 2, "overlap": 5, "seed": 1}
    inputs |= {"steps": 4, "guidance": 4.0, "mode": "base", "hand_off": "frames", "folder": "speed", **SIZE}
    spelled = comfy("LongCatSparseAttention", model=model, density=0.3, dense_steps=0.25)
    spelled = comfy("LongCatStepCache", model=spelled, threshold=0.1)
    node.LongVideo.execute(model=model, speed="fast", **inputs)
    node.LongVideo.execute(model=spelled, guidance_until=0.75, **inputs)
    word, own = requests
    for number in (0, 1):
        assert word.settings(number) == own.settings(number)
        assert word.settings(number)["lossy"].keys() >= {"sparse", "step cache", "guidance until"}
    assert len(said()) == 1
