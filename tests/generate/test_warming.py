"""What is warmed is what runs, and nothing of it shows."""

from __future__ import annotations

import sys
import threading
import warnings
from dataclasses import replace

import pytest
import torch

from longcat_core.generate import pipeline, warming
from longcat_core.generate.pipeline import Pipeline
from longcat_core.generate.request import GenerateRequest
from longcat_core.generate.vae import VideoVAE
from longcat_core.generate.warming import DIVISOR, TURN, few, short_turns, warm_up
from longcat_core.model.block import Block
from longcat_core.model.config import AudioConfig, ModelConfig
from longcat_core.optimize.execution import Execution
from longcat_core.optimize.kernels import vae as kernels
from longcat_core.optimize.plan import Work
from longcat_core.optimize.quantization import Fp8Linear, Policy
from longcat_core.optimize.switches import Optimizations
from longcat_core.vae.layers import RMSNorm
from longcat_core.vae.network import VAEConfig, WanVAE

CPU = torch.device("cpu")
CONFIG = ModelConfig(
    hidden_size=64, depth=3, num_heads=2, caption_channels=32, ffn_hidden=128, adaln_dim=16, frequency_dim=16
)
WORK = Work((1, 16, 41, 4, 6))


@pytest.mark.parametrize("fp8", [None, Policy()])
@pytest.mark.parametrize("guided", [False, True])
def test_one_block_runs_on_tokens_of_the_works_own_size(monkeypatch, fp8, guided):
    seen, kernels = [], []
    forward, evaluate = Block.forward, Execution.evaluate

    def watched(self, x, *more):
        seen.append((tuple(x.shape), isinstance(self.attn.qkv, Fp8Linear)))
        return forward(self, x, *more)

    def evaluated(self, *given, **options):
        kernels.append(self.optimizations.attention)
        return evaluate(self, *given, **options)

    monkeypatch.setattr(Block, "forward", watched)
    monkeypatch.setattr(Execution, "evaluate", evaluated)
    state = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warm_up(CONFIG, Optimizations(), torch.float32, CPU, fp8, Work(WORK.latents, guided))
    assert seen == 2 * [((2 if guided else 1, 9, 6, 64), fp8 is not None)]
    assert kernels == ["sdpa", "auto"], "what needs no package comes before it is there"
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("work", [None, WORK])
def test_compiled_blocks_and_unknown_work_warm_attention_alone(monkeypatch, work):
    chosen = []
    monkeypatch.setattr(warming, "resolve_kernels", lambda *given: chosen.append(given))
    monkeypatch.setattr(warming, "sample", lambda *_, **__: pytest.fail("a block ran"))
    compiled = Optimizations(compile="off" if work is None else "blocks")
    warm_up(CONFIG, compiled, torch.float32, CPU, None, work)
    assert len(chosen) == 1


@pytest.mark.parametrize("room", [1 << 40, 0])
def test_a_network_whose_video_is_unknown_is_warmed_for_the_usual_ones(monkeypatch, room):
    warmed = []
    monkeypatch.setattr(warming, "warm_up", lambda *given: warmed.append(given))
    with warming.network_ahead(CONFIG, torch.bfloat16, CPU, None, room):
        pass
    assert warmed == [], "a CPU has no kernels to compile"
    monkeypatch.setattr(warming, "overlaps", lambda device: True)
    with warming.network_ahead(CONFIG, torch.float32, CPU, None, room):
        pass
    assert warmed == [], "kernels are for 16 bits"
    with warming.network_ahead(CONFIG, torch.bfloat16, CPU, Policy(), room):
        pass
    assert {given[:-1] for given in warmed} == {(CONFIG, Optimizations(), torch.bfloat16, CPU, Policy())}
    usual = Work((1, 16, 24, 60, 104))
    assert [given[-1] for given in warmed] == ([usual, replace(usual, guided=False)] if room else [None])


def test_the_decoders_kernels_are_compiled_for_the_released_vae(monkeypatch):
    compiled = []
    monkeypatch.setattr(kernels, "takes", lambda dtype: dtype == torch.bfloat16)
    monkeypatch.setattr(kernels, "compile_ahead", lambda dtype, widths, stopped: compiled.append((dtype, set(widths))))
    with warming.decoder_ahead(torch.bfloat16, CPU):
        pass
    monkeypatch.setattr(warming, "overlaps", lambda device: True)
    with warming.decoder_ahead(torch.float32, CPU):
        pass
    assert compiled == []
    with warming.decoder_ahead(torch.bfloat16, CPU):
        pass
    with torch.device("meta"):
        released = WanVAE(VAEConfig(96, 16, [0.0] * 16, [1.0] * 16))
    norms = (layer for layer in released.decoder.modules() if isinstance(layer, RMSNorm))
    assert compiled == [(torch.bfloat16, {norm.gamma.numel() for norm in norms})]


def test_an_avatar_is_warmed_without_its_audio():
    heard = replace(CONFIG, audio=AudioConfig(width=16))
    warm_up(heard, Optimizations(), torch.float32, CPU, None, WORK)


@pytest.mark.parametrize("frames", [1, 2, 16, 17, 24, 47])
def test_few_frames_divide_as_all_do(frames):
    *_, found, height, width = few((1, 16, frames, 60, 104))
    assert (height, width) == (60, 104) and found <= min(frames, DIVISOR + 1)
    assert found % DIVISOR == frames % DIVISOR and (found == 1) == (frames == 1)


def test_the_thread_is_over_in_the_end_and_its_errors_are_the_first_steps():
    def warm(stopped) -> None:
        raise RuntimeError("a kernel does not compile")

    before = threading.active_count()
    with warming.warming(CPU, warm):
        pass
    assert threading.active_count() == before


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_error_beside_it_ends_what_is_left_to_compile(error):
    """It would go on for ever otherwise."""

    def warm(stopped) -> None:
        while not stopped():
            begun.set()

    before, begun = threading.active_count(), threading.Event()
    with pytest.raises(error), warming.warming(CPU, warm):
        assert begun.wait(60)
        raise error
    assert threading.active_count() == before


def test_turns_are_short_until_the_last_thread_is_done():
    before = sys.getswitchinterval()
    with short_turns():
        with short_turns():
            pass
        assert sys.getswitchinterval() == pytest.approx(TURN)
    assert sys.getswitchinterval() == before


def test_a_decoders_kernels_are_compiled_while_the_network_samples(monkeypatch):
    """Neither could end alone, and the video is the same."""
    request = GenerateRequest("a red circle moves right", frames=5, steps=1, seed=1)
    loaded, compiling, sampling = Pipeline.load(), threading.Event(), threading.Event()
    wanted, sample = loaded.generate(request).frames, pipeline.sample

    def compile_ahead(self, stopped) -> None:
        compiling.set()
        assert sampling.wait(60) and not stopped()
        raise RuntimeError("a kernel does not compile")

    def sampled(*args, **options):
        sampling.set()
        assert compiling.wait(60)
        return sample(*args, **options)

    monkeypatch.setattr(VideoVAE, "compile_ahead", compile_ahead)
    monkeypatch.setattr(pipeline, "sample", sampled)
    monkeypatch.setattr(pipeline, "overlaps", lambda device: True)
    assert (loaded.generate(request).frames == wanted).all()
