"""LongCat Step Cache: a MODEL that skips steps whose output can be predicted."""

from __future__ import annotations

import logging
from typing import Any

import comfy.model_patcher
import comfy.patcher_extension
import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io
from torch import Tensor

from ..longcat_core.sampling.flow import estimate_clean, output_of
from ..longcat_core.sampling.step_cache import StepCache
from .comfy_network import step_at
from .inputs import LongCatNode
from .models import require_longcat, with_option
from .previews import clean_frames

NAME = "LongCat Step Cache"
# Keys of transformer_options: the threshold and, during a sampling run, the caches.
THRESHOLD_KEY, CACHE_KEY = "longcat_step_cache", "longcat_step_cache_running"


class _Caches:
    """The caches of one run of any sampler, one for each set of conditionings that it evaluates together."""

    def __init__(self, threshold: float, sigmas: Tensor, denoise_mask: Tensor | None) -> None:
        self.threshold, self.sigmas, self.num_cond = threshold, sigmas, clean_frames(denoise_mask)
        self.caches: dict[tuple, StepCache] = {}
        self.steps = self.computed = 0

    def predict(
        self, executor: Any, model: Any, conds: list, x: Tensor, timestep: Tensor, options: dict[str, Any]
    ) -> list[Tensor]:
        """Estimates of the clean latents, one for each of `conds` and zeros for a missing one, from the cache or
        computed."""
        key = tuple(cond and tuple(str(part.get("uuid")) for part in cond) for cond in conds)
        cache = self.caches.get(key) or self._new(key)
        sigma, step = float(timestep.max()), step_at(self.sigmas, timestep)
        present = [i for i, cond in enumerate(conds) if cond is not None]
        self.steps += 1
        out = cache.find(step, x, sigma)
        if out is not None:
            predicted = dict(zip(reversed(present), out.chunk(len(present)), strict=True))
            return [
                estimate_clean(x, predicted[i], sigma) if i in predicted else torch.zeros_like(x)
                for i in range(len(conds))
            ]
        self.computed += 1
        clean = executor(model, conds, x, timestep, options)
        # The prompt's part, ComfyUI's first, goes last: see `keep_last`.
        cache.keep(x, torch.cat([output_of(x, clean[i], sigma) for i in reversed(present)]), sigma)
        return clean

    def _new(self, key: tuple) -> StepCache:
        """The cache of these conditionings: where guidance ends, what is known of the prompt's half goes on."""
        alone = not any(key[1:])
        guided = next((other for other in self.caches if alone and other[:1] == key[:1]), None)
        if guided is None:
            cache = StepCache(self.threshold, len(self.sigmas) - 1, self.num_cond)
        else:
            cache = self.caches.pop(guided)
            cache.keep_last(sum(map(bool, guided)))
        self.caches[key] = cache
        return cache


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
    caches = options[CACHE_KEY] = _Caches(options[THRESHOLD_KEY], sigmas, denoise_mask)
    try:
        return executor(noise, latent_image, sampler, sigmas, denoise_mask, *args, **kwargs)
    finally:
        guider.model_options = shared
        if caches.steps:
            logging.info("%s: %d of %d steps computed", NAME, caches.computed, caches.steps)


def _predict(executor: Any, model: Any, conds: list, x: Tensor, timestep: Tensor, options: dict) -> list[Tensor]:
    return options["transformer_options"][CACHE_KEY].predict(executor, model, conds, x, timestep, options)


_PLACES = comfy.patcher_extension.WrappersMP
_WRAPPERS = {_PLACES.OUTER_SAMPLE: _sample, _PLACES.CALC_COND_BATCH: _predict}


def with_step_cache(model: ModelPatcher, threshold: float) -> ModelPatcher:
    """A clone of the MODEL with a step cache in place of any other; threshold 0: without one, under any speed."""
    model = with_option(model, THRESHOLD_KEY, threshold)
    for place, wrapper in _WRAPPERS.items():
        model.remove_wrappers_with_key(place, THRESHOLD_KEY)
        if threshold > 0:
            model.add_wrapper_with_key(place, THRESHOLD_KEY, wrapper)
    return model


class StepCacheNode(LongCatNode):
    ID = "LongCatStepCache"

    @classmethod
    def execute(cls, model, threshold: float) -> io.NodeOutput:
        require_longcat(model, NAME)
        return io.NodeOutput(with_step_cache(model, threshold))


NODES = [StepCacheNode]
