"""The training step of flow matching, and the parts of the embedded model's recipe that have numbers to agree with."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from longcat_core.checkpoints.load import load_transformer
from longcat_core.files.safetensors_io import read_tensors, write_safetensors
from longcat_core.model.config import ModelConfig
from longcat_core.nano.autoencoder import decode_whole, encode_whole, moments, new_autoencoder, recolor
from longcat_core.nano.train import TEXT_LENGTH, Lesson, Trainer
from longcat_core.optimize.optimized import OptimizedTransformer
from longcat_core.optimize.switches import Optimizations
from longcat_core.sampling.conditioning import seeded_noise
from longcat_core.training.step import WeightAverage, drop_text, flow_matching_loss, initialize, sample_sigmas
from longcat_core.vae.parts import decoded as parts_decoded
from longcat_core.vae.parts import encoded

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
CONFIG = ModelConfig.from_json(GOLDEN / "config.json")
CPU = torch.device("cpu")
SHAPE = (2, 16, 3, 4, 6)


@pytest.fixture(scope="module")
def loaded() -> OptimizedTransformer:
    return load_transformer(GOLDEN / "dit.safetensors", config=CONFIG, optimizations=Optimizations(attention="sdpa"))


@pytest.fixture(scope="module")
def text() -> dict[str, Tensor]:
    data = read_tensors(GOLDEN / "forward.safetensors")
    return {"context": data["context"], "mask": data["mask"]}


@pytest.fixture
def fresh() -> OptimizedTransformer:
    """New weights, to be trained."""
    torch.manual_seed(0)
    model = OptimizedTransformer(CONFIG, Optimizations(attention="sdpa"))
    initialize(model)
    return model


def loss_of(
    model: OptimizedTransformer, text: dict[str, Tensor], latents: Tensor, noise: Tensor, **options: Any
) -> Any:
    return flow_matching_loss(model, latents, torch.tensor([0.9, 0.4]), **text, noise=noise, **options)


# Loss


def test_loss_is_the_definitions(loaded, text):
    latents, noise = seeded_noise(SHAPE, 0), seeded_noise(SHAPE, 1)
    sigmas = torch.tensor([0.9, 0.4])
    level = sigmas[:, None, None, None, None]
    out = loaded((1 - level) * latents + level * noise, 1000 * sigmas, **text)
    wanted = (out - (latents - noise)).square().mean()
    loss = loss_of(loaded, text, latents, noise)
    assert loss.shape == () and loss.dtype == torch.float32
    torch.testing.assert_close(loss, wanted)


def test_given_frames_are_clean_and_carry_no_loss(loaded, text):
    cond = 2
    latents, noise = seeded_noise(SHAPE, 0), seeded_noise(SHAPE, 1)
    other = noise.clone()
    other[:, :, :cond] = seeded_noise(SHAPE, 2)[:, :, :cond]
    losses = [loss_of(loaded, text, latents, n, num_cond_latents=cond) for n in (noise, other)]
    assert torch.equal(*losses), "noise on given frames is neither seen nor asked for"

    seen = []
    handle = loaded.register_forward_pre_hook(lambda _, args, kwargs: seen.append((args, kwargs)), with_kwargs=True)
    loss_of(loaded, text, latents, noise, num_cond_latents=cond)
    handle.remove()
    (x, timesteps, *_), kwargs = seen[0]
    assert kwargs["num_cond_latents"] == cond
    assert torch.equal(x[:, :, :cond], latents[:, :, :cond])
    assert not torch.equal(x[:, :, cond:], latents[:, :, cond:])
    torch.testing.assert_close(timesteps, torch.tensor([[0, 0, 900.0], [0, 0, 400.0]]))


def test_every_weight_learns(loaded, text):
    model = copy.deepcopy(loaded).requires_grad_(True)
    loss_of(model, text, seeded_noise(SHAPE, 0), seeded_noise(SHAPE, 1), num_cond_latents=1).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().sum() > 0, name


def test_noise_is_drawn_where_none_is_given(loaded, text):
    latents, sigmas = seeded_noise(SHAPE, 0), torch.tensor([0.9, 0.4])
    losses = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        losses.append(flow_matching_loss(loaded, latents, sigmas, **text))
    assert torch.equal(losses[0], losses[1]) and not torch.equal(losses[0], losses[2])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_one_batch_is_learned(fresh, text, checkpointing):
    fresh.set_optimizations(replace(fresh.optimizations, gradient_checkpointing=checkpointing))
    latents, noise = seeded_noise(SHAPE, 0), seeded_noise(SHAPE, 1)
    optimizer = torch.optim.AdamW(fresh.parameters(), lr=3e-3)
    losses = []
    for _ in range(80):
        optimizer.zero_grad()
        loss = loss_of(fresh, text, latents, noise, num_cond_latents=1)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    # Before any step the output is zero: the loss is the mean square of latents - noise.
    first = (latents - noise)[:, :, 1:].square().mean().item()
    assert losses[0] == pytest.approx(first, rel=1e-5)
    assert losses[-1] < first / 2


# Weights


def test_a_fresh_network_answers_zero_and_its_gates_are_shut(fresh, text):
    x = seeded_noise(SHAPE, 0)
    assert not fresh(x, torch.tensor([500.0, 20.0]), **text).any()
    inputs = []
    for block in fresh.blocks:
        block.register_forward_hook(lambda _, args, out: inputs.append((args[0], out)))
    fresh(x, torch.tensor([500.0, 20.0]), None)
    assert len(inputs) == CONFIG.depth
    assert all(torch.equal(given, out) for given, out in inputs)


def test_fresh_weights_have_their_scale(fresh):
    weights = dict(fresh.named_parameters())
    for name in ("blocks.0.attn.qkv.weight", "blocks.1.ffn.down.weight", "blocks.1.cross_attn.q.weight"):
        rows, columns = weights[name].shape
        assert weights[name].std().item() == pytest.approx((2 / (rows + columns)) ** 0.5, rel=0.05)
    assert weights["text_embed.1.weight"].std().item() == pytest.approx(0.02, rel=0.05)
    assert all((weights[f"blocks.0.{n}.weight"] == 1).all() for n in ("attn.q_norm", "cross_attn.k_norm", "cross_norm"))
    assert not any(p.any() for name, p in weights.items() if name.endswith("bias"))


def test_average_follows_and_steps_aside():
    layer = nn.Linear(3, 2)
    start = layer.weight.detach().clone()
    average = WeightAverage(layer, 0.9)
    with torch.no_grad():
        layer.weight += 1
        layer.bias.fill_(5)
    average.update()
    average.update()
    trained = layer.weight.detach().clone()
    with average.applied():
        torch.testing.assert_close(layer.weight.detach(), start + (1 - 0.9**2))
    assert torch.equal(layer.weight, trained) and (layer.bias == 5).all()
    with pytest.raises(KeyError), average.applied():
        raise KeyError
    assert torch.equal(layer.weight, trained), "restored after an error too"


def test_average_of_half_precision_weights_is_fp32():
    layer = nn.Linear(3, 2).bfloat16()
    average = WeightAverage(layer, 0.5)
    with torch.no_grad():
        layer.weight += 1
    average.update()
    assert all(tensor.dtype == torch.float32 for tensor in average.average)
    with average.applied():
        assert layer.weight.dtype == torch.bfloat16


# Noise levels and text


@pytest.mark.parametrize("shift", [1.0, 3.0, 12.0])
def test_noise_levels_are_uniform_before_the_shift(shift):
    torch.manual_seed(0)
    sigmas = sample_sigmas(20000, shift)
    assert sigmas.shape == (20000,) and sigmas.dtype == torch.float32
    assert sigmas.min() >= 0 and sigmas.max() <= 1
    uniform = sigmas / (shift - (shift - 1) * sigmas)
    deciles = torch.quantile(uniform, torch.arange(1, 10) / 10)
    torch.testing.assert_close(deciles, torch.arange(1, 10) / 10, atol=0.02, rtol=0)


@pytest.mark.parametrize("probability", [0.0, 1.0, 0.25])
def test_text_is_dropped_with_its_mask(probability):
    torch.manual_seed(0)
    context, mask = torch.ones(4000, 3, 2), torch.ones(4000, 3, dtype=torch.int64)
    null_context, null_mask = torch.zeros(1, 3, 2), torch.tensor([[1, 0, 0]])
    dropped, dropped_mask = drop_text(context, mask, null_context, null_mask, probability)
    assert dropped.shape == context.shape and dropped_mask.dtype == mask.dtype
    gone = (dropped == 0).flatten(1).all(1)
    assert torch.equal(dropped_mask, torch.where(gone[:, None], null_mask, mask))
    assert (dropped[~gone] == 1).all()
    assert gone.float().mean().item() == pytest.approx(probability, abs=0.03 if probability == 0.25 else 0)


# The embedded model's trainer


LESSON = Lesson("wide", SHAPE[2], cond=1, weight=1)
LENGTHS = (4, 6)


def new_trainer() -> Trainer:
    torch.manual_seed(0)
    model = OptimizedTransformer(CONFIG, Optimizations(attention="sdpa")).train()
    model.load_state_dict(load_transformer(GOLDEN / "dit.safetensors", config=CONFIG).state_dict())
    return Trainer(model, CPU)


@pytest.fixture
def batch() -> tuple[Tensor, ...]:
    """Latents, noise levels, text and its mask."""
    context = torch.randn(2, 8, CONFIG.caption_channels, generator=torch.Generator().manual_seed(3))
    mask = (torch.arange(8)[None] < torch.tensor(LENGTHS)[:, None]).long()
    return seeded_noise(SHAPE, 0), torch.tensor([0.9, 0.4]), context * mask[..., None], mask


def test_a_training_step_is_the_loss_of_inference(batch):
    """The text goes into training's loss as it goes into generation: padding up to 512 tokens."""
    latents, sigmas, context, mask = batch
    trainer = new_trainer()
    with torch.no_grad():
        pad = TEXT_LENGTH - context.shape[1]
        context, full = nn.functional.pad(context, (0, 0, 0, pad)), nn.functional.pad(mask, (0, pad))
        trainer.model.set_optimizations(Optimizations(attention="sdpa", text_mode="padded"))
        torch.manual_seed(1)
        noise = torch.randn_like(latents)
        wanted = [
            flow_matching_loss(
                trainer.model, latents[i], sigmas[i], context[i], full[i], num_cond_latents=1, noise=noise[i]
            )
            for i in (slice(0, 1), slice(1, 2))
        ]
    trainer.model.set_optimizations(Optimizations(attention="sdpa"))
    torch.manual_seed(1)
    # Of each sample by itself.
    torch.testing.assert_close(trainer.train(LESSON, 0.0, *batch), torch.stack(wanted), rtol=1e-5, atol=0)


def test_a_lesson_is_learned(batch):
    trainer = new_trainer()
    before = [p.detach().clone() for p in trainer.parameters]
    losses = []
    for _ in range(30):
        torch.manual_seed(1)
        losses.append(trainer.train(LESSON, 1e-3, *batch).mean().item())
    assert losses[-1] < 0.7 * losses[0]
    assert len(trainer.steps) == 1
    names = [name for name, _ in trainer.model.named_parameters()]
    moved = [not torch.equal(p, old) for p, old in zip(trainer.parameters, before, strict=True)]
    assert all(moved), [name for name, changed in zip(names, moved, strict=True) if not changed]


def test_one_text_serves_a_whole_batch(batch):
    latents, sigmas, context, mask = batch
    losses = []
    for rows in (slice(0, 1), [0, 0]):
        torch.manual_seed(1)
        losses.append(new_trainer().train(LESSON, 0.0, latents, sigmas, context[rows], mask[rows]))
    torch.testing.assert_close(*losses)


def test_training_goes_on_from_its_state(batch, tmp_path):
    first, second = new_trainer(), new_trainer()

    def steps(trainer: Trainer, seeds: range) -> list[float]:
        losses = []
        for seed in seeds:
            torch.manual_seed(seed)
            losses.append(trainer.train(LESSON, 1e-3, *batch).mean().item())
        return losses

    steps(first, range(3))
    write_safetensors(tmp_path / "state.safetensors", first.state(3))
    assert second.load_state(read_tensors(tmp_path / "state.safetensors")) == 3
    assert steps(second, range(3, 6)) == steps(first, range(3, 6))
    for a, b in zip(first.parameters, second.parameters, strict=True):
        assert torch.equal(a, b)
    pairs = zip(first.average.average, second.average.average, strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


# The embedded model's VAE


@pytest.fixture(scope="module")
def vae() -> Any:
    """Every weight that training can move is moved; earlier taps of convolutions over pictures stay zero."""
    torch.manual_seed(0)
    vae = new_autoencoder().eval().requires_grad_(False)
    for module in vae.modules():
        if isinstance(module, nn.Conv3d) and module.kernel_size[1] > 1:
            assert not module.weight[:, :, :-1].any()
            weight = module.weight[:, :, -1:]
        elif isinstance(module, (nn.Conv2d, nn.Conv3d)):
            weight = module.weight
        else:
            continue
        weight += torch.randn_like(weight) * 0.5 * weight[0].numel() ** -0.5
        module.bias += 0.1 * torch.randn_like(module.bias)
    for name, parameter in vae.named_parameters():
        if name.endswith("gamma"):
            parameter += 0.2 * torch.randn_like(parameter)
    return vae


@pytest.mark.parametrize("frames", [1, 5, 13])
def test_whole_clips_are_encoded_and_decoded_as_in_parts(vae, frames):
    video = torch.rand(2, frames, 32, 48, 3, generator=torch.Generator().manual_seed(frames)) * 2 - 1
    with torch.no_grad():
        latents = encode_whole(vae, video)
        wanted = encoded(vae, video.permute(0, 4, 1, 2, 3))
        assert latents.shape == (2, 16, 1 + (frames - 1) // 4, 4, 6)
        torch.testing.assert_close(latents, wanted, atol=1e-4 * wanted.std().item(), rtol=1e-4)
        decoded = decode_whole(vae, latents)
        pictures = torch.cat(list(parts_decoded(vae, latents)), dim=1).clamp(-1, 1)
    assert decoded.shape == pictures.shape == video.shape
    assert (pictures.abs() < 1).float().mean() > 0.3, "not all of it is clamped"
    torch.testing.assert_close(decoded.clamp(-1, 1), pictures, atol=1e-4, rtol=1e-4)


def test_moments_are_those_of_wan(vae):
    mean, std = moments(vae, CPU)
    assert mean.shape == std.shape == (1, 16, 1, 1, 1)
    assert mean.flatten()[0].item() == pytest.approx(-0.7571) and std.flatten()[0].item() == pytest.approx(2.8184)


def test_recoloring_stays_in_range_and_changes_whole_clips():
    torch.manual_seed(0)
    video = torch.rand(64, 3, 4, 5, 3)
    changed = recolor(video)
    assert changed.min() >= 0 and changed.max() <= 1
    same = (changed == video).flatten(1).all(1)
    assert 0.5 < same.float().mean().item() < 0.9
    clip = (~same).nonzero()[0, 0]
    # One gain and one offset for every color of a clip.
    for old, new in zip(video[clip].flatten(0, 2).T, changed[clip].flatten(0, 2).T, strict=True):
        gain = new.std() / old.std()
        assert 0.4 <= gain <= 1
        torch.testing.assert_close(new - new.mean(), gain * (old - old.mean()), atol=1e-5, rtol=1e-4)
