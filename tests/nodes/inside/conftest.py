"""A ComfyUI process with the pack loaded the way ComfyUI loads it, and its nodes called directly.

On the CPU, unless LONGCAT_TESTS_DEVICE says cuda, as `make test-gpu` does. Everything is in fp32 then too, so that the
same assertions hold; what 16 and 8 bits give on CUDA is in the matrix of tests/gpu.
"""

from __future__ import annotations

import asyncio
import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from ..checkout import INSIDE, PACK
from . import cases

MODEL, VAE = "longcat_nano_bf16.safetensors", "longcat_nano_vae_bf16.safetensors"
TEXT_ENCODER = "longcat_nano_umt5_bf16.safetensors"
EXTRAS = (
    "nodes_custom_sampler",
    "nodes_model_advanced",
    "nodes_model_merging",
    "nodes_cfg",
    "nodes_easycache",
    "nodes_context_windows",
    "nodes_slg",
    "nodes_torch_compile",
    "nodes_video",
    "nodes_images",
    "nodes_hunyuan",
    "nodes_lora_debug",
    "nodes_train",
)

ON_CPU = os.environ.get("LONGCAT_TESTS_DEVICE", "cpu") == "cpu"
# CUDA adds in other orders than the headless CPU that it is compared with: tolerances of a rounding are as many times.
ROUNDING = 1 if ON_CPU else 20
_SPEAKS_OF_CPU = "speaks of a machine without a GPU"
_CPU_TENSORS = "hands CPU tensors to a model that is on the GPU"
# Test -> why it is left out on CUDA.
CPU_ONLY = {
    "test_a_against_everything_off": _SPEAKS_OF_CPU,
    "test_turns_follow_what_switching_costs": _SPEAKS_OF_CPU,
    "test_the_switch_and_what_is_said_of_it": _SPEAKS_OF_CPU,
    "test_one_input_for_each_optimization": _SPEAKS_OF_CPU,
    "test_compile_without_a_compiler_is_said": _SPEAKS_OF_CPU,
    "test_settings_of_segments_that_nodes_write": "compares with settings that a CPU wrote",
    "test_memory_stays_flat_for_200_segments": "counts the process's own memory, which CUDA's libraries fill",
    "test_loading_is_quiet_and_light": "on CUDA PyTorch imports Triton",
    "test_equals_the_headless_network": "native products in 8 bits round the activations",
    "test_progress_and_a_moving_preview": _CPU_TENSORS,
    "test_equals_the_headless_refinement": _CPU_TENSORS,
    "test_weights_that_stay_in_ram_are_patched_at_use": "forces on a CPU what CUDA does by itself",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if not ON_CPU and (why := CPU_ONLY.get(getattr(item, "originalname", item.name))):
            item.add_marker(pytest.mark.skip(reason=why))


class Comfy:
    """ComfyUI's nodes by their ids, and its folders."""

    def __init__(self, nodes: ModuleType, pack: str, folder: Path) -> None:
        self.mappings, self.pack, self.folder = nodes.NODE_CLASS_MAPPINGS, pack, folder

    def core(self, name: str) -> ModuleType:
        """A module of longcat_core as the pack has it."""
        return importlib.import_module(f"{self.pack}.longcat_core.{name}")

    def node(self, name: str) -> ModuleType:
        """A module of the pack's nodes."""
        return importlib.import_module(f"{self.pack}.nodes.{name}")

    def __call__(self, node: str, **inputs: Any) -> Any:
        """Run a node as ComfyUI does, in inference mode; its one output, or the tuple of them."""
        import torch

        with torch.inference_mode():
            return self._run(node, **inputs)

    def _run(self, node: str, **inputs: Any) -> Any:
        if node not in self.mappings:
            pytest.skip(f"this ComfyUI has no {node}")
        kind = self.mappings[node]
        if hasattr(kind, "PREPARE_CLASS_CLONE"):
            kind = kind.PREPARE_CLASS_CLONE({"hidden_inputs": {}} if version() >= (0, 9) else None)
            # As the user interface does: a widget that is not touched sends its default.
            widgets = {field.id: getattr(field, "default", None) for field in kind.define_schema().inputs}
            inputs = {name: value for name, value in widgets.items() if value is not None} | inputs
            out = kind.EXECUTE_NORMALIZED(**inputs)
            values = getattr(out, "result", out)
        else:
            values = getattr(kind(), kind.FUNCTION)(**inputs)
        if isinstance(values, dict):
            values = values.get("result")
        return values[0] if values is not None and len(values) == 1 else values

    def save(self, kind: str, name: str, tensors: dict, metadata: dict | None = None) -> str:
        """Write a safetensors file into one of the model folders; its name."""
        from safetensors.torch import save_file

        path = self.folder / "models" / kind / name
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, path, metadata)
        return name


def version() -> tuple[int, ...]:
    import comfyui_version

    return tuple(int(part) for part in comfyui_version.__version__.split(".")[:2])


def _load(folder: Path) -> Comfy:
    checkout = os.environ["COMFYUI_PATH"]
    sys.path.insert(0, checkout)
    import comfy.cli_args

    comfy.cli_args.args.cpu = ON_CPU
    if not ON_CPU:
        import torch

        for option in ("fp32_unet", "fp32_vae", "fp32_text_enc"):
            setattr(comfy.cli_args.args, option, True)
        # Else cuDNN rounds what the VAE's convolutions multiply to 10 bits.
        torch.backends.cudnn.allow_tf32 = False
    # First, as main.py does: ComfyUI before 0.9 puts its folder comfy, with a utils.py, on the path later on.
    import folder_paths
    import utils.extra_config  # noqa: F401

    for kind in ("diffusion_models", "text_encoders", "loras", "vae", "audio_encoders"):
        (folder / "models" / kind).mkdir(parents=True)
        folder_paths.folder_names_and_paths[kind] = ([str(folder / "models" / kind)], {".safetensors"})
    # A checkout of ComfyUI has it.
    (folder / "output").mkdir()
    folder_paths.set_output_directory(str(folder / "output"))
    folder_paths.set_temp_directory(str(folder / "temp"))
    import nodes

    link = folder / "custom_nodes" / "longcat-video"
    link.parent.mkdir()
    link.symlink_to(PACK, target_is_directory=True)

    async def load() -> None:
        for name in EXTRAS:
            path = Path(checkout, "comfy_extras", f"{name}.py")
            if path.is_file():
                assert await nodes.load_custom_node(str(path), module_parent="comfy_extras"), name
        assert await nodes.load_custom_node(str(link))

    asyncio.run(load())
    return Comfy(nodes, str(link), folder)


@pytest.fixture(scope="session")
def comfy(tmp_path_factory) -> Comfy:
    assert os.environ.get(INSIDE)
    return _load(tmp_path_factory.mktemp("comfyui"))


@pytest.fixture(scope="session")
def model(comfy):
    return comfy("LongCatModelLoader", model_name=MODEL, weight_dtype="fp32")


@pytest.fixture(scope="session")
def one_block(comfy):
    """The embedded model's first block alone, for compilation: that takes ten seconds a block on two cores."""
    from safetensors.torch import load_file

    tensors = load_file(comfy.core("generate.paths").NANO_MODEL)
    kept = {name: tensor for name, tensor in tensors.items() if name.startswith("blocks.0.") or "blocks" not in name}
    name = comfy.save("diffusion_models", "one_block.safetensors", kept)
    return comfy("LongCatModelLoader", model_name=name, weight_dtype="fp32")


@pytest.fixture(scope="session")
def clip(comfy):
    return comfy("LongCatTextEncoderLoader", text_encoder_name=TEXT_ENCODER, device="default")


@pytest.fixture(scope="session")
def vae(comfy):
    return comfy("VAELoader", vae_name=VAE)


@pytest.fixture(scope="session")
def prompts(comfy, clip) -> dict[str, Any]:
    return {
        "positive": comfy("CLIPTextEncode", clip=clip, text=cases.PROMPT),
        "negative": comfy("CLIPTextEncode", clip=clip, text=cases.NEGATIVE),
    }


@pytest.fixture
def empty() -> dict[str, Any]:
    """An empty latent of the embedded model's size, as stock nodes make it."""
    import torch

    return {"samples": torch.zeros(1, 16, 1 + (cases.FRAMES - 1) // 4, cases.HEIGHT // 8, cases.WIDTH // 8)}


@pytest.fixture(scope="session")
def frames() -> Any:
    """The given clip as ComfyUI's IMAGE: [F, H, W, 3] in 0..1."""
    import torch

    return torch.from_numpy(cases.clip()).float() / 255


@pytest.fixture(scope="session")
def image_latent(comfy, vae, frames) -> dict[str, Any]:
    size = {"width": cases.WIDTH, "height": cases.HEIGHT, "length": cases.FRAMES}
    return comfy("LongCatImageToVideo", vae=vae, image=frames[:1], resolution="custom", **size)


@pytest.fixture(scope="session")
def clip_latent(comfy, vae, frames) -> dict[str, Any]:
    size = {"width": cases.WIDTH, "height": cases.HEIGHT, "length": cases.FRAMES}
    given = {"video": frames, "cond_frames": cases.COND_FRAMES}
    return comfy("LongCatVideoContinuation", vae=vae, resolution="custom", **given, **size)


@pytest.fixture(scope="session")
def sample(comfy, model, prompts) -> Callable[..., Any]:
    """LongCat Sampler on a latent with few steps; its samples."""

    def run(latent: dict, model: Any = model, **values: Any) -> Any:
        settings = {"seed": 1, "steps": 3, "guidance": 4.0, "mode": "base"} | values
        return comfy("LongCatSampler", model=model, latent_image=latent, **prompts, **settings)["samples"]

    return run


@pytest.fixture(scope="session")
def network(comfy):
    """The same weights in the headless network."""
    load = comfy.core("checkpoints.load")
    return load.load_transformer(comfy.core("generate.paths").NANO_MODEL)


@pytest.fixture(scope="session")
def headless(tmp_path_factory) -> dict[str, Any]:
    """`prompt`, encoded, and latents of every case by the headless pipeline, in a Python that has its extras."""
    from safetensors.torch import load_file

    output = tmp_path_factory.mktemp("headless") / "latents.safetensors"
    here = Path(__file__).parent
    python = os.environ.get("LONGCAT_PYTHON", sys.executable)
    command = [python, here / "reference.py", PACK, here / "cases.py", output]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, f"{python} must have the headless extras installed: {run.stderr[-2000:]}"
    return load_file(output)


@pytest.fixture
def forwards(model, monkeypatch) -> list[tuple[int, ...]]:
    """The latents' shapes of every pass through the network while the test runs."""
    network = type(model.model.diffusion_model).__mro__[1]
    passes: list[tuple[int, ...]] = []
    original = network.forward

    def forward(self, x, *args, **kwargs):
        passes.append(tuple(x.shape))
        return original(self, x, *args, **kwargs)

    monkeypatch.setattr(network, "forward", forward)
    return passes
