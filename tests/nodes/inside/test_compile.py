"""TorchCompileModel and other nodes that compile a MODEL: one graph of a block serves all 48. Graphs are counted."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

from ...support.quantized_files import quantized
from .conftest import MODEL
from .golden_avatar import Avatar, close
from .test_lora import DOT, official

BLOCKS = 48
SETTINGS = {"seed": 1, "steps": 1, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}


def error(one: torch.Tensor, two: torch.Tensor) -> float:
    return float((one - two).abs().max() / one.std())


@pytest.fixture(autouse=True)
def _clean(comfy) -> Iterator[None]:
    from comfy import model_management

    torch._dynamo.reset()
    counters.clear()
    yield
    # Object patches stay for as long as a model is loaded.
    model_management.unload_all_models()
    torch._dynamo.reset()
    comfy.node("comfy_compile")._blocks.clear()


@pytest.fixture(scope="session")
def tall(comfy):
    """A network as deep as the released one, of the embedded model's blocks again and again."""
    from safetensors.torch import load_file

    tensors = load_file(comfy.core("generate.paths").NANO_MODEL)
    blocks = {name: tensor for name, tensor in tensors.items() if name.startswith("blocks.")}
    tall = {name: tensor for name, tensor in tensors.items() if name not in blocks}
    count = len({name.split(".")[1] for name in blocks})
    for i in range(BLOCKS):
        own = f"blocks.{i % count}."
        tall |= {f"blocks.{i}.{k.removeprefix(own)}": t.clone() for k, t in blocks.items() if k.startswith(own)}
    name = comfy.save("diffusion_models", "tall.safetensors", tall)
    loaded = comfy("LongCatModelLoader", model_name=name, weight_dtype="fp32")
    assert len(loaded.model.diffusion_model.blocks) == BLOCKS
    return loaded


@pytest.fixture(scope="session")
def ksample(comfy, prompts):
    def run(model: Any, grid: tuple[int, int, int] = (2, 4, 6), cfg: float = 1.0, **values: Any) -> torch.Tensor:
        latent = {"samples": torch.zeros(1, 16, *grid)}
        return comfy("KSampler", model=model, **{"latent_image": latent, "cfg": cfg, **prompts, **SETTINGS, **values})[
            "samples"
        ]

    return run


class Compiled:
    """A MODEL that a node compiles with a backend that counts graphs."""

    def __init__(self, model: Any, backend: Any = "eager", **settings: Any) -> None:
        from comfy_api.torch_helpers import set_torch_compile_wrapper

        self.counter = CompileCounterWithBackend(backend) if isinstance(backend, str) else backend
        self.model = model.clone()
        set_torch_compile_wrapper(self.model, backend=self.counter, **settings)

    @property
    def graphs(self) -> int:
        assert not counters["graph_break"]
        return self.counter.frame_count


def whole(model: Any, backend: Any = "eager", **settings: Any) -> Compiled:
    """As TorchCompileModel does."""
    return Compiled(model, backend, **settings)


def block_by_block(model: Any, **settings: Any) -> Compiled:
    """As nodes of other packs do: a compiled module for each block."""
    keys = [f"diffusion_model.blocks.{i}" for i in range(len(model.model.diffusion_model.blocks))]
    return Compiled(model, keys=keys, **settings)


def as_object_patches(model: Any, **settings: Any) -> Compiled:
    """The same as patches that stay for as long as the model is loaded."""
    compiled = Compiled(model)
    compiled.model = model.clone()
    for i, block in enumerate(model.model.diffusion_model.blocks):
        module = torch.compile(block, backend=compiled.counter, **settings)
        compiled.model.add_object_patch(f"diffusion_model.blocks.{i}", module)
    return compiled


WAYS = pytest.mark.parametrize("way", [whole, block_by_block, as_object_patches])


@WAYS
def test_graphs_for_sizes_and_guidance_are_those_of_our_own_compile(tall, ksample, way):
    compiled = way(tall)
    runs = [{"steps": 2}, {"cfg": 4.0}, {}, {"grid": (3, 6, 8)}, {"grid": (4, 4, 4)}, {"cfg": 4.0, "grid": (3, 6, 8)}]
    counts = []
    for run in runs:
        assert error(ksample(tall, **run), ksample(compiled.model, **run)) <= 1e-4
        counts.append(compiled.graphs)
    assert counts == [1, 2, 2, 3, 3, 4], "one for each kind of input, and one for all its later sizes"


def test_an_avatar(comfy):
    avatar = Avatar(comfy, "v1_5")
    compiled, audio = Compiled(avatar.model), avatar.audio()
    got = avatar.sampled(avatar.conds(audio), avatar.latent(), compiled.model, steps=3)
    assert close(got, avatar.expected(audio, steps=3))
    assert compiled.graphs == 1


@pytest.mark.parametrize("settings", [{"fullgraph": True}, {"dynamic": False}, {"dynamic": True}], ids=str)
def test_settings_of_the_node(model, ksample, settings):
    compiled = whole(model, **settings)
    for grid in ((2, 4, 6), (3, 6, 8), (4, 4, 4)):
        assert error(ksample(model, grid), ksample(compiled.model, grid)) <= 1e-4
    assert compiled.graphs == (1 if settings.get("dynamic") else 2)


def test_given_frames_and_their_cache(model, sample, clip_latent):
    compiled = whole(model)
    for options, graphs in (({}, 1), ({"kv_cache": "off"}, 2), ({}, 2)):
        assert error(sample(clip_latent, model, **options), sample(clip_latent, compiled.model, **options)) <= 1e-3
        assert compiled.graphs == graphs


def test_a_node_that_runs_again_adds_no_graphs(comfy, model, ksample):
    """It does when something before it changes; equal settings know the sizes that were met."""
    first = whole(model)
    again = whole(model, backend=first.counter)
    for grid, patched, graphs in (((2, 4, 6), first, 1), ((3, 6, 8), again, 2), ((4, 4, 4), first, 2)):
        ksample(patched.model, grid)
        assert first.graphs == graphs
    assert len(comfy.node("comfy_compile")._blocks) == 1
    ksample(whole(model, backend=first.counter, fullgraph=True).model)
    assert len(comfy.node("comfy_compile")._blocks) == 2, "other settings are another compiler"


@pytest.mark.parametrize("node", ["LoraLoaderModelOnly", "LoraLoaderBypassModelOnly"])
def test_lora(comfy, tall, ksample, node):
    """On all blocks alike, which share one graph."""
    first = official(comfy, {"blocks.0.attn.qkv": 3, "blocks.0.ffn.w2": 1})
    tensors = {
        name.replace(f"blocks{DOT}0", f"blocks{DOT}{i}"): tensor.clone()
        for i in range(BLOCKS)
        for name, tensor in first.items()
    }
    lora = comfy.save("loras", "everywhere.safetensors", tensors)
    patched = comfy(node, model=tall, lora_name=lora, strength_model=0.5)
    expected = ksample(patched)
    assert error(ksample(tall), expected) > 1e-2
    compiled = whole(patched)
    assert error(expected, ksample(compiled.model)) <= 1e-4
    assert compiled.graphs == 1


@pytest.mark.parametrize("kind", ["fp8_e4m3fn", "fp8 rowwise"])
def test_eight_bit_weights(comfy, sample, empty, kind):
    loaded = comfy("LongCatModelLoader", model_name=MODEL, weight_dtype=kind)
    compiled = whole(loaded)
    assert error(sample(empty, loaded, steps=1), sample(empty, compiled.model, steps=1)) <= 1e-3
    assert compiled.graphs == 1


@pytest.mark.parametrize("form", ["int8 convrot", "nvfp4"])
def test_layers_that_comfyui_quantizes(comfy, sample, empty, form):
    from safetensors.torch import load_file

    state, metadata = quantized(load_file(comfy.core("generate.paths").NANO_MODEL), form)
    file = comfy.save("diffusion_models", "quantized.safetensors", state, metadata)
    loaded = comfy("UNETLoader", unet_name=file, weight_dtype="default")
    compiled = whole(loaded)
    assert error(sample(empty, loaded, steps=1), sample(empty, compiled.model, steps=1)) <= 1e-3
    assert compiled.graphs == 1


def test_our_own_switches(comfy, model, sample, empty):
    """Those that ask for compiling too do not compile a second time."""
    own = comfy.core("optimize.compiled_blocks").COMPILED_BLOCK
    switched, _ = comfy("LongCatOptimizations", model=model, compile="blocks", text_mode="padded")
    compiled = whole(switched)
    expected = comfy("LongCatOptimizations", model=model, compile="off", text_mode="padded")[0]
    known = dict(own._first)
    assert error(sample(empty, expected, steps=1), sample(empty, compiled.model, steps=1)) <= 1e-4
    assert compiled.graphs == 1 and own._first == known
    sparse = whole(comfy("LongCatBlockSparseAttention", model=model, sparsity=0.5))
    plain = comfy("LongCatBlockSparseAttention", model=model, sparsity=0.5)
    assert error(sample(empty, plain, steps=1), sample(empty, sparse.model, steps=1)) <= 1e-3
    assert sparse.graphs == 1


def test_one_graph_for_dense_and_sparse_steps(comfy, model, sample):
    latent = {"samples": torch.zeros(1, 16, 4, 32, 32)}
    sparse = comfy("LongCatSparseAttention", model=model, density=0.2, dense_steps=0.5)
    expected = sample(latent, sparse, steps=2)
    assert error(sample(latent, model, steps=2), expected) > 1e-3
    compiled = whole(sparse)
    assert error(expected, sample(latent, compiled.model, steps=2)) <= 1e-3
    assert compiled.graphs == 1


def test_hooks_stay_outside_of_the_graph(comfy, model, ksample):
    """Replaced blocks and step caches, which are other packs' Python."""
    seen = []

    def replacement(args, extra):
        seen.append(args["img"].shape)
        return extra["original_block"](args)

    patched = model.clone()
    patched.set_model_patch_replace(replacement, "dit", "double_block", 1)
    options = {"reuse_threshold": 0.3, "start_percent": 0.15, "end_percent": 1.0, "verbose": False}
    for case in (patched, comfy("EasyCache", model=model, **options)):
        compiled = whole(case)
        assert error(ksample(case, steps=8), ksample(compiled.model, steps=8)) <= 1e-3
        assert compiled.graphs == 1
    assert len(seen) == 16


def test_backends_that_record_cuda_graphs(comfy, one_block, ksample):
    """The next block overwrites such a backend's output, so that it is copied."""
    patched = comfy("TorchCompileModel", model=one_block, backend="cudagraphs")
    assert error(ksample(one_block), ksample(patched)) <= 1e-3
    ((_, block),) = comfy.node("comfy_compile")._blocks
    assert block.copied


def test_generated_code(comfy, one_block, ksample):
    """The node itself, with PyTorch's code generator."""
    patched = comfy("TorchCompileModel", model=one_block, backend="inductor")
    assert error(ksample(one_block), ksample(patched)) <= 1e-3
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    ((_, block),) = comfy.node("comfy_compile")._blocks
    assert not block.copied and not block._failed


def test_training(comfy, model, prompts, image_latent):
    fields = comfy.mappings["TrainLoraNode"].define_schema().inputs
    settings = {field.id: [field.default] for field in fields if getattr(field, "default", None) is not None}
    settings |= {"training_dtype": ["fp32"], "lora_dtype": ["fp32"], "steps": [2], "learning_rate": [0.01]}
    losses = []
    for case in (model, whole(model, "aot_eager").model):
        out = comfy("TrainLoraNode", model=[case], latents=[image_latent], positive=[prompts["positive"]], **settings)
        losses.append(out[-2]["loss"])
    assert losses[1] == pytest.approx(losses[0], rel=0.05), "the weights of the copy that is trained"


def test_dense_and_sparse_steps_of_all_layers_share_a_graph(comfy, model, ksample):
    sparse = comfy("LongCatSparseAttention", model=model, density=0.2, dense_steps=0.5)
    compiled = whole(sparse)
    for guidance, graphs in ((1.0, 1), (4.0, 2)):
        values = {"steps": 2, "grid": (4, 32, 32), "cfg": guidance}
        assert error(ksample(sparse, **values), ksample(compiled.model, **values)) <= 1e-3
        assert compiled.graphs == graphs
