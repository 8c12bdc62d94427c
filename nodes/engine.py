"""ComfyUI's models as the core's engine: long tasks of the core on a MODEL, a CLIP and a VAE, in its machinery."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path, PureWindowsPath
from typing import Any

import comfy.model_patcher
import comfy.samplers
import comfy.sd
import comfy.utils
import folder_paths
import numpy as np
import torch
from torch import Tensor

from ..longcat_core.errors import LongCatError
from ..longcat_core.generate.pipeline import Engine
from ..longcat_core.generate.request import RELEASED, Defaults
from ..longcat_core.model.kv_cache import KVMode
from ..longcat_core.sampling.sampler import Callback, Step
from ..longcat_core.sampling.schedules import Schedule
from .comfy_model import BLOCK_SPARSE_KEY, OPTIMIZATIONS_KEY, compute_dtype
from .conditioning import put_given, require_wan_vae, to_bytes
from .sampling import make_guider, preview_callback
from .step_cache import THRESHOLD_KEY

# Numbers of a tensor that a fingerprint looks at.
SAMPLES = 64
# Tables of ComfyUI's own noise levels, which the core does not use. They are those of whoever sampled last: what a node
# such as ModelSamplingSD3 puts in their place stays in the model until the next sampling.
NOISE_LEVELS = "model_sampling."


class ComfyEngine(Engine):
    """Latents are as in ComfyUI's LATENT. prompts: all that will be asked for, so that the text encoder is loaded once.

    What is on the MODEL (LoRA, block-sparse attention, step cache, optimizations, wrappers) is in force.
    """

    def __init__(
        self, node: str, model: Any, clip: Any, vae: Any, prompts: Iterable[str], defaults: Defaults = RELEASED
    ) -> None:
        require_wan_vae(vae)
        self.node, self.model, self.clip, self.vae = node, model, clip, vae
        self.prompts = list(dict.fromkeys(prompts))
        self.defaults = defaults
        self.texts: dict[str, list] = {}

    def encode(self, pixels: Tensor) -> Tensor:
        return encode_video(self.vae, pixels)

    def decode(self, latents: Tensor) -> np.ndarray:
        images = self.vae.decode(latents)
        return to_bytes(images[0] if images.ndim == 5 else images)

    def denoise(
        self,
        noise: Tensor,
        schedule: Schedule,
        prompt: str,
        *,
        clean: Tensor | None = None,
        negative_prompt: str = "",
        guidance_scale: float = 1.0,
        cond_latents: Tensor | None = None,
        kv_cache: KVMode = "exact",
        step_cache: float = 0.0,
        block_sparse: None = None,
        callback: Callback | None = None,
    ) -> Tensor:
        texts = self._text(prompt), self._text(negative_prompt)
        guider = make_guider(self.model, *texts, guidance_scale, kv_cache, self.node)
        samples = torch.zeros_like(noise) if clean is None else clean.to(noise)
        mask = None
        if cond_latents is not None:
            mask = put_given(samples, cond_latents)
        show = preview_callback(self.model, len(schedule), mask)

        def after(step: int, x0: Tensor, x: Tensor, total: int) -> None:
            show(step, x0, x, total)
            if callback is not None:
                sigma = float(schedule.sigmas[step])
                callback(Step(step, total, float(schedule.timesteps[step]), sigma, x, x0))

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
            for text in dict.fromkeys((*self.prompts, prompt)):
                tokens = self.clip.tokenize(text)
                self.texts[text] = self.clip.encode_from_tokens_scheduled(tokens)
        return self.texts[prompt]

    def settings(self) -> dict[str, Any]:
        """What of the models decides the result, as plain JSON values."""
        options = self.model.model_options.get("transformer_options", {})
        switches = options.get(OPTIMIZATIONS_KEY)
        sparse = options.get(BLOCK_SPARSE_KEY)
        return {
            "model": fingerprint(self.model),
            "text encoder": fingerprint(self.clip.patcher),
            "vae": fingerprint(self.vae.patcher),
            "dtype": str(compute_dtype(self.model)).removeprefix("torch."),
            "optimizations": "defaults" if switches is None else repr(switches),
            "block-sparse": None if sparse is None else repr(sparse),
            "step cache": options.get(THRESHOLD_KEY),
            "wrappers": sorted(str(name) for kind in options.get("wrappers", {}).values() for name in kind),
            "injections": sorted(self.model.injections),
        }


def encode_video(vae: comfy.sd.VAE, pixels: Tensor) -> Tensor:
    """LATENT samples [1, 16, T, H/8, W/8] of video [1, 3, F, H, W] in -1..1."""
    return vae.encode((pixels[0].permute(1, 2, 3, 0) + 1) / 2)


def fingerprint(patcher: comfy.model_patcher.ModelPatcher) -> str:
    """What tells a model with its patches from others: names, shapes and samples of all weights and patches."""
    total = hashlib.sha256()
    # A patch that is in force stands in the weight itself; the weight as loaded is kept aside.
    for name, weight in patcher.model.state_dict().items():
        if name.startswith(NOISE_LEVELS):
            continue
        backup = patcher.backup.get(name)
        _add(total, name, weight if backup is None else backup.weight)
    for name, patches in sorted(patcher.patches.items()):
        _add(total, name, patches)
    return total.hexdigest()[:16]


def _add(total: Any, name: str, value: Any) -> None:
    if isinstance(value, Tensor):
        flat = value.detach().reshape(-1)
        stride = max(1, flat.numel() // SAMPLES)
        sample = flat[::stride][:SAMPLES].float().cpu().numpy().tobytes()
        total.update(f"{name}{tuple(value.shape)}{value.dtype}".encode() + sample)
    elif isinstance(value, list | tuple):
        for part in value:
            _add(total, name, part)
    elif hasattr(value, "weights"):
        # A LoRA of ComfyUI's adapters.
        _add(total, f"{name}{type(value).__name__}", value.weights)
    elif callable(value):
        total.update(f"{name}{getattr(value, '__qualname__', type(value).__name__)}".encode())
    else:
        total.update(f"{name}{value!r}".encode())


def output_folder(name: str) -> Path:
    """A folder inside ComfyUI's output folder. Raises LongCatError for a name that leads out of it, or none."""
    root = Path(folder_paths.get_output_directory()).resolve()
    asked = name.replace("\\", "/").strip()
    # Elsewhere than on Windows a drive would become a folder of that name, as a home directory does everywhere.
    foreign = asked.startswith("~") or (PureWindowsPath(asked).drive and not Path(asked).drive)
    try:
        path = (root / asked).resolve()
        path.exists()
    except (OSError, ValueError):  # too long, or with a null character
        foreign = True
    if foreign or not path.is_relative_to(root) or path == root:
        raise LongCatError(
            f"folder {name!r} is no folder inside ComfyUI's output folder; name one such as longcat/my-video"
        )
    return path
