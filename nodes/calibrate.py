"""LongCat Calibrate: finds how sparse each head's attention may be on a MODEL's weights, and writes a calibration."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io, ui

from ..longcat_core.errors import LongCatError
from ..longcat_core.files.atomic import free_name
from ..longcat_core.generate.calibration import check_calibration_place, check_calibration_suffix, write_calibration
from ..longcat_core.optimize.attention import is_exact
from ..longcat_core.sampling.conditioning import SPATIAL_FACTOR, video_frames
from ..longcat_core.sampling.schedules import make_schedule
from .checks import check_ranges, check_steps
from .comfy_attention import attention_by_comfyui
from .comfy_avatar import audio_of
from .comfy_network import BLOCK_SPARSE_KEY, PROBE_KEY, SPARSE_KEY
from .folders import output_folder
from .inputs import LongCatNode
from .models import options_of, preferences_of, require_longcat, switches_of, with_option
from .previews import clean_frames
from .progress import NodeProgress
from .sampling import sample_latent, starting_latents
from .step_cache import THRESHOLD_KEY

if TYPE_CHECKING:
    from ..longcat_core.measure.probe import Probe

NODE = "LongCat Calibrate"


class _Subject:
    """A MODEL as the search sees it. sample: samples a video with a clone of it, given a callback of ComfyUI's."""

    def __init__(self, model: ModelPatcher, sample: Callable[[ModelPatcher, Callable], Any]) -> None:
        self.model, self.sample = model, sample
        self.network, self.device = model.model.diffusion_model, model.load_device

    @contextmanager
    def probed(self, probe: Probe) -> Iterator[None]:
        before, self.model = self.model, with_option(self.model, PROBE_KEY, probe)
        try:
            yield
        finally:
            self.model = before

    def video(self, number: int, stepped: Callable[[int, int], None]) -> np.ndarray:
        self.sample(self.model, lambda step, x0, x, total: stepped(step, total))
        # Nothing is compared, so nothing is decoded.
        return np.empty((0, 0, 0, 3), np.uint8)


class Calibrate(LongCatNode):
    ID = "LongCatCalibrate"

    @classmethod
    def validate_inputs(cls, steps=None, mode=None, budget=None, dense_steps=None, file=None) -> bool:
        from ..longcat_core.measure.calibrate import Measured, Recipe

        check_ranges(cls.ID, {"steps": steps, "mode": mode, "budget": budget, "dense_steps": dense_steps})
        check_steps(steps, mode)
        if None not in (steps, mode, dense_steps):
            Measured.of(len(make_schedule(mode, steps)), Recipe(dense_steps=dense_steps))
        if file is not None:
            check_calibration_suffix(output_folder(file))
        return True

    @classmethod
    def execute(
        cls, model, positive, negative, latent_image, seed, steps, guidance, mode, budget, dense_steps, file,
        kv_cache="exact",
    ) -> io.NodeOutput:  # fmt: skip
        # Imported when it runs: with its report and its prompts it would be a fifth of the pack's start.
        from ..longcat_core.measure.calibrate import Recipe, Search, Videos, check_calibration
        from ..longcat_core.measure.calibration_report import text

        _require_exact(model)
        if model.model.network.config.audio is not None:
            for name, conds in (("positive", positive), ("negative", negative)):
                audio_of(conds, name)
        shape = starting_latents(model, latent_image).shape
        given = clean_frames(latent_image.get("noise_mask"))
        size = video_frames(shape[2]), *(SPATIAL_FACTOR * side for side in shape[3:])
        videos = Videos(mode, steps, guidance, *size, given and video_frames(given), seed, 1)
        recipe = Recipe(budget, dense_steps, video=False)
        check_calibration(videos, recipe, model.model.diffusion_model.config.patch_size)
        path = _place(file)

        def sample(probed: ModelPatcher, callback: Callable) -> None:
            inputs = positive, negative, latent_image, seed, steps, guidance, mode, kv_cache
            sample_latent(NODE, probed, *inputs, callback=callback)

        with NodeProgress(Search.parts(videos, recipe), closing=False) as shown:
            found = Search(videos, recipe, shown.task).run(_Subject(model, sample))
        path = free_name(path)
        write_calibration(path, found)
        report = f"{text(found)}\n{path}"
        return io.NodeOutput(str(path), report, ui=ui.PreviewText(report))


def _require_exact(model: ModelPatcher) -> None:
    """Raise LongCatError for a MODEL that is not LongCat-Video, or whose dense attention is not what it computes."""
    require_longcat(model, NODE)
    options, attention = options_of(model), switches_of(model).attention
    if options.get(BLOCK_SPARSE_KEY) is not None:
        raise LongCatError(f"{NODE} got a MODEL with block-sparse attention; connect the MODEL before that node")
    if options.get(SPARSE_KEY) is not None:
        raise LongCatError(f"{NODE} got a MODEL with sparse attention; connect the MODEL before that node")
    if options.get(THRESHOLD_KEY):
        raise LongCatError(f"{NODE} got a MODEL with a step cache, which leaves steps out; connect the MODEL before it")
    if not is_exact(attention):
        raise LongCatError(f"attention {attention} is lossy; calibrate against an exact backend, such as auto")
    if other := attention_by_comfyui(switches_of(model), options, preferences_of(model)):
        raise LongCatError(f"{other} chooses the attention, which may not be exact; remove it to calibrate")


def _place(name: str) -> Path:
    """A free path for the file in ComfyUI's output folder, whose folders are made."""
    path = output_folder(name)
    check_calibration_suffix(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path = free_name(path)
    check_calibration_place(path)
    return path


NODES = [Calibrate]
