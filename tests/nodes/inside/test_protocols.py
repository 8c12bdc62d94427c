"""What newer core nodes do to any MODEL, each by a stand-in: attention overrides, block numbers, patches, wrappers,
prefetching, and guidance that is split over devices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from .conftest import MODEL, ON_CPU
from .test_stock import difference

OVERRIDE = "optimized_attention_override"


@pytest.fixture(scope="session")
def samplers(sample, comfy, prompts) -> dict[str, Callable[..., torch.Tensor]]:
    """LongCat Sampler and KSampler, two steps each."""

    def stock(latent: dict, model: Any, **values: Any) -> torch.Tensor:
        settings = {"seed": 1, "steps": 2, "cfg": 4.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
        return comfy("KSampler", model=model, latent_image=latent, **prompts, **settings | values)["samples"]

    return {"longcat": lambda latent, model, **values: sample(latent, model, steps=2, **values), "stock": stock}


@pytest.fixture(params=["longcat", "stock"])
def sampler(samplers, request) -> Callable[..., torch.Tensor]:
    return samplers[request.param]


def with_options(model: Any, **options: Any) -> Any:
    model = model.clone()
    model.model_options.setdefault("transformer_options", {}).update(options)
    return model


def optimized(comfy: Any, model: Any, **switches: Any) -> Any:
    return comfy("LongCatOptimizations", model=model, **switches)[0]


class Numbered:
    """An attention override that records the block, and the keys, of each call."""

    def __init__(self, act: Callable[[int, torch.Tensor], torch.Tensor] = lambda i, out: out) -> None:
        self.act, self.blocks, self.keys = act, [], []

    def __call__(self, attention: Callable, q: Any, k: Any, v: Any, heads: int, **kwargs: Any) -> torch.Tensor:
        options = kwargs["transformer_options"]
        assert options["total_blocks"] > options["block_index"] and options["block_type"] == "double"
        assert all(isinstance(part, torch.Tensor) for part in (q, k, v)), "no containers were declared"
        self.blocks.append(options["block_index"])
        self.keys.append(k.shape[1])
        return self.act(self.blocks[-1], attention(q, k, v, heads, **kwargs))


# --- attention overrides ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("latent, kv_cache", [("empty", "exact"), ("image_latent", "exact"), ("image_latent", "off")])
def test_an_override_sees_the_number_of_each_block(model, sampler, samplers, request, latent, kv_cache):
    given = request.getfixturevalue(latent)
    values = {"kv_cache": kv_cache} if sampler is samplers["longcat"] else {}
    depth = model.model.diffusion_model.config.depth
    seen = Numbered()
    out = sampler(given, with_options(model, **{OVERRIDE: seen}), **values)
    runs = [i for i, block in enumerate(seen.blocks) if block == 0 and (not i or seen.blocks[i - 1] != 0)]
    for start, end in zip(runs, [*runs[1:], len(seen.blocks)], strict=True):
        blocks = seen.blocks[start:end]
        # Conditioning frames attend among themselves first: two calls a block.
        assert list(dict.fromkeys(blocks)) == list(range(depth)) and blocks == sorted(blocks)
    assert difference(sampler(given, model, **values), out) <= 1e-4
    muted = Numbered(lambda i, out: out * 0 if i == 1 else out)
    assert difference(out, sampler(given, with_options(model, **{OVERRIDE: muted}), **values)) > 0.01


def test_an_override_that_declares_containers_gets_them(model, sampler, empty):
    from comfy.ldm.modules import attention

    if not hasattr(attention, "AttentionTensorContainer"):
        pytest.skip("this ComfyUI has no containers")
    blocks = []

    def override(function, q, k, v, heads, **kwargs):
        raise AssertionError("plain tensors were passed")

    def container_function(q, k, v, heads, **kwargs):
        blocks.append(kwargs["transformer_options"]["block_index"])
        tensors = [part.take() for part in (q, k, v)]
        return attention.attention_pytorch(*tensors, heads, **kwargs)

    override.container_function = container_function
    out = sampler(empty, with_options(model, **{OVERRIDE: override}))
    assert {*blocks} == {*range(model.model.diffusion_model.config.depth)}
    assert difference(sampler(empty, model), out) <= 1e-4


def test_model_attention_backend(comfy, model, sampler, empty):
    """The stock node of this protocol."""
    patched = comfy("ModelAttentionBackend", model=model, attention="pytorch attention")
    assert OVERRIDE in patched.model_options["transformer_options"]
    assert difference(sampler(empty, model), sampler(empty, patched)) <= 1e-4


@pytest.mark.parametrize(
    "switches",
    [{"compile": "blocks"}, {"attention": "sdpa"}, {"split_guidance": True}, {"fused_qkv": False}],
    ids=lambda switches: next(iter(switches)),
)
def test_an_override_acts_under_optimizations(comfy, model, samplers, empty, switches):
    """In compiled blocks too, which share a graph, it sees which block runs."""
    changed = optimized(comfy, model, **switches)
    seen = Numbered(lambda i, out: out * 0 if i == 1 else out)
    out = samplers["longcat"](empty, with_options(changed, **{OVERRIDE: seen}))
    passes = 4 if "split_guidance" in switches else 2
    assert seen.blocks == list(range(model.model.diffusion_model.config.depth)) * passes
    assert difference(samplers["longcat"](empty, model), out) > 0.01
    plain = samplers["longcat"](empty, with_options(model, **{OVERRIDE: Numbered(seen.act)}))
    assert difference(plain, out) <= 1e-3


def test_block_sparse_attention_wins_over_an_override(comfy, model, samplers, empty):
    sparse = comfy("LongCatBlockSparseAttention", model=model, sparsity=0.5, cdf_threshold=0.0, chunk="4x4x4")
    seen = Numbered()
    both = with_options(sparse, **{OVERRIDE: seen})
    assert torch.equal(samplers["longcat"](empty, sparse), samplers["longcat"](empty, both)) and not seen.blocks
    report = comfy("LongCatOptimizations", model=both)[1]
    assert "attention: auto (not used: LongCat Block-Sparse Attention decides)" in report


@pytest.mark.parametrize("kind", ["override", "replace"])
def test_compiled_whole_network_still_runs_hooks(comfy, model, one_block, samplers, empty, kind):
    compiled = comfy("TorchCompileModel", model=one_block, backend="eager")
    seen = Numbered(lambda i, out: out * 0)
    patched, plain = (with_options(m, **{OVERRIDE: seen} if kind == "override" else {}) for m in (compiled, one_block))
    if kind == "replace":
        for m in (patched, plain):
            m.set_model_patch_replace(lambda args, extra: args, "dit", "double_block", 0)
    out = samplers["stock"](empty, patched, steps=1)
    assert difference(samplers["stock"](empty, plain, steps=1), out) <= 1e-3
    assert difference(samplers["stock"](empty, one_block, steps=1), out) > 0.01
    assert kind == "replace" or seen.blocks == [0, 0]


# --- patches ---------------------------------------------------------------------------------------------------------


def test_double_block_patches_run_after_each_block(model, sampler, empty):
    depth, seen = model.model.diffusion_model.config.depth, []

    def patch(args):
        seen.append(args["block_index"])
        assert args["x"].ndim == 5 and args["img"].shape[1] == 9 * 4 * 6 and args["transformer_options"]
        return {"img": args["img"] * (0.5 if args["block_index"] == 2 else 1)}

    patched = model.clone()
    patched.set_model_patch(patch, "double_block")
    assert difference(sampler(empty, model), sampler(empty, patched)) > 0.01
    assert seen[:depth] == list(range(depth)) and len(seen) % depth == 0


@pytest.mark.parametrize("kv_cache", ["exact", "official"])
def test_a_replaced_block_is_replaced_for_conditioning_frames_too(comfy, model, sample, clip_latent, kv_cache):
    """Their cached keys would be those of the block itself."""
    patched = model.clone()
    patched.set_model_patch_replace(
        lambda args, extra: {"img": extra["original_block"](args)["img"] * 0.5}, "dit", "double_block", 1
    )
    out = sample(clip_latent, patched, kv_cache=kv_cache, steps=2)
    assert difference(out, sample(clip_latent, model, kv_cache=kv_cache, steps=2)) > 0.01
    if kv_cache == "exact":
        assert difference(out, sample(clip_latent, patched, kv_cache="off", steps=2)) <= 1e-4


# --- wrappers and callbacks ------------------------------------------------------------------------------------------


def test_wrappers_and_callbacks_of_every_kind_run(model, sampler, empty):
    from comfy.patcher_extension import CallbacksMP, WrappersMP

    kinds = [value for name, value in vars(WrappersMP).items() if name.isupper()]
    moments = [CallbacksMP.ON_PRE_RUN, CallbacksMP.ON_CLEANUP, CallbacksMP.ON_PREPARE_STATE]
    patched, seen = model.clone(), dict.fromkeys([*kinds, *moments], 0)

    def wrapper(kind: str) -> Callable:
        def wrapped(executor, *args, **kwargs):
            seen[kind] += 1
            return executor(*args, **kwargs)

        return wrapped

    def callback(moment: str) -> Callable:
        def called(*args, **kwargs):
            seen[moment] += 1

        return called

    for kind in kinds:
        patched.add_wrapper_with_key(kind, "stand-in", wrapper(kind))
    for moment in moments:
        patched.add_callback_with_key(moment, "stand-in", callback(moment))
    assert torch.equal(sampler(empty, model), sampler(empty, patched))
    assert all(seen.values()), seen


def test_a_wrapper_may_change_the_options_on_the_way(model, sampler, empty):
    """An override set by a wrapper, in a copy of the options, acts in that pass."""
    from comfy.patcher_extension import WrappersMP

    seen = Numbered(lambda i, out: out * 0 if i == 1 else out)

    def wrapper(executor, x, t, c_concat, c_crossattn, control, transformer_options, **kwargs):
        options = {**transformer_options, OVERRIDE: seen}
        return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)

    patched = model.clone()
    patched.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "stand-in", wrapper)
    assert difference(sampler(empty, model), sampler(empty, patched)) > 0.01
    assert {*seen.blocks} == {*range(model.model.diffusion_model.config.depth)}


# --- prefetching -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("latent", ["empty", "image_latent"])
def test_each_block_is_prefetched_before_it_runs(model, sampler, monkeypatch, request, latent):
    """ComfyUI's own queue, on weights that are all there."""
    try:
        from comfy import model_management, model_prefetch
    except ImportError:
        pytest.skip("this ComfyUI does not prefetch")
    given, blocks = request.getfixturevalue(latent), list(model.model.diffusion_model.blocks)
    expected = sampler(given, model)
    events, queues = [], []
    make, pop = model_prefetch.make_prefetch_queue, model_prefetch.prefetch_queue_pop

    def made(queue, device, options):
        # A CPU does not have streams to fetch in.
        with monkeypatch.context() as patch:
            patch.setattr(model_management, "NUM_STREAMS", 2)
            patch.setattr(model_management, "is_device_cpu", lambda device: False)
            patch.setattr(model_management, "device_supports_non_blocking", lambda device: True)
            queues.append(make(queue, device, options))
        assert queues[-1] == [None, *blocks, None]
        return queues[-1]

    def popped(queue, device, module, **options):
        ahead = None if module is None else blocks.index(module)
        assert queue[1] is module
        events.append(("fetch", ahead))
        pop(queue, device, module, **options)

    monkeypatch.setattr(model_prefetch, "make_prefetch_queue", made)
    monkeypatch.setattr(model_prefetch, "prefetch_queue_pop", popped)
    monkeypatch.setattr(type(model), "is_dynamic", lambda self: True, raising=False)
    handles = [
        block.register_forward_pre_hook(lambda block, inputs: events.append(("run", blocks.index(block))))
        for block in blocks
    ]
    try:
        assert torch.equal(expected, sampler(given, model))
    finally:
        for handle in handles:
            handle.remove()
        model_prefetch.cleanup_prefetch_queues()
    one = [event for i in range(len(blocks)) for event in (("fetch", i), ("run", i))] + [("fetch", None)]
    assert queues and events == one * len(queues) and all(queue == [None] for queue in queues)


@pytest.mark.parametrize("called", [torch.bfloat16, torch.float32])
def test_a_lora_is_added_once_to_fetched_weights(comfy, called):
    """ComfyUI adds it in place at each use of a layer, and the feed-forward uses its layers once for each piece."""
    from comfy import model_patcher, ops

    if not hasattr(ops, "resolve_cast_module_with_vbar"):
        pytest.skip("this ComfyUI does not prefetch")
    from comfy import memory_management

    layer = ops.disable_weight_init.Linear(8, 4, dtype=torch.bfloat16)
    with torch.no_grad():
        layer.weight.copy_(torch.arange(32).view(4, 8))
        layer.bias.fill_(1)
    added = torch.full((4, 8), 64.0, dtype=torch.bfloat16)
    layer.weight_lowvram_function = model_patcher.LowVramPatch("w", {"w": [(1.0, ("diff", (added,)), 1.0, None, None)]})
    parts, device = [layer.weight, layer.bias], torch.device("cpu")
    buffer = torch.zeros(memory_management.vram_aligned_size(parts), dtype=torch.uint8)
    for view, part in zip(memory_management.interpret_gathered_like(parts, buffer), parts, strict=True):
        view.copy_(part.detach())
    geometry = memory_management.tensors_to_geometries(parts)
    # As ComfyUI describes weights for which the card has no room to stay.
    layer._prefetch = {"signature": None, "resident": False, "needs_cast": False}
    layer._prefetch |= {"xfer_dest": buffer, "cast_dest": None, "cast_geometry": geometry}
    assert comfy.node("comfy_prefetch").patch_once(layer, device, called) == (called == torch.bfloat16)
    for _ in range(3):
        weight, bias = ops.resolve_cast_module_with_vbar(layer, called, device, called, None, False)
        assert torch.equal(weight, layer.weight.to(called) + added) and torch.equal(bias, layer.bias.to(called))


# --- guidance split over devices -------------------------------------------------------------------------------------


@pytest.fixture
def two_devices(monkeypatch) -> list[torch.device]:
    """Two devices: the one that ComfyUI runs on and the CPU, under another name if that is the CPU too."""
    import comfy.model_management

    if not hasattr(comfy.model_management, "get_all_torch_devices"):
        pytest.skip("this ComfyUI does not split guidance over devices")
    devices = [comfy.model_management.get_torch_device(), torch.device("cpu", 1) if ON_CPU else torch.device("cpu")]
    monkeypatch.setattr(comfy.model_management, "get_all_torch_devices", lambda exclude_current=False: list(devices))
    return devices


def split(model: Any) -> Any:
    from comfy.multigpu import create_multigpu_deepclones

    return create_multigpu_deepclones(model, 2)


@pytest.mark.parametrize("latent", ["empty", "image_latent", "clip_latent"])
def test_guidance_split_over_devices_equals_one_device(comfy, model, sampler, two_devices, request, latent):
    import threading

    given = request.getfixturevalue(latent)
    both = split(model)
    (clone,) = both.get_additional_models_with_key("multigpu")
    assert clone.load_device == two_devices[1] and clone.model is not model.model
    threads: dict[int, set[int]] = {}

    def override(attention, q, k, v, heads, **kwargs):
        options = kwargs["transformer_options"]
        threads.setdefault(threading.get_ident(), set()).add(options["block_index"])
        return attention(q, k, v, heads, **kwargs)

    depth = model.model.diffusion_model.config.depth
    for _ in range(2):
        assert difference(sampler(given, model), sampler(given, both)) <= 1e-4
    assert difference(sampler(given, model), sampler(given, with_options(both, **{OVERRIDE: override}))) <= 1e-4
    assert list(threads.values()) == [{*range(depth)}] * 2 and threading.get_ident() not in threads


def test_guidance_is_split_over_devices_rather_than_in_time(comfy, model, samplers, two_devices, empty, monkeypatch):
    import comfy.samplers as stock

    changed, batches = optimized(comfy, model, split_guidance=True), []
    whole = stock.calc_cond_batch

    def counted(model, conds, *args):
        batches.append(len(conds))
        return whole(model, conds, *args)

    monkeypatch.setattr(stock, "calc_cond_batch", counted)
    one = samplers["longcat"](empty, changed)
    assert batches == [1, 1] * 2
    batches.clear()
    assert difference(one, samplers["longcat"](empty, split(changed))) <= 1e-4 and batches == [2] * 2


def test_blocks_compile_on_several_devices_at_once(comfy, one_block, samplers, two_devices, empty):
    compiled = optimized(comfy, one_block, compile="blocks")
    assert difference(samplers["longcat"](empty, one_block), samplers["longcat"](empty, split(compiled))) <= 1e-3


@pytest.mark.parametrize("kind", ["stock", "shards", "fp8 rowwise", "LoRA"])
def test_a_model_of_every_loader_runs_on_other_devices(comfy, model, samplers, two_devices, empty, kind):
    """ComfyUI loads the model again for each device."""
    if kind == "stock":
        loaded = comfy("UNETLoader", unet_name=MODEL, weight_dtype="default")
    elif kind == "fp8 rowwise":
        loaded = comfy("LongCatModelLoader", model_name=MODEL, weight_dtype=kind)
        # CPUs do not multiply in 8 bits.
        loaded = optimized(comfy, loaded, fp8=False)
    elif kind == "shards":
        from safetensors.torch import load_file

        tensors = list(load_file(comfy.core("generate.paths").NANO_MODEL).items())
        for i, part in enumerate((tensors[::2], tensors[1::2])):
            comfy.save("diffusion_models", f"two/model-{i + 1:05}-of-00002.safetensors", dict(part))
        loaded = comfy("LongCatModelLoader", model_name="two", weight_dtype="fp32")
    else:
        loaded = model.clone()
        weight = model.model.diffusion_model.blocks[1].attn.proj.weight
        assert loaded.add_patches({"diffusion_model.blocks.1.attn.proj.weight": (torch.full(weight.shape, 0.05),)})
    one = samplers["longcat"](empty, loaded)
    assert difference(one, samplers["longcat"](empty, split(loaded))) <= 1e-4
    assert (difference(one, samplers["longcat"](empty, model)) > 1e-3) == (kind in ("fp8 rowwise", "LoRA"))
