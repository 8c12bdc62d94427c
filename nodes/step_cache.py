"""LongCat Step Cache: a MODEL that skips steps whose output can be predicted."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import comfy.model_patcher
import comfy.patcher_extension
import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io
from torch import Tensor

from ..longcat_core.optimize.residual_cache import ResidualCache
from ..longcat_core.sampling.flow import estimate_clean, output_of
from ..longcat_core.sampling.step_cache import StepCache, StepCacheKind, check_kind
from .comfy_network import RESIDUALS_KEY, step_at
from .inputs import LongCatNode
from .models import require_longcat, with_option
from .previews import clean_frames

NAME = "LongCat Step Cache"
# Keys of transformer_options: threshold and kind and, during a sampling run, the caches of whole steps.
THRESHOLD_KEY, KIND_KEY, CACHE_KEY = "longcat_step_cache", "longcat_step_cache_kind", "longcat_step_cache_running"


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


class _BlockCaches:
    """The block caches of one run of any sampler, one for each batch of conditionings that the network gets."""

    def __init__(self, threshold: float, sigmas: Tensor, latents: Sequence[int], guided: bool) -> None:
        self.threshold, self.sigmas, self.latents, self.guided = threshold, sigmas, latents, guided
        self.caches: dict[tuple, ResidualCache] = {}
        self.steps, self.computed = 0, 0.0

    def of(self, device: torch.device, options: dict[str, Any]) -> ResidualCache | None:
        """The cache of the pass on `device` that these transformer_options describe; None if they do not say which
        conditionings it has."""
        uuids, timestep = options.get("uuids"), options.get("sigmas")
        if not uuids or timestep is None:
            return None
        # Passes of one step that other nodes change (skip-layer guidance), and context windows, are runs of their own.
        replaced = tuple(sorted(map(str, options.get("patches_replace", {}).get("dit", ()))))
        window = tuple(getattr(options.get("context_window"), "index_list", ()))
        there = device, replaced, window, id(options.get("optimized_attention_override"))
        step = step_at(self.sigmas, timestep)
        key = (*there, tuple(map(str, uuids)))
        cache = self.caches.get(key)
        if cache is None:
            self._split(there, key[-1], step)
            cache = self.caches.setdefault(key, ResidualCache(self.threshold, len(self.sigmas) - 1))
        cache.begin(step, float(timestep.max()))
        return cache

    def _split(self, there: tuple, uuids: tuple[str, ...], step: int) -> None:
        """Where a batch of several conditionings was one until now, give each its part."""
        for key in [key for key in self.caches if key[:-1] == there and len(key[-1]) > 1]:
            if len(uuids) == 1 and uuids[0] in key[-1] and self.caches[key].step != step:
                for uuid, part in zip(key[-1], self.caches.pop(key).split(len(key[-1])), strict=True):
                    self.caches[(*there, (uuid,))] = part

    def count(self, cache: ResidualCache) -> None:
        """Add what the last pass computed to what the log says."""
        self.steps, self.computed = self.steps + 1, self.computed + cache.ran


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
    caches: _Caches | _BlockCaches
    if options.get(KIND_KEY) == "blocks":
        # At guidance 1 ComfyUI leaves the negative prompt out.
        guides = getattr(guider, "guides", getattr(guider, "cfg", None) != 1)
        guided = guides or bool(guider.model_options.get("disable_cfg1_optimization"))
        caches = options[RESIDUALS_KEY] = _BlockCaches(options[THRESHOLD_KEY], sigmas, noise.shape, guided)
    else:
        caches = options[CACHE_KEY] = _Caches(options[THRESHOLD_KEY], sigmas, denoise_mask)
    try:
        return executor(noise, latent_image, sampler, sigmas, denoise_mask, *args, **kwargs)
    finally:
        guider.model_options = shared
        if caches.steps:
            logging.info("%s: %.4g of %d steps computed", NAME, caches.computed, caches.steps)


def _predict(executor: Any, model: Any, conds: list, x: Tensor, timestep: Tensor, options: dict) -> list[Tensor]:
    return options["transformer_options"][CACHE_KEY].predict(executor, model, conds, x, timestep, options)


def _prepare(executor: Any, model: ModelPatcher, shape: Sequence[int], conds: dict, *args: Any, **kwargs: Any) -> Any:
    # ComfyUI estimates here how much memory to leave free of weights; with context windows, `shape` is one of them.
    caches = kwargs["model_options"]["transformer_options"][RESIDUALS_KEY]
    halves = sum(map(bool, conds.values())) if caches.guided else 1
    with model.model.keeping_residuals(caches.latents, halves):
        return executor(model, shape, conds, *args, **kwargs)


_PLACES = comfy.patcher_extension.WrappersMP
_WRAPPERS: dict[StepCacheKind, dict[str, Any]] = {
    "steps": {_PLACES.OUTER_SAMPLE: _sample, _PLACES.CALC_COND_BATCH: _predict},
    "blocks": {_PLACES.OUTER_SAMPLE: _sample, _PLACES.PREPARE_SAMPLING: _prepare},
}


def with_step_cache(model: ModelPatcher, threshold: float, kind: StepCacheKind) -> ModelPatcher:
    """A clone of the MODEL with a step cache in place of any other; threshold 0: without one, under any speed."""
    model = with_option(with_option(model, THRESHOLD_KEY, threshold), KIND_KEY, kind)
    for place in {place for wrappers in _WRAPPERS.values() for place in wrappers}:
        model.remove_wrappers_with_key(place, THRESHOLD_KEY)
        if threshold > 0 and place in _WRAPPERS[kind]:
            model.add_wrapper_with_key(place, THRESHOLD_KEY, _WRAPPERS[kind][place])
    return model


class StepCacheNode(LongCatNode):
    ID = "LongCatStepCache"

    @classmethod
    def execute(cls, model, threshold: float, kind: StepCacheKind = "steps") -> io.NodeOutput:
        require_longcat(model, NAME)
        check_kind(kind)
        return io.NodeOutput(with_step_cache(model, threshold, kind))


NODES = [StepCacheNode]
