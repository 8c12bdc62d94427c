"""Words of speed: the table of sets, what of a set fits, and which values win."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from datetime import date
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from longcat_core.checkpoints.load import open_checkpoint
from longcat_core.errors import LongCatError
from longcat_core.generate import speed_fit
from longcat_core.generate.calibration import VideoCheck
from longcat_core.generate.long_video import LongVideoRequest
from longcat_core.generate.options import of_command, option
from longcat_core.generate.paths import NANO_MODEL
from longcat_core.generate.pipeline import Pipeline
from longcat_core.generate.request import NANO, RELEASED, GenerateRequest
from longcat_core.generate.speed_fit import Loaded, fit_loading, loading_notes
from longcat_core.generate.speeds import (
    AVATAR,
    AVATAR_DISTILLED,
    BASE,
    DISTILLED,
    KINDS,
    REFINE,
    SETS,
    SPEEDS,
    Price,
    SpeedSet,
    prices_in_words,
    set_of,
)
from longcat_core.generate.takes import LOSSY, lossy_settings
from longcat_core.measure.fidelity import MARGIN_DB
from longcat_core.model.config import ModelConfig
from longcat_core.optimize import attention
from longcat_core.optimize.requirement import Inputs
from longcat_core.optimize.sparse.settings import Sparse
from longcat_core.optimize.switches import Optimizations

from .test_calibration import calibration_of

CPU = Inputs(torch.device("cpu"), torch.float32, 64, False)
PRICE = Price(33.3, 41.2, "a model", 2.14, "a clock", "2026-11-29")
# Every option that a set may have.
WHOLE = SpeedSet(PRICE, True, "cudnn-fp8", 0.15, 0.2, 0.05, 0.8)
EVERY = [(speed, kind) for speed in SPEEDS for kind in SETS[speed]]
REQUEST = GenerateRequest("x", steps=4)


@pytest.fixture
def whole(monkeypatch) -> None:
    """The word fast stands for all options."""
    monkeypatch.setitem(SETS, "fast", dict.fromkeys(KINDS, WHOLE))


# --- the table -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("speed", "kind"), EVERY)
def test_a_set_has_options_of_the_table_in_their_range(speed, kind):
    found = SETS[speed][kind]
    for name, value in found.options.items():
        command = "refine" if kind == REFINE else "avatar" if kind in (AVATAR, AVATAR_DISTILLED) else "generate"
        rows = [row for row in of_command(command) if row.name == name]
        assert rows, f"{name} is not an option of the commands that {kind} is for"
        assert rows[0].least is None or rows[0].least < value < rows[0].most
    assert 0 < found.dense_steps < 1
    assert not set(found.options) & {"dense_steps", "price"}


@pytest.mark.parametrize(("speed", "kind"), EVERY)
def test_a_set_is_lossy_and_exact_is_not(speed, kind):
    found = SETS[speed][kind]
    values = {name: getattr(found, name) for name in ("step_cache", "guidance_until")}
    sparse = None if found.sparse is None else Sparse(found.sparse, dense_steps=found.dense_steps)
    switches = Optimizations(attention=found.attention)
    lossy = lossy_settings(**values, sparse=sparse, switches=switches, eight_bit=found.fp8)
    assert len(lossy) == len(found.options), "each option of a set changes the result, which its price says"
    assert (speed == "exact") <= (not lossy)
    assert found.attention in attention.names()


@pytest.mark.parametrize(("speed", "kind"), EVERY)
def test_a_set_with_options_says_its_price(speed, kind):
    found = SETS[speed][kind]
    assert (found.price is not None) == bool(found.options)
    if (price := found.price) is not None:
        assert price.psnr > 0 and price.times > 1 and price.model and price.timing and date.fromisoformat(price.date)
        assert speed != "near" or price.psnr >= price.floor - MARGIN_DB


def test_all_words_have_all_kinds():
    assert tuple(SETS) == SPEEDS == option("speed").choices
    assert all(tuple(kinds) == KINDS for kinds in SETS.values())
    assert set_of("fast", "enhance_hf") is set_of("fast", "base") is SETS["fast"][BASE]
    assert set_of("fast", "distilled") is SETS["fast"][DISTILLED]
    assert set_of("fast", "enhance_hf", avatar=True) is SETS["fast"][AVATAR]
    assert set_of("fast", "distilled", avatar=True) is SETS["fast"][AVATAR_DISTILLED]


def test_faster_words_are_faster_and_cost_more():
    for kind in KINDS:
        prices = [
            (1.0, -math.inf) if (p := SETS[speed][kind].price) is None else (p.times, -p.psnr) for speed in SPEEDS
        ]
        assert all(slower <= faster for values in zip(*prices, strict=True) for slower, faster in pairwise(values))


def test_what_is_said_of_a_set(monkeypatch):
    assert WHOLE.in_words() == (
        "fp8, attention cudnn-fp8, sparse attention 0.15 after 20% of the steps, step cache 0.05 and guidance until 0.8"
    )
    monkeypatch.setitem(SETS, "fast", {BASE: WHOLE})
    assert "fast (33.3 dB against exact, 2.14 times as fast)" in prices_in_words()
    monkeypatch.setitem(SETS, "near", {BASE: SpeedSet(None)})
    assert filled(speed="near").notes() == ["speed near sets nothing lossy for this schedule yet"]


# --- which values win ------------------------------------------------------------------------------------------------


def filled(defaults=RELEASED, **changes: Any):
    return replace(REQUEST, **changes).filled(defaults)


def test_exact_is_the_default_and_sets_nothing():
    found = filled()
    assert (found.speed, found.sparse, found.step_cache) == ("exact", None, 0.0)
    assert found.guidance_until == 1.0 and found.notes() == []
    assert filled(speed="exact", step_cache=0.05).step_cache == 0.05, "explicit options still work"


def test_a_word_fills_in_what_is_not_given(whole):
    found = filled(speed="fast")
    assert found.sparse == Sparse(0.15, dense_steps=0.2)
    assert (found.step_cache, found.guidance_until) == (0.05, 0.8)
    (note,) = found.notes()
    assert note == (
        f"speed fast sets {WHOLE.in_words()}; 33.3 dB against exact, 2.14 times as fast (dB on a model, where two "
        "exact kernels are 41.2 dB apart; times by a clock; 2026-11-29)"
    )


@pytest.mark.parametrize(
    ("given", "kept", "said"),
    [
        ({"step_cache": 0.0}, {"guidance_until": 0.8}, "your own step cache takes precedence"),
        ({"step_cache": 0.1}, {"guidance_until": 0.8}, "your own step cache takes precedence"),
        ({"guidance_until": 1.0}, {"step_cache": 0.05}, "your own guidance until takes precedence"),
        ({"sparse": Sparse(1.0)}, {"guidance_until": 0.8}, "your own sparse attention takes precedence"),
        ({"sparse": Sparse(0.3), "guidance_until": 0.5}, {}, "sparse attention and guidance until take precedence"),
    ],
)
def test_what_is_given_wins(whole, given, kept, said):
    found = filled(speed="fast", **given)
    assert {name: getattr(found, name) for name in given | kept} == given | kept
    (note,) = [note for note in found.notes() if note.startswith("speed")]
    assert said in note
    if said:
        assert note.endswith("; the whole set is 33.3 dB against exact, 2.14 times as fast")


def test_a_kernel_is_that_of_the_words_density(whole):
    assert filled(speed="fast", sparse_kernel="triton").sparse_settings == Sparse(0.15, kernel="triton")


@pytest.mark.parametrize(
    ("changes", "gone", "said"),
    [
        ({"frames": 5, "height": 64, "width": 96}, "sparse", "sparse attention (the video has 48 tokens to generate, "
         "fewer than 1024)"),
        ({"frames": 17, "height": 272, "width": 256, "given": 13}, "sparse", "(the video has 272 tokens to generate"),
        ({"guidance_scale": 1.0}, "guidance_until", "guidance until (the video has no guidance)"),
    ],
)  # fmt: skip
def test_what_the_video_does_not_allow_is_left_out(whole, changes, gone, said):
    if "given" in changes:
        changes = changes | {"given": np.zeros((13, 64, 64, 3), np.uint8)}
    found = filled(speed="fast", **changes)
    assert getattr(found, gone) == speed_fit.EXACT_VALUES[gone] and found.step_cache == 0.05
    (note,) = found.notes()
    assert said in note and note.endswith("; the whole set is 33.3 dB against exact, 2.14 times as fast")


def test_a_calibration_says_its_own_price(whole):
    found = calibration_of(open_checkpoint(NANO_MODEL))
    video = VideoCheck(35.2, 50.1, "attention cudnn", 0.1, 0.05, 1.8)
    request = filled(speed="fast", sparse=replace(found, video=video))
    (note,) = [note for note in request.notes() if note.startswith("speed")]
    assert request.sparse_settings.densities is not None and request.step_cache == 0.05
    assert "your own sparse attention takes precedence" in note
    assert note.endswith("; the calibration was measured at 35.2 dB against exact, 1.8 times as fast")
    (note,) = [n for n in filled(speed="fast", sparse=replace(found, video=None)).notes() if n.startswith("speed")]
    assert note.endswith(f"; the calibration is expected to be {found.expected_speed_up:.2g} times as fast")
    assert not [n for n in filled(sparse=replace(found, video=video)).notes() if "35.2" in n], "exact needs no price"


def test_filling_again_changes_nothing_unless_the_word_changes(whole):
    found = filled(speed="fast", step_cache=0.1)
    again = found.filled(RELEASED)
    assert again == found and again.notes() == found.notes()
    exact = replace(found, speed="exact").filled(RELEASED)
    assert (exact.sparse, exact.guidance_until, exact.step_cache) == (None, 1.0, 0.1)
    back = replace(filled(), speed="fast").filled(RELEASED)
    assert (back.sparse, back.step_cache) == (Sparse(0.15), 0.05)
    changed = replace(filled(speed="fast"), guidance_until=0.5, speed="exact").filled(RELEASED)
    assert (changed.guidance_until, changed.step_cache) == (0.5, 0.0)


def test_an_unknown_word_is_refused():
    with pytest.raises(LongCatError, match="speed is 'quick'; choose one of exact, near, fast, fastest"):
        filled(speed="quick")
    with pytest.raises(LongCatError, match="speed is 'quick'"):
        Pipeline.load(speed="quick")


def test_later_segments_record_what_is_in_force(whole):
    request = LongVideoRequest(replace(REQUEST, speed="fast", guidance_until=0.9), ("x", "y")).filled(RELEASED)
    same = replace(REQUEST, sparse=Sparse(0.15), step_cache=0.05, guidance_until=0.9)
    spelled = LongVideoRequest(same, ("x", "y")).filled(RELEASED)
    for number in (0, 1):
        assert request.settings(number) == spelled.settings(number)
        assert request.settings(number)[LOSSY].keys() == {"sparse", "step cache", "guidance until"}


# --- how a model is loaded -------------------------------------------------------------------------------------------


def load(fp8=None, backend=None, config=None, inputs=CPU) -> Loaded:
    return fit_loading("fast", "base", inputs, config or ModelConfig.from_dict({}), fp8, backend)


def test_a_machine_without_8_bits_loads_exactly(whole):
    found = load()
    assert (found.fp8, found.attention) == (False, "auto") and found.reasons.keys() == {"fp8", "attention"}
    (note,) = filled(replace(RELEASED, loaded=found), speed="fast").notes()
    assert "; it leaves out fp8 (it runs on CUDA, the tensors are on cpu), attention (" in note
    assert "sparse attention (no kernel of it runs here: " in note
    (note,) = loading_notes("fast", REFINE, found)
    assert note.startswith("speed fast sets sparse attention")


def test_a_machine_with_8_bits_takes_them(whole, monkeypatch):
    monkeypatch.setattr(speed_fit, "missing", lambda device: "")
    monkeypatch.setattr(attention, "why_not", lambda name, inputs: "")
    monkeypatch.setattr(speed_fit, "only_plain", lambda inputs: "")
    found = load()
    assert (found.fp8, found.attention, dict(found.reasons)) == (True, "cudnn-fp8", {})
    (note,) = filled(replace(RELEASED, loaded=found), speed="fast").notes()
    assert "leaves out" not in note
    # A network whose layers 8-bit products do not take.
    config = ModelConfig(hidden_size=72, num_heads=1, depth=1, ffn_hidden=64)
    assert "must be multiples of 16" in load(config=config).reasons["fp8"]
    found = load(config=config)
    assert found.fp8 is False and found.attention == "cudnn-fp8"


def test_how_the_user_loads_wins(whole, monkeypatch):
    monkeypatch.setattr(speed_fit, "missing", lambda device: "")
    monkeypatch.setattr(speed_fit, "only_plain", lambda inputs: "")
    found = load(fp8=False, backend="sdpa")
    assert (found.fp8, found.attention, dict(found.reasons)) == (False, "sdpa", {})
    (note,) = filled(replace(RELEASED, loaded=found), speed="fast").notes()
    assert "your own fp8 and attention take precedence" in note and "leaves out" not in note


def test_a_model_that_was_loaded_without_the_word_says_so(whole, monkeypatch):
    monkeypatch.setattr(speed_fit, "only_plain", lambda inputs: "")
    exact = fit_loading("exact", "base", CPU, ModelConfig.from_dict({}), None, None)
    (note,) = filled(replace(RELEASED, loaded=exact), speed="fast").notes()
    assert "it leaves out fp8 (the model was loaded without it) and attention (the model was loaded without it)" in note


# --- whole runs ------------------------------------------------------------------------------------------------------


def test_a_pipeline_under_a_word(monkeypatch):
    """Nano on a CPU: everything is left out but the step cache, and exact is bit-equal to no word."""
    monkeypatch.setitem(SETS, "fast", dict.fromkeys(KINDS, WHOLE))
    request = GenerateRequest("a red circle moves right on a blue background", frames=9, steps=6, seed=1)
    pipeline = Pipeline.load(speed="fast")
    assert not pipeline.model.eight_bit and pipeline.model.optimizations == Optimizations()
    result = pipeline.generate(request)
    assert (result.request.speed, result.request.sparse, result.request.step_cache) == ("fast", None, 0.05)
    spelled = Pipeline.load()
    options = {"step_cache": 0.05, "guidance_until": 0.8}
    assert torch.equal(result.latents, spelled.generate(replace(request, **options)).latents)
    assert torch.equal(result.latents, spelled.generate(replace(request, speed="fast")).latents)
    exact = spelled.generate(request).latents
    assert torch.equal(pipeline.generate(replace(request, speed="exact")).latents, exact)
    assert not torch.equal(result.latents, exact)


def test_fields_of_a_set_are_options_or_belong_to_one():
    assert {field.name for field in fields(SpeedSet)} == {"price", "dense_steps"} | {
        "fp8", "attention", *speed_fit.EXACT_VALUES
    }  # fmt: skip
    assert NANO.speed == RELEASED.speed == "exact"
