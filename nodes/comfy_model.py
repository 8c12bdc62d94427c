"""LongCat-Video as a native ComfyUI model: its BaseModel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import comfy.conds
import comfy.model_base
import comfy.supported_models_base
import torch
import torch.nn.functional as F
from torch import Tensor

from ..longcat_core.errors import LongCatError
from ..longcat_core.generate.text import MAX_LENGTH
from ..longcat_core.model.config import ModelConfig
from ..longcat_core.model.text import trim_text
from ..longcat_core.optimize.memory import audio_rows, text_bytes
from ..longcat_core.sampling.frames import count_clean, noisy_frames
from .comfy_avatar import AUDIO, HEARD, REFERENCE, SHOWN, AudioCond, Heard, check_audio, in_window, reference_cond
from .comfy_compile import Own, original, without_compiled_modules
from .comfy_network import DiffusionModel


class TextCond(comfy.conds.CONDRegular):
    """Text [B, L, C] without its padding. Texts of different lengths form one batch, padded with zero rows."""

    def can_concat(self, other: TextCond) -> bool:
        one, two = self.cond, other.cond
        return one.shape[0] == two.shape[0] and one.shape[2] == two.shape[2] and one.device == two.device

    def concat(self, others: list[TextCond]) -> Tensor:
        texts = [self.cond, *(other.cond for other in others)]
        longest = max(text.shape[1] for text in texts)
        return torch.cat([F.pad(text, (0, 0, 0, longest - text.shape[1])) for text in texts])


class LongCatVideo(comfy.model_base.BaseModel):
    def __init__(self, model_config: comfy.supported_models_base.BASE, device: Any = None) -> None:
        flow = comfy.model_base.ModelType.FLOW
        super().__init__(model_config, flow, device=device, unet_model=DiffusionModel)
        # ComfyUI may be asked to leave the network out.
        if hasattr(self, "diffusion_model"):
            self.own = Own(self.diffusion_model, tuple(self.diffusion_model.blocks))

    @property
    def network(self) -> DiffusionModel:
        """The network itself, even while TorchCompileModel has replaced it with a compiled module."""
        return self.diffusion_model if original(self.diffusion_model) is self.diffusion_model else self.own.network

    def compute_dtype(self) -> torch.dtype:
        """The dtype of activations."""
        return self.manual_cast_dtype or self.get_dtype()

    def extra_conds(self, **kwargs: Any) -> dict[str, Any]:
        """The conditioning of one prompt for all steps. Raises LongCatError for input that the network cannot take."""
        config = self.diffusion_model.config
        check_latents(kwargs.get("noise"), config)
        text = kwargs.get("cross_attn")
        if text is None:
            raise LongCatError("a conditioning holds no text; connect the CONDITIONING of a CLIP Text Encode node")
        if text.ndim != 3 or text.shape[-1] != config.caption_channels:
            raise LongCatError(
                f"the conditioning is text of {text.shape[-1]} channels, this model reads {config.caption_channels}; "
                "encode the prompts with the text encoder that belongs to it (LongCat Text Encoder Loader)"
            )
        conds: dict[str, Any] = {"c_crossattn": TextCond(trim_text(text, MAX_LENGTH))}
        mask = kwargs.get("denoise_mask")
        if mask is not None:
            conds["denoise_mask"] = comfy.conds.CONDRegular(mask)
        check_audio(config, kwargs, 0 if mask is None else count_clean(noisy_frames(mask)))
        return conds | self._avatar_conds(kwargs)

    def _avatar_conds(self, values: Mapping[str, Any]) -> dict[str, Any]:
        audio, reference = values.get(AUDIO), values.get(REFERENCE)
        conds: dict[str, Any] = {} if audio is None else {HEARD: AudioCond(Heard(audio))}
        if reference is not None:
            conds[SHOWN] = reference_cond(reference, self.process_latent_in(reference.latents))
        return conds

    def extra_conds_shapes(self, **kwargs: Any) -> dict[str, Any]:
        return {name: cond.size() for name, cond in self._avatar_conds(kwargs).items()}

    def process_latent_in(self, latent: Tensor) -> Tensor:
        check_latents(latent, self.diffusion_model.config)
        return super().process_latent_in(latent)

    def _apply_model(
        self, x: Tensor, t: Tensor, c_concat=None, c_crossattn=None, control=None, transformer_options=None, **kwargs
    ) -> Tensor:
        # Counted outside the network, where reading a value back would break a compiled graph in two.
        mask = kwargs.get("denoise_mask")
        noisy = None if mask is None else noisy_frames(mask)
        kwargs["num_cond_latents"] = self.latent_format.given = 0 if noisy is None else count_clean(noisy)
        kwargs["shared_timestep"] = bool((t == t[:1]).all()) and (noisy is None or bool((noisy == noisy[:1]).all()))
        for heard in kwargs.get(HEARD, ()):
            if heard.length != x.shape[2]:
                raise LongCatError(
                    f"the audio is of {heard.length} latent frames and the model was given {x.shape[2]}; context "
                    "windows of an avatar need a newer ComfyUI (0.33)"
                )
        options = {} if transformer_options is None else transformer_options
        self.network.patched_as = getattr(self, "current_weight_patches_uuid", None)
        with without_compiled_modules(self, self.own) as compilers:
            kwargs["prepared"] = self.network.prepare(x.device, self.compute_dtype(), options, compilers)
            return super()._apply_model(x, t, c_concat, c_crossattn, control, options, **kwargs)

    def process_timestep(self, timestep: Tensor, denoise_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        """Timesteps [B], or with a mask [B, T], 0 for conditioning frames."""
        return timestep if denoise_mask is None else timestep[:, None] * noisy_frames(denoise_mask)

    def scale_latent_inpaint(
        self, sigma: Tensor, noise: Tensor, latent_image: Tensor, denoise_mask: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        """The latents where the mask is 0: clean in conditioning frames, noised in frames that are masked in part.

        ComfyUI before 0.33 does not pass the mask here; all are clean then.
        """
        if denoise_mask is None:
            return latent_image
        noised = super().scale_latent_inpaint(sigma=sigma, noise=noise, latent_image=latent_image)
        return torch.where(noisy_frames(denoise_mask)[:, None, :, None, None], noised, latent_image)

    def resize_cond_for_context_window(self, cond_key: str, cond_value: Any, *args: Any, **kwargs: Any) -> Any:
        if cond_key == HEARD:
            return in_window(cond_value, args[0])
        # These have no time axis, even if one of their sizes equals the number of latent frames.
        return cond_value if cond_key in ("c_crossattn", SHOWN) else None

    def memory_required(self, input_shape: list[int], cond_shapes: Mapping[str, Any] | None = None) -> float:
        """Bytes of activations and keys for one forward on latents of this shape; ComfyUI counts the weights."""
        if len(input_shape) != 5:
            return 0.0  # not a video; `extra_conds` raises an error that says so
        dtype, shapes, config = self.compute_dtype(), cond_shapes or {}, self.network.config
        batch, channels, frames, *sides = input_shape
        if shapes.get(SHOWN):
            input_shape = [batch, channels, frames + 1, *sides]
        tokens = 1 + max((shape[1] for shape in shapes.get("c_crossattn", ())), default=0)
        tokens += max((audio_rows(config, length, voices) for voices, length in shapes.get(HEARD, ())), default=0)
        needed = text_bytes(config, batch, tokens, dtype.itemsize)
        return self.network.forward_bytes(input_shape, dtype) + needed


def check_latents(latents: Tensor | None, config: ModelConfig) -> None:
    if latents is None:
        return
    _, rows, columns = config.patch_size
    if latents.ndim != 5 or latents.shape[1] != config.in_channels:
        raise LongCatError(
            f"the latent is {list(latents.shape)} but LongCat-Video takes video latents [B, {config.in_channels}, T, "
            "H/8, W/8] of the Wan 2.1 VAE; use Empty LongCat Latent or a LongCat conditioning node"
        )
    if latents.shape[3] % rows or latents.shape[4] % columns:
        height, width = 8 * latents.shape[3], 8 * latents.shape[4]
        raise LongCatError(
            f"the latent is of a video of {height}x{width} (height x width) pixels; give multiples of "
            f"{8 * rows} and {8 * columns}"
        )
