"""`Pipeline`: LongCat-Video with its VAE and text encoder, loaded and ready for every task."""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from ..checkpoints.adapted import RuntimeLoras
from ..checkpoints.load import load_transformer
from ..checkpoints.lora import Lora, check_loras
from ..checkpoints.merged import MergedLoras
from ..checkpoints.reader import Watch
from ..errors import CheckpointError, LongCatError, check_choice, check_type, is_whole
from ..optimize.compilation import compiles
from ..optimize.plan import Plan, Work, apply_plan, smaller
from ..optimize.quantization import Policy
from ..optimize.requirement import Inputs
from ..optimize.switches import Optimizations
from ..parallel.devices import AUTO, Gpus, devices_of
from ..parallel.layout import layout_of, shrunk
from ..parallel.led_vae import LedVAE
from ..parallel.mirror import share
from ..parallel.start import gathers_fast, started
from ..parallel.torchrun import torchrun_size
from ..sampling.sampler import check_finite, sample
from ..sampling.schedules import Schedule
from .calibration import Calibration, check_fits
from .engine import Denoising, Engine
from .inputs import check_callback, check_tensor, device_of, dtype_of, loras_of
from .loading import OnLoad, load_both, overlaps
from .opened import OpenedModel, open_model
from .paths import ModelPaths
from .placement import Placement
from .progress import COMPILING, DECODING, ENCODING, LOADING_TEXT
from .request import RELEASED, Defaults, FilledRequest, check_text
from .speed_fit import check_speed, fit_loading
from .speeds import BASE, EXACT, Speed
from .text_cache import CachedTextEncoder, TextCache
from .turns import Turns
from .vae import VideoVAE, load_vae
from .warming import warm_bytes, warm_up, warming

if TYPE_CHECKING:
    from ..optimize.optimized import OptimizedTransformer

# `merged` adds LoRAs to the weights, at no cost while sampling; `runtime` keeps them beside the weights, so that
# strengths change at once.
LoraMode = Literal["merged", "runtime"]
# So many prompts are encoded while the model is loaded: they take up to 8 MB each in CPU memory.
PREPARED = 128


class PipelineLoras(Sequence[Lora]):
    """The LoRAs of a pipeline as pairs of file and strength, read from it whenever they are asked for."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline

    def __len__(self) -> int:
        return len(self._pipeline._active)

    def __getitem__(self, at: Any) -> Any:
        return self._pipeline._active[at]

    def __repr__(self) -> str:
        return repr(list(self))

    def set(self, lora: str | Path | Sequence[Lora] | None = None) -> list[str]:
        """`Pipeline.set_loras`."""
        return self._pipeline.set_loras(lora)


@dataclass
class Pipeline(Engine):
    """A loaded model with its VAE and text encoder.

    plan: what is kept in CPU memory, or run in parts. plan_note: a sentence for a user about that and about how several
    GPUs share the work, or "".
    """

    model: OptimizedTransformer
    vae: VideoVAE
    text_encoder: CachedTextEncoder
    defaults: Defaults = RELEASED
    plan: Plan = field(default_factory=Plan)
    plan_note: str = ""
    # Exchanges the transformer's LoRAs; None if it does not come from a checkpoint.
    _exchange: MergedLoras | RuntimeLoras | None = None
    _active: tuple[Lora, ...] = ()
    _turns: Turns = field(default_factory=Turns, init=False, repr=False, compare=False)

    @classmethod
    def load(
        cls,
        paths: ModelPaths | OpenedModel | None = None,
        *,
        dtype: str | torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        optimizations: Optimizations | None = None,
        fp8: bool | None = None,
        lora: str | Path | Sequence[Lora] | None = None,
        lora_mode: LoraMode = "merged",
        work: Work | None = None,
        least: Plan | None = None,
        memory: int | None = None,
        speed: Speed = EXACT,
        text_cache: Path | None = None,
        prompts: Sequence[str] = (),
        on_load: OnLoad | None = None,
        gpus: Gpus = 1,
    ) -> Pipeline:
        """Load the transformer, the VAE and the text encoder.

        paths: of the model, or what `open_model` returned, with its LoRAs; None: the nano model. fp8: quantize the
        transformer's large layers to 8 bits (lossy); None: what `speed` says. lora: a LoRA file, or pairs of file and
        strength. lora_mode: `merged` into the weights (before they are quantized), or `runtime`, beside them.
        work: the largest sampling to come; the fastest plan that fits a GPU's free memory is chosen for it. None:
        everything goes on the device. least: what the plan must have in any case. memory: bytes it may need at most.
        speed: of requests that name none; it also decides `fp8` where that is None, and the attention where the
        optimizations leave it at auto. What the machine lacks is left out; `notes` of a filled request say so.
        text_cache: a folder that keeps encodings of prompts under hashes, such as `text_cache.cache_folder()`;
        they do not change results. prompts: all that are to come, negative ones too. They are encoded now, and on a GPU
        the text encoder goes then; if the folder has them all, it is not loaded. It is loaded again for another prompt.
        on_load: called in this thread with what is loaded (a word of `progress`: LOADING_TEXT, ENCODING, LOADING), the
        bytes that are read and those of all, 0 of 0 for ENCODING; what it raises ends the load.
        gpus: how many share each video, `device` and others like it; "auto": as many like it as make `work`
        faster, by calculation from measured speeds; None: those of torchrun. The others have processes that end with
        this one, or with the next load on other GPUs.

        On a GPU the transformer is read while the text encoder works, if both fit.
        Several threads may use a pipeline: each call waits for those of other threads. Raises LongCatError for files
        that do not fit the network or each other, and for arguments of the wrong type.
        """
        dtype, device = dtype_of(dtype), device_of(device)
        devices = devices_of(gpus, device)
        optimizations = Optimizations() if optimizations is None else optimizations
        check_type("optimizations", optimizations, Optimizations, "an Optimizations")
        check_choice("the LoRA mode", lora_mode, get_args(LoraMode))
        check_type("fp8", fp8, (bool, type(None)), "True or False")
        check_speed(speed)
        for name, value, kind in (("work", work, Work), ("least", least, Plan)):
            check_type(name, value, (kind, type(None)), f"a {kind.__name__} or None")
        check_type("prompts", prompts, (list, tuple), "a list of texts")
        for prompt in prompts:
            check_text("prompt", prompt)
        check_callback(on_load, "what takes the progress of loading")
        if memory is not None and not (is_whole(memory) and memory > 0):
            raise LongCatError(f"memory cannot be {memory!r}; give a number of bytes, or None for what is free")
        if isinstance(paths, OpenedModel):
            if lora is not None:
                raise LongCatError("an opened model has its LoRAs already; give them to open_model instead")
            opened = paths
        else:
            opened = open_model(paths, lora, optimizations.attention)
        paths, loras = opened.paths, opened.loras
        # Headers first, because they reveal another model's file at once; the transformer's large weights last.
        checkpoint = opened.checkpoint
        config = checkpoint.config
        if least is not None and len(devices) == 1:
            least = replace(least, sharded=0)
        if least is not None and (most := least.streamed + least.sharded) > config.depth:
            what = "streamed and sharded" if least.sharded else "streamed"
            raise LongCatError(f"{most} {what} blocks are more than the model's {config.depth}; give fewer")
        check_loras(loras, config)
        vae = load_vae(paths.vae, dtype=dtype, device=device)
        text_encoder = _text_encoder(paths.text_encoder, dtype, device, text_cache)
        if text_encoder.channels != config.caption_channels:
            raise CheckpointError(
                f"text encoder {paths.text_encoder} gives {text_encoder.channels} channels but the model takes "
                f"{config.caption_channels}; give the text encoder that belongs to it"
            )
        inputs = Inputs(device, dtype, config.head_dim, False)
        named = None if optimizations.attention == "auto" else optimizations.attention
        loaded = fit_loading(speed, BASE, inputs, config, fp8, named)
        optimizations = replace(optimizations, attention=loaded.attention)
        policy = Policy() if loaded.fp8 else None
        runtime = lora_mode == "runtime"
        # LoRAs beside the weights are on the device under every plan.
        others = sum(lora.path.stat().st_size for lora in loras) if runtime else 0
        room = Placement(
            *(config, dtype, device, policy, optimizations, work, text_encoder.nbytes, others, memory),
            ranks=len(devices),
            sharding=gathers_fast(devices),
        )
        prepared = 0 < len(prompts) <= PREPARED
        # What is read for the prompts to come is not needed later.
        text_goes = prepared and device.type == "cuda"
        plan, plan_note = room.plan(least, text_goes)
        asked = least is not None and least.stream_text_encoder
        # Without room beside the network, one that goes has the GPU to itself before.
        before = plan.stream_text_encoder and text_goes and not asked and room.has_room_before(text_encoder.nbytes)
        if plan.stream_text_encoder and not before:
            text_encoder.stream(device)
        streamed, sharded = plan.places(config.depth)
        switches = replace(optimizations, split_guidance=plan.split_guidance)
        tell = on_load or (lambda stage, done, of: None)

        def text(check: Callable[[], None]) -> None:
            if prepared:
                check()
                tell(ENCODING, 0, 0)
                text_encoder.prepare(prompts, check, lambda done, of: tell(LOADING_TEXT, done, of))
            if text_goes:
                text_encoder.release()
            if before:
                text_encoder.stream(device)
                _empty_cache()

        def transformer(watch: Watch) -> OptimizedTransformer:
            return load_transformer(
                checkpoint,
                dtype=dtype,
                device=device,
                optimizations=switches,
                fp8=policy,
                lora=() if runtime else loras,
                # Rank 0 keeps blocks that are divided among the GPUs in CPU memory too.
                streamed=(*streamed, *sharded),
                watch=watch,
            )

        def warm(_: object) -> None:
            whole = work is not None and warm_bytes(config, dtype, work) <= spare
            warm_up(config, switches, dtype, device, policy, work if whole else None)

        beside, spare = overlaps(device), room.spare(plan)
        # The processes of torchrun are as many as somebody asked for.
        counts = room.counts(plan) if gpus == AUTO and not torchrun_size() else [len(devices)]
        with started(devices) as ready:
            # Before other threads start: beside their imports it takes ten times as long.
            if not prompts or text_encoder.missing(prompts):
                text_encoder.load(lambda done, of: tell(LOADING_TEXT, done, of))
            with warming(device, warm) if beside else nullcontext():
                model = load_both(text, transformer, tell, device, beside and not plan.stream_text_encoder)
            exchange = RuntimeLoras(model, loras) if runtime else MergedLoras(model, checkpoint, loras)
            active = tuple((lora.path, lora.strength) for lora in loras)
            defaults = replace(paths.defaults, speed=speed, loaded=loaded, audio=config.audio)
            pipeline = cls(model, vae, text_encoder, defaults, plan, plan_note, exchange, active)
            group = ready()
            if group is not None and work is not None:
                layout = layout_of(group, config, work, dtype, plan.split_guidance, counts)
                said = layout.describe("GPUs" if device.type == "cuda" else "processes")
                pipeline.plan_note = "; ".join(filter(None, (plan_note, said)))
                group = shrunk(group, layout.count)
            if group is not None:
                share(group, model, sharded)
                vae.spread = LedVAE(group, vae.model)
        return pipeline

    @property
    def channels(self) -> int:
        return self.model.config.in_channels

    def turn(self) -> AbstractContextManager[None]:
        return self._turns.take()

    @property
    def loras(self) -> PipelineLoras:
        """The LoRAs that are applied now: pairs of file and strength, and `set` to replace them."""
        return PipelineLoras(self)

    def set_loras(self, lora: str | Path | Sequence[Lora] | None = None) -> list[str]:
        """Replace the LoRAs by these, given as to `load`; None removes all. Returns the names of the changed weights.

        Raises LongCatError for files that are not LoRAs of this network, which then stays as it was, and for a pipeline
        that `load` did not make.
        """
        loras = loras_of(lora)
        if self._exchange is None:
            raise LongCatError("the LoRAs of this pipeline cannot be exchanged; make it with Pipeline.load")
        with self.turn():
            changed = self._exchange.set(loras)
            self._active = tuple(loras)
        return changed

    def encode(self, pixels: Tensor) -> Tensor:
        check_tensor("the video", pixels, (None, 3, None, None, None))
        with self.turn():
            self.begins(ENCODING)
            try:
                return self.vae.encode(pixels)
            except torch.OutOfMemoryError as error:
                self._in_tiles(error)
            return self.vae.encode(pixels)

    def decode(self, latents: Tensor, truncated: bool = False) -> np.ndarray:
        return np.concatenate(list(self.decode_frames(latents, truncated)))

    def decode_frames(self, latents: Tensor, truncated: bool = False) -> Iterator[np.ndarray]:
        check_tensor("the latents", latents, (1, self.channels, None, None, None))
        return self._decoded(latents, truncated)

    def _decoded(self, latents: Tensor, truncated: bool) -> Iterator[np.ndarray]:
        with self.turn():
            self.begins(DECODING)
            for part in self.vae.decode_in_any_case(latents, self._in_tiles):
                check_finite(part, "the VAE")
                levels = part[0].mul(255)
                yield (levels if truncated else levels.round()).to(torch.uint8).cpu().numpy()

    def _in_tiles(self, error: torch.OutOfMemoryError) -> None:
        """Let the VAE work on tiles after it ran out of memory; raises the error again if it does so already."""
        if self.vae.tiling:
            raise error
        # The traceback's frames hold the tensors that fill the memory.
        traceback.clear_frames(error.__traceback__)
        _empty_cache()
        warnings.warn("the VAE ran out of memory; it works on tiles from now on", stacklevel=4)
        self.vae.tiling = True

    def _make_room(self, guided: bool) -> bool:
        """Switch to the next smaller plan after a forward ran out of memory; False if it is the smallest already.

        With several GPUs always False: they are out of step then.
        """
        if self.model.execution.ranks is not None:
            return False
        before = replace(self.plan, split_guidance=self.model.optimizations.split_guidance)
        plan = smaller(before, self.model.config.depth, guided)
        if plan is None:
            return False
        apply_plan(self.model, plan)
        self.plan = plan
        _empty_cache()
        warnings.warn(f"out of memory; continuing with {plan.describe(self.model.config.depth)}", stacklevel=3)
        return True

    def _check_sparse(self, request: FilledRequest) -> None:
        if isinstance(request.sparse, Calibration):
            check_fits(request.sparse, self.model)

    def _denoise(self, noise: Tensor, schedule: Schedule, prompt: str, options: Denoising) -> Tensor:
        start = noise
        if options.clean is not None:
            share = schedule.timesteps[0] / 1000
            start = (1 - share) * options.clean + share * noise.to(options.clean)
        self.model.check_sparse(options.sparse)
        self.begins(ENCODING)
        context, mask = self._text("prompt", prompt)
        negative = self._text("negative prompt", options.negative_prompt) if options.guided else (None, None)
        return self.sampled(start, schedule, (context, mask), negative, options)

    def sampled(
        self,
        start: Tensor,
        schedule: Schedule,
        text: tuple[Tensor, Tensor],
        negative: tuple[Tensor | None, Tensor | None],
        options: Denoising,
    ) -> Tensor:
        """Latents [B, C, T, h, w] from those at the schedule's beginning. text, negative: encodings of one prompt or
        of B, in place of the options' prompts; see `sample`. The caller holds the turn."""
        guided = options.guided
        before = self.model.block_sparse, self.model.sparse
        self.model.block_sparse, self.model.sparse = options.block_sparse, options.sparse
        announce = self.model.announce
        self.model.announce = lambda sentence: self._announced(sentence, announce)
        self.begins("")
        device = self.vae.device
        try:
            # While a GPU samples, this process has little to do.
            with warming(device, self.vae.compile_ahead) if overlaps(device) else nullcontext():
                return sample(
                    self.model,
                    start,
                    schedule,
                    *text,
                    negative_context=negative[0],
                    negative_mask=negative[1],
                    guidance_scale=options.guidance_scale,
                    guidance_until=options.guidance_until,
                    cond_latents=options.cond_latents,
                    kv_cache=options.kv_cache,
                    step_cache=options.step_cache,
                    offload_kv_cache=self.plan.offload_kv_cache,
                    make_room=lambda: self._make_room(guided),
                    callback=self._turns.guard(options.callback),
                    audio=options.audio,
                    reference=options.reference,
                )
        finally:
            (self.model.block_sparse, self.model.sparse), self.model.announce = before, announce
            if self.model.stream is not None:
                # The VAE is next and needs the memory, in larger pieces than sampling leaves behind.
                self.model.stream.rest()
                _empty_cache()

    def _announced(self, sentence: str, announce: Callable[[str], None]) -> None:
        if compiles(sentence):
            self.begins(COMPILING)
        announce(sentence)

    def _text(self, name: str, prompt: str) -> tuple[Tensor, Tensor]:
        context, mask = self.text_encoder.encode([prompt])
        if bool(mask.all()):
            warnings.warn(f"the {name} is longer than {mask.shape[1]} tokens; the rest is ignored", stacklevel=5)
        return context, mask


def _text_encoder(path: Path, dtype: torch.dtype, device: torch.device, kept: Path | None) -> CachedTextEncoder:
    """The opened text encoder. kept: the folder of encodings."""
    cache = None if kept is None else TextCache(kept, path, dtype, device)
    return CachedTextEncoder(path, dtype, device, cache)


def _empty_cache() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
