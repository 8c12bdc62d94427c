"""What the input `speed` makes of a MODEL: a clone with the options of the word's set, for one sampling."""

from __future__ import annotations

from dataclasses import replace

from comfy.model_patcher import ModelPatcher

from ..longcat_core.generate.speed_fit import Loaded, check_speed, fit_request
from ..longcat_core.generate.speeds import EXACT, Speed, set_of
from ..longcat_core.optimize import attention
from ..longcat_core.optimize.requirement import Inputs
from . import comfy_fp8
from .comfy_attention import attention_by_comfyui
from .comfy_network import BLOCK_SPARSE_KEY, OPTIMIZATIONS_KEY, SPARSE_KEY, quantizes_input
from .models import compute_dtype, options_of, preferences_of, switches_of, with_option
from .step_cache import THRESHOLD_KEY, with_step_cache


def with_speed(
    model: ModelPatcher, speed: Speed, *, mode: str, guidance: float, guidance_until: float, tokens: int
) -> tuple[ModelPatcher, float, list[str]]:
    """The MODEL under a word, the share of the steps with guidance, and a note of one sentence, or none.

    Nodes in front of it win over the word's set, and so does a `guidance_until` below 1. tokens: to generate. The MODEL
    itself does not change. Raises LongCatError for an unknown word.
    """
    check_speed(speed)
    if speed == EXACT:
        return model, guidance_until, []
    avatar = model.model.diffusion_model.config.audio is not None
    options, loaded = options_of(model), _loaded(model, set_of(speed, mode, avatar).attention)
    given = {
        "sparse": SPARSE_KEY in options or options.get(BLOCK_SPARSE_KEY) is not None,
        "step_cache": THRESHOLD_KEY in options,
        "guidance_until": guidance_until < 1,
    }
    chosen = fit_request(
        speed,
        [name for name, there in given.items() if there],
        schedule=mode,
        guided=guidance != 1,
        tokens=tokens,
        kernel="auto",
        loaded=loaded,
        avatar=avatar,
    )
    values = chosen.values
    switches = switches_of(model)
    if loaded.attention != switches.attention:
        model = with_option(model, OPTIMIZATIONS_KEY, replace(switches, attention=loaded.attention))
    if values.get("sparse") is not None:
        model = with_option(model, SPARSE_KEY, values["sparse"])
    if values.get("step_cache"):
        model = with_step_cache(model, values["step_cache"])
    return model, values.get("guidance_until", guidance_until), chosen.notes()


def _loaded(model: ModelPatcher, wanted: str) -> Loaded:
    """How the MODEL is loaded, and with the `wanted` attention if that can be had."""
    network, switches, reasons = model.model.diffusion_model, switches_of(model), {}
    inputs = Inputs(model.load_device, compute_dtype(model), network.config.head_dim, False)
    given = [] if switches.attention == "auto" else ["attention"]
    layers = bool(comfy_fp8.layers(network))
    if layers and not switches.fp8:
        given.append("fp8")
    elif any(quantizes_input(layer) for layer in network.blocks[0].modules()):
        reasons["fp8"] = "ComfyUI multiplies the MODEL's quantized weights its own way"
    else:
        reasons["fp8"] = "the MODEL was loaded without it; choose weight_dtype fp8 rowwise in LongCat Model Loader"
    name = switches.attention
    if name == "auto" != wanted:
        other = attention_by_comfyui(switches, options_of(model), preferences_of(model))
        reasons["attention"] = f"{other} decides" if other else attention.why_not(wanted, inputs)
        name = name if reasons["attention"] else wanted
    return Loaded(inputs, layers and switches.fp8, name, tuple(given), reasons)
