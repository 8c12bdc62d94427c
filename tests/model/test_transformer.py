"""The network's switches change how it runs, not what it computes; conditioning frames, text modes, cache, RoPE."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longcat_core.checkpoints.load import load_transformer
from longcat_core.errors import BackendUnavailable, LongCatError
from longcat_core.files.safetensors_io import read_tensors
from longcat_core.model.config import ModelConfig
from longcat_core.model.kv_cache import KVCache
from longcat_core.model.layers import linear_fp32
from longcat_core.model.rope import apply_rope, rope_table
from longcat_core.model.text import TextTokens
from longcat_core.optimize.optimized import OptimizedTransformer
from longcat_core.optimize.switches import Optimizations

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
CONFIG = ModelConfig.from_json(GOLDEN / "config.json")
FUSED = Optimizations(attention="sdpa")


@pytest.fixture(scope="module")
def data() -> dict[str, Tensor]:
    return read_tensors(GOLDEN / "forward.safetensors")


@pytest.fixture(scope="module")
def loaded() -> OptimizedTransformer:
    return load_transformer(GOLDEN / "dit.safetensors", config=CONFIG)


@pytest.fixture
def model(loaded):
    loaded.set_optimizations(FUSED)
    yield loaded
    loaded.set_optimizations(FUSED)


@pytest.fixture(scope="module")
def packing() -> OptimizedTransformer:
    """The same weights under `text_tokens_zero_pad` false."""
    return load_transformer(GOLDEN / "dit.safetensors", config=replace(CONFIG, text_tokens_zero_pad=False))


def t2v(model: OptimizedTransformer, data: dict[str, Tensor], **changes: Tensor) -> Tensor:
    given = {key: data[key] for key in ("x", "t", "context", "mask")} | changes
    return model(given["x"], given["t"], given["context"], given["mask"])


def error(got: Tensor, wanted: Tensor) -> float:
    """Largest difference over the wanted values' standard deviation; infinite where shapes differ."""
    if got.shape != wanted.shape:
        return float("inf")
    return ((got.float() - wanted.float()).abs().max() / wanted.float().std()).item()


# Switches


@pytest.mark.parametrize("off", ["fused_qkv", "fused_ffn", "explicit_fp32"])
def test_a_switch_flips_on_the_loaded_model_and_back(model, data, off):
    fused = t2v(model, data)
    calls = []
    linear = F.linear

    def counted(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        calls.append(weight.shape[0])
        return linear(x, weight, bias)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "linear", counted)
        t2v(model, data)
        gemms = len(calls)
        calls.clear()
        model.set_optimizations(replace(FUSED, **{off: False}))
        unfused = t2v(model, data)
    # q, k, v and the text's k, v apart: three more a block; gate and up apart: one more.
    assert len(calls) - gemms == {"fused_qkv": 3, "fused_ffn": 1, "explicit_fp32": 0}[off] * CONFIG.depth
    assert error(unfused, fused) <= (0 if off == "explicit_fp32" else 1e-6)
    model.set_optimizations(FUSED)
    assert torch.equal(t2v(model, data), fused)


def test_switches_leave_the_weights_alone(model, data):
    before = {name: (p.data_ptr(), p.clone()) for name, p in model.named_parameters()}
    for fused in (False, True):
        model.set_optimizations(replace(FUSED, fused_qkv=fused, fused_ffn=fused))
        t2v(model, data)
    assert all(p.data_ptr() == before[n][0] and torch.equal(p, before[n][1]) for n, p in model.named_parameters())


def test_an_unavailable_backend_changes_nothing(model):
    wanted = replace(FUSED, attention="flash9", fused_qkv=False)
    with pytest.raises(BackendUnavailable, match="flash9"):
        model.set_optimizations(wanted)
    assert model.optimizations == FUSED


@pytest.mark.parametrize("change", [{"text_mode": "short"}, {"compile": "all"}])
def test_unknown_switch_positions_are_named(change):
    (name, value), *_ = change.items()
    with pytest.raises(LongCatError, match=f"{name} is '{value}'; choose one of"):
        Optimizations(**change)


# Text


def test_padding_modes_of_the_released_kind(model, data):
    outputs = {}
    for mode in ("exact", "padded", "packed"):
        model.set_optimizations(replace(FUSED, text_mode=mode))
        outputs[mode] = t2v(model, data)
    assert error(outputs["exact"], outputs["padded"]) <= 1e-5
    assert error(outputs["packed"], outputs["padded"]) > 1e-3
    assert error(outputs["packed"], data["skip_padding.out"]) <= 2e-5


def test_padding_modes_where_padding_is_dropped(packing, data):
    for mode in ("exact", "padded", "packed"):
        packing.set_optimizations(replace(FUSED, text_mode=mode))
        assert error(t2v(packing, data), data["skip_padding.out"]) <= 2e-5


@pytest.mark.parametrize("mode", ["exact", "padded"])
def test_length_stands_for_padding_that_was_cut_off(model, data, mode):
    model.set_optimizations(replace(FUSED, text_mode=mode))
    context, mask = data["context"], data["mask"]
    long = model(data["x"], data["t"], F.pad(context, (0, 0, 0, 48)), F.pad(mask, (0, 48)))
    cut = model.embed_text(context[:, :9], mask[:, :9], length=64)
    assert error(model(data["x"], data["t"], cut), long) <= 1e-5
    assert error(t2v(model, data), long) > 1e-4, "the count of padding tokens matters"


@pytest.mark.parametrize("mode", ["exact", "packed", "padded"])
def test_no_mask_means_every_token_is_real(model, data, mode):
    model.set_optimizations(replace(FUSED, text_mode=mode))
    without = model(data["x"], data["t"], data["context"])
    assert error(without, data["nomask.out"]) <= 2e-5
    ones = t2v(model, data, mask=torch.ones_like(data["mask"]))
    assert error(ones, without) <= 1e-5


def test_lengths_in_a_batch_do_not_mix(model, data):
    context = torch.randn(2, 200, CONFIG.caption_channels, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(2, 200, dtype=torch.int64)
    mask[0, :1] = 1
    mask[1, :] = 1
    both = t2v(model, data, context=context, mask=mask)
    for i in range(2):
        row = slice(i, i + 1)
        alone = model(data["x"][row], data["t"][row], context[row], mask[row])
        assert error(both[row], alone) <= 1e-5
    model.set_optimizations(replace(FUSED, text_mode="padded"))
    assert error(t2v(model, data, context=context, mask=mask), both) <= 1e-5


def test_real_tokens_may_stand_anywhere(model, data):
    mask = data["mask"].flip(1)
    flipped = t2v(model, data, context=data["context"].flip(1), mask=mask)
    assert error(flipped, data["t2v.out"]) <= 2e-5


def test_only_real_tokens_are_kept(model, data):
    text = model.embed_text(data["context"], data["mask"])
    assert text.lengths == data["mask"].sum(1).tolist() == [5, 9]
    assert text.tokens.shape == (2, 10, CONFIG.hidden_size), "nine real tokens and one for the padding"
    assert text.pad_counts.tolist() == [11, 7]
    assert not text.tokens[:, -1].any() and not text.tokens[0, 5:].any()


def test_one_text_serves_a_batch(model, data):
    text = model.embed_text(data["context"][:1], data["mask"][:1]).expand(2)
    twice = {"context": data["context"][:1].expand(2, -1, -1), "mask": data["mask"][:1].expand(2, -1)}
    assert error(model(data["x"], data["t"], text), t2v(model, data, **twice)) <= 5e-6


@pytest.mark.parametrize("mode", ["exact", "packed", "padded"])
def test_a_text_without_any_token(model, packing, data, mode):
    mask = data["mask"] * torch.tensor([[1], [0]])
    packing.set_optimizations(replace(FUSED, text_mode=mode))
    with pytest.raises(LongCatError, match="text row 1 has no token"):
        t2v(packing, data, mask=mask)
    if mode != "packed":  # zero vectors are something to attend to
        outputs = []
        for same in ("exact", "padded"):
            model.set_optimizations(replace(FUSED, text_mode=same))
            outputs.append(t2v(model, data, mask=mask))
        assert torch.isfinite(outputs[0]).all() and error(outputs[0], outputs[1]) <= 1e-5


# Conditioning frames and their cache


def test_noise_frames_follow_the_given_ones(model, data):
    out = model(data["x"], data["vc.t"], data["context"], data["mask"], num_cond_latents=2)
    x = data["x"].clone()
    x[:, :, 1] += 1
    changed = model(x, data["vc.t"], data["context"], data["mask"], num_cond_latents=2)
    assert error(changed[:, :, 2:], out[:, :, 2:]) > 1e-3


def test_given_frames_know_neither_noise_nor_prompt_nor_step(model, data):
    cond = 2
    out = model(data["x"], data["vc.t"], data["context"], data["mask"], num_cond_latents=cond)
    x = data["x"].clone()
    x[:, :, cond:] = torch.randn(x[:, :, cond:].shape, generator=torch.Generator().manual_seed(1))
    t = data["vc.t"].clone()
    t[:, cond:] = 100
    other = model(x, t, data["context"].flip(0, 1) + 1, torch.ones_like(data["mask"]), num_cond_latents=cond)
    assert error(other[:, :, :cond], out[:, :, :cond]) <= 1e-6
    assert error(other[:, :, cond:], out[:, :, cond:]) > 0.1
    alone = model(data["x"][:, :, :cond], torch.zeros(2), data["context"], data["mask"], num_cond_latents=cond)
    assert error(alone, out[:, :, :cond]) <= 1e-5


@pytest.mark.parametrize("videos", [1, 2])
def test_cached_frames_give_what_computed_ones_give(model, data, videos):
    """A cache of one video serves two samples; one of two serves both halves of guidance, four samples."""
    cond, batch = 2, 2 * videos
    x, context, mask = (data[k].repeat(2, *[1] * (data[k].ndim - 1))[:batch] for k in ("x", "context", "mask"))
    context = context + torch.arange(batch)[:, None, None]
    x[:, :, :cond] = data["x"][:videos, :, :cond].repeat(2, 1, 1, 1, 1)
    t = torch.full((batch, x.shape[2]), 500.0)
    t[:, :cond] = 0
    whole = model(x, t, context, mask, num_cond_latents=cond)
    cache = model.fill_kv_cache(data["x"][:videos, :, :cond])
    assert cache.k.shape[1] == videos
    cached = model(x[:, :, cond:], t[:, cond:], context, mask, kv_cache=cache)
    assert error(cached, whole[:, :, cond:]) <= 1e-5


def test_cache_in_cpu_memory_and_its_size(model, data):
    noisy = data["x"][:, :, 2:]
    here = model.fill_kv_cache(data["x"][:1, :, :2])
    moved = model.fill_kv_cache(data["x"][:1, :, :2], device="cpu").to("cpu")
    assert moved.k.device.type == "cpu" and moved.rotated
    outputs = [model(noisy, data["t"], data["context"], data["mask"], kv_cache=cache) for cache in (here, moved)]
    assert torch.equal(*outputs)
    tokens = 2 * (8 // 2) * (12 // 2)
    assert here.num_latents == 2 and here.k.shape == (CONFIG.depth, 1, tokens, CONFIG.num_heads, CONFIG.head_dim)
    assert here.nbytes == 2 * CONFIG.depth * tokens * CONFIG.hidden_size * 4


def test_keys_are_rotated_once():
    cache = KVCache(CONFIG, 2, 3, 4)
    keys = torch.randn(cache.k.shape, generator=torch.Generator().manual_seed(0))
    for block in range(CONFIG.depth):
        cache.store(block, keys[block], 2 * keys[block])
    cache.rotate()
    rotated = cache.k.clone()
    table = rope_table(CONFIG.head_dim, 2, 3, 4, 0, torch.device("cpu"))
    assert torch.equal(rotated[1], apply_rope(keys[1], *table)) and not torch.equal(rotated, keys)
    cache.rotate()
    assert torch.equal(cache.k, rotated) and torch.equal(cache.v, 2 * keys)


# Precision


def test_bf16_is_near_fp32(model, data):
    half = load_transformer(GOLDEN / "dit.safetensors", config=CONFIG, dtype=torch.bfloat16)
    t = torch.full((2,), 872.0)  # a number that bf16 holds
    out, wanted = t2v(half, data, t=t), t2v(model, data, t=t)
    assert out.dtype == torch.float32 and half.dtype == torch.bfloat16
    given, wanted = out.double(), wanted.double()
    assert ((given - wanted).square().mean().sqrt() / wanted.std()).item() < 3e-2


def test_timesteps_are_rounded_to_the_models_dtype(model, data):
    rounded = torch.tensor([997.0]).to(torch.bfloat16).float()
    assert rounded.item() == 996.0
    t, near = torch.full((2,), 997.0), rounded.expand(2)
    half = load_transformer(GOLDEN / "dit.safetensors", config=CONFIG, dtype=torch.bfloat16)
    assert torch.equal(t2v(half, data, t=t), t2v(half, data, t=near))
    assert not torch.equal(t2v(model, data, t=t), t2v(model, data, t=near))


def test_moving_the_model_changes_what_it_casts_to(loaded, data):
    moved = copy.deepcopy(loaded).to(torch.bfloat16)
    assert moved.dtype == torch.bfloat16
    wanted = load_transformer(GOLDEN / "dit.safetensors", config=CONFIG, dtype=torch.bfloat16)
    assert torch.equal(t2v(moved, data), t2v(wanted, data))


# Gradients


def gradients(model: OptimizedTransformer, data: dict[str, Tensor], cond: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad(set_to_none=True)
    t = data["vc.t"] if cond else data["t"]
    loss = model(data["x"], t, data["context"], data["mask"], num_cond_latents=cond).square().mean()
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("cond", [0, 2])
def test_checkpointing_changes_no_gradient(loaded, data, cond):
    model = copy.deepcopy(loaded).requires_grad_(True)
    model.set_optimizations(FUSED)
    loss, plain = gradients(model, data, cond)
    model.set_optimizations(replace(FUSED, gradient_checkpointing=True))
    calls = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda *_: calls.append(1))
    again, recomputed = gradients(model, data, cond)
    assert len(calls) == 2 * CONFIG.depth, "every block runs once more in the backward pass"
    assert torch.equal(loss, again)
    for name, gradient in plain.items():
        assert gradient is not None and gradient.abs().sum() > 0, name
        torch.testing.assert_close(recomputed[name], gradient, rtol=1e-6, atol=1e-9)


def test_gradient_agrees_with_a_difference_quotient(loaded, data):
    model = copy.deepcopy(loaded).requires_grad_(True)
    model.set_optimizations(FUSED)
    _, grads = gradients(model, data)
    for name in ("blocks.0.attn.qkv.weight", "blocks.1.cross_attn.kv.weight", "blocks.0.modulation.weight"):
        parameter = dict(model.named_parameters())[name]
        direction = grads[name] / grads[name].norm()
        losses = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter += sign * 1e-2 * direction
            losses.append(gradients(model, data)[0])
            with torch.no_grad():
                parameter -= sign * 1e-2 * direction
        slope = (losses[0] - losses[1]) / 2e-2
        torch.testing.assert_close(slope, grads[name].norm(), rtol=2e-2, atol=0)


# Operations of an owner


class Operations:
    """Layers that count their calls, as a host that streams weights would supply them."""

    calls = 0
    fp32_calls = 0

    class Linear(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            Operations.calls += 1
            return super().forward(x)

    class Conv3d(nn.Conv3d):
        pass

    @staticmethod
    def linear_fp32(layer: nn.Module, x: Tensor) -> Tensor:
        Operations.fp32_calls += 1
        return linear_fp32(layer, x)


@pytest.mark.parametrize("fused", [True, False])
def test_operations_are_used_for_every_layer(loaded, data, fused):
    switches = replace(FUSED, fused_qkv=fused, fused_ffn=fused)
    owned = OptimizedTransformer(CONFIG, switches, operations=Operations, dtype=torch.float32, device="cpu")
    owned.load_state_dict(loaded.state_dict())
    assert all(type(m) is Operations.Linear for m in owned.modules() if isinstance(m, nn.Linear))
    assert isinstance(owned.patch_embed, Operations.Conv3d)
    Operations.calls = Operations.fp32_calls = 0
    with torch.no_grad():
        out = t2v(owned, data)
    assert error(out, data["t2v.out"]) <= 2e-5
    # An owner's layers run whole whatever the switches say: seven a block and two for the text.
    assert Operations.calls == 7 * CONFIG.depth + 2
    # Modulation of every block, two layers for the timestep, two in the final layer.
    assert Operations.fp32_calls == CONFIG.depth + 4


# Bad input


@pytest.mark.parametrize(
    ("shape", "cond", "said"),
    [
        ((1, 15, 2, 8, 12), 0, r"\(1, 15, 2, 8, 12\).*16 channels"),
        ((1, 16, 2, 7, 12), 0, r"\(1, 16, 2, 7, 12\).*2x2"),
        ((1, 16, 2, 8, 11), 0, r"\(1, 16, 2, 8, 11\).*2x2"),
        ((1, 16, 2, 8, 12), 3, "num_cond_latents is 3 but there are 2"),
        ((1, 16, 2, 8, 12), -1, "num_cond_latents is -1 but there are 2"),
    ],
)
def test_bad_latents_are_named(model, data, shape, cond, said):
    with pytest.raises(LongCatError, match=said):
        model(torch.zeros(shape), torch.zeros(1), data["context"][:1], data["mask"][:1], num_cond_latents=cond)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"depth": 0}, "depth is 0"),
        ({"num_heads": 3}, "3 heads do not divide hidden_size 64"),
        ({"num_heads": 16}, "head dim 4"),
        ({"hidden_size": "64"}, "hidden_size is '64'"),
        ({"patch_size": (2, 2, 2)}, r"patch_size \(2, 2, 2\)"),
    ],
)
def test_bad_configs_are_named(changes, said):
    with pytest.raises(LongCatError, match=said):
        replace(CONFIG, **changes)


def test_released_model_is_the_default():
    assert CONFIG.ffn_hidden == 256
    assert ModelConfig().ffn_hidden == ModelConfig.from_dict({"hidden_size": 4096, "mlp_ratio": 4}).ffn_hidden == 11008
    assert ModelConfig().head_dim == 128


# RoPE


@pytest.mark.parametrize("head_dim", [32, 64, 128])
def test_table_follows_the_formula(head_dim):
    frames, height, width = 3, 4, 5
    cos, sin = rope_table(head_dim, frames, height, width, 2, torch.device("cpu"))
    assert cos.shape == sin.shape == (frames * height * width, head_dim // 2) and cos.dtype == torch.float32
    spatial = 2 * (head_dim // 6)
    dims = (head_dim - 2 * spatial, spatial, spatial)
    for t, h, w in ((0, 0, 0), (2, 0, 4), (1, 3, 2)):
        angles = [p * 10000.0 ** (-2 * i / d) for p, d in zip((t + 2, h, w), dims, strict=True) for i in range(d // 2)]
        angles = torch.tensor(angles, dtype=torch.float64)
        token = (t * height + h) * width + w
        torch.testing.assert_close(cos[token].double(), angles.cos(), atol=1e-6, rtol=0)
        torch.testing.assert_close(sin[token].double(), angles.sin(), atol=1e-6, rtol=0)


def test_a_later_start_is_a_slice_of_a_longer_table():
    device = torch.device("cpu")
    for late, whole in zip(rope_table(32, 3, 2, 4, 5, device), rope_table(32, 8, 2, 4, 0, device), strict=True):
        assert torch.equal(late, whole[5 * 2 * 4 :])


def test_rotation_keeps_lengths_and_knows_distances_only():
    device = torch.device("cpu")
    q, k = torch.randn(2, 1, 24, 2, 32, generator=torch.Generator().manual_seed(0))
    near, far = rope_table(32, 2, 3, 4, 0, device), rope_table(32, 2, 3, 4, 7, device)
    rotated = apply_rope(q, *near)
    torch.testing.assert_close(rotated.norm(dim=-1), q.norm(dim=-1))
    torch.testing.assert_close(rotated[:, 0], q[:, 0])
    assert apply_rope(q.bfloat16(), *near).dtype == torch.bfloat16
    scores = [torch.einsum("bnhd,bmhd->bhnm", apply_rope(q, *t), apply_rope(k, *t)) for t in (near, far)]
    torch.testing.assert_close(*scores, atol=1e-4, rtol=1e-4)


def test_text_tokens_of_the_right_batch_stay_as_they_are():
    text = TextTokens(torch.zeros(2, 3, 8), lengths=[3, 2])
    assert text.expand(2) is text


def test_texts_that_fit_neither_one_nor_every_video(model, data):
    with pytest.raises(LongCatError, match="2 texts for 1 videos"):
        model(data["x"][:1], data["t"][:1], data["context"], data["mask"])
