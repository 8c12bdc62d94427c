"""Passes of a network on 2 and 4 ranks, real processes over gloo, against one."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from longcat_core.checkpoints.load import load_transformer
from longcat_core.files.safetensors_io import read_tensors
from longcat_core.model.config import ModelConfig
from longcat_core.model.kv_cache import Reference
from longcat_core.optimize.adapters import adapt, release
from longcat_core.optimize.block_sparse import BlockSparse
from longcat_core.optimize.optimized import OptimizedTransformer
from longcat_core.optimize.quantization import quantize
from longcat_core.optimize.shared_memory import Place, can_share
from longcat_core.optimize.sparse.settings import Densities, Sparse
from longcat_core.optimize.switches import Optimizations
from longcat_core.parallel import weights
from longcat_core.parallel.group import Group
from longcat_core.parallel.led_vae import LedVAE
from longcat_core.parallel.mirror import ALONE, share
from longcat_core.parallel.start import start
from longcat_core.parallel.weights import OwnWeights
from longcat_core.sampling.avatar import Audio, ReferenceFrame, class_tokens
from longcat_core.sampling.sampler import sample
from longcat_core.sampling.schedules import make_schedule
from longcat_core.vae.network import VAEConfig, WanVAE
from longcat_core.vae.parts import decoded
from longcat_core.vae.parts import encoded as encode

from ..support.tiny import tiny_config

AVATAR = Path(__file__).parents[1] / "data" / "golden-avatar" / "v1_5"
# Rows by columns of latents: tokens of a frame divide by 4, by 2, and by neither.
EVEN, HALVES, ODD = (8, 12), (4, 12), (6, 10)
# Both are exact: into each other's memory, and by messages.
EXCHANGES = ("exact", "messages")


@pytest.fixture(scope="module", params=[2, 4])
def group(request) -> Iterator[Group]:
    with start([torch.device("cpu")] * request.param) as group, torch.no_grad():
        yield group


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def network(heads: int = 4, depth: int = 2, **switches: Any) -> OptimizedTransformer:
    config = tiny_config(hidden_size=16 * heads, num_heads=heads, depth=depth)
    model = OptimizedTransformer(config, Optimizations(**switches)).requires_grad_(False)
    for i, parameter in enumerate(model.parameters()):
        parameter.copy_(randn(*parameter.shape, seed=i) * 0.2)
    return model


def texts(model: OptimizedTransformer, count: int) -> Any:
    mask = torch.arange(7)[None] < torch.arange(7, 7 - count, -1)[:, None]
    return model.embed_text(randn(count, 7, 32, seed=5), mask)


def video(
    model: OptimizedTransformer,
    batch: int = 1,
    size: tuple[int, int] = EVEN,
    frames: int = 3,
    cond: int = 0,
    text: Any = None,
    **options: Any,
) -> Tensor:
    times = torch.full((1, frames), 500.0)
    times[:, :cond] = 0
    latents = randn(batch, 16, frames, *size, seed=1)
    return model(latents, times, text or texts(model, batch), num_cond_latents=cond, **options)


def continued(model: OptimizedTransformer, batch: int = 1, size: tuple[int, int] = EVEN, **options: Any) -> Tensor:
    """What a cache of 2 frames holds of the network's output, and the output behind it."""
    cache = model.fill_kv_cache(randn(1, 16, 2, *size, seed=9))
    latents = randn(batch, 16, 3, *size, seed=1)
    out = model(latents, torch.full((1, 1), 500.0), texts(model, batch), kv_cache=cache, **options)
    return torch.cat((cache.out.expand(batch, -1, -1, -1, -1), out), 2)


def check(group: Group, model: OptimizedTransformer, run: Callable[..., Tensor], *args: Any, **options: Any) -> None:
    """`run` gives on all ranks, twice, what it gives on one."""
    wanted = run(model, *args, **options)
    share(group, model)
    for _ in range(2):
        torch.testing.assert_close(run(model, *args, **options), wanted, atol=1e-5 * float(wanted.std()), rtol=1e-5)


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("size", [EVEN, HALVES, ODD])
@pytest.mark.parametrize("batch", [1, 2, 3, 4])
def test_samples_and_tokens(group, batch, size, exchange):
    check(group, network(exchange=exchange), video, batch, size, cond=batch % 2)


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("heads", [1, 3, 11])
def test_heads_that_do_not_divide(group, heads, exchange):
    check(group, network(heads, exchange=exchange), video)


@pytest.mark.parametrize("group", [3], indirect=True)
@pytest.mark.parametrize(("batch", "size"), [(2, EVEN), (3, EVEN), (1, (2, 2))])
def test_ranks_that_divide_neither_samples_nor_tokens(group, batch, size):
    """Also more ranks than a frame has tokens."""
    check(group, network(), video, batch, size)


@pytest.mark.parametrize("size", [EVEN, ODD])
@pytest.mark.parametrize("heads", [3, 4])
def test_exchange_in_eight_bits(group, heads, size):
    """Lossy, by as much as int8 rounds; sparse attention and a cache take part, and the exact exchange comes back."""
    model = network(heads)
    model.sparse = Sparse(0.5, dense_steps=0)
    runs = (
        (video, {"size": size}),
        (continued, {"size": size}),
        (video, {"size": (24, 34), "frames": 8, "progress": 0.5}),
    )
    wanted = [run(model, **options) for run, options in runs]
    share(group, model)
    for exchange in ("int8", "exact"):
        model.set_optimizations(Optimizations(exchange=exchange))
        for (run, options), exact in zip(runs, wanted, strict=True):
            error = (run(model, **options) - exact).norm() / exact.norm()
            assert 1e-4 < error < 0.01 if exchange == "int8" else error < 1e-5


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("size", [EVEN, ODD])
@pytest.mark.parametrize("batch", [1, 2])
def test_continuation_with_a_cache(group, batch, size, exchange):
    check(group, network(exchange=exchange), continued, batch, size)


def test_a_cache_of_several_videos(group):
    def run(model: OptimizedTransformer) -> Tensor:
        cache = model.fill_kv_cache(randn(2, 16, 2, *EVEN, seed=9))
        return model(randn(4, 16, 3, *EVEN, seed=1), torch.full((1, 1), 500.0), texts(model, 4), kv_cache=cache)

    check(group, network(), run)


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("size", [EVEN, ODD])
def test_block_sparse_attention(group, size, exchange):
    model = network(exchange=exchange)
    model.block_sparse = BlockSparse(0.5, chunk=(2, 2, 2))
    check(group, model, video, 1, size, 5, cond=1)
    model = network(exchange=exchange)
    model.block_sparse = BlockSparse(0.5, chunk=(2, 2, 2))
    check(group, model, continued, 1, size)


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("heads", [3, 4])
@pytest.mark.parametrize("cond", [0, 1])
def test_sparse_attention_with_densities_of_heads(group, heads, cond, exchange):
    model = network(heads, exchange=exchange)
    layers = tuple(tuple(0.1 + 0.2 * (head + layer) for head in range(heads)) for layer in range(2))
    model.sparse = Sparse(densities=Densities((1.0,), (layers,)), dense_steps=0)
    check(group, model, video, 1, (24, 34), 8, cond, progress=0.5)


def test_a_density_for_all_heads(group):
    model = network()
    model.sparse = Sparse(0.2, dense_steps=0)
    check(group, model, video, 1, (24, 32), 8, progress=0.5)


def test_eight_bit_layers_and_loras_beside_weights(group):
    model = network()
    quantize(model)
    for number, layer in enumerate((model.blocks[0].attn.qkv, model.blocks[1].ffn.down)):
        adapt(layer, 4)
        layer.lora_up.copy_(randn(*layer.lora_up.shape, seed=number))
        layer.lora_down.copy_(randn(*layer.lora_down.shape, seed=number + 2))
        layer.lora_scale.fill_(0.5)
    check(group, model, video, 2)
    model.execution.ranks = None
    before = video(model, 2)
    model.blocks[0].attn.qkv.lora_scale.fill_(1.0)
    wanted = video(model, 2)
    assert (wanted - before).abs().max() > 1e-3
    check(group, model, video, 2)


def test_changed_weights_and_switches_reach_all_ranks(group):
    """One after the other, with passes between them."""
    changes: list[Callable[[OptimizedTransformer], object]] = [
        lambda model: model.blocks[1].attn.qkv.weight.mul_(0.5),
        lambda model: model.set_optimizations(Optimizations(fused_qkv=False, text_mode="padded")),
        lambda model: setattr(model, "sparse", Sparse(0.3, dense_steps=0)),
        lambda model: setattr(model.blocks[0].ffn.down, "bias", torch.nn.Parameter(randn(64), requires_grad=False)),
        lambda model: adapt(model.blocks[1].cross_attn.kv, 2).lora_up.add_(1),
        lambda model: model.blocks[1].cross_attn.kv.lora_down.add_(0.1),
        lambda model: model.blocks[1].cross_attn.kv.lora_scale.fill_(1),
        lambda model: release(model.blocks[1].cross_attn.kv),
        lambda model: setattr(model, "sparse", None),
        quantize,
    ]
    model, other = network(), network()
    share(group, model)
    text = texts(model, 1)
    sized: dict[str, Any] = {"size": (24, 32), "frames": 8, "progress": 0.5}
    before = video(model, text=text, **sized)
    for i, change in enumerate(changes):
        for one in (model, other):
            change(one)
        wanted, found = video(other, **sized), video(model, text=text, **sized)
        assert i in (1, 4, 5) or (wanted - before).abs().max() > 1e-2
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
        before = found


def test_streamed_blocks(group):
    model = network()
    model.stream_blocks("cpu", [1])
    check(group, model, video, 2)


@pytest.mark.skipif(not can_share(), reason="this system has no such memory")
def test_streamed_blocks_are_in_memory_once(group, monkeypatch):
    """The other processes map rank 0's pages, also with adapters and 8-bit layers, and see what it writes there."""

    def made() -> OptimizedTransformer:
        model = network(depth=3)
        quantize(model)
        layer = model.blocks[2].ffn.down
        adapt(layer, 4)
        layer.lora_up.copy_(randn(*layer.lora_up.shape, seed=1))
        layer.lora_down.copy_(randn(*layer.lora_down.shape, seed=2))
        layer.lora_scale.fill_(0.5)
        return model

    def written(model: OptimizedTransformer) -> Tensor:
        for block in (model.blocks[0], model.blocks[2]):
            block.attn.qkv.weight_scale.mul_(2)
        return video(model, 2)

    whole, model, sent = made(), made(), []
    share(group, whole)
    wanted, after = video(whole, 2), written(whole)
    assert (after - wanted).abs().max() > 1e-2
    model.stream_blocks("cpu", [0, 2])
    plain = OwnWeights.weights
    monkeypatch.setattr(OwnWeights, "weights", lambda self, names: sent.extend(names) or plain(self, names))
    share(group, model)
    assert torch.equal(video(model, 2), wanted)
    in_blocks = {name for name in sent if name.startswith("blocks")}
    assert in_blocks and all(name.startswith("blocks.1.") or ".lora_" in name for name in in_blocks)
    places = [block.place for block in model.execution.ranks.common.values()]
    assert len(places) == 2 and sum(place.size for place in places) > 50_000
    for process in (os.getpid(), *(process.pid for process in group._hub._processes.values())):
        maps = Path(f"/proc/{process}/maps").read_text()
        assert all(f"/memfd:{place.name} " in maps for place in places)
    sent.clear()
    assert torch.equal(written(model), after) and not sent


@pytest.mark.parametrize("group", [2], indirect=True)
@pytest.mark.parametrize("why", ["this system has no such memory", "another machine"])
def test_streamed_blocks_are_copied_where_memory_is_not_shared(group, monkeypatch, why):
    if why == "another machine":
        plain = weights.shared
        monkeypatch.setattr(weights, "shared", lambda size: (plain(size)[0], Place("/proc/1/fd/none", "none", size)))
    else:
        monkeypatch.setattr(weights, "can_share", lambda: False)
    model = network()
    model.stream_blocks("cpu", [1])
    check(group, model, video, 2)


# Every process compiles, so no more than two.
@pytest.mark.parametrize("group", [2], indirect=True)
def test_compiled_blocks(group):
    check(group, network(compile="blocks"), video)


def test_patched_blocks_run_on_one_rank(group):
    model, said = network(), []
    model.announce = said.append
    wanted = video(model)
    share(group, model)
    found = video(model, around_block=lambda i, run, x: run(x))
    torch.testing.assert_close(found, wanted)
    assert said == [ALONE]


@pytest.fixture(scope="module")
def heard() -> dict[str, Tensor]:
    names = ("generate", "audio", "forward")
    return {k: tensor for name in names for k, tensor in read_tensors(AVATAR / f"{name}.safetensors").items()}


def avatar() -> OptimizedTransformer:
    config = ModelConfig.from_json(AVATAR / "config.json")
    return load_transformer(AVATAR / "dit.safetensors", config=config, optimizations=Optimizations(attention="sdpa"))


@pytest.mark.parametrize("people", [1, 2])
@pytest.mark.parametrize("kv_cache", ["exact", "off"])
def test_avatars(group, heard, people, kv_cache):
    """Text, audio and a reference frame; who is where is found by attention to a frame of which ranks have shares."""
    windows = [heard["one.segment0"], heard["two.segment0"]][:people]
    classes = class_tokens(heard["duo.masks"], 4, 6) if people == 2 else None

    def run(model: OptimizedTransformer, reference: bool) -> Tensor:
        options: dict[str, Any] = {"cond_latents": heard["image.latent"]}
        if reference:
            options["reference"] = ReferenceFrame(heard["image.latent"], Reference(5, 1))
        return sample(
            model,
            heard["noise0"],
            make_schedule("base", 2),
            heard["pos.embeds"],
            heard["pos.mask"],
            negative_context=heard["neg.embeds"],
            negative_mask=heard["neg.mask"],
            guidance_scale=3.0,
            audio=Audio(torch.cat(windows), classes, 4.5),
            kv_cache=kv_cache,
            **options,
        )

    for reference in (False, True):
        check(group, avatar(), run, reference)


def test_the_vae(group):
    """Also after a caller has stopped between two parts, and in another precision."""
    torch.manual_seed(0)
    vae = WanVAE(VAEConfig(4, 16, [0.0] * 16, [1.0] * 16)).eval().double()
    latents, clip = randn(1, 16, 3, 9, 2, seed=1).double(), randn(1, 3, 9, 72, 16, seed=2).double()
    for _ in range(2):
        frames, encoded = torch.cat(list(decoded(vae, latents)), 1), encode(vae, clip)
        led = LedVAE(group, vae)
        torch.testing.assert_close(torch.cat(list(led.decode(latents)), 1), frames)
        next(parts := led.decode(latents))
        parts.close()
        torch.testing.assert_close(led.encode(clip), encoded)
        vae.float()
        latents, clip = latents.float(), clip.float()
