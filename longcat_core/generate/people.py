"""Where the people of a picture are: boxes and masks, and the tokens of a frame that belong to each person."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from math import isfinite

import numpy as np
import torch
from torch import Tensor

from ..errors import LongCatError, is_number, printable
from ..sampling.avatar import LEFT, RIGHT, Box, box_mask, class_tokens, fit_masks, with_background
from .options import SIDE_MULTIPLE

# A box (top, left, bottom, right) in shares of the image, or a mask [h, w] of its pixels: above 0 where the person is.
Person = Box | Tensor | np.ndarray
# Who may speak in one video.
VOICES = 2


def masks_of(people: Sequence[Person], voices: int, given: np.ndarray | None) -> Tensor | None:
    """Masks [K, h, w] fp32 in the order of `Audio.classes`, in pixels of the image; None for one person.

    given: the image, uint8 [1, h, w, 3]. Raises LongCatError for people that do not fit the voices or the image.
    """
    if voices > VOICES:
        raise LongCatError(f"{voices} voices are more than the {VOICES} of a video; give at most {VOICES}")
    if voices < VOICES and not people:
        return None
    if given is None:
        raise LongCatError("who is where among several people is seen in an image, and none is given; give an image")
    if voices < VOICES:
        raise LongCatError(
            "one voice is given and several people are named; give a voice for the second one, or silence"
        )
    people = people or (LEFT, RIGHT)
    if len(people) < VOICES:
        raise LongCatError("two people speak and one is named; give a box or a mask for each, or none")
    height, width = given.shape[1:3]
    masks = with_background([_mask(one, number, height, width) for number, one in enumerate(people, 1)])
    if not masks[2].any():
        raise LongCatError("the people cover the whole image; give boxes or masks that leave some of it as background")
    return masks


def _mask(person: Person, number: int, height: int, width: int) -> Tensor:
    name = f"of person {number}"
    if isinstance(person, tuple | list) and len(person) == 4 and all(map(is_number, person)) and isfinite(sum(person)):
        return box_mask((person[0], person[1], person[2], person[3]), height, width, f"the box {name}")
    if not isinstance(person, Tensor | np.ndarray) or (
        isinstance(person, np.ndarray) and person.dtype.kind not in "biuf"
    ):
        raise LongCatError(
            f"where person {number} is cannot be {printable(repr(person), 80)}; give a box (top, left, bottom, right) "
            "in shares of the image, or a mask [h, w] of numbers"
        )
    mask = torch.as_tensor(person)
    if tuple(mask.shape) != (height, width):
        raise LongCatError(
            f"the mask {name} is {list(mask.shape)} and the image {height}x{width} (height x width); give a mask of "
            "the image's size"
        )
    if not (mask > 0).any():
        raise LongCatError(f"the mask {name} is empty; give one that covers the person")
    return (mask > 0).float()


def classes_of(masks: Tensor, height: int, width: int) -> Tensor:
    """Which tokens of a frame of height x width pixels belong to whom, [S, K] bool, from masks in pixels of the image.

    Raises LongCatError for a mask without a token, which may lie outside of what is left after cropping.
    """
    return class_tokens(fit_masks(masks, height, width), height // SIDE_MULTIPLE, width // SIDE_MULTIPLE)


def people_notes(masks: Tensor) -> list[str]:
    """A sentence about each pair of people whose masks overlap. masks: as `masks_of` returns them."""
    people = [masks[0], masks[1], *masks[3:]]
    pairs = combinations(enumerate(people, 1), 2)
    return [
        f"the masks of persons {i} and {j} overlap; what they share counts for both, so keep them apart if voices mix"
        for (i, one), (j, other) in pairs
        if (one * other).any()
    ]


def box_of_pixels(box: Sequence[int], height: int, width: int, name: str) -> Box:
    """The shares of an image of a box (top, left, bottom, right) in its pixels. name: of the box, for errors."""
    top, left, bottom, right = box
    if not (0 <= top < bottom <= height and 0 <= left < right <= width):
        raise LongCatError(
            f"{name} {','.join(map(str, box))} does not lie in the image of {height}x{width} pixels (height x width); "
            "give y0,x0,y1,x1 with y0 < y1 and x0 < x1"
        )
    return top / height, left / width, bottom / height, right / width
