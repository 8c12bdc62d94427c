"""Moving previews: the generated frames in turn, at each step and between two steps."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import latent_preview
from comfy.model_patcher import ModelPatcher
from comfy_execution.progress import PreviewImageTuple
from torch import Tensor

from ..longcat_core.generate.progress import Part
from ..longcat_core.sampling.frames import count_clean, noisy_frames
from .comfy_latents import LongCatLatents
from .progress import RUNNING, NodeProgress
from .tiny_decoder import CannotShow, TinyPreviewer, find_previewer, plain_previewer, say_once

# Frames that play in turn, spread over the video, and the seconds that each is shown.
FRAMES, SHOWN_FOR = 16, 0.2
# Share of a run's time that decoding previews may take, and the seconds that it may take after one step.
SHARE, LONGEST = 0.03, 1.0


def clean_frames(noise_mask: Tensor | None) -> int:
    """Number of latent frames at the front that a noise_mask [1, 1, T, h, w] keeps: the conditioning frames."""
    return 0 if noise_mask is None or noise_mask.ndim != 5 else count_clean(noisy_frames(noise_mask))


class Film:
    """The generated frames of one sampling run, as ComfyUI's preview method shows them.

    Both of ComfyUI's renderers show the last picture that they got, and neither plays an animated one: frames are sent
    one by one. Each step decodes as many as the run's time allows, the oldest first; a thread sends them in turn.
    """

    def __init__(self, previewer: Any, form: LongCatLatents, given: int, shown: NodeProgress) -> None:
        """given: number of conditioning frames at the front."""
        self.previewer, self.form, self.given, self.shown = previewer, form, given, shown
        self.pictures: dict[int, PreviewImageTuple] = {}
        self.next = self.at = 0
        self.started, self.spent, self.cost = time.monotonic(), 0.0, 0.0
        # Not yet: the first step's pictures pay for what happens once, such as choosing kernels.
        self.warm = False
        self.over, self.thread = threading.Event(), None

    def expose(self, x0: Tensor) -> PreviewImageTuple | None:
        """Decode frames of the estimated clean latents [B, C, T, h, w], and return the picture to show now."""
        # LatentCut leaves the noise_mask of the whole latent, so there may be fewer frames than are given.
        frames = self.form.shown(x0.shape[2], self.given)
        count = min(FRAMES, len(frames))
        chosen = [frames[i * len(frames) // count] for i in range(count)]
        # The GPU may still compute the step: its time is not the preview's, and a picture must wait for it.
        x0[:1, :1, :1, :1, :1].cpu()
        began, made = time.monotonic(), 0
        for _ in chosen:
            # Factors cost next to nothing: they show one new picture after each step in any case.
            due = not self.pictures or not (made or isinstance(self.previewer, TinyPreviewer))
            if not due and not self._affordable(began):
                break
            self._decode(x0, chosen[self.next % count])
            self.next, made = self.next + 1, made + 1
        if self.warm:
            self.spent += time.monotonic() - began
        self.warm = True
        if self.thread is None and len(self.pictures) > 1 and self.shown.heard:
            self.thread = threading.Thread(target=self._play, name="longcat preview", daemon=True)
            self.thread.start()
        return self.turn()

    def _affordable(self, began: float) -> bool:
        """Whether one more picture, as dear as the last one, stays within the time; began: of this step's pictures."""
        now = time.monotonic()
        here = now - began + self.cost
        return here <= LONGEST and self.spent + here <= SHARE * (now - self.started)

    def _decode(self, x0: Tensor, frame: int) -> None:
        began, before = time.monotonic(), getattr(self.previewer, "before", 0)
        latents = x0[:, :, max(frame - before, 0) : frame + 1]
        try:
            if isinstance(self.previewer, latent_preview.Latent2RGBPreviewer):
                # ComfyUI reads a picture without waiting until it has been copied from a GPU, and sees an older one.
                latents = latents.cpu()
            picture = self.previewer.decode_latent_to_preview_image("JPEG", latents)
        except CannotShow as error:
            say_once(str(error))
            # Also frees the decoder.
            self.previewer = plain_previewer(self.form)
            with self.shown.lock:
                self.pictures.clear()
            return self._decode(x0, frame)
        self.cost = time.monotonic() - began
        if picture is not None:
            with self.shown.lock:
                self.pictures[frame] = picture

    def turn(self) -> PreviewImageTuple | None:
        """The picture after the last one that was shown."""
        with self.shown.lock:
            ordered = [self.pictures[frame] for frame in sorted(self.pictures)]
            self.at += 1
            return ordered[(self.at - 1) % len(ordered)] if ordered else None

    def end(self) -> None:
        self.over.set()
        if self.thread is not None:
            self.thread.join()

    def _play(self) -> None:
        while not self.over.wait(SHOWN_FOR):
            with self.shown.lock:
                picture = self.turn()
                if picture is None or self.over.is_set():
                    continue
                try:
                    self.shown.send(picture)
                except Exception as error:
                    # A preview that cannot be sent must not end a run that may have taken hours.
                    logging.debug("LongCat: previews end: %s", error)
                    return


def preview_callback(model: ModelPatcher, steps: int, noise_mask: Tensor | None) -> Callable:
    """The callback of a sampling run of the running node: its bar, its words and its moving preview."""
    shown = RUNNING.get() or NodeProgress([Part(steps)], closing=False)
    form = model.model.latent_format
    previewer = find_previewer(model.load_device, form)
    film = None if previewer is None else Film(previewer, form, clean_frames(noise_mask), shown)
    shown.play(film)

    def callback(step: int, x0: Tensor, x: Tensor, total: int) -> None:
        shown.step(step + 1, total, None if film is None else film.expose(x0))

    return callback
