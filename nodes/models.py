"""What nodes read of a MODEL, and how they set options on a clone of it."""

from __future__ import annotations

from typing import Any

import torch
from comfy.model_patcher import ModelPatcher

from ..longcat_core.errors import LongCatError
from ..longcat_core.optimize.execution import Execution
from ..longcat_core.optimize.switches import Optimizations
from ..longcat_core.sampling.schedules import is_newer
from .comfy_attention import Attention, preferences
from .comfy_model import LongCatVideo
from .comfy_network import OPTIMIZATIONS_KEY


def require_longcat(model: ModelPatcher, node: str) -> None:
    """Raise LongCatError in the name of `node` unless the MODEL is LongCat-Video."""
    if not isinstance(model.model, LongCatVideo):
        raise LongCatError(
            f"{node} got a {type(model.model).__name__} model; connect LongCat-Video, from LongCat Model Loader or "
            "Load Diffusion Model"
        )


def require_soundless(model: ModelPatcher, node: str) -> None:
    """Raise LongCatError in the name of `node` unless the MODEL is LongCat-Video, and not its avatar."""
    require_longcat(model, node)
    if model.model.network.config.audio is not None:
        raise LongCatError(f"{node} has no audio for LongCat-Video-Avatar; connect LongCat-Video")


def require_comparable(a: ModelPatcher, b: ModelPatcher, node: str) -> None:
    """Raise LongCatError in the name of `node` unless both MODELs are LongCat-Video, of one size."""
    for model in (a, b):
        require_longcat(model, node)
    if a.model.diffusion_model.config != b.model.diffusion_model.config:
        raise LongCatError(f"{node} got two models of different sizes as A and B; connect one model twice")


def distilled_notes(model: ModelPatcher, mode: str, guidance: float) -> list[str]:
    """What speaks against sampling in mode distilled like this, in sentences."""
    if mode != "distilled":
        return []
    notes = []
    if guidance != 1:
        notes.append(f"the distilled schedule is made for guidance 1, not {guidance:g}")
    if not model.patches and not model.injections:
        audio = model.model.network.config.audio
        name = "DMD" if audio is not None and is_newer(audio) else "cfg_step"
        notes.append(
            f"mode distilled needs the {name} LoRA, and the MODEL has no LoRA; connect LoraLoaderModelOnly, unless it "
            "is merged into the weights"
        )
    return notes


def until_notes(guidance: float, guidance_until: float) -> list[str]:
    """What speaks against leaving guidance out like this, in sentences."""
    return ["guidance_until has no effect at guidance 1"] if guidance == 1 and guidance_until < 1 else []


def options_of(model: ModelPatcher) -> dict[str, Any]:
    """The MODEL's transformer_options."""
    return model.model_options.get("transformer_options", {})


def with_option(model: ModelPatcher, key: str, value: Any) -> ModelPatcher:
    """A clone of the MODEL with one of its transformer_options set."""
    model = model.clone()
    model.model_options.setdefault("transformer_options", {})[key] = value
    return model


def switches_of(model: ModelPatcher) -> Optimizations:
    """The switches that LongCat Optimizations set on the MODEL, or the defaults."""
    return options_of(model).get(OPTIMIZATIONS_KEY, Optimizations())


def wrappers_of(model: ModelPatcher) -> list[str]:
    """The names under which nodes added wrappers to the MODEL, sorted."""
    return sorted(str(name) for kind in options_of(model).get("wrappers", {}).values() for name in kind)


def patches_of(model: ModelPatcher) -> list[str]:
    """Where nodes replaced or patched parts of the MODEL, by name, sorted."""
    options = options_of(model)
    replaced = [f"{kind} {block}" for kind, blocks in options.get("patches_replace", {}).items() for block in blocks]
    patched = [name for name, patches in options.get("patches", {}).items() if patches]
    other = ["attention"] if "optimized_attention_override" in options else []
    return sorted([*replaced, *patched, *other])


def preferences_of(model: ModelPatcher) -> list[Attention | None]:
    """The attention that the MODEL's checkpoint sets in each block, see `preferences`."""
    return preferences(model.model.network.blocks)


def compute_dtype(model: ModelPatcher) -> torch.dtype:
    """The dtype of the MODEL's activations."""
    return model.model.compute_dtype()


def execution_of(model: ModelPatcher) -> Execution:
    """How the MODEL runs under its own switches."""
    return model.model.network.execution(compute_dtype(model), options_of(model))
