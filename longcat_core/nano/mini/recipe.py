"""How LongCat-mini is trained: text encoder, VAE, clips, transformer, within a number of minutes, over several runs.

The transformer learns on pictures of a third of the sides first, then of half, then on whole ones: forms, colors and
motions take tens of thousands of steps, and a small step costs a tenth.
"""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, autocast

from ...checkpoints.formats import OFFICIAL
from ...checkpoints.load import official_state, read_config
from ...errors import LongCatError
from ...files.atomic import atomic_path
from ...files.safetensors_io import read_tensors, write_safetensors
from ...generate.paths import WORLD_FILE, ModelPaths, World
from ...generate.text import load_text_encoder
from ...generate.vae import load_vae
from ...model.block import Block
from ...model.config import ModelConfig
from ...optimize.compilation import graph_limit
from ...optimize.optimized import OptimizedTransformer
from ...optimize.switches import Optimizations
from ...sampling.guidance import DEFAULT_NEGATIVE_PROMPT
from ...training.step import drop_text, initialize, sample_sigmas
from .. import train as nano
from ..autoencoder import BASE_DIM, encode_whole
from ..reading import labels, teach
from ..train import Lesson, Trainer, prefer_text
from ..vocabulary import new_text_encoder, save_text_encoder, train_vocabulary
from .clock import Clock
from .drawing import FRAMES, HEIGHT, WIDTH, place, render
from .pictures import train_vae
from .scenes import QUESTIONS, caption, corpus, labeled, sample_scene

CONFIG = ModelConfig(
    hidden_size=512, depth=12, num_heads=4, caption_channels=192, ffn_hidden=1408, adaln_dim=256, frequency_dim=256
)
MODEL_FILE = Path("dit", "diffusion_pytorch_model.safetensors")
VAE_FILE = Path("vae", "vae.safetensors")
TEXT_FILE = Path("text_encoder", "model.safetensors")
STATE, CLOCK = "state", "clock.json"
TOKENS = 96  # of a caption in training, and of the negative prompt
VOCABULARY = 640
LEARNING_RATE = 8e-4
WARM_UP = 200  # steps
EMPTY_TEXT, NEGATIVE_TEXT = 0.06, 0.06
CHUNK = 8  # full clips drawn and encoded at once, and as many pixels of smaller ones
# How often steps of each bucket are drawn: pairs of a share of the transformer's time and a weight, with lines between.
COURSE: dict[str, tuple[tuple[float, float], ...]] = {
    "tiny": ((0.3, 1.0), (0.5, 0.0)),
    "small": ((0.3, 0.0), (0.5, 1.0), (0.7, 0.0)),
    "full": ((0.5, 0.0), (0.7, 1.0)),
}
RARE = 0.05  # share of the steps, below which a lesson is not compiled
# Share of the time for clips at which the drawing of each bucket ends.
DRAWN = {"tiny": 0.4, "small": 0.65, "full": 1.0}


@dataclass(frozen=True)
class Bucket:
    """Clips of one size: how many there are, how many a step takes, and how many captions each has."""

    height: int
    width: int
    clips: int
    batch: int
    captions: int = 4


@dataclass(frozen=True)
class Recipe:
    """Sizes of one training. vae_until, clips_until: share of the minutes at which the VAE and the drawing of clips
    end."""

    config: ModelConfig = CONFIG
    frames: int = FRAMES
    tiny: Bucket = Bucket(HEIGHT // 3, 96, 24000, 32, 2)
    small: Bucket = Bucket(HEIGHT // 2, WIDTH // 2, 6000, 32)
    full: Bucket = Bucket(HEIGHT, WIDTH, 3000, 16)
    text_steps: int = 900
    corpus: int = 8000
    captions: int = 24000
    vae_until: float = 0.22
    clips_until: float = 0.33
    vae_shapes: tuple[tuple[int, int, int, int], ...] = ((9, 192, 320, 1), (17, 96, 160, 2), (1, 192, 320, 8))

    @property
    def latents(self) -> int:
        return 1 + (self.frames - 1) // 4


RECIPES = {
    "mini": Recipe(),
    # The same code in seconds on a CPU, to try a machine out.
    "mini-tiny": Recipe(
        config=ModelConfig(hidden_size=128, depth=2, num_heads=1, caption_channels=32, ffn_hidden=128, adaln_dim=32),
        frames=9,
        tiny=Bucket(16, 16, 6, 2),
        small=Bucket(16, 32, 6, 2),
        full=Bucket(32, 48, 6, 2),
        text_steps=2,
        corpus=400,
        captions=64,
        vae_shapes=((5, 32, 48, 1), (1, 32, 48, 2)),
    ),
}


class MiniTrainer(Trainer):
    """Every kind of step has a graph of its own with fixed sizes: there are few, and large."""

    decay = 0.998

    def _compile(self, block: Block, lesson: Lesson) -> None:
        block.compile(dynamic=False)

    def _prepare(self, lesson: Lesson, buffers: list[Tensor]) -> tuple[list[Tensor], Callable[[], Tensor]]:
        with graph_limit():
            return super()._prepare(lesson, buffers)


def seeded(recipe_seed: int, step: int) -> random.Random:
    """The random numbers of a run that begins at `step`."""
    return random.Random(f"mini {recipe_seed} {step}")


def train_text(folder: Path, recipe: Recipe, seed: int, device: torch.device) -> str:
    """Train vocabulary and text encoder; returns what came out."""
    import sentencepiece

    vocabulary = train_vocabulary([*corpus(recipe.corpus, seed), *[DEFAULT_NEGATIVE_PROMPT] * 400], VOCABULARY)
    processor = sentencepiece.SentencePieceProcessor(model_proto=vocabulary)
    torch.manual_seed(seed)
    encoder = new_text_encoder(vocabulary, d_model=recipe.config.caption_channels, d_ff=384, num_layers=3)
    rng = random.Random(f"mini reading {seed}")
    said = [labeled(sample_scene(rng), rng) for _ in range(recipe.captions)]
    wanted = [labels(processor, one.text, one.whole, one.parts, QUESTIONS, TOKENS) for one in said]
    texts = [one.text for one in said]
    steps, encoder = recipe.text_steps, encoder.to(device).train()
    share = teach(encoder, processor, texts, wanted, QUESTIONS, steps=steps, seed=seed, device=device, log_every=100)
    save_text_encoder(folder / TEXT_FILE, encoder, vocabulary)
    tokens = len(processor.encode(DEFAULT_NEGATIVE_PROMPT)) + 1
    return f"{share:.2%} of the answers right, the negative prompt has {tokens} tokens"


@torch.no_grad()
def draw_clips(
    folder: Path, name: str, bucket: Bucket, recipe: Recipe, clock: Clock, seed: int, device: torch.device
) -> str:
    """Draw and encode a bucket's clips with their captions into the state folder; fewer if the time is up."""
    vae, encoder = load_vae(folder / VAE_FILE, device=device), load_text_encoder(folder / TEXT_FILE, device=device)
    rng = random.Random(f"mini clips {name} {seed}")
    scenes = [sample_scene(rng) for _ in range(bucket.clips)]
    placements = place(scenes, seed)
    mean, std = vae.mean.to(device), vae.std.to(device)
    latents: list[Tensor] = []
    begin = recipe.vae_until
    until = begin + DRAWN[name] * (recipe.clips_until - begin)
    chunk = CHUNK * recipe.full.height * recipe.full.width // (bucket.height * bucket.width)
    for number, start in enumerate(range(0, bucket.clips, chunk)):
        part = placements[slice(start, start + chunk)].to(device)
        video = render(part, recipe.frames, bucket.height, bucket.width, compiled=device.type == "cuda")
        with autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            mu = encode_whole(vae.model, video * 2 - 1).float()
        latents.append(((mu - mean) / std).to(torch.bfloat16))
        if number % 8 == 7:
            latents[-1].sum().item()  # waits, so that the clock sees the time
            clock.tick(name)
            if clock.share > until:
                break
    drawn = torch.cat(latents)
    texts = [caption(scene, rng if k else None) for scene in scenes[: len(drawn)] for k in range(bucket.captions)]
    context, mask = (part.unflatten(0, (-1, bucket.captions)) for part in nano._embed(encoder, texts, TOKENS))
    write_safetensors(folder / STATE / f"{name}.safetensors", {"latents": drawn, "context": context, "mask": mask})
    return f"{len(drawn)} clips, deviation of the latents {drawn.float().std():.3f}"


def lessons(recipe: Recipe) -> tuple[Lesson, ...]:
    """Smaller pictures from text, and full ones from text, from a picture, and from the end of a clip."""
    last = min(4, recipe.latents - 1)
    smaller = (Lesson(name, recipe.latents, 0, 1.0) for name in ("tiny", "small"))
    full = (Lesson("full", recipe.latents, cond, weight) for cond, weight in ((0, 0.7), (1, 0.15), (last, 0.15)))
    return (*smaller, *full)


def weight_at(bucket: str, share: float) -> float:
    """How often steps of a bucket are drawn after a share of the transformer's time."""
    shares, weights = zip(*COURSE[bucket], strict=True)
    return float(np.interp(share, np.array(shares), np.array(weights)))


def draw_lesson(items: Sequence[Lesson], share: float, prepared: Collection[Lesson], rng: random.Random) -> Lesson:
    """One of the lessons that the course has after a share of the time. prepared: those whose steps are compiled; one
    that is hardly drawn then is not worth the seconds that this takes."""
    weights = [item.weight * weight_at(item.bucket, share) for item in items]
    least = RARE * sum(weights)
    worth = [
        weight if weight >= least or item in prepared else 0.0 for item, weight in zip(items, weights, strict=True)
    ]
    return rng.choices(items, worth)[0]


def rate_at(share: float, step: int) -> float:
    """The learning rate after a share of time: a warm-up in steps, a plateau, and from 0.4 a cosine down to zero."""
    fall = max(0.0, (share - 0.4) / 0.6)
    return LEARNING_RATE * min(1.0, (step + 1) / WARM_UP) * (0.5 + 0.5 * math.cos(math.pi * min(1.0, fall)))


def new_model(recipe: Recipe, device: torch.device) -> OptimizedTransformer:
    """Fresh weights."""
    model = OptimizedTransformer(recipe.config, Optimizations(attention="sdpa")).to(device).train()
    initialize(model)
    prefer_text(model)
    return model


class Teacher:
    """The transformer's training steps on the clips of a folder."""

    def __init__(self, folder: Path, recipe: Recipe, seed: int, device: torch.device) -> None:
        self.recipe, self.device = recipe, device
        encoder = load_text_encoder(folder / TEXT_FILE, device=device)
        self.data = {name: read_tensors(folder / STATE / f"{name}.safetensors", device) for name in COURSE}
        self.nothing, self.negative = (nano._embed(encoder, [t], TOKENS) for t in ("", DEFAULT_NEGATIVE_PROMPT))
        torch.manual_seed(seed)
        self.model = new_model(recipe, device)
        self.trainer = MiniTrainer(self.model, device)
        self.lessons = lessons(recipe)
        self.counts: dict[Lesson, int] = {}

    def lesson(self, share: float, rng: random.Random) -> Lesson:
        return draw_lesson(self.lessons, share, self.trainer.steps, rng)

    def step(self, lesson: Lesson, rate: float) -> Tensor:
        """One training step; returns the loss of each clip [B], those at higher noise first."""
        clips, bucket = self.data[lesson.bucket], getattr(self.recipe, lesson.bucket)
        rows = torch.randint(len(clips["latents"]), (bucket.batch,), device=self.device)
        version = torch.randint(bucket.captions, rows.shape, device=self.device)
        text = clips["context"][rows, version], clips["mask"][rows, version]
        text = drop_text(*drop_text(*text, *self.negative, NEGATIVE_TEXT), *self.nothing, EMPTY_TEXT)
        shifts = zip((len(rows) // 2, (len(rows) + 1) // 2), nano.SIGMA_SHIFTS, strict=True)
        sigmas = torch.cat([sample_sigmas(n, shift, device=self.device) for n, shift in shifts])
        self.counts[lesson] = self.counts.get(lesson, 0) + 1
        return self.trainer.train(lesson, rate, clips["latents"][rows].float(), sigmas, text[0].float(), text[1])

    def save(self, folder: Path, step: int) -> None:
        """The averaged weights, and the state from which training goes on."""
        with self.trainer.average.applied():
            tensors = {k: v.to(torch.bfloat16) for k, v in official_state(self.model, OFFICIAL).items()}
            write_safetensors(folder / MODEL_FILE, tensors, {"format": "pt"})
        write_safetensors(folder / STATE / "transformer.safetensors", self.trainer.state(step))


def train_transformer(folder: Path, recipe: Recipe, clock: Clock, seed: int, device: torch.device) -> str:
    """Train until the minutes are used up. Raises Paused when this run must end before that."""
    teacher = Teacher(folder, recipe, seed, device)
    saved, step = folder / STATE / "transformer.safetensors", 0
    if saved.exists():
        step = teacher.trainer.load_state(read_tensors(saved))
        torch.manual_seed(seed + step)
        print(f"resuming after step {step}", flush=True)
    rng = seeded(seed, step)

    def take(share: float, number: int) -> Callable[[], dict[str, float]]:
        lesson = teacher.lesson(share, rng)
        found = teacher.step(lesson, rate_at(share, number))

        def read() -> dict[str, float]:
            halves = zip(("high", "low"), found.tensor_split(2), strict=True)
            return {f"{lesson.bucket} {lesson.cond} {noise}": part.mean().item() for noise, part in halves}

        return read

    step, losses = clock.steps("transformer", step, take, partial(teacher.save, folder))
    counts = ", ".join(f"{n} of {item.bucket} {item.cond}" for item, n in teacher.counts.items())
    return f"{step} steps (this run {counts}), loss {losses.get('full 0 low', math.nan):.4f} at low noise"


def world_of(recipe: Recipe) -> World:
    """What the folder says about its world."""
    return World("mini", recipe.full.height, recipe.full.width, recipe.frames)


def write_folder(folder: Path, recipe: Recipe) -> None:
    """The folders and what says how the model is used: its config, and the size and the scorer of its videos."""
    for file in (MODEL_FILE, VAE_FILE, TEXT_FILE, Path(STATE, CLOCK)):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
    config = recipe.config.to_dict()
    vae = {"_class_name": "AutoencoderKLWan", "z_dim": 16, "base_dim": BASE_DIM}
    written = {
        MODEL_FILE.parent / "config.json": config,
        VAE_FILE.parent / "config.json": vae,
        Path(WORLD_FILE): asdict(world_of(recipe)),
    }
    for name, values in written.items():
        with atomic_path(folder / name) as temporary:
            temporary.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def take_over(folder: Path, other: Path, recipe: Recipe, clock: Clock) -> None:
    """Copy text encoder and VAE of another training of this size, and mark both stages as done with their seconds.

    Raises LongCatError unless `other` has both and was trained by this recipe. Without its clock, the time of both is
    not counted.
    """
    remedy = "give the folder of a training that has finished these stages, or leave out --start-from"
    config, world = read_config(other / MODEL_FILE.parent / "config.json"), ModelPaths.of(other).world
    if world is None:
        raise LongCatError(f"{other} holds no training of mini; {remedy}")
    if (config, world) != (recipe.config, world_of(recipe)):
        raise LongCatError(f"{other} was trained with another --size; {remedy}")
    before = Clock(other / STATE / CLOCK, clock.budget)
    files = {"text": (TEXT_FILE, "text encoder"), "vae": (VAE_FILE, "VAE")}
    for stage, (file, what) in files.items():
        if not (other / file).is_file() or (before.done and stage not in before.done):
            raise LongCatError(f"{other} has no finished {what}; {remedy}")
    for stage, (file, _) in files.items():
        if stage in clock.done:
            continue
        with atomic_path(folder / file) as temporary:
            shutil.copyfile(other / file, temporary)
        clock.seconds[stage] = before.seconds.get(stage, 0.0)
        clock.finish(stage, f"taken from {other}")


def train_mini(
    folder: Path,
    *,
    size: str = "mini",
    minutes: float = 24.0,
    stop_after: float = math.inf,
    seed: int = 0,
    start_from: Path | None = None,
    device: torch.device,
) -> bool:
    """Train LongCat-mini into `folder`, a model's folder of the official form; returns whether it is finished.

    minutes: of all runs together. stop_after: seconds after which this run ends, to be continued by another with the
    same folder. Every stage resumes where it was, with other random numbers than an uninterrupted run. start_from: a
    folder whose text encoder and VAE are taken over, see `take_over`. Raises LongCatError if training diverges.
    """
    recipe = RECIPES[size]
    write_folder(folder, recipe)
    clock = Clock(folder / STATE / CLOCK, minutes * 60, stop_after)

    shapes: Any = recipe.vae_shapes
    with clock.pausing():
        if start_from is not None:
            take_over(folder, start_from, recipe, clock)
        clock.stage("text", lambda: train_text(folder, recipe, seed, device))
        until = recipe.vae_until
        clock.stage("vae", lambda: train_vae(folder / VAE_FILE, folder / STATE, shapes, clock, until, seed, device))
        for i, name in enumerate(COURSE):
            bucket: Bucket = getattr(recipe, name)
            clock.stage(name, partial(draw_clips, folder, name, bucket, recipe, clock, seed + i, device))
        clock.stage("transformer", lambda: train_transformer(folder, recipe, clock, seed, device))
    return "transformer" in clock.done
