"""LongCat Step Cache: a MODEL that skips steps whose output can be predicted."""

from __future__ import annotations

import logging
from typing import Any

import comfy.model_patcher
import comfy.patcher_extension
import torch
from comfy_api.latest import io
from torch import Tensor

from ..longcat_core.sampling.step_cache import StepCache
from .inputs import schema
from .sampling import given_frames, require_longcat

NAME = "LongCat Step Cache"
# In a MODEL's transformer_options: the threshold and, while a sampling runs, its cache.
THRESHOLD_KEY, CACHE_KEY = "longcat_step_cache", "longcat_step_cache_running"


class _Running:
    """The caches of one sampling by any sampler, one for each set of conditionings that is evaluated together."""

    def __init__(self, threshold: float, sigmas: Tensor, denoise_mask: Tensor | None) -> None:
        self.threshold, self.sigmas, self.given = threshold, sigmas, given_frames(denoise_mask)
        self.caches: dict[tuple, StepCache] = {}
        self.asked = self.computed = 0

    def predict(
        self, executor: Any, model: Any, conds: list, x: Tensor, timestep: Tensor, options: dict[str, Any]
    ) -> list[Tensor]:
        """Clean latents for each of `conds`; guidance is computed from them afterwards."""
        key = tuple(cond and tuple(str(part.get("uuid")) for part in cond) for cond in conds)
        cache = self.caches.setdefault(key, StepCache(self.threshold, len(self.sigmas) - 1, self.given))
        sigma = float(timestep.max())
        step = int((self.sigmas > sigma * (1 + 1e-6)).sum())
        asked = [i for i, cond in enumerate(conds) if cond is not None]
        self.asked += 1
        out = cache.find(step, x, sigma)
        if out is not None:
            found = iter((x + sigma * part) for part in out.chunk(len(asked)))
            return [next(found) if i in asked else torch.zeros_like(x) for i in range(len(conds))]
        self.computed += 1
        clean = executor(model, conds, x, timestep, options)
        cache.keep(x, torch.cat([(clean[i] - x) / sigma for i in asked]), sigma)
        return clean


def _sample(
    executor: Any,
    noise: Tensor,
    latent_image: Tensor,
    sampler: Any,
    sigmas: Tensor,
    denoise_mask: Tensor | None = None,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    guider = executor.class_obj
    shared = guider.model_options
    guider.model_options = comfy.model_patcher.create_model_options_clone(shared)
    options = guider.model_options["transformer_options"]
    running = options[CACHE_KEY] = _Running(options[THRESHOLD_KEY], sigmas, denoise_mask)
    try:
        return executor(noise, latent_image, sampler, sigmas, denoise_mask, *args, **kwargs)
    finally:
        guider.model_options = shared
        if running.asked:
            logging.info("%s: %d of %d steps computed", NAME, running.computed, running.asked)


def _predict(
    executor: Any, model: Any, conds: list, x: Tensor, timestep: Tensor, model_options: dict[str, Any]
) -> list[Tensor]:
    running = model_options["transformer_options"][CACHE_KEY]
    return running.predict(executor, model, conds, x, timestep, model_options)


class StepCacheNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema("LongCatStepCache")

    @classmethod
    def execute(cls, model, threshold: float) -> io.NodeOutput:
        require_longcat(model, NAME)
        model = model.clone()
        kinds = comfy.patcher_extension.WrappersMP
        for kind in (kinds.OUTER_SAMPLE, kinds.CALC_COND_BATCH):
            model.remove_wrappers_with_key(kind, THRESHOLD_KEY)
        if threshold > 0:
            model.model_options.setdefault("transformer_options", {})[THRESHOLD_KEY] = threshold
            model.add_wrapper_with_key(kinds.OUTER_SAMPLE, THRESHOLD_KEY, _sample)
            model.add_wrapper_with_key(kinds.CALC_COND_BATCH, THRESHOLD_KEY, _predict)
        return io.NodeOutput(model)


NODES = [StepCacheNode]
