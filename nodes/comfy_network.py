"""The network inside ComfyUI: layers that ComfyUI streams, casts and patches, its hooks, and the call itself.

The core does all arithmetic. This file decides which ComfyUI value becomes which argument of the network, and negates
its output: the core's is x0 - noise, ComfyUI's flow models return the velocity noise - x0.
"""

from __future__ import annotations

import logging
from collections.abc import Container, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import comfy.ops
import comfy.patcher_extension
import torch
import torch.nn.functional as F
from torch import Tensor

from ..longcat_core.generate.progress import COMPILING
from ..longcat_core.measure.probe import Probed
from ..longcat_core.model import layers
from ..longcat_core.model.config import ModelConfig
from ..longcat_core.model.layers import Norm
from ..longcat_core.model.transformer import LongCatTransformer
from ..longcat_core.optimize.attention import Kernels
from ..longcat_core.optimize.compilation import compiles
from ..longcat_core.optimize.compiled_blocks import Compilers
from ..longcat_core.optimize.execution import AroundBlock, Execution
from ..longcat_core.optimize.kernels import elementwise
from ..longcat_core.optimize.memory import forward_bytes
from ..longcat_core.optimize.plan import Work
from ..longcat_core.optimize.sparse.settings import Sparse
from ..longcat_core.optimize.switches import Optimizations
from ..longcat_core.sampling.avatar import ReferenceFrame
from . import comfy_fp8
from .comfy_attention import OVERRIDE, ComfyAttention, add_preferences, preferences, with_comfyui_attention
from .comfy_avatar import Heard
from .comfy_caches import CONDITIONING_CACHE_KEY, TEXT_CACHE_KEY, read_text
from .comfy_fp8 import is_replaced
from .comfy_prefetch import Prefetch, prefetching
from .comfy_reading import Unread
from .host import running_workers
from .progress import begins

# Keys of transformer_options that the pack's nodes set and the network reads.
OPTIMIZATIONS_KEY = "longcat_optimizations"
BLOCK_SPARSE_KEY = "longcat_block_sparse"
SPARSE_KEY = "longcat_sparse"
GPUS_KEY = "longcat_gpus"
# The probe of a calibration that passes go through.
PROBE_KEY = "longcat_probe"
# Number of executions that a network keeps, one for each set of switches on clones of its MODEL.
EXECUTIONS = 16


def linear_fp32(layer: torch.nn.Module, x: Tensor) -> Tensor:
    """Apply a layer in fp32, wherever and in whichever dtype ComfyUI keeps its weights, with LoRAs applied to them."""
    x = x.float()
    if is_replaced(layer) or not quantizes_input(layer):
        # Such layers cast their weights to the input's dtype, since `DiffusionModel` sets `comfy_cast_weights`.
        return layer(x)
    weight, bias, stream = comfy.ops.cast_bias_weight(layer, x, offloadable=True)
    out = F.linear(x, weight, bias)
    comfy.ops.uncast_bias_weight(layer, weight, bias, stream)
    return out


def quantizes_input(layer: torch.nn.Module) -> bool:
    """Whether the layer is one of ComfyUI's own that may do more with its input than multiply it by its weight: those
    of quantized files, of `--fast fp8_matrix_mult` and of the weight dtype fp8_e4m3fn_fast."""
    plain = comfy.ops.disable_weight_init.Linear.forward_comfy_cast_weights
    return type(layer).__module__ == plain.__module__ and type(layer).forward_comfy_cast_weights is not plain


def affine(
    norm: Norm, device: torch.device, dtype: torch.dtype, kept: Container[torch.dtype] = ()
) -> tuple[Tensor, ...]:
    """Parameters of a norm as `layers.affine` gives them, if ComfyUI streams them or patches them at use too."""
    patched = bool(norm.weight_function or norm.bias_function)
    if not patched and all(parameter.device == device for parameter in norm.parameters()):
        return layers.affine(norm, device, dtype, kept)
    dtype = norm.weight.dtype if norm.weight.dtype in kept and not patched else dtype
    options = {"device": device, "dtype": dtype, "bias_dtype": dtype, "offloadable": True}
    weight, bias, stream = comfy.ops.cast_bias_weight(norm, **options)
    # Copies: after use is over, other weights may be written to where these lie.
    copies = tuple(parameter.clone() for parameter in (weight, bias) if parameter is not None)
    comfy.ops.uncast_bias_weight(norm, weight, bias, stream)
    return copies


def is_streamed(block: torch.nn.Module, device: torch.device) -> bool:
    """Whether a weight of the block is not on `device`, or is patched when it is used."""
    return any(
        getattr(layer, "weight_function", None)
        or getattr(layer, "bias_function", None)
        or any(parameter.device != device for parameter in layer.parameters(recurse=False))
        for layer in block.modules()
    )


def sliceable(layer: torch.nn.Module, x: Tensor) -> bool:
    """Whether `layer.weight` can be used as it is: ComfyUI does not stream, cast, quantize or patch it at use."""
    return (
        isinstance(layer, torch.nn.Linear)
        and not is_replaced(layer)
        and not layer.comfy_cast_weights
        and not layer.weight_function
        and not layer.bias_function
        and layer.weight.dtype == x.dtype
        and layer.weight.device == x.device
    )


def _patched(options: dict[str, Any]) -> bool:
    """Whether nodes change what blocks compute, and with it the keys of conditioning frames: in this pass only, as
    skip-layer guidance does, or at some steps."""
    return bool(options.get("patches_replace", {}).get("dit") or options.get("patches", {}).get("double_block"))


class Prepared(NamedTuple):
    """How one forward runs; chosen beforehand."""

    execution: Execution
    kernels: Kernels
    compilers: Compilers | None = None


def step_at(sigmas: Tensor, timestep: Tensor) -> int:
    """Which step of a run at `sigmas` evaluates the model at `timestep`, counted from 0."""
    # Samplers call with rounded sigmas, and some between two steps.
    return int((sigmas > float(timestep.max()) * (1 + 1e-6)).sum())


def _progress(options: dict[str, Any]) -> float | None:
    """The share of a sampler's steps that is done, 0 <= progress < 1; None outside of sampling."""
    sigmas, now = options.get("sample_sigmas"), options.get("sigmas")
    if sigmas is None or now is None or len(sigmas) < 2:
        return None
    return min(step_at(sigmas, now), len(sigmas) - 2) / (len(sigmas) - 1)


def _announce(sentence: str) -> None:
    logging.warning("LongCat: %s", sentence)
    if compiles(sentence):
        begins(COMPILING)


class DiffusionModel(LongCatTransformer):
    """The network as ComfyUI builds and calls it. Clones of a MODEL share it; each has an execution of its own."""

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
        # ComfyUI-GGUF passes an instance.
        base = operations if isinstance(operations, type) else type(operations)
        operations = type(
            "Operations", (base,), {"linear_fp32": staticmethod(linear_fp32), "affine": staticmethod(affine)}
        )
        super().__init__(ModelConfig.from_dict(config), operations=operations, dtype=dtype, device=device)
        if fp8:
            comfy_fp8.install(self, self.config)
        for layer in self.fp32_layers():
            # These take fp32 input, which ComfyUI's layers refuse unless they cast their weights.
            layer.comfy_cast_weights = True
        for module in self.modules():
            if isinstance(module, Norm):
                # What makes ComfyUI stream a module and patch it with LoRAs wherever it lies.
                module.comfy_cast_weights, module.weight_function, module.bias_function = False, [], []
        add_preferences(self.blocks)
        # In order of use, by the arguments that they were made from; see `execution`.
        self.executions: dict[tuple, Execution] = {}
        self.said: set[str] = set()
        # Which patches ComfyUI's weights have; `LongCatVideo` says so before each pass.
        self.patched_as: Any = None
        # Settings of sparse attention that the log has.
        self.logged: set[Sparse] = set()

    def fp32_layers(self) -> list[torch.nn.Module]:
        final = [self.final_layer.modulation, self.final_layer.linear]
        names = ("modulation",) if self.config.audio is None else ("modulation", "audio_modulation")
        return [*self.time_embed, *(getattr(block, name) for block in self.blocks for name in names), *final]

    def _apply(self, fn: Any, recurse: bool = True) -> DiffusionModel:
        # Keeps `dtype`: ComfyUI reads it as the dtype that it asked for, even if weights have the file's dtype for now.
        return torch.nn.Module._apply(self, fn, recurse)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        tensors = state_dict.read(self, assign) if isinstance(state_dict, Unread) else state_dict
        return super().load_state_dict(tensors, strict, assign)

    def execution(self, dtype: torch.dtype, options: dict[str, Any]) -> Execution:
        """How a MODEL with these transformer_options runs, with activations in `dtype`.

        Equal arguments give the same execution, so that a lossy switch that the guard turned off stays off.
        """
        sparse = options.get(SPARSE_KEY)
        if sparse is not None and options.get(OVERRIDE) is not None:
            # It is another node's choice for this very MODEL, and may be sparse itself.
            self._say("an attention override set by another node takes the place of sparse attention")
            sparse = None
        key = dtype, options.get(OPTIMIZATIONS_KEY, Optimizations()), options.get(BLOCK_SPARSE_KEY), sparse
        execution = self.executions.pop(key, None)
        if execution is None:
            execution = Execution(
                self,
                key[1],
                block_sparse=key[2],
                sparse=sparse,
                dtype=dtype,
                sliceable=sliceable,
                uncompiled=is_streamed,
                announce=_announce,
            )
        # Taken out above, it is the last in order of use again. Each holds only its switches.
        self.executions[key] = execution
        if len(self.executions) > EXECUTIONS:
            del self.executions[next(iter(self.executions))]
        return execution

    def _say(self, sentence: str) -> None:
        """Announce it, once for this network."""
        if sentence not in self.said:
            self.said.add(sentence)
            _announce(sentence)

    def prepare(
        self, device: torch.device, dtype: torch.dtype, options: dict[str, Any], compilers: Compilers | None = None
    ) -> Prepared:
        """The execution and kernels of the MODEL that is about to run.

        compilers: what compiles a block, where another node than ours asked for it.
        """
        comfy_fp8.prepare(self, device, dtype)
        execution = self.execution(dtype, options)
        if execution.sparse is not None and execution.sparse not in self.logged:
            self.logged.add(execution.sparse)
            if words := execution.sparse_in_words(device):
                logging.info("LongCat: sparse attention: %s", words)
        kernels = execution.choose_kernels(device)
        sparse = execution.block_sparse is not None
        chosen = with_comfyui_attention(kernels, execution.requested, options, preferences(self.blocks), sparse)
        return Prepared(execution, chosen, compilers)

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
        heard: tuple[Heard, ...] = (),
        reference: ReferenceFrame | None = None,
        **unused: Any,
    ) -> Tensor:
        """Latents x [B, 16, T, H, W] -> flow velocity (noise - x0), the same shape, fp32.

        timestep [B] or [B, T] in 0..1000; context [B, L, caption], padded with zero rows; num_cond_latents: number of
        conditioning frames at the front of x; shared_timestep: whether all rows of timestep are equal. heard: what an
        avatar hears, in each of as many equal parts of the batch. reference: a clean frame in front of x, not of it.
        """
        options = {} if transformer_options is None else transformer_options
        kind = comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL
        wrappers = comfy.patcher_extension.get_all_wrappers(kind, options)
        executor = comfy.patcher_extension.WrapperExecutor.new_class_executor(self._run, self, wrappers)
        prepared = self.prepare(x.device, x.dtype, options) if prepared is None else prepared
        # A copy: EasyCache writes into the input, which in fp32 is the sampler's own tensor.
        given = num_cond_latents, shared_timestep, prepared, heard, reference
        return executor.execute(x.clone(), timestep, context, *given, options)

    def forward_bytes(self, latents: Sequence[int], dtype: torch.dtype, options: dict[str, Any] | None = None) -> int:
        """Peak bytes of the activations of one forward on latents of this shape in `dtype`."""
        switches = (options or {}).get(OPTIMIZATIONS_KEY, Optimizations())
        fused = switches.fused_kernels and switches.explicit_fp32 and elementwise.takes(dtype)
        eight_bit = any(getattr(module, "eight_bit", False) for module in self.modules())
        return forward_bytes(self.config, latents, dtype.itemsize, fused, eight_bit)

    def _run(
        self,
        x: Tensor,
        timestep: Tensor,
        context: Tensor,
        num_cond: int,
        shared: bool,
        prepared: Prepared,
        heard: tuple[Heard, ...],
        reference: ReferenceFrame | None,
        options: dict[str, Any],
    ) -> Tensor:
        execution, kernels, compilers = prepared
        # MODELs with equal switches share an execution.
        execution.ranks = self._ranks(options, x, num_cond)
        lead, apart = 0, {}
        if reference is not None:
            lead, num_cond, apart = 1, num_cond + 1, {"reference": reference.at}
            x = torch.cat((reference.latents.to(x).expand(len(x), -1, -1, -1, -1), x), dim=2)
            timestep = timestep[:, None].expand(-1, x.shape[2] - 1) if timestep.ndim == 1 else timestep
            timestep = F.pad(timestep, (1, 0))
        by_comfyui = isinstance(kernels.attend, ComfyAttention)
        if by_comfyui:
            # ComfyUI and its wrappers copy the options on their way here, and an override reads `block_index`.
            kernels.attend.options = options
        texts = options.get(TEXT_CACHE_KEY)
        reuse = texts is not None and execution.optimizations.reuse_text and not torch.compiler.is_compiling()
        text = texts.get(execution, context, heard) if reuse else read_text(execution, context, heard)
        prefetch = prefetching(self.blocks, x.device, x.dtype, options, self.fp32_layers())
        around = self._around_block(x, timestep, context, options, prefetch, always=by_comfyui)
        timestep = timestep[:1] if shared else timestep
        cache, caches = None, options.get(CONDITIONING_CACHE_KEY)
        if num_cond and caches is not None and not _patched(options):
            activations = self.forward_bytes(x.shape, x.dtype, options)
            cache = caches.get(execution, x[:, :, :num_cond], activations, kernels, around, **apart)
            x, timestep = x[:, :, num_cond:], timestep[:, num_cond:]
        run = execution if (probe := options.get(PROBE_KEY)) is None else Probed(execution, probe)
        out = run(
            x,
            timestep,
            text,
            num_cond_latents=0 if cache else num_cond,
            kv_cache=cache,
            kernels=kernels,
            around_block=around,
            compilers=compilers,
            progress=_progress(options) if execution.sparse is not None else None,
            **apart,
        )
        if not cache:
            if num_cond and caches is not None and not caches.exact:
                out[:, :, :num_cond] = 0
            return -out[:, :, lead:]
        # The sampler restores the conditioning frames, but guidance sums over the network's output for them too; with
        # zeros they drop out of the sums.
        clean = cache.out if caches.exact else torch.zeros_like(cache.out)
        return -torch.cat((clean.to(out).repeat(len(out) // len(clean), 1, 1, 1, 1)[:, :, lead:], out), dim=2)

    def _ranks(self, options: dict[str, Any], x: Tensor, num_cond: int) -> Any:
        """What runs passes on several GPUs, or None."""
        gpus = options.get(GPUS_KEY)
        if torch.compiler.is_compiling():
            return None
        if gpus is None:
            if (workers := running_workers()) is not None:
                workers.rest()
            return None
        # Imports torch.distributed.
        from .comfy_ranks import WORKERS, bypassed

        if bypassed(self):
            self._say("a LoRA that bypasses the weights runs on one GPU; load it by LoraLoaderModelOnly")
            return None
        # A batch of both halves of guidance.
        guided = len(set(options.get("cond_or_uncond", ()))) == 2 and len(x) % 2 == 0
        latents = (len(x) // 2 if guided else len(x), *x.shape[1:])
        work = Work(latents, guided, num_cond, parts=2 if guided else None)
        return WORKERS.leader(self, gpus, x.dtype, x.device, work)

    def _around_block(
        self,
        x: Tensor,
        timestep: Tensor,
        context: Tensor,
        options: dict[str, Any],
        prefetch: Prefetch | None,
        always: bool,
    ) -> AroundBlock | None:
        """What ComfyUI wants around each block: its patches, the weights of the next block, and the block's number.

        None if nothing needs it. always: whether attention reads the number.
        """
        replace = options.get("patches_replace", {}).get("dit", {})
        after = options.get("patches", {}).get("double_block", ())
        options["total_blocks"], options["block_type"] = len(self.blocks), "double"
        if not (replace or after or prefetch or always):
            return None

        def around(i: int, run: Any, tokens: Tensor) -> Tensor:
            options["block_index"] = i
            values = {"img": tokens.flatten(1, 2), "txt": context, "vec": timestep, "pe": None}
            values["transformer_options"] = options
            with nullcontext() if prefetch is None else prefetch(i):
                if ("double_block", i) in replace:
                    original = {"original_block": lambda args: {"img": run(args["img"].view_as(tokens)).flatten(1, 2)}}
                    out = replace[("double_block", i)](values, original)["img"].view_as(tokens)
                else:
                    out = run(tokens)
            for patch in after:
                values |= {"img": out.flatten(1, 2), "x": x, "block_index": i, "img_offset": 0}
                out = patch(values).get("img", out).view_as(tokens)
            return out

        # Loading the weights of the next block is this process's own affair.
        around.changes = bool(replace or after or always)  # type: ignore[attr-defined]
        return around
