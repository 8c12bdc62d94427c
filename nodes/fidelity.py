"""LongCat Fidelity: how much a setting changes the video. Samples two MODELs at one seed, and the noise floor."""

from __future__ import annotations

import logging
from dataclasses import asdict, replace
from typing import Any

import comfy.model_management
import numpy as np
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io, ui

from ..longcat_core.errors import LongCatError
from ..longcat_core.generate.progress import DECODING, Part
from ..longcat_core.generate.speeds import EXACT
from ..longcat_core.measure import fidelity as core
from ..longcat_core.measure.fidelity import FLOOR, REFERENCE, Setting
from ..longcat_core.optimize.attention import Inputs
from ..longcat_core.sampling.conditioning import video_frames
from ..longcat_core.sampling.schedules import make_schedule
from .checks import check_ranges, check_steps
from .comfy_attention import attention_by_comfyui
from .comfy_network import BLOCK_SPARSE_KEY, OPTIMIZATIONS_KEY, SPARSE_KEY
from .conditioning import require_wan_vae
from .images import to_bytes, to_image
from .inputs import LongCatNode
from .models import (
    compute_dtype,
    options_of,
    preferences_of,
    require_comparable,
    switches_of,
    until_notes,
    with_option,
    wrappers_of,
)
from .previews import clean_frames
from .progress import NodeProgress
from .sampling import StepTimer, latent_tokens, sample_latent, starting_latents
from .speed import with_speed
from .step_cache import THRESHOLD_KEY

NODE = "LongCat Fidelity"
TIMED = "steps after the first"


def floor_kernel(model: ModelPatcher) -> str:
    """An exact kernel other than the MODEL's own. Raises LongCatError with the reason if there is none."""
    switches = switches_of(model)
    if other := attention_by_comfyui(switches, options_of(model), preferences_of(model)):
        raise LongCatError(f"{other} chooses A's attention, which may not be exact; remove it to get a noise floor")
    head_dim = model.model.diffusion_model.config.head_dim
    return core.other_kernel(switches.attention, Inputs(model.load_device, compute_dtype(model), head_dim, False))


def settings_of(model: ModelPatcher) -> dict[str, Any]:
    """Everything about a MODEL that can change its video, for people."""
    options = options_of(model)
    return asdict(switches_of(model)) | {
        "step cache": options.get(THRESHOLD_KEY, 0),
        "block-sparse": getattr(options.get(BLOCK_SPARSE_KEY), "sparsity", 0),
        "sparse": sparse.in_words() if (sparse := options.get(SPARSE_KEY)) else "off",
        "dtype": str(compute_dtype(model)).removeprefix("torch."),
        "patched weights": len(model.patches),
        "other nodes": ", ".join(sorted({*wrappers_of(model)} - {THRESHOLD_KEY})) or "none",
    }


def differences(model: ModelPatcher, other: ModelPatcher) -> str:
    """How `other` differs from `model`, in words; "" if no difference is visible."""
    before, words = settings_of(model), {True: "on", False: "off"}
    changed = {name: value for name, value in settings_of(other).items() if value != before[name]}
    return ", ".join(f"{name} {words[v] if isinstance(v, bool) else v}" for name, v in changed.items())


class Fidelity(LongCatNode):
    ID = "LongCatFidelity"

    @classmethod
    def validate_inputs(cls, steps=None, mode=None) -> bool:
        check_ranges(cls.ID, {"steps": steps, "mode": mode})
        check_steps(steps, mode)
        return True

    @classmethod
    def execute(
        cls, model, model_b, vae, positive, negative, latent_image, seed, steps, guidance, mode, noise_floor=True,
        kv_cache="exact", guidance_until=1.0, speed=EXACT,
    ) -> io.NodeOutput:  # fmt: skip
        require_comparable(model, model_b, NODE)
        require_wan_vae(vae)
        shape = starting_latents(model, latent_image).shape
        given = clean_frames(latent_image.get("noise_mask"))
        model_b, until, notes = with_speed(
            model_b, speed, mode=mode, guidance=guidance, guidance_until=guidance_until,
            tokens=latent_tokens(shape, given),
        )  # fmt: skip
        for note in (*notes, *until_notes(guidance, guidance_until)):
            logging.warning("LongCat: %s", note)
        given, frames = given and video_frames(given), video_frames(shape[2])
        less = [f"guidance until {until:g}"] if until < 1 and guidance != 1 else []
        changed = ", ".join(filter(None, [differences(model, model_b), *less]))
        runs, no_floor = {REFERENCE: (model, ""), "B": (model_b, changed)}, "it is switched off"
        if noise_floor:
            try:
                kernel = floor_kernel(model)
                floor = with_option(model, OPTIMIZATIONS_KEY, replace(switches_of(model), attention=kernel))
                runs[FLOOR] = floor, f"attention {kernel}"
            except LongCatError as error:
                no_floor = str(error)

        inputs = (positive, negative, latent_image, seed, steps, guidance, mode, kv_cache)
        per_run = len(make_schedule(mode, steps))
        picks, settings, images = core.picks(frames, given), {}, {}
        reference: list[np.ndarray] = []
        # Without previews: the page would keep showing the last one in place of the plot.
        with NodeProgress([Part(per_run, name) for name in runs], what="run") as shown:
            for name, (each, options) in runs.items():
                timer = StepTimer(each.load_device)
                try:
                    samples = sample_latent(
                        NODE, each, *inputs, until if name == "B" else 1.0, timer=timer,
                        callback=lambda step, x0, x, total: shown.step(step + 1, total),
                    )  # fmt: skip
                    shown.task.phase(DECODING)
                    images[name] = vae.decode(samples)
                except comfy.model_management.OOM_EXCEPTION:
                    if name != FLOOR:
                        raise
                    no_floor = f"the other exact kernel ({options}) ran out of memory"
                    shown.task.drop(FLOOR)
                    continue
                # One video [F, H, W, 3] or several [B, F, H, W, 3].
                videos = [to_bytes(video) for video in images[name].reshape(-1, *images[name].shape[-4:])]
                reference = reference or videos
                setting = settings[name] = Setting(name, options, shots=videos[0][picks], steps=per_run)
                if name != FLOOR:
                    setting.first_s, *later = timer.seconds
                    setting.seconds = [sum(later)] if later else []
                if name != REFERENCE:
                    setting.distances = [
                        core.distance(*both, given, model.load_device) for both in zip(videos, reference, strict=True)
                    ]
                shown.task.finish()

        size = (frames, 8 * shape[3], 8 * shape[4])
        what = core.described(shape[0], size, steps, guidance, model.load_device, compute_dtype(model))
        found = core.Fidelity(
            settings[REFERENCE], [settings["B"]], settings.get(FLOOR), no_floor, f"{what}; seed {seed}", picks, TIMED
        )
        # Imported when it runs, for a quick start of ComfyUI.
        from ..longcat_core.measure.charts import fidelity_plot, side_by_side

        pictures = [to_image(np.array(picture)[None]) for picture in (fidelity_plot(found), side_by_side(found))]
        preview = ui.PreviewImage(pictures[0], cls=cls)
        # The second picture has another size, so it needs a preview of its own.
        preview.values = [*preview.values, *ui.PreviewImage(pictures[1], cls=cls).values]
        decoded = (images[name].flatten(0, -4) for name in (REFERENCE, "B"))
        return io.NodeOutput(*pictures, *decoded, core.text(found), ui=preview)


NODES = [Fidelity]
