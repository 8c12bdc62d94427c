"""LongCat VAE Decode gives the frames of ComfyUI's own decoder, part by part, and the file of the video with them."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from .conftest import ROUNDING


def latents(frames: int = 4, batch: int = 1, width: int = 6) -> dict[str, torch.Tensor]:
    """In the scale of ComfyUI's LATENT, which the VAE's own normalization is not taken off."""
    return {"samples": torch.randn(batch, 16, frames, 4, width, generator=torch.Generator().manual_seed(frames))}


@pytest.mark.parametrize(("frames", "batch"), [(1, 1), (4, 1), (2, 3)])
def test_the_frames_are_those_of_vae_decode(comfy, vae, frames, batch):
    wanted = comfy("VAEDecode", samples=latents(frames, batch), vae=vae)
    images, video = comfy("LongCatVAEDecode", samples=latents(frames, batch), vae=vae)
    assert images.shape == wanted.shape == (batch * (4 * frames - 3), 32, 48, 3)
    torch.testing.assert_close(images, wanted, atol=2e-5 * ROUNDING, rtol=0)
    assert video.get_dimensions() == (48, 32) and torch.equal(video.get_components().images, images)


@pytest.mark.parametrize("frames", [1, 13])
def test_conditioning_frames_are_those_of_vae_encode(comfy, vae, frames):
    clip = torch.rand(frames, 32, 48, 3, generator=torch.Generator().manual_seed(frames))
    with torch.inference_mode():
        samples = comfy.node("comfy_vae").encoded(vae, clip)
    wanted = comfy("VAEEncode", pixels=clip, vae=vae)["samples"]
    assert samples.shape == wanted.shape == (1, 16, 1 + frames // 4, 4, 6)
    torch.testing.assert_close(samples, wanted, atol=2e-5 * ROUNDING, rtol=0)


def test_encoding_goes_on_in_tiles(comfy, vae, caplog, monkeypatch):
    core, plain, calls = comfy.core("generate.vae"), comfy.core("vae.parts").encoded, []

    def short(*args, **options):
        calls.append(args)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("out of memory")
        return plain(*args, **options)

    monkeypatch.setattr(core, "encoded", short)
    with caplog.at_level(logging.WARNING), torch.inference_mode():
        comfy.node("comfy_vae").encoded(vae, torch.rand(5, 32, 48, 3))
    assert "works on tiles" in caplog.text and len(calls) == 2


def test_a_connected_video_is_a_finished_file(comfy, vae, monkeypatch):
    import folder_paths

    module = comfy.node("vae_decode")
    node = {"class_type": "SaveVideo", "inputs": {"video": ["5", 1]}}
    prompt = SimpleNamespace(all_node_ids=lambda: ["9"], get_node=lambda name: node)
    hidden = SimpleNamespace(unique_id="5", dynprompt=prompt)
    assert comfy.node("video").connected(hidden, 1) and not comfy.node("video").connected(hidden, 0)
    monkeypatch.setattr(module, "connected", lambda hidden, slot: slot == 1)
    kept: list[list[Path]] = []
    monkeypatch.setattr(module.VaeDecode, "remember", kept.append)
    images, video = comfy("LongCatVAEDecode", samples=latents(), vae=vae, fps=12.0)
    file = Path(video.get_stream_source())
    assert file.parent == Path(folder_paths.get_temp_directory()) and file.suffix == ".mp4"
    assert kept == [[file]], "the node runs again once it is gone"
    frames, fps = comfy.core("files.media").read_video(file)
    assert frames.shape == (13, 32, 48, 3) and fps == 12
    # H.264 is lossy.
    assert np.abs(frames / 255 - images.numpy()).mean() < 0.05
    video.save_to(str(comfy.folder / "output" / "copied.mp4"))
    assert np.array_equal(comfy.core("files.media").read_video(comfy.folder / "output" / "copied.mp4")[0], frames)


def test_weights_are_shared_and_only_a_wan_vae_has_them(comfy, vae, caplog, monkeypatch):
    module = comfy.node("comfy_vae")
    with torch.inference_mode():
        own, theirs = module.own_vae(vae), vae.first_stage_model
        found = own.model.decoder.conv_in.weight.data_ptr()
    assert found == theirs.decoder.conv1.weight.data_ptr()
    wanted = comfy("VAEDecode", samples=latents(), vae=vae)
    monkeypatch.setattr(module, "own_vae", lambda vae: None)
    with caplog.at_level(logging.INFO):
        images, _ = comfy("LongCatVAEDecode", samples=latents(), vae=vae)
    assert torch.equal(images, wanted) and caplog.text.count("the VAE is not a Wan 2.1 VAE") == 1
    monkeypatch.undo()
    monkeypatch.setattr(vae, "first_stage_model", torch.nn.Linear(1, 1))
    assert module.own_vae(vae) is None


def test_out_of_memory_goes_on_in_tiles(comfy, vae, caplog, monkeypatch):
    core, plain = comfy.core("generate.vae"), comfy.core("vae.parts").decoded
    calls = []

    def short(*args, **options):
        for number, part in enumerate(plain(*args, **options, most=1)):
            if number == 2 and not calls:
                calls.append(number)
                raise torch.OutOfMemoryError("out of memory")
            yield part

    monkeypatch.setattr(core, "decoded", short)
    with caplog.at_level(logging.WARNING):
        images, _ = comfy("LongCatVAEDecode", samples=latents(), vae=vae)
    assert "works on tiles" in caplog.text and calls == [2]
    wanted = comfy("VAEDecode", samples=latents(), vae=vae)
    torch.testing.assert_close(images, wanted, atol=2e-5 * ROUNDING, rtol=0)


def test_an_interrupt_leaves_no_file(comfy, vae, monkeypatch):
    import comfy.model_management as management

    module = comfy.node("vae_decode")
    monkeypatch.setattr(module, "connected", lambda hidden, slot: True)
    before = set(comfy.folder.rglob("*.mp4"))
    management.interrupt_current_processing(True)
    with pytest.raises(management.InterruptProcessingException):
        comfy("LongCatVAEDecode", samples=latents(), vae=vae)
    management.interrupt_current_processing(False)
    assert set(comfy.folder.rglob("*.mp4")) == before


def test_samples_of_a_picture_are_refused(comfy, vae):
    with pytest.raises(comfy.core("errors").LongCatError, match=r"samples are \[1, 16, 4, 6\]; connect latents"):
        comfy("LongCatVAEDecode", samples={"samples": torch.zeros(1, 16, 4, 6)}, vae=vae)


def test_a_vae_that_gives_other_frames_is_refused(comfy):
    other = comfy("VAELoader", vae_name="pixel_space")
    with pytest.raises(comfy.core("errors").LongCatError, match=r"and not to \d+ frames of three channels; connect"):
        comfy("LongCatVAEDecode", samples=latents(), vae=other)
