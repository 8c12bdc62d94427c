"""The VAE's network in parts gives the numbers of the whole clip, those of diffusers' AutoencoderKLWan."""

from __future__ import annotations

import gc
import traceback
import weakref

import pytest
import torch
from torch import Tensor

from longcat_core.vae import parts, tiles
from longcat_core.vae.network import VAEConfig, WanVAE, channels_last, run_stage
from longcat_core.vae.parts import decoded, encoded

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Of the values' deviation.
TOLERANCE = 3e-4 if DEVICE.type == "cpu" else 1e-3


@pytest.fixture(autouse=True)
def no_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN rounds by it what convolutions multiply to 10 bits, which puts networks of the same weights 0.1 apart."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def new_vae(base: int = 4, decoder: int | None = None, **options) -> WanVAE:
    """Random weights with norms that are not 1."""
    torch.manual_seed(base)
    config = VAEConfig(base, 16, [0.0] * 16, [1.0] * 16, decoder_base_dim=decoder, **options)
    vae = WanVAE(config).eval().requires_grad_(False)
    for name, parameter in vae.named_parameters():
        if name.endswith("gamma"):
            parameter.uniform_(0.5, 1.5)
    return vae.to(DEVICE)


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(DEVICE)


def decode(vae: WanVAE, latents: Tensor, **options) -> Tensor:
    """[B, 3, F, H, W]."""
    return torch.cat(list(decoded(vae, latents, **options)), dim=1).permute(0, 4, 1, 2, 3)


def close(got: Tensor, want: Tensor, tolerance: float = TOLERANCE) -> None:
    assert got.shape == want.shape
    assert ((got - want).abs().max() / want.std()).item() < tolerance


@pytest.fixture(params=[(4, None), (4, 8)], ids=["one width", "a wider decoder"])
def both(request):
    """Our network and diffusers', with the same weights."""
    diffusers = pytest.importorskip("diffusers")
    base, decoder = request.param
    own = new_vae(base, decoder)
    other = diffusers.AutoencoderKLWan(base_dim=base, decoder_base_dim=decoder, z_dim=16)
    other.load_state_dict(own.state_dict())
    return own, other.eval().requires_grad_(False).to(DEVICE)


@pytest.mark.parametrize("frames", [1, 2, 5])
@pytest.mark.parametrize("most", [1, 300_000, 1 << 30])
def test_both_directions_are_those_of_diffusers(both, frames, most):
    own, other = both
    latents = randn(2, 16, frames, 3, 4)
    close(decode(own, latents, most=most).clamp(-1, 1), other.decode(latents).sample)
    video = randn(2, 3, 4 * frames - 3, 24, 32)
    close(encoded(own, video, most=most), other.encode(video).latent_dist.mode())


def test_tiles_are_those_of_diffusers(both):
    own, other = both
    other.enable_tiling()
    latents, video = randn(1, 16, 2, 3, 60), randn(1, 3, 5, 264, 16)
    want = other.decode(latents).sample.cpu()
    close(tiles.tiled(latents, lambda part: decode(own, part), 8, 1).clamp(-1, 1), want)
    want = other.encode(video).latent_dist.mode().cpu()
    close(tiles.tiled(video, lambda part: encoded(own, part), 1, 8), want)


@pytest.mark.parametrize("most", [1, 50_000, 100_000, 1 << 30])
def test_parts_of_any_length_give_the_same_frames(most):
    vae, latents = new_vae(), randn(1, 16, 6, 2, 3)
    parts = list(decoded(vae, latents, most=most))
    assert parts[0].shape[1] == 1 and sum(part.shape[1] for part in parts) == 21
    assert len(parts) == {1: 21, 50_000: 11, 100_000: 7, 1 << 30: 2}[most]
    close(decode(vae, latents, most=most), decode(vae, latents))
    video = randn(1, 3, 21, 16, 24)
    close(encoded(vae, video, most=most), encoded(vae, video))


def test_a_frame_depends_on_earlier_ones_alone():
    vae, latents = new_vae(), randn(1, 16, 4, 2, 3)
    whole, begun = decode(vae, latents), decode(vae, latents[:, :, :2])
    close(whole[:, :, :5], begun)
    changed = latents.clone()
    changed[:, :, 0] += 1
    assert ((decode(vae, changed) - whole).abs().amax((0, 1, 3, 4)) > 1e-4).all()


def test_what_is_kept_does_not_grow_with_the_clip(monkeypatch):
    vae, held = new_vae(), []

    def run(coder, number, x, kept, first, rows):
        out, after = run_stage(coder, number, x, kept, first, rows)
        held.append((number, first, sum(frames.numel() for frames in after if frames is not None), x.shape[1]))
        return out, after

    monkeypatch.setattr(parts, "run_stage", run)
    list(decoded(vae, randn(1, 16, 9, 2, 3), most=1))
    for number in range(vae.decoder.stages):
        kept = {count for stage, first, count, _ in held if stage == number and not first}
        assert len(kept) == 1
    assert {frames for *_, frames in held} == {1}


def test_gradients_pass_through_both_directions():
    vae = new_vae().requires_grad_(True)
    latents = encoded(vae, randn(1, 3, 5, 16, 16))
    torch.cat(list(decoded(vae, latents)), dim=1).square().mean().backward()
    without = {name for name, parameter in vae.named_parameters() if parameter.grad is None}
    assert not without, without


def test_weights_in_another_order_are_the_same_weights():
    vae, latents = new_vae(), randn(1, 16, 3, 2, 3)
    before, video = {name: weight.clone() for name, weight in vae.state_dict().items()}, decode(vae, latents)
    channels_last(vae)
    assert all(torch.equal(weight, before[name]) for name, weight in vae.state_dict().items())
    assert vae.decoder.conv_in.weight.stride(1) == 1
    close(decode(vae, latents), video)


def test_nothing_stays_alive_after_memory_ran_out(monkeypatch):
    vae, latents, held = new_vae(), randn(1, 16, 4, 3, 4), []
    real = parts.run_stage

    def fails(*args, **options):
        out = real(*args, **options)
        held.extend(weakref.ref(tensor) for tensor in out[1] if tensor is not None)
        if len(held) > 20:
            raise torch.OutOfMemoryError
        return out

    monkeypatch.setattr(parts, "run_stage", fails)
    # What waits for the collector would fill the memory of a GPU meanwhile.
    gc.disable()
    try:
        with pytest.raises(torch.OutOfMemoryError) as caught:
            list(decoded(vae, latents))
        traceback.clear_frames(caught.tb)
        assert not [tensor for tensor in held if tensor() is not None]
    finally:
        gc.enable()
