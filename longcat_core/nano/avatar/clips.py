"""The clips that the nano avatar learns from: faces of its world, encoded, with what they say."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, autocast

from ...generate.audio import AudioEncoder
from ...generate.audio.speech import leveled
from ...sampling.avatar import LEFT, RIGHT, Box, box_mask, class_tokens, with_background
from ..autoencoder import encode_whole
from ..mini.pictures import Draw
from ..train import _embed
from .sounds import opening, voice
from .world import FRAMES, HEIGHT, WIDTH, Placements, caption, mouth, place, render, sample_scene

SECONDS = 12.0  # of each sound
PATCH = 16  # pixels of a token's side
MOUTH_WEIGHT = 6.0  # of the error where a mouth is
# Faces and voices of each kind of clips.
KINDS = {"solo": (1, 1), "pair": (2, 1), "duo": (2, 2)}


@dataclass
class Clips:
    """N clips of one kind. latents [N, 16, T, h, w] and references [N, 16, 1, h, w], bf16; weight [N, h, w] of errors;
    context and mask: their captions; voices, starts [N, 2]: number and first frame of what each face says; classes
    [N, S, 3]: which token belongs to the left face, to the right one and to neither."""

    latents: Tensor
    references: Tensor
    weight: Tensor
    context: Tensor
    mask: Tensor
    voices: Tensor
    starts: Tensor
    classes: Tensor

    def to(self, device: torch.device) -> Clips:
        return Clips(*(getattr(self, field.name).to(device) for field in fields(self)))


def sounds(count: int, seed: int, encoder: AudioEncoder) -> tuple[Tensor, Tensor]:
    """Embeddings [count + 1, N, groups, channels] and openings [count + 1, N] of voices; the last one is silence."""
    waves = [leveled(torch.from_numpy(voice(1000 * seed + i, SECONDS))) for i in range(count)]
    waves.append(torch.zeros_like(waves[0]))
    embeddings = torch.stack([encoder.embed(wave) for wave in waves])
    return embeddings, torch.stack([opening(wave, embeddings.shape[1]) for wave in waves])


def face_clips(seed: int, device: torch.device) -> Draw:
    """Clips of talking faces, which do not need embeddings: see `mini.pictures`."""
    said = [opening(leveled(torch.from_numpy(voice(9000 * (seed + 1) + i, SECONDS))), 300) for i in range(24)]
    mouths = torch.stack([*said, torch.zeros(300)]).to(device)

    def draw(shape: Sequence[int], clips: int, rng: random.Random) -> Tensor:
        scenes = [sample_scene(rng, *rng.choice(list(KINDS.values()))) for _ in range(clips)]
        placements = place(scenes, rng.randrange(1 << 30)).to(device)
        rows = torch.randint(len(mouths), (clips, 2, 1), device=device)
        begin = torch.randint(300 - shape[0], (clips, 2, 1), device=device)
        return render(placements, mouths[rows, begin + torch.arange(shape[0], device=device)])

    return draw


def _tokens(boxes: Sequence[Box]) -> Tensor:
    """Which token of a frame belongs to the left box, to the right one and to neither, [S, 3] bool."""
    masks = with_background([box_mask(box, HEIGHT, WIDTH) for box in boxes])
    return class_tokens(masks, HEIGHT // PATCH, WIDTH // PATCH)


def _classes(placements: Placements, rng: random.Random) -> Tensor:
    """[N, S, 3] bool: the default boxes, or those of the heads."""
    found, fixed = [], _tokens((LEFT, RIGHT))
    for center, radius in zip(placements.center, placements.radius, strict=True):
        if rng.random() < 0.7:
            found.append(fixed)
            continue
        sizes = torch.tensor([[HEIGHT, WIDTH]])
        middle, reach = center.flip(1) / sizes, radius[:, None] / sizes
        corners = torch.cat((middle - reach, middle + reach), dim=1).clamp(0, 1)
        found.append(_tokens([tuple(box) for box in corners.tolist()]))
    return torch.stack(found)


def _weight(placements: Placements) -> Tensor:
    """[N, h, w]: MOUTH_WEIGHT in cells of a mouth, 1 elsewhere, scaled to a mean of 1."""
    center, half = mouth(placements)
    columns, rows = 8 * torch.arange(WIDTH // 8) + 4, 8 * torch.arange(HEIGHT // 8)[:, None] + 4
    across = (columns - center[..., 0, None, None]).abs() < half[..., None, None] + 4
    down = (rows - center[..., 1, None, None]).abs() < 8
    inside = (across & down & (placements.head >= 0)[..., None, None]).any(1)
    weight = 1 + (MOUTH_WEIGHT - 1) * inside.float()
    return weight / weight.mean((1, 2), keepdim=True)


@torch.no_grad()
def draw_clips(
    vae: Any, encoder: Any, openings: Tensor, kind: str, count: int, seed: int, device: torch.device
) -> Clips:
    """Draw and encode `count` clips of a kind. openings [V, N] of voices, the last one silent."""
    faces, talking = KINDS[kind]
    rng = random.Random(f"avatar {kind} {seed}")
    generator = torch.Generator().manual_seed(seed)
    # Now and then one of two people has nothing to say.
    scenes = [sample_scene(rng, faces, 1 if faces == 2 and rng.random() < 0.25 else talking) for _ in range(count)]
    placements = place(scenes, seed)
    silence = len(openings) - 1
    voices = torch.randint(silence, (count, 2), generator=generator)
    talks = torch.tensor([[i < faces and scene.faces[i].talks for i in range(2)] for scene in scenes])
    voices = torch.where(talks, voices, silence)
    starts = torch.randint(openings.shape[1] - FRAMES, (count, 2), generator=generator)
    mouths = openings[voices[..., None], starts[..., None] + torch.arange(FRAMES)]
    other = openings[voices, torch.randint(openings.shape[1], (count, 2), generator=generator)]
    # The picture that begins a video mostly shows closed mouths.
    other = torch.where(torch.rand(count, 1, generator=generator) < 0.6, 0.0, other)[..., None]
    mean, std = vae.mean.to(device), vae.std.to(device)
    latents: list[Tensor] = []
    references: list[Tensor] = []
    for start in range(0, count, 64):
        rows = slice(start, start + 64)
        shown = placements[rows].to(device)
        for part, seen in ((latents, mouths), (references, other)):
            video = render(shown, seen[rows].to(device))
            with autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                mu = encode_whole(vae.model, video * 2 - 1).float()
            part.append(((mu - mean) / std).to(torch.bfloat16))
    context, mask = _embed(encoder, [caption(scene) for scene in scenes])
    tensors = (torch.cat(latents), torch.cat(references), _weight(placements), context, mask)
    return Clips(*tensors, voices, starts, _classes(placements, rng)).to(device)
