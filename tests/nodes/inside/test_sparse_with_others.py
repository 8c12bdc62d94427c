"""LongCat Sparse Attention beside what else a graph may have: a run equals one whose tokens keep the order of frames,
so no other node can have seen, kept or mixed permuted ones."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch

from .conftest import MODEL, ROUNDING
from .test_lora import STRENGTH, official

# 16x16 tokens a frame; four noisy frames are just enough to be sparse.
SIDE = 256
SETTINGS = {"density": 0.2, "dense_steps": 0.5}
STEPS = 2
LORA = {"lora_name": "beside_sparse.safetensors", "strength_model": STRENGTH}
WINDOWS = {"context_length": 4, "context_overlap": 1, "context_schedule": "standard_static", "context_stride": 1,
           "closed_loop": False, "fuse_method": "pyramid", "dim": 2, "freenoise": False}  # fmt: skip
SKIPPED = {"double_layers": "2", "single_layers": "", "scale": 3.0, "start_percent": 0.0, "end_percent": 1.0,
           "rescaling_scale": 0.0}  # fmt: skip


class Case(NamedTuple):
    """before, behind: nodes on the MODEL on both sides of LongCat Sparse Attention."""

    before: tuple[str, dict] | None = None
    behind: tuple[str, dict] | None = None
    latent: str = "text"
    how: str = "LongCatSampler"
    weights: str = "fp32"


CASES = {
    "SamplerCustomAdvanced": Case(how="SamplerCustomAdvanced"),
    "merged LoRA": Case(before=("LoraLoaderModelOnly", LORA)),
    "bypassed LoRA": Case(behind=("LoraLoaderBypassModelOnly", LORA)),
    "fp8, split guidance": Case(before=("LongCatOptimizations", {"split_guidance": True}), weights="fp8_e4m3fn"),
    "context windows": Case(behind=("ContextWindowsManual", WINDOWS), latent="long", how="KSampler"),
    "skipped layers": Case(behind=("SkipLayerGuidanceDiT", SKIPPED), how="KSampler"),
    "continuation, KV cache": Case(latent="clip"),
}


def difference(one: torch.Tensor, two: torch.Tensor) -> float:
    return float((one - two).abs().max() / one.std())


@pytest.fixture(scope="module")
def loaded(comfy, model) -> dict[str, Any]:
    comfy.save("loras", LORA["lora_name"], official(comfy))
    kind = "fp8_e4m3fn"
    return {"fp32": model, kind: comfy("LongCatModelLoader", model_name=MODEL, weight_dtype=kind)}


@pytest.fixture(scope="module")
def run(comfy, prompts, vae, frames):
    """Samples of a MODEL by one of the samplers."""

    def latent(kind: str) -> dict[str, Any]:
        size = {"width": SIDE, "height": SIDE}
        if kind == "clip":
            given = {"video": frames, "cond_frames": 5, "length": 21, "resolution": "custom"}
            return comfy("LongCatVideoContinuation", vae=vae, **given, **size)
        return comfy("EmptyHunyuanLatentVideo", **size, length={"text": 13, "long": 25}[kind], batch_size=1)

    def sampled(model: Any, kind: str = "text", how: str = "LongCatSampler") -> torch.Tensor:
        inputs = {"model": model, "latent_image": latent(kind), "seed": 1, "steps": STEPS, **prompts}
        if how == "KSampler":
            return comfy(how, **inputs, sampler_name="euler", scheduler="simple", denoise=1.0, cfg=4.0)["samples"]
        if how == "LongCatSampler":
            return comfy(how, **inputs, mode="base", guidance=4.0)["samples"]
        out, _ = comfy(
            how, noise=comfy("RandomNoise", noise_seed=1), latent_image=inputs["latent_image"],
            guider=comfy("LongCatGuider", model=model, **prompts, guidance=4.0),
            sampler=comfy("KSamplerSelect", sampler_name="euler"),
            sigmas=comfy("LongCatScheduler", model=model, mode="base", steps=STEPS),
        )  # fmt: skip
        return out["samples"]

    return sampled


@pytest.fixture
def attended(comfy, monkeypatch) -> list[int]:
    """The layer of every sparse call."""
    passes, seen = comfy.core("optimize.sparse.passes"), []
    attend = passes.SparsePass.attend

    def recorded(self, q, k, v):
        if k.shape[1] == self.keys:
            seen.append(self.layer)
        return attend(self, q, k, v)

    monkeypatch.setattr(passes.SparsePass, "attend", recorded)
    return seen


@pytest.fixture
def in_frame_order(comfy, monkeypatch):
    """Called, it lets only the attention itself see permuted tokens from then on."""
    choice, layouts = comfy.core("optimize.layouts"), comfy.core("optimize.sparse.layout")
    with_attend = choice.with_attend
    orders: list[torch.Tensor] = []

    class Kept(comfy.core("model.transformer").FrameLayout):
        def __init__(self, grid, cond_frames, device, *_) -> None:
            orders.append(layouts.sparse_order(grid, cond_frames, device)[0])

    def around(kernels, attend, layout):
        # The layout is made first.
        order, keys = orders[-1], attend.__self__.keys
        before = keys - len(order)

        def permuted(q, k, v):
            if k.shape[1] != keys:
                return attend(q, k, v)
            every = torch.cat((torch.arange(before, device=q.device), before + order))
            own = every[keys - q.shape[1] :] - (keys - q.shape[1])
            out = attend(q[:, own], k[:, every], v[:, every])
            return torch.empty_like(out).index_copy_(1, own, out)

        return with_attend(kernels, permuted)

    def switch() -> None:
        monkeypatch.setattr(choice, "SparseLayout", Kept)
        monkeypatch.setattr(choice, "with_attend", around)

    return switch


@pytest.mark.parametrize("name", CASES)
def test_equals_a_run_in_the_order_of_frames(comfy, loaded, run, attended, in_frame_order, name):
    case = CASES[name]
    used = loaded[case.weights]
    for node, inputs in filter(None, (case.before, ("LongCatSparseAttention", SETTINGS), case.behind)):
        out = comfy(node, model=used, **inputs)
        used = out[0] if isinstance(out, tuple) else out
    got = run(used, case.latent, case.how)
    layers = list(attended)
    assert set(layers) == set(range(len(used.model.network.blocks)))
    in_frame_order()
    expected = run(used, case.latent, case.how)
    assert attended[len(layers) :] == layers
    assert difference(expected, got) <= 1e-3 * ROUNDING


def test_patches_know_the_number_of_each_block(comfy, model, run, attended):
    numbers = []

    def patch(values):
        numbers.append((values["block_index"], values["transformer_options"]["block_index"]))
        return {}

    sparse = comfy("LongCatSparseAttention", model=model, density=0.2, dense_steps=0.0)
    sparse.set_model_patch(patch, "double_block")
    run(sparse)
    assert attended == [*range(len(model.model.network.blocks))] * STEPS
    assert numbers == [(layer, layer) for layer in attended]


def test_a_long_video_takes_it_from_the_model(comfy, model, clip, vae, attended):
    """Also its second segment, which has cached frames."""
    sparse = comfy("LongCatSparseAttention", model=model, density=0.2, dense_steps=0.0)
    inputs = {"clip": clip, "vae": vae, "prompts": "a red circle moves right", "segments": 2, "folder": "sparse/long",
              "width": SIDE, "height": SIDE, "length": 21, "overlap": 5, "seed": 3, "steps": 1, "guidance": 1.0,
              "mode": "base", "negative_prompt": ""}  # fmt: skip
    comfy("LongCatLongVideo", model=sparse, **inputs)
    assert attended == [*range(len(model.model.network.blocks))] * 2
