"""LongCat Fidelity: how much a setting changes the video. Samples two MODELs at one seed, and the noise floor."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.utils
import numpy as np
import torch
from comfy_api.latest import io, ui
from torch import Tensor

from ..longcat_core.errors import LongCatError
from ..longcat_core.measure import fidelity as core
from ..longcat_core.measure.charts import fidelity_plot, side_by_side
from ..longcat_core.measure.fidelity import FLOOR, REFERENCE, Setting
from ..longcat_core.optimize.attention import Inputs
from ..longcat_core.sampling.conditioning import video_frames
from ..longcat_core.sampling.schedules import make_schedule
from .comfy_attention import chosen
from .comfy_model import BLOCK_SPARSE_KEY, OPTIMIZATIONS_KEY
from .conditioning import require_wan_vae, to_bytes, to_image
from .inputs import schema
from .sampling import (
    Clock,
    given_frames,
    require_longcat,
    sample_latent,
    starting_latents,
    switches_of,
)
from .step_cache import THRESHOLD_KEY

NODE = "LongCat Fidelity"
TIMED = "steps after the first"


def _dtype(model: comfy.model_patcher.ModelPatcher) -> torch.dtype:
    return model.model.manual_cast_dtype or model.model.get_dtype()


def with_attention(model: comfy.model_patcher.ModelPatcher, name: str) -> comfy.model_patcher.ModelPatcher:
    """A clone of the MODEL with another attention kernel."""
    switches = replace(switches_of(model), attention=name)
    model = model.clone()
    model.model_options.setdefault("transformer_options", {})[OPTIMIZATIONS_KEY] = switches
    return model


def floor_kernel(model: comfy.model_patcher.ModelPatcher) -> str:
    """An exact kernel other than the MODEL's own. Raises LongCatError with the reason if there is none."""
    switches, options = switches_of(model), model.model_options.get("transformer_options", {})
    if other := chosen(switches, options):
        raise LongCatError(f"{other} chooses A's attention, which may not be exact; remove it to get a noise floor")
    config = model.model.diffusion_model.config
    return core.other_kernel(switches.attention, Inputs(model.load_device, _dtype(model), config.head_dim, False))


def _settings(model: comfy.model_patcher.ModelPatcher) -> dict[str, Any]:
    """Everything about a MODEL that can change its video."""
    options = model.model_options.get("transformer_options", {})
    wrappers = {str(name) for kind in options.get("wrappers", {}).values() for name in kind} - {THRESHOLD_KEY}
    return asdict(switches_of(model)) | {
        "step cache": options.get(THRESHOLD_KEY, 0),
        "block-sparse": getattr(options.get(BLOCK_SPARSE_KEY), "sparsity", 0),
        "dtype": str(_dtype(model)).removeprefix("torch."),
        "patched weights": len(model.patches),
        "other nodes": ", ".join(sorted(wrappers)) or "none",
    }


def differences(model: comfy.model_patcher.ModelPatcher, other: comfy.model_patcher.ModelPatcher) -> str:
    """How `other` differs from `model`, in words; "" if no difference is visible."""
    one, two = _settings(model), _settings(other)
    words = {True: "on", False: "off"}
    shown = {name: words[value] if isinstance(value, bool) else value for name, value in two.items()}
    return ", ".join(f"{name} {shown[name]}" for name in two if two[name] != one[name])


class Fidelity(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema("LongCatFidelity")

    @classmethod
    def execute(
        cls,
        model,
        model_b,
        vae,
        positive,
        negative,
        latent_image,
        seed,
        steps,
        guidance,
        mode,
        noise_floor=True,
        kv_cache="exact",
    ) -> io.NodeOutput:
        for patcher in (model, model_b):
            require_longcat(patcher, NODE)
        if model_b.model.diffusion_model.config != model.model.diffusion_model.config:
            raise LongCatError(f"{NODE} got two models of different sizes as A and B; connect one model twice")
        require_wan_vae(vae)
        shape = starting_latents(model, latent_image).shape
        given = given_frames(latent_image.get("noise_mask"))
        given, frames = given and video_frames(given), video_frames(shape[2])
        runs, no_floor = {REFERENCE: (model, ""), "B": (model_b, differences(model, model_b))}, "it is switched off"
        if noise_floor:
            try:
                kernel = floor_kernel(model)
                runs[FLOOR] = with_attention(model, kernel), f"attention {kernel}"
            except LongCatError as error:
                no_floor = str(error)

        inputs = (positive, negative, latent_image, seed, steps, guidance, mode, kv_cache)
        per_run = len(make_schedule(mode, steps))
        picks, settings, images = core.picks(frames, given), {}, {}
        reference: list[np.ndarray] = []
        # No previews: the page would keep showing the last one in place of the plot.
        bar, total = comfy.utils.ProgressBar(len(runs) * per_run), len(runs) * per_run
        for i, (name, (patcher, options)) in enumerate(runs.items()):
            clock = Clock(patcher.load_device)

            def callback(step: int, *_: Any, done: int = i * per_run) -> None:
                bar.update_absolute(done + step + 1, total)

            try:
                images[name] = vae.decode(sample_latent(NODE, patcher, *inputs, clock=clock, callback=callback))
            except comfy.model_management.OOM_EXCEPTION:
                if name != FLOOR:
                    raise
                no_floor = f"the other exact kernel ({options}) ran out of memory"
                continue
            videos = [to_bytes(video) for video in _videos(images[name])]
            reference = reference or videos
            setting = settings[name] = Setting(name, options, shots=videos[0][picks], steps=per_run)
            if name != FLOOR:
                first, *later = clock.seconds
                setting.first_s, setting.seconds = first, [sum(later)] if later else []
            if name != REFERENCE:
                setting.distances = [core.distance(*both, given) for both in zip(videos, reference, strict=True)]

        size = (frames, 8 * shape[3], 8 * shape[4])
        what = core.described(shape[0], size, steps, guidance, model.load_device, _dtype(model))
        found = core.Fidelity(
            settings[REFERENCE], [settings["B"]], settings.get(FLOOR), no_floor, f"{what}; seed {seed}", picks, TIMED
        )
        pictures = [to_image(np.array(picture)[None]) for picture in (fidelity_plot(found), side_by_side(found))]
        shown = ui.PreviewImage(pictures[0], cls=cls)
        # Its size differs, so it needs a preview of its own.
        shown.values = [*shown.values, *ui.PreviewImage(pictures[1], cls=cls).values]
        decoded = (images[name].flatten(0, -4) for name in (REFERENCE, "B"))
        return io.NodeOutput(*pictures, *decoded, core.text(found), ui=shown)


def _videos(images: Tensor) -> Tensor:
    """IMAGE of one video [F, H, W, 3], or of several, as videos [B, F, H, W, 3]."""
    return images if images.ndim == 5 else images[None]


NODES = [Fidelity]
