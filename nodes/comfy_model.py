"""LongCat-Video as a native ComfyUI model: network, BaseModel, config, registration. The one bridge to ComfyUI.

All arithmetic is `longcat_core`'s. What is settled here: which ComfyUI value becomes which argument of the network,
and that the network's x0 - noise is the negative of the velocity that ComfyUI's flow models return.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import comfy.conds
import comfy.latent_formats
import comfy.model_base
import comfy.model_detection
import comfy.model_management
import comfy.ops
import comfy.patcher_extension
import comfy.supported_models
import comfy.supported_models_base
import comfy.utils
import torch
import torch.nn.functional as F
from torch import Tensor

from ..longcat_core.checkpoints.formats import FORMATS
from ..longcat_core.checkpoints.formats import detect as detect_form
from ..longcat_core.checkpoints.load import CONFIG_KEY, infer_config
from ..longcat_core.errors import CheckpointError, LongCatError
from ..longcat_core.generate.text import MAX_LENGTH
from ..longcat_core.model.config import ModelConfig
from ..longcat_core.model.text import trim_text
from ..longcat_core.model.transformer import LongCatTransformer
from ..longcat_core.optimize.attention import Kernels
from ..longcat_core.optimize.execution import Execution
from ..longcat_core.optimize.kernels import elementwise
from ..longcat_core.optimize.memory import forward_bytes, text_bytes
from ..longcat_core.optimize.switches import Optimizations
from ..longcat_core.sampling.frames import count_clean, noisy_frames
from ..longcat_core.sampling.schedules import SHIFT
from . import comfy_fp8
from .comfy_attention import user_kernels
from .comfy_caches import CONDITIONING_CACHE_KEY, TEXT_CACHE_KEY, read_text
from .comfy_weights import from_checkpoint, to_official

IMAGE_MODEL = "longcat_video"
# Keys of transformer_options that the pack's nodes set and the network reads.
OPTIMIZATIONS_KEY = "longcat_optimizations"
BLOCK_SPARSE_KEY = "longcat_block_sparse"
# Sets of switches whose executions a network keeps: clones of a MODEL in one workflow.
EXECUTIONS = 16


def _replaced(layer: torch.nn.Module) -> bool:
    """Whether someone's function stands in for the layer's own forward, as a bypass LoRA's does."""
    return getattr(layer.forward, "__func__", None) is not type(layer).forward


def _linear_fp32(layer: torch.nn.Module, x: Tensor) -> Tensor:
    """A layer in fp32 wherever its weights are and whatever they are stored in, with LoRAs on them applied."""
    x = x.float()
    if isinstance(layer, torch.nn.Linear) or _replaced(layer):
        # `comfy_cast_weights` is set on these layers below: they cast their weights to the input's dtype.
        return layer(x)
    # ComfyUI's quantized layer, which would quantize the input as well.
    weight, bias, stream = comfy.ops.cast_bias_weight(layer, x, offloadable=True)
    out = F.linear(x, weight, bias)
    comfy.ops.uncast_bias_weight(layer, weight, bias, stream)
    return out


def _is_streamed(block: torch.nn.Module, device: torch.device) -> bool:
    """Whether a weight of the block is elsewhere than on `device`, or is patched at its use."""
    return any(
        getattr(layer, "weight_function", None)
        or getattr(layer, "bias_function", None)
        or any(parameter.device != device for parameter in layer.parameters(recurse=False))
        for layer in block.modules()
    )


def _sliceable(layer: torch.nn.Module, x: Tensor) -> bool:
    """A layer that ComfyUI neither streams, casts, quantizes nor patches at use holds its whole weight, ready."""
    return (
        isinstance(layer, torch.nn.Linear)
        and not _replaced(layer)
        and not layer.comfy_cast_weights
        and not layer.weight_function
        and not layer.bias_function
        and layer.weight.dtype == x.dtype
        and layer.weight.device == x.device
    )


class Prepared(NamedTuple):
    """How one forward runs, chosen before it."""

    execution: Execution
    kernels: Kernels


class DiffusionModel(LongCatTransformer):
    """The network as ComfyUI builds and calls it. Clones of a MODEL share it, each with an execution of its own."""

    def __init__(
        self,
        *,
        image_model: str,
        dtype: torch.dtype | None = None,
        device: Any = None,
        operations: Any,
        fp8: bool = False,
        **config: Any,
    ) -> None:
        operations = type("Operations", (operations,), {"linear_fp32": staticmethod(_linear_fp32)})
        super().__init__(ModelConfig(**config), operations=operations, dtype=dtype, device=device)
        if fp8:
            comfy_fp8.install(self, self.config)
        for layer in self._fp32_layers():
            # fp32 input on a layer that does not cast raises; these must take it.
            layer.comfy_cast_weights = True
        # By what makes them; see `execution`.
        self.executions: dict[tuple, Execution] = {}

    def _fp32_layers(self) -> list[torch.nn.Module]:
        final = [self.final_layer.modulation, self.final_layer.linear]
        return [*self.time_embed, *(block.modulation for block in self.blocks), *final]

    def _apply(self, fn: Any, recurse: bool = True) -> DiffusionModel:
        # ComfyUI takes `dtype` for what it asked for, also while weights are not loaded or come as the file has them.
        return torch.nn.Module._apply(self, fn, recurse)

    def execution(self, dtype: torch.dtype, options: dict[str, Any]) -> Execution:
        """How a MODEL with these transformer_options runs, with activations in `dtype`; the same one for the same.

        One that has given up a lossy switch stays so until other switches have been in use.
        """
        key = dtype, options.get(OPTIMIZATIONS_KEY, Optimizations()), options.get(BLOCK_SPARSE_KEY)
        execution = self.executions.pop(key, None)
        if execution is None:
            execution = Execution(
                self,
                key[1],
                block_sparse=key[2],
                dtype=dtype,
                sliceable=_sliceable,
                uncompiled=_is_streamed,
                announce=lambda sentence: logging.warning("LongCat: %s", sentence),
            )
        # Those used last, in order of use. Each holds only its switches.
        self.executions = dict([*self.executions.items()][1 - EXECUTIONS :]) | {key: execution}
        return execution

    def prepare(self, device: torch.device, dtype: torch.dtype, options: dict[str, Any]) -> Prepared:
        """The execution and kernels of the MODEL that is about to run.

        Not a part of `forward`, so that a compiled graph of the whole network holds none of the look-ups.
        """
        comfy_fp8.prepare(self, device, dtype)
        execution = self.execution(dtype, options)
        own = execution.choose_kernels(device)
        return Prepared(execution, user_kernels(execution.requested, options, own))

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        context: Tensor | None = None,
        control: Any = None,
        transformer_options: dict[str, Any] | None = None,
        num_cond_latents: int = 0,
        shared_timestep: bool = False,
        prepared: Prepared | None = None,
        **unused: Any,
    ) -> Tensor:
        """Latents x [B, 16, T, H, W] -> flow velocity (noise - x0), the same shape, fp32.

        timestep [B] or [B, T] in 0..1000; context [B, L, caption], padded with zero rows; num_cond_latents: clean
        frames at the front of x; shared_timestep: all rows of timestep are the same.
        """
        options = {} if transformer_options is None else transformer_options
        kind = comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL
        wrappers = comfy.patcher_extension.get_all_wrappers(kind, options)
        executor = comfy.patcher_extension.WrapperExecutor.new_class_executor(self._run, self, wrappers)
        prepared = self.prepare(x.device, x.dtype, options) if prepared is None else prepared
        # A copy: EasyCache writes into the input, which in fp32 is the sampler's own tensor.
        return executor.execute(x.clone(), timestep, context, num_cond_latents, shared_timestep, prepared, options)

    def forward_bytes(self, latents: Sequence[int], dtype: torch.dtype, options: dict[str, Any] | None = None) -> int:
        """Peak bytes of the activations of one forward on latents of this shape in `dtype`."""
        switches = (options or {}).get(OPTIMIZATIONS_KEY, Optimizations())
        own = switches.fused_kernels and switches.explicit_fp32 and elementwise.takes(dtype)
        eight_bit = any(getattr(module, "eight_bit", False) for module in self.modules())
        return forward_bytes(self.config, latents, dtype.itemsize, own, eight_bit)

    def _run(
        self,
        x: Tensor,
        timestep: Tensor,
        context: Tensor,
        num_cond: int,
        shared: bool,
        prepared: Prepared,
        options: dict[str, Any],
    ) -> Tensor:
        execution, kernels = prepared
        texts = options.get(TEXT_CACHE_KEY)
        known = texts is not None and execution.optimizations.reuse_text and not torch.compiler.is_compiling()
        text = texts.get(execution, context) if known else read_text(execution, context)
        around = self._around_block(x, timestep, context, options)
        timestep = timestep[:1] if shared else timestep
        cache, holder = None, options.get(CONDITIONING_CACHE_KEY)
        if num_cond and holder is not None:
            room = self.forward_bytes(x.shape, x.dtype, options)
            cache = holder.get(execution, x[:, :, :num_cond], room, kernels)
            x, timestep = x[:, :, num_cond:], timestep[:, num_cond:]
        out = execution(
            x,
            timestep,
            text,
            num_cond_latents=0 if cache else num_cond,
            kv_cache=cache,
            kernels=kernels,
            around_block=around,
        )
        if not cache:
            return -out
        # The sampler puts the clean frames back itself. What the network returns for them is in guidance's sums, or
        # not where it is 0.
        known = cache.out if holder.exact else torch.zeros_like(cache.out)
        return -torch.cat((known.to(out).repeat(len(out) // len(known), 1, 1, 1, 1), out), dim=2)

    def _around_block(self, x: Tensor, timestep: Tensor, context: Tensor, options: dict[str, Any]) -> Any:
        """The blocks under ComfyUI's `patches_replace` hooks, or None where there is none."""
        replace = options.get("patches_replace", {}).get("dit", {})
        options["total_blocks"], options["block_type"] = len(self.blocks), "double"
        if not replace and "optimized_attention_override" not in options:
            return None

        def around(i: int, run: Any, tokens: Tensor) -> Tensor:
            options["block_index"] = i
            if ("double_block", i) not in replace:
                return run(tokens)
            values = {"img": tokens.flatten(1, 2), "txt": context, "vec": timestep, "pe": None}
            values["transformer_options"] = options
            original = {"original_block": lambda args: {"img": run(args["img"].view_as(tokens)).flatten(1, 2)}}
            return replace[("double_block", i)](values, original)["img"].view_as(tokens)

        return around


class TextCond(comfy.conds.CONDRegular):
    """Text [B, L, C] whose padding is cut; texts of other lengths join its batch, padded with zero rows."""

    def can_concat(self, other: TextCond) -> bool:
        one, two = self.cond, other.cond
        return one.shape[0] == two.shape[0] and one.shape[2] == two.shape[2] and one.device == two.device

    def concat(self, others: list[TextCond]) -> Tensor:
        texts = [self.cond, *(other.cond for other in others)]
        longest = max(text.shape[1] for text in texts)
        return torch.cat([F.pad(text, (0, 0, 0, longest - text.shape[1])) for text in texts])


class LongCatLatents(comfy.latent_formats.Wan21):
    """Wan 2.1 latents. Stock previews, which show frame 0, get the last frame: frame 0 may be the given image."""

    @staticmethod
    def latent_rgb_factors_reshape(latents: Tensor) -> Tensor:
        return latents[:, :, -1:] if latents.ndim == 5 else latents


class LongCatVideo(comfy.model_base.BaseModel):
    def __init__(self, model_config: LongCatConfig, device: Any = None) -> None:
        flow = comfy.model_base.ModelType.FLOW
        super().__init__(model_config, flow, device=device, unet_model=DiffusionModel)

    @property
    def network(self) -> DiffusionModel:
        """The network itself, even while TorchCompileModel has replaced it with a compiled module."""
        return getattr(self.diffusion_model, "_orig_mod", self.diffusion_model)

    def compute_dtype(self) -> torch.dtype:
        """The dtype of activations."""
        return self.manual_cast_dtype or self.get_dtype()

    def extra_conds(self, **kwargs: Any) -> dict[str, Any]:
        """The conditioning of one prompt for all steps. Raises LongCatError for what the network cannot take."""
        config = self.diffusion_model.config
        _check_latents(kwargs.get("noise"), config)
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
        return conds

    def process_latent_in(self, latent: Tensor) -> Tensor:
        _check_latents(latent, self.diffusion_model.config)
        return super().process_latent_in(latent)

    def _apply_model(
        self, x: Tensor, t: Tensor, c_concat=None, c_crossattn=None, control=None, transformer_options=None, **kwargs
    ) -> Tensor:
        # Counted here and not in the network, where reading a value back would break a compiled graph in two.
        mask = kwargs.get("denoise_mask")
        noisy = None if mask is None else noisy_frames(mask)
        kwargs["num_cond_latents"] = 0 if noisy is None else count_clean(noisy)
        kwargs["shared_timestep"] = bool((t == t[:1]).all()) and (noisy is None or bool((noisy == noisy[:1]).all()))
        options = {} if transformer_options is None else transformer_options
        kwargs["prepared"] = self.network.prepare(x.device, self.compute_dtype(), options)
        return super()._apply_model(x, t, c_concat, c_crossattn, control, options, **kwargs)

    def process_timestep(self, timestep: Tensor, denoise_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        """Timesteps [B], or [B, T] with 0 on given frames where there is a mask."""
        return timestep if denoise_mask is None else timestep[:, None] * noisy_frames(denoise_mask)

    def scale_latent_inpaint(
        self, sigma: Tensor, noise: Tensor, latent_image: Tensor, denoise_mask: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        """What stands where the mask is 0: given frames clean; the given parts of other frames noised like the rest.

        ComfyUI before 0.33 tells no mask here; all given latents are clean then.
        """
        if denoise_mask is None:
            return latent_image
        noised = super().scale_latent_inpaint(sigma=sigma, noise=noise, latent_image=latent_image)
        return torch.where(noisy_frames(denoise_mask)[:, None, :, None, None], noised, latent_image)

    def resize_cond_for_context_window(self, cond_key: str, cond_value: Any, *args: Any, **kwargs: Any) -> Any:
        # Text has no time axis, whatever length its channels happen to have.
        return cond_value if cond_key == "c_crossattn" else None

    def memory_required(self, input_shape: list[int], cond_shapes: Mapping[str, Any] | None = None) -> float:
        """Bytes of one forward on latents of this shape, keys and values of the text included; weights are ComfyUI's to
        count."""
        if len(input_shape) != 5:
            return 0.0  # no video: refused in a sentence as soon as sampling begins
        dtype = self.compute_dtype()
        tokens = max((shape[1] for shape in (cond_shapes or {}).get("c_crossattn", ())), default=0)
        text = text_bytes(self.network.config, input_shape[0], tokens + 1, dtype.itemsize)
        return self.network.forward_bytes(input_shape, dtype) + text


def _check_latents(latents: Tensor | None, config: ModelConfig) -> None:
    if latents is None:
        return
    _, rows, columns = config.patch_size
    if latents.ndim != 5 or latents.shape[1] != config.in_channels:
        raise LongCatError(
            f"the latent is {list(latents.shape)} but LongCat-Video takes video latents [B, {config.in_channels}, T, "
            "H/8, W/8] of the Wan 2.1 VAE; use EmptyHunyuanLatentVideo or a LongCat conditioning node"
        )
    if latents.shape[3] % rows or latents.shape[4] % columns:
        height, width = 8 * latents.shape[3], 8 * latents.shape[4]
        raise LongCatError(
            f"the latent is of a video of {height}x{width} (height x width) pixels; give multiples of "
            f"{8 * rows} and {8 * columns}"
        )


class LongCatConfig(comfy.supported_models_base.BASE):
    unet_config = {"image_model": IMAGE_MODEL}  # noqa: RUF012 - ComfyUI reads these off the class
    unet_extra_config = {}  # noqa: RUF012
    sampling_settings = {"shift": SHIFT, "multiplier": 1000}  # noqa: RUF012
    latent_format = LongCatLatents
    supported_inference_dtypes = [torch.bfloat16, torch.float16, torch.float32]  # noqa: RUF012
    vae_key_prefix = ["vae."]  # noqa: RUF012
    text_encoder_key_prefix = ["text_encoders."]  # noqa: RUF012

    def get_model(self, state_dict: Mapping[str, Tensor], prefix: str = "", device: Any = None) -> LongCatVideo:
        if self.custom_operations is comfy_fp8.Rowwise:
            # Not operations of all layers: which layers become 8-bit ones, the network says.
            self.custom_operations = None
            self.unet_config = {**self.unet_config, "fp8": True}
        # ComfyUI runs nodes in inference mode, whose tensors no gradient may pass: training nodes need others.
        with torch.inference_mode(False):
            return LongCatVideo(self, device=device)

    def inpaint_model(self) -> bool:
        return False

    def model_config(self) -> ModelConfig:
        names = ModelConfig.__dataclass_fields__
        return ModelConfig(**{name: value for name, value in self.unet_config.items() if name in names})

    def process_unet_state_dict(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        return from_checkpoint(state_dict, self.model_config(), rowwise=bool(self.unet_config.get("fp8")))

    def process_unet_state_dict_for_saving(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        named = to_official(state_dict, self.model_config())
        return comfy.utils.state_dict_prefix_replace(named, {"": "model.diffusion_model."})


def detect(
    state_dict: Mapping[str, Tensor], prefix: str = "", metadata: Mapping[str, str] | None = None
) -> dict | None:
    """The unet_config of a LongCat-Video checkpoint of any form, or None for any other file.

    PixArt and Wan have some of the names that the headless loader looks for: here all must be there, and the patch
    embedding must be a video's.
    """
    form = next((form for form in FORMATS if _is_video(state_dict, f"{prefix}{form.outer['patch_embed'][0]}")), None)
    if form is None:
        return None
    names = [key.removeprefix(prefix) for key in state_dict if key.startswith(prefix)]
    try:
        known = detect_form(names, "the checkpoint")
    except CheckpointError:
        return None
    if known != (form, "") or not all(any(name.startswith(mark) for name in names) for mark in form.signature):
        return None
    shapes = {name: tuple(state_dict[prefix + name].shape) for name in names}
    values = infer_config(form, shapes, "the checkpoint").to_dict()
    stored = json.loads((metadata or {}).get(CONFIG_KEY) or "{}")
    if isinstance(stored, dict) and "text_tokens_zero_pad" in stored:
        values["text_tokens_zero_pad"] = bool(stored["text_tokens_zero_pad"])
    return {"image_model": IMAGE_MODEL, **values}


def _is_video(state_dict: Mapping[str, Tensor], module: str) -> bool:
    embedding = state_dict.get(f"{module}.weight")
    return embedding is not None and embedding.ndim == 5


def register() -> None:
    """Make ComfyUI's own loaders recognize LongCat-Video files; a second call, or copy of the pack, replaces it."""
    models = comfy.supported_models.models
    models[:] = [model for model in models if model.unet_config.get("image_model") != IMAGE_MODEL]
    models.append(LongCatConfig)
    current = comfy.model_detection.detect_unet_config
    others = getattr(current, "longcat_wraps", current)

    def detect_unet_config(state_dict, key_prefix, metadata=None):
        # First, because official LongCat names send ComfyUI's own tests down another model's branch.
        found = detect(state_dict, key_prefix, metadata)
        return others(state_dict, key_prefix, metadata=metadata) if found is None else found

    detect_unet_config.longcat_wraps = others
    comfy.model_detection.detect_unet_config = detect_unet_config
