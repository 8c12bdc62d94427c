"""The one sampler loop: Euler steps of flow matching for every task, with conditioning frames and guidance."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..errors import LongCatError
from ..model.audio_tokens import AudioTokens
from ..model.kv_cache import KVCache, KVMode, check_mode
from ..model.text import TextTokens
from .avatar import Audio, ReferenceFrame
from .guidance import audio_parts, guided_steps, is_guided
from .network import Network
from .schedules import Schedule
from .step import take_step
from .step_cache import StepCache

T = TypeVar("T")
NO_ROOM = "out of memory; ask for a smaller size or fewer frames, or load with fp8"


class Interrupted(Exception):
    """Raise this from a callback to stop sampling between two steps."""


@dataclass(frozen=True)
class Step:
    """What a callback receives after a step. Tensors are live: clone those that you keep.

    index counts from 0; timestep in 0..1000; latents [B, C, T, H, W] fp32 after the step, conditioning frames
    included; denoised: the estimate of the clean latents, the same shape; reused: whether `StepCache` predicted the
    output; computed: the share of the step's work that was computed: of the blocks, and of the parts of guidance.
    """

    index: int
    total: int
    timestep: float
    sigma: float
    latents: Tensor
    denoised: Tensor
    reused: bool = False
    computed: float = 1.0


Callback = Callable[[Step], None]


@torch.no_grad()
def sample(
    model: Network,
    noise: Tensor,
    schedule: Schedule,
    context: Tensor,
    mask: Tensor | None,
    *,
    negative_context: Tensor | None = None,
    negative_mask: Tensor | None = None,
    guidance_scale: float = 4.0,
    guidance_until: float = 1.0,
    cond_latents: Tensor | None = None,
    kv_cache: KVMode = "exact",
    offload_kv_cache: bool = False,
    step_cache: float = 0.0,
    make_room: Callable[[], bool] | None = None,
    callback: Callback | None = None,
    audio: Audio | None = None,
    reference: ReferenceFrame | None = None,
) -> Tensor:
    """Denoise `noise` [B, C, T, H, W] to latents of the same shape, fp32.

    context [B or 1, L, caption] with its mask [B or 1, L]; the negative ones are used when guidance_scale is not 1.
    guidance_until: the share of the steps, at the front, that have guidance; later ones evaluate the prompt alone.
    cond_latents [B or 1, C, n, H, W]: clean latents that replace the first n frames (image: 1, continuation: more).
    kv_cache: `exact` computes their keys and values once instead of at every step; `official` does too, but leaves
    them out of the guidance sums, as the public cached path does, which changes the result; `off` computes them at
    every step. Without guidance all three agree. offload_kv_cache keeps the cache in CPU memory.
    step_cache: threshold of `StepCache`; 0 computes every step. Faster, and changes the result.
    make_room: called when an evaluation runs out of memory, before it is tried again. It may change how the network
    runs, and returns False when nothing more can be freed; the out-of-memory error is then raised, unless a KV cache
    can still move to CPU memory.
    audio: what an avatar's network hears. Its guidance takes three evaluations: `guidance.audio_guidance`.
    reference: a clean frame in front of the conditioning frames; neither noise nor result has it.
    Raises LongCatError for shapes that do not fit and for a first step that is not finite, and anything that
    `callback` raises.
    """
    check_mode(kv_cache)
    guided = is_guided(guidance_scale, None if audio is None else audio.guidance_scale)
    apart: dict[str, Any] = {}
    lead = 0
    if reference is not None:
        apart, lead = {"reference": reference.at}, 1
        first = reference.latents.to(noise).expand(len(noise), -1, -1, -1, -1)
        clean = noise[:, :, :0] if cond_latents is None else cond_latents.to(noise).expand(len(noise), -1, -1, -1, -1)
        noise, cond_latents = torch.cat((first, noise), dim=2), torch.cat((first, clean), dim=2)
    if guided and negative_context is None:
        raise LongCatError(f"guidance scale {guidance_scale} needs a negative prompt; give one or set guidance to 1")
    num_cond, device = 0 if cond_latents is None else cond_latents.shape[2], model.device
    if num_cond >= noise.shape[2]:
        raise LongCatError(
            f"{num_cond} conditioning latent frames leave nothing to generate of {noise.shape[2]}; ask for more frames"
        )
    if audio is not None and audio.classes is not None and not num_cond:
        raise LongCatError("masks say where people are in the first frame, and none is given; give an image")
    latents = noise.to(device=device, dtype=torch.float32, copy=True)
    if cond_latents is not None:
        shape = cond_latents.shape
        if shape[0] not in (1, len(noise)) or shape[1] != noise.shape[1] or shape[3:] != noise.shape[3:]:
            raise LongCatError(
                f"conditioning latents {tuple(shape)} do not fit latents {tuple(noise.shape)}; "
                "encode them at the size of the video"
            )
        latents[:, :, :num_cond] = cond_latents.to(latents)

    needed: tuple[bool, bool] = (False, guided)
    scales: float | tuple[float, ...] = guidance_scale
    if guided and audio is not None:
        needed, scales = audio_parts(guidance_scale, audio.guidance_scale)
    texts = _Texts(model, noise.shape[0], context, mask, negative_context, negative_mask, audio, needed)
    cached = num_cond > 0 and kv_cache != "off"
    cache: KVCache | None = None

    def make_more_room() -> bool:
        nonlocal offload_kv_cache
        moves = cached and not offload_kv_cache
        offload_kv_cache = True
        if cache is not None:
            cache.to("cpu")
        return (make_room is not None and make_room()) or moves

    more_room = None if make_room is None else make_more_room
    # Conditioning frames at the front of `latents`, how many of these the network is given, and those kept outside.
    carried, passed, outside = num_cond, 0 if cached else num_cond, latents[:, :, :0]
    cond_out: Tensor | None = None
    if cached and cond_latents is not None:
        clean = cond_latents.to(latents)
        cache = _with_room(lambda: model.fill_kv_cache(clean, "cpu" if offload_kv_cache else None, **apart), more_room)
        if kv_cache == "exact" and guided and audio is None:
            assert cache.out is not None, "filling a cache keeps the network's output"
            # What the network would return for the conditioning frames, at every step and for both halves.
            cond_out = cache.out.repeat(2 * len(latents) // len(cache.out), 1, 1, 1, 1)
        else:
            carried, outside, latents = 0, latents[:, :, :num_cond], latents[:, :, num_cond:].contiguous()

    sigmas, optimizations = schedule.sigmas.tolist(), model.optimizations
    # Differences in double precision, then as tensors: see `euler_step`.
    changes = [(sigma, after - sigma) for sigma, after in pairwise(sigmas)]
    levels = torch.tensor(changes, dtype=torch.float32, device=device)
    scale = torch.tensor(scales, dtype=torch.float32, device=device) if guided else None
    with_guidance = guided_steps(guidance_until, len(schedule)) if guided else 0
    steps = StepCache(step_cache, len(schedule), carried)
    count = len(texts.parts_of_guidance)
    for i, timestep in enumerate(schedule.timesteps.tolist()):
        # One for all videos, both halves of guidance and all frames, unless some of the frames are clean.
        t = torch.full((1, latents.shape[2] if passed else 1), timestep, device=device)
        t[:, :passed] = 0
        both = i < with_guidance
        if guided and i == with_guidance:
            steps.keep_last(count)
        out = steps.find(i, latents, sigmas[i])
        reused = out is not None
        if out is None:
            x = latents if cond_out is None else latents[:, :, carried:]

            def evaluate(x: Tensor = x, t: Tensor = t, i: int = i, both: bool = both) -> Tensor:
                parts = texts.parts(model.optimizations.split_guidance, both)
                x = torch.cat([x] * count) if both and len(parts) == 1 else x
                progress = i / len(schedule)
                outs = [
                    model(x, t, text, num_cond_latents=passed, kv_cache=cache, progress=progress, **apart)
                    for text in parts
                ]
                return outs[0] if len(outs) == 1 else torch.cat(outs)

            out = _with_room(evaluate, more_room)
            out = out if cond_out is None else torch.cat((cond_out[: len(out)], out), dim=2)
            steps.keep(latents, out, sigmas[i])
        level, change = levels[i]
        latents, denoised = take_step(optimizations, latents, out, level, change, scale if both else None, carried)
        if i == 0:
            # What spoils a video spoils this step in most cases, and all others are still to be waited for.
            check_finite(denoised)
        if callback is not None:
            computed = 0.0 if reused else 1.0 if both else 1 / count
            after, estimate = (torch.cat((outside, frames), dim=2)[:, :, lead:] for frames in (latents, denoised))
            callback(Step(i, len(schedule), timestep, sigmas[i], after, estimate, reused, computed))
    return torch.cat((outside, latents), dim=2)[:, :, lead:]


def check_finite(
    tensor: Tensor, what: str = "the transformer", remedy: str = "load it as bf16 or fp32 (--dtype)"
) -> None:
    """Raise LongCatError for a result of `what` that contains NaN or infinity."""
    if not tensor.isfinite().all():
        raise LongCatError(
            f"the result of {what} is not finite: it overflows in this precision, or its weights are damaged; "
            f"{remedy}, or get its files again"
        )


def _with_room(run: Callable[[], T], make_room: Callable[[], bool] | None) -> T:
    """run(), tried again as long as memory runs out and room can be made."""
    while make_room is not None:
        try:
            return run()
        except torch.OutOfMemoryError as error:
            # Its frames hold the tensors that are in the way; nothing here may hold them while room is made.
            traceback.clear_frames(error.__traceback__)
        if not make_room():
            raise torch.OutOfMemoryError(NO_ROOM)
    return run()


class _Texts:
    """Text, and audio, of every evaluation, embedded once for all steps: all together, or one at a time."""

    def __init__(
        self,
        model: Network,
        batch: int,
        context: Tensor,
        mask: Tensor | None,
        negative_context: Tensor | None,
        negative_mask: Tensor | None,
        audio: Audio | None,
        needed: tuple[bool, bool],
    ) -> None:
        """needed: whether guidance evaluates the negative text with silence, and without it, beside the prompt."""
        self.model, self.batch = model, batch
        context = context.to(model.device)
        if context.shape[0] == 1:
            # One prompt for several videos: each part of a guided batch needs it once per video.
            context = context.expand(batch, -1, -1)
            mask = None if mask is None else mask.expand(batch, -1)
        heard = None if audio is None else self._heard(audio, audio.windows)
        # Those that guidance combines, the unconditional ones first.
        self.parts_of_guidance = [(context, mask, heard)]
        # A map of who is where belongs to one evaluation.
        self.apart = audio is not None and audio.classes is not None
        if any(needed):
            assert negative_context is not None, "checked"
            if (mask is None) != (negative_mask is None):
                raise LongCatError(
                    "one of prompt and negative prompt has a mask and the other has none; give both or neither"
                )
            negative_mask = None if negative_mask is None or mask is None else negative_mask.expand_as(mask)
            negative = negative_context.to(model.device).expand_as(context)
            if needed[1]:
                self.parts_of_guidance.insert(0, (negative, negative_mask, heard))
            if needed[0] and audio is not None:
                silence = self._heard(audio, torch.zeros_like(audio.windows))
                self.parts_of_guidance.insert(0, (negative, negative_mask, silence))
        # Whether the parts run one after the other, and whether all run.
        self._form: tuple[bool, bool] | None = None
        self._parts: list[TextTokens] = []

    def _heard(self, audio: Audio, windows: Tensor) -> AudioTokens:
        return self.model.embed_audio(windows.to(self.model.device), audio.classes)

    def parts(self, split: bool, both: bool) -> list[TextTokens]:
        """Texts of the evaluations that make up a step, the unconditional ones first.

        both: with these, if there are any.
        """
        if (split, both) != self._form:
            # Keys and values are kept with a text, so the old texts are dropped.
            self._form, self._parts = (split, both), [self._embedded(part) for part in self._of(split, both)]
        return self._parts

    def _of(self, split: bool, both: bool) -> list[list[tuple[Tensor, Tensor | None, AudioTokens | None]]]:
        parts = self.parts_of_guidance if both else self.parts_of_guidance[-1:]
        return [[part] for part in parts] if split or self.apart else [parts]

    def _embedded(self, parts: list[tuple[Tensor, Tensor | None, AudioTokens | None]]) -> TextTokens:
        contexts, masks, heard = zip(*parts, strict=True)
        mask = None if masks[0] is None else torch.cat(masks)
        text = self.model.embed_text(torch.cat(contexts), mask)
        if heard[0] is None:
            return text
        together = torch.cat([audio.tokens.expand(self.batch, -1, -1, -1) for audio in heard]) if heard[1:] else None
        return replace(text, audio=heard[0] if together is None else AudioTokens(together))
