"""LongCat Multi-GPU: the sampler's videos on two processes are those of one."""

from __future__ import annotations

import os
import signal

import pytest
import torch

from .conftest import MODEL, ON_CPU

STEPS = 3


@pytest.fixture(scope="module", autouse=True)
def ended(comfy):
    if not ON_CPU and torch.cuda.device_count() < 2:
        pytest.skip("this machine has one GPU")
    yield
    comfy.node("comfy_ranks").WORKERS.end()


@pytest.fixture
def latent(comfy):
    return comfy("EmptyHunyuanLatentVideo", width=96, height=64, length=17, batch_size=1)


def group(comfy):
    return comfy.node("comfy_ranks").WORKERS._group


def close(got, wanted):
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)


def test_videos_are_those_of_one(comfy, model, latent, sample):
    shared = comfy("LongCatMultiGPU", model=model, gpus="2")
    wanted = sample(latent, model=model, steps=STEPS, seed=2)
    close(sample(latent, model=shared, steps=STEPS, seed=2), wanted)
    first = group(comfy)
    assert first.size == 2
    # The processes stay, and the MODEL that came in runs on one.
    close(sample(latent, model=shared, steps=STEPS, seed=3), sample(latent, model=model, steps=STEPS, seed=3))
    assert group(comfy) is first


def test_stock_samplers(comfy, model, prompts, latent):
    inputs = {"latent_image": latent, **prompts, "seed": 1, "steps": STEPS, "cfg": 4.0, "denoise": 1.0}
    inputs |= {"sampler_name": "euler", "scheduler": "simple"}
    shared = comfy("LongCatMultiGPU", model=model, gpus="2")
    close(comfy("KSampler", model=shared, **inputs)["samples"], comfy("KSampler", model=model, **inputs)["samples"])


def test_loras_and_another_model(comfy, model, latent, sample):
    """Weights follow LoRAs and models without other processes."""
    torch.manual_seed(0)
    name = "blocks.0.attn.qkv"
    rows, columns = model.model.network.get_submodule(name).weight.shape
    state = {"lora_down": torch.randn(4, columns), "lora_up": torch.randn(rows, 4) * 0.3}
    state = {f"diffusion_model.{name}.{key}.weight": value for key, value in state.items()}
    lora = comfy.save("loras", "shared.safetensors", state)
    patched = comfy("LoraLoaderModelOnly", model=model, lora_name=lora, strength_model=1.0)
    wanted = sample(latent, model=patched, steps=STEPS, seed=2)
    plain = sample(latent, model=model, steps=STEPS, seed=2)
    assert (wanted - plain).abs().max() > 0.01
    weaker = comfy("LoraLoaderModelOnly", model=model, lora_name=lora, strength_model=0.5)
    half = sample(latent, model=weaker, steps=STEPS, seed=2)
    assert min((half - other).abs().max() for other in (plain, wanted)) > 0.005
    shared = comfy("LongCatMultiGPU", model=model, gpus="2")
    first = group(comfy)
    for one, result in ((patched, wanted), (model, plain), (patched, wanted), (weaker, half)):
        close(sample(latent, model=comfy("LongCatMultiGPU", model=one, gpus="2"), steps=STEPS, seed=2), result)
    weights = comfy("LongCatModelLoader", model_name=MODEL, weight_dtype="fp8 rowwise")
    wanted = sample(latent, model=weights, steps=STEPS, seed=2)
    close(sample(latent, model=comfy("LongCatMultiGPU", model=weights, gpus="2"), steps=STEPS, seed=2), wanted)
    close(sample(latent, model=shared, steps=STEPS, seed=2), plain)
    assert group(comfy) is first


def test_a_clip_goes_on(comfy, model, clip_latent, sample, monkeypatch):
    """Keys and values of the given frames are on both processes."""
    shared = comfy("LongCatMultiGPU", model=model, gpus="2")
    division, together = comfy.core("parallel.division").Division, []
    plain = division.evaluate

    def noted(self, execution, x, timestep, text, cache, **options):
        together.append("fill" if options.get("fill") else "read" if cache else "")
        return plain(self, execution, x, timestep, text, cache, **options)

    monkeypatch.setattr(division, "evaluate", noted)
    for kv_cache, passes in (("exact", ["fill", *["read"] * STEPS]), ("off", [""] * STEPS)):
        wanted = sample(clip_latent, steps=STEPS, seed=2, kv_cache=kv_cache)
        assert not together, "a MODEL without the node runs on one"
        close(sample(clip_latent, model=shared, steps=STEPS, seed=2, kv_cache=kv_cache), wanted)
        assert together == passes
        together.clear()


def test_patches_of_other_nodes_run_on_one_and_say_so(comfy, model, latent, sample, caplog):
    patched = model.clone()
    patched.set_model_patch_replace(lambda args, extra: extra["original_block"](args), "dit", "double_block", 0)
    shared = comfy("LongCatMultiGPU", model=patched, gpus="2")
    close(sample(latent, model=shared, steps=STEPS), sample(latent, steps=STEPS))
    assert "the patches run on one GPU" in caplog.text


def test_a_process_that_is_killed_is_said_and_replaced(comfy, model, latent, sample, monkeypatch):
    shared = comfy("LongCatMultiGPU", model=model, gpus="2")
    wanted = sample(latent, model=shared, steps=STEPS, seed=2)
    first, (process,) = group(comfy), group(comfy)._hub._processes.values()
    division = comfy.core("parallel.division").Division
    plain = division.evaluate

    def killed(*args, **kwargs):
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        return plain(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(division, "evaluate", killed)
        with pytest.raises(comfy.core("errors").LongCatError, match=r"rank 1.*: its process was killed"):
            sample(latent, model=shared, steps=STEPS, seed=2)
    assert group(comfy) is first
    close(sample(latent, model=shared, steps=STEPS, seed=2), wanted)
    assert group(comfy) is not first


def test_an_interrupt_leaves_the_processes_there(comfy, model, latent, sample, monkeypatch):
    """In the middle of a pass, which then ends first, as before one."""
    import comfy.model_management as management

    shared = comfy("LongCatMultiGPU", model=model, gpus="2")
    wanted = sample(latent, model=shared, steps=STEPS, seed=2)
    first = group(comfy)
    check = management.throw_exception_if_processing_interrupted
    passes = []
    for owner, name in (
        (comfy.core("parallel.division").Division, "evaluate"),
        (comfy.node("comfy_ranks").ComfyLeader, "evaluate"),
    ):
        plain = getattr(owner, name)

        def interrupted(*args, plain=plain, **options):
            management.interrupt_current_processing(True)
            out = plain(*args, **options)
            passes.append(plain)
            return out

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, interrupted)
            with pytest.raises(management.InterruptProcessingException):
                sample(latent, model=shared, steps=STEPS, seed=2)
        assert group(comfy) is first and not first.failed
        close(sample(latent, model=shared, steps=STEPS, seed=2), wanted)
    assert len(passes) == 1 and management.throw_exception_if_processing_interrupted is check


def test_unloading_all_models_frees_the_other_gpus(comfy, model, latent, sample):
    """By ComfyUI's button, and after memory ran out."""
    import comfy.model_management as management

    shared = comfy("LongCatMultiGPU", model=model, gpus="2")
    wanted = sample(latent, model=shared, steps=STEPS, seed=2)
    (process,) = group(comfy)._hub._processes.values()
    management.unload_all_models()
    assert group(comfy) is None and process.poll() is not None
    close(sample(latent, model=shared, steps=STEPS, seed=2), wanted)


def test_one_gpu_is_no_group(comfy, model):
    out = comfy("LongCatMultiGPU", model=model, gpus="1")
    assert out.model_options["transformer_options"]["longcat_gpus"] is None


def test_a_self_test_uses_the_processes_that_are_there(comfy, model, latent, sample, monkeypatch):
    """A network that they hold is sent again; a fault is an error."""
    shared = comfy("LongCatMultiGPU", model=model, gpus="2")
    wanted = sample(latent, model=shared, steps=STEPS, seed=2)
    first = group(comfy)
    report = comfy("LongCatMultiGPUTest", gpus="2")
    assert "known bytes from each to each: 0 wrong" in report and "a sample each: equal bit for bit" in report
    assert group(comfy) is first
    close(sample(latent, model=shared, steps=STEPS, seed=2), wanted)
    known = comfy.core("parallel.known")
    plain = known._bytes
    monkeypatch.setattr(known, "_bytes", lambda sender, to: plain(sender, to) + (sender == 0))
    with pytest.raises(comfy.core("errors").LongCatError, match=r"exchanges wrong bytes, mostly from .*rank 0\)? to"):
        comfy("LongCatMultiGPUTest", gpus="2")


def test_auto_takes_as_many_as_make_the_video_faster(comfy, model, latent, sample, monkeypatch, caplog):
    """Links that are fast keep both processes, and slow ones end one; the log says how they share the work."""
    caplog.set_level("INFO")
    ranks, workers = comfy.node("comfy_ranks"), comfy.node("comfy_ranks").WORKERS
    monkeypatch.setattr(ranks, "devices_of", lambda gpus, device: (torch.device(device),) * 2)
    monkeypatch.setattr(comfy.node("multi_gpu"), "devices_of", lambda gpus, device: (torch.device(device),) * 2)
    monkeypatch.setattr(ranks, "layout_on", lambda device, *given: fixed(device, *given))
    plain, speed = comfy.core("parallel.layout").layout_on, {}

    def fixed(device, links, *given):
        return plain(device, {2: links[2]._replace(written=speed["now"])}, *given)

    shared = comfy("LongCatMultiGPU", model=model, gpus="auto")
    wanted = sample(latent, model=model, steps=STEPS, seed=2, guidance=1.0)
    for speed["now"], said in (
        (1e15, "2 processes share the tokens of each video and exchange 1e+06 GB/s"),
        (1.0, "1 of 2 processes does the work; more would be slower, because they exchange 1e-09 GB/s"),
    ):
        workers._counts.clear()
        close(sample(latent, model=shared, steps=STEPS, seed=2, guidance=1.0), wanted)
        assert caplog.text.count(said) == 1
    assert group(comfy) is None


def test_the_vae_follows_the_last_pass(comfy, model, vae, latent, sample, monkeypatch):
    """Decoding and encoding behind a pass of two processes are theirs too, also after an interrupt between parts."""
    import comfy.model_management as management

    led = comfy.core("parallel.led_vae").LedVAE
    calls = []
    for name in ("decode", "encode"):
        plain = getattr(led, name)
        monkeypatch.setattr(led, name, lambda self, x, name=name, plain=plain: calls.append(name) or plain(self, x))
    clip = torch.rand(5, 32, 48, 3, generator=torch.Generator().manual_seed(0))
    encoded = comfy.node("comfy_vae").encoded

    def run(chosen):
        samples = {"samples": sample(latent, model=chosen, steps=1, seed=2, guidance=1.0)}
        with torch.inference_mode():
            return comfy("LongCatVAEDecode", samples=samples, vae=vae)[0], encoded(vae, clip)

    shared = comfy("LongCatMultiGPU", model=model, gpus="2")
    wanted = run(model)
    assert not calls
    found = run(shared)
    assert calls == ["decode", "encode"]
    with monkeypatch.context() as patch:
        patch.setattr(comfy.core("vae.parts"), "MOST_ON_CPU", 1)
        checks = []

        def interrupted():
            checks.append(None)
            if len(checks) == 2:
                raise management.InterruptProcessingException

        patch.setattr(management, "throw_exception_if_processing_interrupted", interrupted)
        with pytest.raises(management.InterruptProcessingException) as kept:
            comfy("LongCatVAEDecode", samples={"samples": torch.zeros(1, 16, 5, 8, 12)}, vae=vae)
    assert kept and len(checks) == 2
    first = group(comfy)
    for one in (found, run(shared)):
        for got, right in zip(one, wanted, strict=True):
            close(got, right)
    assert group(comfy) is first and not first.failed
    calls.clear()
    run(model)
    assert not calls
