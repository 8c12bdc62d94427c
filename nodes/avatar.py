"""LongCat Avatar and LongCat Avatar Boxes: the conditioning and the latent of one segment of a talking person."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import comfy.model_management
import numpy as np
import torch
from comfy_api.latest import io, ui
from PIL import Image, ImageDraw
from torch import Tensor

from ..longcat_core.errors import LongCatError
from ..longcat_core.files.media import cover
from ..longcat_core.generate.audio import Embeddings
from ..longcat_core.generate.people import Person, classes_of
from ..longcat_core.generate.progress import ENCODING
from ..longcat_core.model.audio import PEOPLE
from ..longcat_core.model.kv_cache import Reference
from ..longcat_core.sampling.avatar import (
    LEFT,
    RIGHT,
    Audio,
    ReferenceFrame,
    box_mask,
    with_background,
)
from ..longcat_core.sampling.buckets import nearest_bucket
from ..longcat_core.sampling.conditioning import SPATIAL_FACTOR, latent_frames, latent_shape
from .audio import spoken
from .checks import check_length, check_ranges, check_size
from .comfy_avatar import AUDIO, REFERENCE, silent, with_values
from .comfy_vae import encoded
from .conditioning import put_clean, require_wan_vae
from .images import check_images, one_image, to_bytes, to_image
from .inputs import LongCatNode
from .progress import working
from .sounds import audio_of, part_of
from .video import footage_of
from .widgets import CUSTOM

# (height, width) of a video from text alone.
TEXT_SIZES = {"480p": (480, 832), "720p": (768, 1280)}
COLORS = ((255, 80, 60), (70, 150, 255))


def size_of(
    resolution: str, width: int, height: int, image: np.ndarray | None, previous: np.ndarray | None
) -> tuple[int, int]:
    """(height, width) of a segment: of the previous one, of the trained size nearest to the image, or as chosen.

    image, previous: frames uint8 [F, H, W, 3]. Raises LongCatError for sides that the model does not take.
    """
    if previous is not None:
        height, width = previous.shape[1:3]
    elif resolution != CUSTOM:
        return TEXT_SIZES[resolution] if image is None else nearest_bucket(*image.shape[1:3], resolution)
    check_size(width, height, of="" if previous is None else "previous: ")
    return height, width


def people_of(
    person_1: Tensor | None, person_2: Tensor | None, others: Tensor | None, first_voice: str
) -> tuple[Person, ...]:
    """Where people are, as `AvatarRequest.people` has it: masks [h, w], or the half in which the first voice is.

    Raises LongCatError for one mask of two.
    """
    given = [mask for mask in (person_1, person_2) if mask is not None]
    if len(given) == 1:
        raise LongCatError("one of person_1 and person_2 has a mask; connect both or neither")
    masks = [mask[0] if mask.ndim == 3 else mask for mask in given]
    if others is None:
        return tuple(masks) or (() if first_voice == "left" else (RIGHT, LEFT))
    return *(masks or ((LEFT, RIGHT) if first_voice == "left" else (RIGHT, LEFT))), *others


def person_masks(
    speakers: int, given: Sequence[Tensor | None], others: Tensor | None, first_voice: str, source: tuple[int, int]
) -> Tensor | None:
    """Masks [K, h, w] in the order of `Audio.classes`; None for one speaker. given: MASKs of the two people; by default
    the boxes of the public demo in an image of the size `source`. Raises LongCatError for masks that do not fit."""
    if speakers == 1:
        if any(mask is not None for mask in (*given, others)):
            raise LongCatError("masks tell several voices apart, and voices has one; connect audio_2 of Encode Audio")
        return None
    people = people_of(*given, others, first_voice) or (LEFT, RIGHT)
    if others is not None and speakers == PEOPLE:
        raise LongCatError("others has masks, but voices has no silence for them; turn others of Encode Audio on")
    if others is None and speakers > PEOPLE:
        raise LongCatError(
            "voices has silence for others, which has no masks; connect them, or turn others of Encode Audio off"
        )
    masks = [box_mask(person, *source) if isinstance(person, tuple) else person for person in people]
    if len({tuple(mask.shape) for mask in masks}) > 1:
        raise LongCatError("the masks are of different sizes; give all of them the size of the image")
    return with_background(masks)


def windows_of(embeddings: Embeddings, segment: int, length: int, overlap: int) -> tuple[Tensor, int]:
    """The audio windows of a segment, and the number of its first frame. Raises LongCatError beyond the sound."""
    first = segment * (length - overlap)
    if first * embeddings.stride >= embeddings.values.shape[1]:
        seconds = embeddings.values.shape[1] / embeddings.stride / embeddings.fps
        raise LongCatError(
            f"segment {segment} begins after the sound, which ends at {seconds:.1f} s; choose an earlier one"
        )
    return embeddings.windows(first, length), first


class Avatar(LongCatNode):
    ID = "LongCatAvatar"

    @classmethod
    def validate_inputs(
        cls, resolution=None, width=None, height=None, length=None, segment=None, audio_guidance=None,
        first_voice=None, reference_position=None, skip=None, overlap=None,
    ) -> bool:  # fmt: skip
        known = {"resolution": resolution, "segment": segment, "audio_guidance": audio_guidance, "skip": skip}
        known |= {"first_voice": first_voice, "reference_position": reference_position, "overlap": overlap}
        check_ranges(cls.ID, known)
        check_size(width, height, resolution)
        check_length(length, overlap)
        return True

    @classmethod
    def execute(
        cls, positive, negative, vae, voices, resolution, width, height, length, segment, audio_guidance, image=None,
        previous=None, reference=None, person_1=None, person_2=None, others=None, first_voice="left",
        reference_position=10, skip=3, overlap=13,
    ) -> io.NodeOutput:  # fmt: skip
        require_wan_vae(vae)
        found = spoken(voices)
        embeddings = found.embeddings
        if (previous is None) != (reference is None):
            raise LongCatError("a continuation takes previous and reference; connect both, or neither")
        if image is not None and previous is not None:
            raise LongCatError("image begins a first segment and previous a later one; connect one of them")
        start = None if image is None else one_image(image)
        end = None if previous is None else last_of(previous, overlap)
        given = start if end is None else end
        height, width = size_of(resolution, width, height, start, end)
        windows, first = windows_of(embeddings, segment, length, overlap)
        source = (height, width) if given is None else given.shape[1:3]
        masks = person_masks(len(windows), (person_1, person_2), others, first_voice, source)
        if masks is not None and given is None:
            raise LongCatError("masks say where people are in the first frame, and none is given; connect image")
        classes = None if masks is None else classes_of(masks, height, width)
        latent = {"samples": torch.zeros((1, *latent_shape(length, height, width)))}
        latent["samples"] = latent["samples"].to(comfy.model_management.intermediate_device())
        if given is not None:
            with working(ENCODING):
                fitted = np.stack([cover(frame, height, width) for frame in given])
                latent["noise_mask"] = put_clean(latent["samples"], encoded(vae, to_image(fitted)))
        audio = Audio(windows, classes, audio_guidance)
        values: dict[str, Any] = {}
        if reference is not None:
            shown = first_frame(reference, height, width)
            values[REFERENCE] = ReferenceFrame(shown, Reference(reference_position, skip))
        kept = 0 if previous is None else overlap
        sound = part_of(found.track, (first + kept) / embeddings.fps, (length - kept) / embeddings.fps)
        return io.NodeOutput(
            with_values(positive, **{AUDIO: audio}, **values),
            with_values(negative, **{AUDIO: silent(audio)}, **values),
            latent,
            audio_of(sound),
            float(embeddings.fps),
        )


def last_of(previous: Any, overlap: int) -> np.ndarray:
    """The last frames of a segment, uint8 [F, H, W, 3]. Raises LongCatError for too few."""
    latent_frames(overlap, "overlap")
    footage = footage_of("previous", previous)
    if footage.frames < overlap:
        raise LongCatError(f"previous has {footage.frames} frames, fewer than the overlap of {overlap}; connect more")
    return np.stack(deque(footage.read(), overlap))


def first_frame(reference: dict[str, Any], height: int, width: int) -> Tensor:
    """The first latent frame [1, C, 1, h, w] of a LATENT. Raises LongCatError for that of another size."""
    samples = reference["samples"]
    if samples.ndim != 5 or samples.shape[-2:] != (height // SPATIAL_FACTOR, width // SPATIAL_FACTOR):
        raise LongCatError(
            f"reference is a latent {list(samples.shape)} and the video is of {height}x{width} pixels (height x "
            "width); connect the latents of the first segment"
        )
    return samples[:1, :, :1]


class AvatarBoxes(LongCatNode):
    ID = "LongCatAvatarBoxes"

    @classmethod
    def execute(cls, image, left_1, top_1, right_1, bottom_1, left_2, top_2, right_2, bottom_2) -> io.NodeOutput:
        check_images("image", image)
        height, width = image.shape[1:3]
        boxes = (top_1, left_1, bottom_1, right_1), (top_2, left_2, bottom_2, right_2)
        masks = [
            box_mask(tuple(side / 100 for side in box), height, width, f"the box of person {number}")
            for number, box in enumerate(boxes, 1)
        ]
        picture = Image.fromarray(to_bytes(image[:1])[0])
        for (top, left, bottom, right), color in zip(boxes, COLORS, strict=True):
            corners = [(left * width / 100, top * height / 100), (right * width / 100 - 1, bottom * height / 100 - 1)]
            ImageDraw.Draw(picture).rectangle(corners, outline=color, width=max(2, width // 200))
        shown = to_image(np.array(picture)[None])
        return io.NodeOutput(*(mask[None] for mask in masks), ui=ui.PreviewImage(shown, cls=cls))


NODES = [Avatar, AvatarBoxes]
