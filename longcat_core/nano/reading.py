"""Teach nano's text encoder to read: every token of a caption learns the attributes of the thing that it names.

Generation alone does not teach it: its loss barely depends on which of two colors belongs to which shape. An encoder
trained by that loss alone leaves words unconnected, and scenes of two shapes mix up their attributes. Real text
encoders are pretrained as well.
"""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Linear

from .world import BACKGROUNDS, COLORS, MAX_ACTORS, MOTIONS, SHAPES, Scene, actor_spans, caption, sample_scene

if TYPE_CHECKING:
    from transformers import UMT5EncoderModel

CAPTIONS = 60000
LEARNING_RATE = 3e-3
BATCH = 256
# What each token must answer: every token for the whole scene, an actor's tokens also for that actor.
QUESTIONS = {
    "background": tuple(BACKGROUNDS),
    "actors": tuple(range(1, MAX_ACTORS + 1)),
    "shape": tuple(SHAPES),
    "color": tuple(COLORS),
    "motion": tuple(MOTIONS),
}
NO_ANSWER = -100  # the target that cross_entropy ignores


class Labeled(NamedTuple):
    """A caption with what it says. whole: answers about the scene, which every token learns; parts: spans of characters
    with the answers that their tokens learn besides."""

    text: str
    whole: Mapping[str, str]
    parts: Sequence[tuple[tuple[int, int], Mapping[str, str]]]


def tokenize(processor: Any, text: str, length: int) -> tuple[list[int], list[int]]:
    """Token ids, ending in EOS and padded to `length`, and their mask."""
    ids = [*processor.encode(text)[: length - 1], 1]
    return ids + [0] * (length - len(ids)), [1] * len(ids) + [0] * (length - len(ids))


def answers(processor: Any, text: str, scene: Scene, length: int) -> list[list[int]]:
    """For each of `length` tokens the index of the correct answer to each question, or NO_ANSWER."""
    whole = {"background": scene.background, "actors": len(scene.actors)}
    parts = [
        (span, {name: getattr(actor, name) for name in ("shape", "color", "motion")})
        for span, actor in zip(actor_spans(text), scene.actors, strict=True)
    ]
    return labels(processor, text, whole, parts, QUESTIONS, length)


def labels(
    processor: Any,
    text: str,
    whole: Mapping[str, Any],
    parts: Sequence[tuple[tuple[int, int], Mapping[str, Any]]],
    questions: Mapping[str, Sequence[Any]],
    length: int,
) -> list[list[int]]:
    """`answers` for any questions; see `Labeled`."""
    pieces = processor.encode(text, out_type=str)
    rows = [[NO_ANSWER] * len(questions) for _ in range(length)]
    end = -1  # a blank stands before the first word
    for row, piece in zip(rows, [*pieces[: length - 1], ""], strict=False):
        begin, end = end, end + len(piece)
        said = dict(whole)
        for (first, last), attributes in parts:
            if begin < last and end > first:
                said |= attributes
        for column, (name, choices) in enumerate(questions.items()):
            if name in said:
                row[column] = choices.index(said[name])
    return rows


def train_text_encoder(
    encoder: UMT5EncoderModel,
    processor: Any,
    *,
    tokens: int,
    steps: int,
    seed: int,
    device: torch.device,
    captions: int = CAPTIONS,
    log_every: int = 500,
) -> float:
    """Train `encoder` in place, on captions of at most `tokens` tokens; returns the share of correct answers.

    The share covers all questions in the last fifty steps. Linear heads give the answers and are discarded.
    """
    rng = random.Random(f"reading {seed}")
    scenes = [sample_scene(rng, two_shapes=0.7) for _ in range(captions)]
    texts = [caption(scene, rng) for scene in scenes]
    wanted = [answers(processor, text, scene, tokens) for text, scene in zip(texts, scenes, strict=True)]
    return teach(
        encoder, processor, texts, wanted, QUESTIONS, steps=steps, seed=seed, device=device, log_every=log_every
    )


def teach(
    encoder: UMT5EncoderModel,
    processor: Any,
    texts: Sequence[str],
    wanted: Sequence[Sequence[Sequence[int]]],
    questions: Mapping[str, Sequence[Any]],
    *,
    steps: int,
    seed: int,
    device: torch.device,
    log_every: int = 500,
) -> float:
    """`train_text_encoder` on any texts. wanted: answers of each text's tokens to `questions`, by `labels`."""
    torch.manual_seed(seed)
    captions, tokens = len(texts), len(wanted[0])
    ids, mask = (
        torch.tensor(rows, device=device)
        for rows in zip(*(tokenize(processor, text, tokens) for text in texts), strict=True)
    )
    right = torch.tensor(wanted, device=device)
    heads = Linear(encoder.config.d_model, sum(map(len, questions.values())), device=device)
    sizes = [len(choices) for choices in questions.values()]
    parameters = [*encoder.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1)
    started = time.monotonic()
    share = 0.0
    for step in range(steps):
        rows = torch.randint(captions, (BATCH,), device=device)
        hidden = encoder(input_ids=ids[rows], attention_mask=mask[rows]).last_hidden_state
        scores = heads(hidden).split(sizes, dim=-1)
        losses = [_loss(part, right[rows, :, i]) for i, part in enumerate(scores)]
        loss = sum(losses[1:], losses[0])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step >= steps - 50:
            share += _share(scores, right[rows]) / min(50, steps)
        if step % log_every == log_every - 1:
            took = time.monotonic() - started
            print(f"text {step + 1}/{steps} {took:.0f} s: right {_share(scores, right[rows]):.4f}", flush=True)
    return share


def _loss(scores: Tensor, right: Tensor) -> Tensor:
    return F.cross_entropy(scores.flatten(0, 1), right.flatten(), ignore_index=NO_ANSWER)


def _share(scores: tuple[Tensor, ...], right: Tensor) -> float:
    asked = right != NO_ANSWER
    found = torch.stack([part.argmax(-1) for part in scores], dim=-1) == right
    return (found & asked).sum().item() / asked.sum().item()
