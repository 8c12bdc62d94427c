"""ComfyUI's MODEL, CLIP and VAE as the core's engine, so that long video and refining run on them."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Iterable
from typing import Any

import comfy.samplers
import comfy.sd
import comfy.utils
import numpy as np
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ..longcat_core.errors import LongCatError
from ..longcat_core.files import fingerprints
from ..longcat_core.generate.engine import Denoising, Engine
from ..longcat_core.generate.progress import DECODING, ENCODING
from ..longcat_core.generate.request import RELEASED, Defaults
from ..longcat_core.generate.takes import lossy_settings
from ..longcat_core.sampling.sampler import Step
from ..longcat_core.sampling.schedules import Schedule
from . import comfy_fp8
from .comfy_avatar import AUDIO, REFERENCE, with_values
from .comfy_network import BLOCK_SPARSE_KEY, SPARSE_KEY
from .comfy_vae import decoded, encoded
from .conditioning import put_clean, require_wan_vae
from .images import to_bytes
from .models import compute_dtype, options_of, patches_of, switches_of, wrappers_of
from .previews import preview_callback
from .progress import begins
from .sampling import make_guider
from .step_cache import THRESHOLD_KEY

# Numbers of each tensor that a fingerprint hashes.
SAMPLES = 64
# ComfyUI's tables of noise levels, which the core does not use. A node such as ModelSamplingSD3 replaces them, and what
# it puts there stays in the model until the next sampling run.
NOISE_LEVELS = "model_sampling."
# Wrappers that are said in words instead, or change nothing.
WITHOUT_EFFECT = (THRESHOLD_KEY, "torch.compile")


class ComfyEngine(Engine):
    """Runs the core's long tasks in ComfyUI; latents are those of ComfyUI's LATENT.

    node: the node's name, for errors. prompts: all prompts of the run, so that the text encoder is loaded once. LoRAs,
    block-sparse attention, a step cache, optimizations and wrappers on the MODEL apply.
    """

    def __init__(
        self, node: str, model: ModelPatcher, clip: Any, vae: Any, prompts: Iterable[str], defaults: Defaults = RELEASED
    ) -> None:
        require_wan_vae(vae)
        self.node, self.model, self.clip, self.vae = node, model, clip, vae
        self.prompts = list(dict.fromkeys(prompts))
        self.defaults = defaults
        self.texts: dict[str, list] = {}

    def encode(self, pixels: Tensor) -> Tensor:
        begins(ENCODING)
        return encode_video(self.vae, pixels)

    def decode(self, latents: Tensor, truncated: bool = False) -> np.ndarray:
        begins(DECODING)
        return np.concatenate([to_bytes(part, truncated) for part in decoded(self.vae, latents)])

    def _denoise(self, noise: Tensor, schedule: Schedule, prompt: str, options: Denoising) -> Tensor:
        if options.step_cache or options.block_sparse is not None or options.sparse is not None:
            raise LongCatError(
                f"{self.node} takes a step cache, block-sparse and sparse attention from the MODEL; connect LongCat "
                "Step Cache, LongCat Block-Sparse Attention or LongCat Sparse Attention to it"
            )
        texts = self._text(prompt), self._text(options.negative_prompt)
        if options.audio is not None:
            values = {AUDIO: options.audio} | ({} if options.reference is None else {REFERENCE: options.reference})
            texts = tuple(with_values(text, **values) for text in texts)
        guider = make_guider(
            self.model, *texts, options.guidance_scale, options.kv_cache, self.node, options.guidance_until
        )
        samples = torch.zeros_like(noise) if options.clean is None else options.clean.to(noise)
        mask = None if options.cond_latents is None else put_clean(samples, options.cond_latents)
        show = preview_callback(self.model, len(schedule), mask)

        def after(step: int, x0: Tensor, x: Tensor, total: int) -> None:
            show(step, x0, x, total)
            if options.callback is not None:
                sigma = float(schedule.sigmas[step])
                options.callback(Step(step, total, float(schedule.timesteps[step]), sigma, x, x0))

        return guider.sample(
            noise,
            samples,
            comfy.samplers.ksampler("euler"),
            schedule.sigmas,
            denoise_mask=mask,
            callback=after,
            disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        ).to("cpu", torch.float32)

    def _text(self, prompt: str) -> list:
        if prompt not in self.texts:
            begins(ENCODING)
            for text in dict.fromkeys((*self.prompts, prompt)):
                tokens = self.clip.tokenize(text)
                # Its own bar would take the place of the node's.
                self.texts[text] = self.clip.encode_from_tokens_scheduled(tokens, show_pbar=False)
        return self.texts[prompt]

    def settings(self) -> dict[str, Any]:
        """What decides the result beside the request, as JSON values that segment folders store: the values of the
        weights, and what other nodes put into the model, by name."""
        found = {
            "model": fingerprint(self.model),
            "text encoder": fingerprint(self.clip.patcher),
            "vae": fingerprint(self.vae.patcher),
            "wrappers": [name for name in wrappers_of(self.model) if name not in WITHOUT_EFFECT],
            "injections": sorted(self.model.injections),
            "patches": patches_of(self.model),
        }
        # Most models have none, and folders of earlier versions do not know of patches.
        return {name: value for name, value in found.items() if value}

    def lossy(self) -> dict[str, str]:
        """Settings that change the result a little, in words."""
        options, switches = options_of(self.model), switches_of(self.model)
        found = lossy_settings(
            precision=str(compute_dtype(self.model)).removeprefix("torch."),
            switches=switches,
            step_cache=options.get(THRESHOLD_KEY) or 0.0,
            block_sparse=options.get(BLOCK_SPARSE_KEY),
            sparse=options.get(SPARSE_KEY),
        )
        # The fingerprint, of the weights' values, covers weights in 8 bits.
        if not switches.fp8 and comfy_fp8.layers(self.model.model.diffusion_model):
            found["fp8 products"] = "off"
        return found


def encode_video(vae: comfy.sd.VAE, pixels: Tensor) -> Tensor:
    """LATENT samples [1, 16, T, H/8, W/8] of video [1, 3, F, H, W] in -1..1."""
    return encoded(vae, (pixels[0].permute(1, 2, 3, 0) + 1) / 2)


def weights_hash(module: torch.nn.Module) -> str:
    """A hash of the name, the shape and some numbers of every weight of a module that ComfyUI does not manage."""
    total = hashlib.sha256()
    for name, weight in module.state_dict().items():
        _add(total, name, weight, False)
    return total.hexdigest()[:16]


def fingerprint(patcher: ModelPatcher) -> str:
    """A hash of a model and its patches: of the name, the shape and some numbers of every weight and patch.

    The dtype in which numbers are stored does not count: the same values give the same result.
    """
    model = weakref.ref(patcher)

    def first_kind() -> str:
        alive = model()
        return "" if alive is None else _hash(alive, dtypes=True)

    return fingerprints.remember(fingerprints.PREFIX + _hash(patcher), first_kind)


def _hash(patcher: ModelPatcher, dtypes: bool = False) -> str:
    total = hashlib.sha256()
    # While a patch is merged into a weight, ComfyUI keeps the weight as loaded in `backup`.
    for name, weight in patcher.model.state_dict().items():
        if name.startswith(NOISE_LEVELS):
            continue
        backup = patcher.backup.get(name)
        _add(total, name, weight if backup is None else backup.weight, dtypes)
    for name, patches in sorted(patcher.patches.items()):
        _add(total, name, patches, dtypes)
    return total.hexdigest()[:16]


def _add(total: Any, name: str, value: Any, dtypes: bool) -> None:
    if isinstance(value, Tensor):
        flat = value.detach().reshape(-1)
        stride = max(1, flat.numel() // SAMPLES)
        sample = flat[::stride][:SAMPLES].float().cpu().numpy().tobytes()
        total.update(f"{name}{tuple(value.shape)}{value.dtype if dtypes else ''}".encode() + sample)
    elif isinstance(value, list | tuple):
        for part in value:
            _add(total, name, part, dtypes)
    elif hasattr(value, "weights"):
        # One of ComfyUI's adapters, such as a LoRA.
        _add(total, f"{name}{type(value).__name__}", value.weights, dtypes)
    elif callable(value):
        total.update(f"{name}{getattr(value, '__qualname__', type(value).__name__)}".encode())
    else:
        total.update(f"{name}{value!r}".encode())
