"""The contract of every task: a VAE in both directions, and denoising. Tasks know engines, not pipelines."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..errors import LongCatError, check_type
from ..files.media import resize_and_crop
from ..model.kv_cache import KVMode, check_mode
from ..optimize.block_sparse import BlockSparse
from ..optimize.sparse.settings import Sparse
from ..sampling.avatar import Audio, ReferenceFrame
from ..sampling.conditioning import last_frames, latent_frames, latent_shape, seeded_noise, to_pixels
from ..sampling.guidance import is_guided
from ..sampling.sampler import Callback, check_finite
from ..sampling.schedules import Schedule, make_schedule
from .inputs import check_callback, check_tensor
from .options import MAX_GUIDANCE, MAX_STEP_CACHE
from .request import Defaults, FilledRequest, GenerateRequest, check_number, check_text


@dataclass(frozen=True)
class Generation:
    """A generated video.

    frames: uint8 [F, H, W, 3]. latents: normalized, [1, 16, T, H/8, W/8] fp32 on the CPU. request: the filled request.
    """

    frames: np.ndarray
    latents: Tensor
    request: GenerateRequest

    @property
    def seed(self) -> int:
        return self.request.seed

    @property
    def fps(self) -> float:
        return self.request.fps


@dataclass(frozen=True)
class Denoising:
    """The options of `Engine.denoise`, checked; see there."""

    clean: Tensor | None = None
    negative_prompt: str = ""
    guidance_scale: float = 1.0
    cond_latents: Tensor | None = None
    kv_cache: KVMode = "exact"
    step_cache: float = 0.0
    block_sparse: BlockSparse | None = None
    callback: Callback | None = None
    guidance_until: float = 1.0
    sparse: Sparse | None = None
    audio: Audio | None = None
    reference: ReferenceFrame | None = None

    @property
    def guided(self) -> bool:
        """Whether sampling reads the negative prompt."""
        return is_guided(self.guidance_scale, None if self.audio is None else self.audio.guidance_scale)


class Engine(ABC):
    """Everything that tasks ask of a model. `Pipeline` loads its own models; in ComfyUI an engine uses ComfyUI's.

    Latents belong to the engine: they come from its VAE, in its scale, and nothing else interprets their values.
    Noise is drawn on the CPU in fp32, so a seed gives the same noise on every device; on one machine with one number
    of threads it gives the same video bit for bit.
    """

    defaults: Defaults
    # Called with what begins, in words of `progress`: ENCODING, DECODING, COMPILING, or "" for the steps.
    on_phase: Callable[[str], None] | None = None

    def begins(self, phase: str) -> None:
        """Tell `on_phase`, if anybody listens."""
        if self.on_phase is not None:
            self.on_phase(phase)

    @property
    def channels(self) -> int:
        """C, the number of latent channels."""
        return 16

    @abstractmethod
    def encode(self, pixels: Tensor) -> Tensor:
        """Video [1, 3, F, H, W] in -1..1 -> latents [1, C, T, H/8, W/8]."""

    @abstractmethod
    def decode(self, latents: Tensor, truncated: bool = False) -> np.ndarray:
        """Latents [1, C, T, h, w] -> uint8 frames [F, 8h, 8w, 3].

        truncated: levels are cut to whole numbers instead of rounded, as an avatar's next segment wants its beginning.
        """

    def decode_frames(self, latents: Tensor, truncated: bool = False) -> Iterator[np.ndarray]:
        """The frames of `decode` part by part, as they leave the decoder, where an engine can give them so."""
        yield self.decode(latents, truncated) if truncated else self.decode(latents)

    @abstractmethod
    def _denoise(self, noise: Tensor, schedule: Schedule, prompt: str, options: Denoising) -> Tensor:
        """`denoise` with checked arguments, while this thread holds the turn."""

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
        block_sparse: BlockSparse | None = None,
        callback: Callback | None = None,
        guidance_until: float = 1.0,
        sparse: Sparse | None = None,
        audio: Audio | None = None,
        reference: ReferenceFrame | None = None,
    ) -> Tensor:
        """Standard normal noise [1, C, T, h, w] -> clean latents of the same shape.

        clean: latents of that shape, mixed with the noise as the schedule's first timestep says; None: noise only.
        block_sparse: settings of block-sparse attention; None: full attention. sparse: settings of sparse attention,
        without effect beside block_sparse; None: full attention. audio, reference: what an avatar hears, and the clean
        frame in front of its continuations. For the other options see `sampling.sampler.sample`. Raises LongCatError
        for tensors that do not fit.
        """
        check_callback(callback)
        check_type("the schedule", schedule, Schedule, "what make_schedule returns")
        check_text("prompt", prompt)
        check_text("negative prompt", negative_prompt)
        check_number("guidance", guidance_scale, 0.0, MAX_GUIDANCE)
        check_number("guidance until", guidance_until, 0.0, 1.0)
        check_number("step cache", step_cache, 0.0, MAX_STEP_CACHE)
        check_mode(kv_cache)
        check_type("block_sparse", block_sparse, (BlockSparse, type(None)), "a BlockSparse or None")
        check_type("sparse", sparse, (Sparse, type(None)), "a Sparse or None")
        check_type("audio", audio, (Audio, type(None)), "an Audio or None")
        check_type("reference", reference, (ReferenceFrame, type(None)), "a ReferenceFrame or None")
        check_tensor("the noise", noise, (None, self.channels, None, None, None))
        if clean is not None:
            check_tensor("the clean latents", clean, tuple(noise.shape))
        if cond_latents is not None:
            check_tensor("the conditioning latents", cond_latents, (None, self.channels, None, None, None))
        options = Denoising(
            clean,
            negative_prompt,
            guidance_scale,
            cond_latents,
            kv_cache,
            step_cache,
            block_sparse,
            callback,
            guidance_until,
            sparse,
            audio,
            reference,
        )
        with self.turn():
            return self._denoise(noise, schedule, prompt, options)

    def generate(
        self,
        request: GenerateRequest,
        callback: Callback | None = None,
        handed: Tensor | None = None,
        on_frames: Callable[[np.ndarray], None] | None = None,
    ) -> Generation:
        """Run one request. `callback` is called after each step; what it raises ends the run.

        handed: latents [1, C, n, H/8, W/8] of all conditioning frames but the first, used instead of encoding them.
        on_frames: called with the frames, uint8 [f, H, W, 3], part by part as they leave the decoder, so that a file
        can be written meanwhile (`VideoBeside`); it must not change them.
        Warns (UserWarning) if a prompt is longer than the model reads. Raises LongCatError for a bad request.
        """
        check_type("the request", request, GenerateRequest, "a GenerateRequest")
        check_callback(callback)
        check_callback(on_frames, "what takes the frames")
        request = request.filled(self.defaults)
        self._check_sparse(request)
        if handed is not None:
            self._check_handed(request, handed)
        with self.turn():
            shape = latent_shape(request.frames, request.height, request.width, self.channels)
            latents = self.denoise(
                seeded_noise((1, *shape), request.seed),
                make_schedule(request.schedule, request.steps),
                request.prompt,
                negative_prompt=request.negative_prompt,
                guidance_scale=request.guidance_scale,
                cond_latents=self._cond_latents(request, handed),
                kv_cache=request.kv_cache,
                step_cache=request.step_cache,
                callback=callback,
                guidance_until=request.guidance_until,
                sparse=request.sparse_settings,
            )
            check_finite(latents)
            parts = []
            for frames in self.decode_frames(latents):
                if on_frames is not None:
                    on_frames(frames)
                parts.append(frames)
            return Generation(np.concatenate(parts), latents.cpu(), request)

    def turn(self) -> AbstractContextManager[None]:
        """Held while this engine works, so that threads take turns. Engines that one thread uses need none."""
        return nullcontext()

    def _check_sparse(self, request: FilledRequest) -> None:  # noqa: B027
        """Raise LongCatError if a request's calibration is of another model."""

    def _check_handed(self, request: FilledRequest, handed: Tensor) -> None:
        """Raise LongCatError unless `handed` fits a filled request's conditioning frames without the first."""
        if request.cond_frames < 2:
            raise LongCatError("latents are handed over without the clip that they belong to; give its frames too")
        _, _, height, width = latent_shape(request.frames, request.height, request.width, self.channels)
        count = latent_frames(request.cond_frames) - 1
        check_tensor("the handed latents", handed, (1, self.channels, count, height, width))

    def _cond_latents(self, request: FilledRequest, handed: Tensor | None) -> Tensor | None:
        if request.given is None:
            return None
        frames = last_frames(request.given, request.cond_frames)
        if handed is not None:
            frames = frames[:1]
        frames = resize_and_crop(frames, request.height, request.width)
        latents = self.encode(to_pixels(torch.from_numpy(frames.copy())))
        return latents if handed is None else torch.cat((latents, handed.to(latents)), dim=2)
