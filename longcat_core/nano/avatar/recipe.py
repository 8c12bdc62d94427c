"""How the nano avatar is trained: nano's VAE goes on with faces, then nano's transformer learns to hear.

Within a number of minutes, over several runs, as LongCat-mini is. The text encoder is nano's.
"""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, autocast

from ...checkpoints.formats import OFFICIAL
from ...checkpoints.load import load_transformer, official_state
from ...files.atomic import atomic_path
from ...files.safetensors_io import read_tensors, write_safetensors
from ...generate.audio import load_audio_encoder
from ...generate.paths import NANO_MODEL, NANO_TEXT_ENCODER, WORLD_FILE, World
from ...generate.text import load_text_encoder
from ...generate.vae import load_vae
from ...model.audio import speaker_positions
from ...model.audio_block import AudioBlock
from ...model.audio_tokens import AudioTokens
from ...model.config import AudioConfig
from ...model.kv_cache import Reference
from ...model.rope import line_table
from ...model.text import fold_padding
from ...optimize.optimized import OptimizedTransformer
from ...optimize.switches import Optimizations
from ...sampling.flow import NUM_TRAIN_TIMESTEPS, shift_sigmas
from ...sampling.guidance import AVATAR_NEGATIVE_PROMPT
from ...training.step import WeightAverage, captured, initialize
from .. import train as nano
from ..autoencoder import BASE_DIM
from ..mini.clock import Clock
from ..mini.pictures import train_vae
from .clips import KINDS, Clips, draw_clips, face_clips, sounds
from .ear import EAR, save_ear
from .world import FRAMES, HEIGHT, WIDTH

AUDIO = AudioConfig(window=5, groups=5, channels=EAR.width, hidden=64, width=32, tokens=4)
# Of nano's six blocks, those with which the avatar begins: it must fit into 10 MB with its VAE.
BLOCKS = (0, 1, 3, 5)
CONFIG = replace(nano.CONFIG, depth=len(BLOCKS), audio=AUDIO)
MODEL_FILE = Path("dit", "diffusion_pytorch_model.safetensors")
VAE_FILE = Path("vae", "vae.safetensors")
TEXT_FILE = Path("text_encoder", "model.safetensors")
EAR_FILE = Path("whisper-large-v3", "model.safetensors")
STATE, CLOCK = "state", "clock.json"
VAE_SHAPES = ((17, HEIGHT, WIDTH, 4), (9, HEIGHT, WIDTH, 6), (1, HEIGHT, WIDTH, 16))
LATENTS, TAIL = 1 + (FRAMES - 1) // 4, 4  # of a segment, and of those that continue the one before
LEARNING_RATE, WARM_UP, DECAY = 8e-4, 100, 0.998
SIGMA_SHIFTS = (7.0, 2.0)
EMPTY, SILENT = 0.05, 0.02  # shares of the samples without a text, and of those without a sound
ROUGH = 0.1  # noise on clean latents at most, as decoding and encoding again leaves it
CAPTURED = True  # a step on a GPU is one CUDA graph; False: kernel by kernel, five times slower


@dataclass(frozen=True)
class Lesson:
    """Clips of a kind whose first `clean` latents are given, behind a reference frame if there is more than one.

    position: of the reference in RoPE. weight: how often it is drawn. negative: all get the default negative prompt
    instead of captions, every other time with silence, as guidance has them.
    """

    kind: str
    clean: int
    weight: float
    position: int = 10
    negative: bool = False


LESSONS = (
    *(Lesson("solo", clean, weight) for clean, weight in ((0, 3), (1, 2), (TAIL, 2.5))),
    *(Lesson("solo", TAIL, 0.3, position) for position in (-10, 30)),
    *(Lesson("pair", clean, weight) for clean, weight in ((0, 1.5), (1, 1), (TAIL, 1))),
    *(Lesson("duo", clean, weight) for clean, weight in ((1, 1.2), (TAIL, 1.2))),
    *(Lesson("solo", clean, 0.3, negative=True) for clean in (0, 1, TAIL)),
    *(Lesson("duo", clean, 0.1, negative=True) for clean in (1, TAIL)),
)


@dataclass(frozen=True)
class Recipe:
    """Sizes of one training. voices: sounds; clips: of each kind; batch: of a step, and of one with two voices."""

    voices: int = 160
    clips: int = 6144
    batch: int = 48
    pairs: int = 8
    vae_until: float = 0.4


RECIPES = {"avatar": Recipe(), "avatar-tiny": Recipe(voices=24, clips=160, batch=8, pairs=3)}


def new_model(device: torch.device) -> OptimizedTransformer:
    """Nano's weights in what the avatar has of it; what hears is fresh, and its gates are closed."""
    model = OptimizedTransformer(CONFIG, Optimizations(attention="sdpa"))
    initialize(model)
    known = load_transformer(NANO_MODEL).state_dict()
    state = model.state_dict()
    for name in state:
        parts = name.split(".")
        if parts[0] == "blocks":
            parts[1] = str(BLOCKS[int(parts[1])])
        if ".".join(parts) in known:
            state[name] = known[".".join(parts)].float()
    model.load_state_dict(state)
    with torch.no_grad():
        for block in model.blocks:
            listening = cast(AudioBlock, block)
            listening.audio_modulation.weight.zero_()
            prefer_near(listening.audio_attn)
    return model.to(device).train()


def prefer_near(layer: Any) -> None:
    """Give queries and keys a direction in common, in the channels whose RoPE tells 2 from 22.

    So a token hears the voice whose position is near its own. Without RoPE it changes nothing.
    """
    for bias, strength in ((layer.q.bias, 3.0), (layer.kv.bias[: layer.q.bias.numel()], 2.0)):
        bias.view(layer.num_heads, -1)[:, 10:20] = strength


def windows_of(embeddings: Tensor, voices: Tensor, starts: Tensor) -> Tensor:
    """Windows [N, FRAMES, 5, groups, channels] of clips, from embeddings [V, L, groups, channels]."""
    at = starts[:, None, None] + torch.arange(FRAMES, device=starts.device)[:, None]
    at = at + torch.arange(-2, 3, device=starts.device)
    return embeddings[voices[:, None, None], at.clamp(0, embeddings.shape[1] - 1)]


def errors_of(
    model: OptimizedTransformer,
    latents: Tensor,
    sigmas: Tensor,
    text: Any,
    clean: int,
    weight: Tensor,
    reference: tuple[Tensor, Reference] | None = None,
) -> Tensor:
    """The weighted squared error of the predicted x0 - noise of noisy frames: [B] fp32; see `flow_matching_errors`.

    text: with its audio. reference: latents [B, C, 1, h, w] in front of the others, and how they enter.
    """
    noise = torch.randn_like(latents)
    level = sigmas[:, None].repeat(1, latents.shape[2])
    level[:, :clean] = 0
    x = torch.lerp(latents, noise, level[:, None, :, None, None])
    x[:, :, :clean] += ROUGH * torch.rand(len(x), 1, 1, 1, 1, device=x.device) * noise[:, :, :clean]
    options: dict[str, Any] = {"num_cond_latents": clean}
    if reference is not None:
        x, level = torch.cat((reference[0], x), dim=2), torch.cat((torch.zeros_like(level[:, :1]), level), dim=1)
        options = {"num_cond_latents": clean + 1, "reference": reference[1]}
    out = model(x, level * NUM_TRAIN_TIMESTEPS, text, **options)[:, :, -latents.shape[2] :]
    error = (out - (latents - noise))[:, :, clean:].square() * weight[:, None, None]
    return error.flatten(1).mean(1)


class Teacher:
    """The transformer's training steps."""

    def __init__(self, folder: Path, recipe: Recipe, seed: int, device: torch.device) -> None:
        self.recipe, self.device = recipe, device
        vae, encoder = load_vae(folder / VAE_FILE, device=device), load_text_encoder(folder / TEXT_FILE, device=device)
        ear = load_audio_encoder(folder / EAR_FILE, device=device)
        embeddings, openings = sounds(recipe.voices, seed, ear)
        self.embeddings = embeddings.to(device)
        self.data = {
            kind: draw_clips(vae, encoder, openings, kind, recipe.clips, seed + i, device)
            for i, kind in enumerate(KINDS)
        }
        length = int(encoder.tokens([AVATAR_NEGATIVE_PROMPT])[1].sum())
        self.nothing, self.negative = nano._embed(encoder, [""]), nano._embed(encoder, [AVATAR_NEGATIVE_PROMPT], length)
        torch.manual_seed(seed)
        self.model = new_model(device)
        self.parameters = list(self.model.parameters())
        groups = [
            {"params": [p for p in self.parameters if p.ndim > 1], "weight_decay": 0.02},
            {"params": [p for p in self.parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
        cuda = device.type == "cuda"
        self.rate = torch.tensor(0.0, device=device)
        self.optimizer = torch.optim.AdamW(groups, lr=self.rate, betas=(0.9, 0.98), capturable=cuda, fused=cuda)
        self.pool = torch.cuda.graph_pool_handle() if cuda and CAPTURED else None
        self.steps: dict[Lesson, tuple[Tensor, Callable[[], Tensor]]] = {}
        self.average = WeightAverage(self.model, DECAY)
        positions = speaker_positions(AUDIO, 2, 3)
        at = torch.tensor(positions, device=device).repeat_interleave(AUDIO.tokens)
        self.near = line_table(CONFIG.head_dim, at)

    def _text(self, clips: Clips, rows: Tensor, negative: bool) -> tuple[Any, Tensor]:
        """Text of these clips, and which clips hear nothing."""
        draw = torch.rand(2, len(rows), device=self.device)
        if negative:
            context, mask = self.negative
        else:
            empty, (context, mask) = draw[0] < EMPTY, self.nothing
            context = torch.where(empty[:, None, None], context, clips.context[rows])
            mask = torch.where(empty[:, None], mask, clips.mask[rows])
        text = fold_padding(context.float(), mask != 0, self.model.embed_tokens, nano.TEXT_LENGTH)
        return text.expand(len(rows)), draw[1] < (0.5 if negative else SILENT)

    def _audio(self, clips: Clips, rows: Tensor, silent: Tensor, kind: str) -> AudioTokens:
        """What clips hear; two voices belong to one clip."""
        voices, starts = clips.voices[rows], clips.starts[rows]
        if kind != "duo":
            # The one who talks; the other one's voice is silence.
            who = (voices != len(self.embeddings) - 1).int().argmax(1, keepdim=True)
            voices, starts = voices.gather(1, who), starts.gather(1, who)
        windows = windows_of(self.embeddings, voices.flatten(), starts.flatten())
        windows = windows * ~silent.repeat_interleave(voices.shape[1]).view(-1, 1, 1, 1, 1)
        assert self.model.audio_embed is not None, "an avatar"
        tokens = self.model.audio_embed(windows)
        if kind != "duo":
            return AudioTokens(tokens)
        classes = clips.classes.index_select(0, rows)[0]
        return AudioTokens(tokens.transpose(0, 1).flatten(1, 2)[None], self.near, classes)

    def losses(self, lesson: Lesson, rows: Tensor) -> Tensor:
        """The loss of each of these clips [B]; those with two voices must come one by one."""
        clips = self.data[lesson.kind]
        draw = torch.rand(2, len(rows), device=self.device)
        sigmas = shift_sigmas(draw[0], torch.where(draw[1] < 0.5, *SIGMA_SHIFTS))
        latents = clips.latents[rows].float()
        references = clips.references[rows].float()
        reference = None
        if lesson.clean == 1:
            # A picture whose mouth need not fit the sound.
            latents = torch.cat((references, latents[:, :, 1:]), dim=2)
        elif lesson.clean:
            reference = references, Reference(lesson.position)
        cuda = self.device.type == "cuda"
        # Without the weight cache, which a captured graph would read stale.
        with autocast(self.device.type, torch.bfloat16, enabled=cuda, cache_enabled=False):
            text, silent = self._text(clips, rows, lesson.negative)
            text = replace(text, audio=self._audio(clips, rows, silent, lesson.kind))
            return errors_of(self.model, latents, sigmas, text, lesson.clean, clips.weight[rows], reference)

    def _step(self, lesson: Lesson, rows: Tensor) -> Tensor:
        parts = rows.split(1 if lesson.kind == "duo" else len(rows))
        total = torch.zeros((), device=self.device)
        for part in parts:
            loss = self.losses(lesson, part).mean() / len(parts)
            loss.backward()
            total = total + loss.detach()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.average.update()
        return total

    def step(self, lesson: Lesson, rate: float) -> Tensor:
        """One training step; returns its loss, a scalar that the next step of this lesson overwrites on a GPU."""
        count = self.recipe.pairs if lesson.kind == "duo" else self.recipe.batch
        rows = torch.randint(len(self.data[lesson.kind].latents), (count,))
        if lesson not in self.steps:
            buffer = rows.to(self.device)
            device = self.device if CAPTURED else torch.device("cpu")
            run = captured(partial(self._step, lesson, buffer), self.optimizer, self.rate, device, self.pool)
            self.steps[lesson] = buffer, run
        buffer, run = self.steps[lesson]
        buffer.copy_(rows)
        self.rate.fill_(rate)
        return run()

    def save(self, folder: Path, step: int) -> None:
        """The averaged weights, and the state from which training goes on."""
        with self.average.applied():
            tensors = {k: v.to(torch.bfloat16) for k, v in official_state(self.model, OFFICIAL).items()}
            write_safetensors(folder / MODEL_FILE, tensors, metadata())
        state = {"step": torch.tensor(step)}
        for i, (parameter, average) in enumerate(zip(self.parameters, self.average.average, strict=True)):
            state |= {f"{i}.weight": parameter, f"{i}.average": average}
            state |= {f"{i}.{key}": value for key, value in self.optimizer.state[parameter].items()}
        write_safetensors(folder / STATE / "transformer.safetensors", state)

    @torch.no_grad()
    def load(self, folder: Path) -> int:
        """Take up a saved state, if there is one; returns the number of steps done."""
        file = folder / STATE / "transformer.safetensors"
        if not file.exists():
            return 0
        tensors = read_tensors(file, self.device)
        for i, (parameter, average) in enumerate(zip(self.parameters, self.average.average, strict=True)):
            parameter.copy_(tensors[f"{i}.weight"])
            average.copy_(tensors[f"{i}.average"])
            kept = {key: tensors[f"{i}.{key}"] for key in ("step", "exp_avg", "exp_avg_sq")}
            if self.device.type != "cuda":
                kept["step"] = kept["step"].cpu()
            self.optimizer.state[parameter] = kept
        return int(tensors["step"])


def metadata() -> dict[str, str]:
    """What the shapes of the weights do not say."""
    return {"format": "pt", "config": json.dumps({"audio": asdict(AUDIO)})}


def rate_at(share: float, step: int) -> float:
    """The learning rate after a share of the time: a warm-up in steps, then from 0.3 a cosine down to zero."""
    fall = max(0.0, (share - 0.3) / 0.7)
    return LEARNING_RATE * min(1.0, (step + 1) / WARM_UP) * (0.5 + 0.5 * math.cos(math.pi * min(1.0, fall)))


def train_transformer(folder: Path, recipe: Recipe, clock: Clock, seed: int, device: torch.device) -> str:
    """Train until the minutes are used up. Raises Paused when this run must end before that."""
    teacher = Teacher(folder, recipe, seed, device)
    clock.tick("clips")
    step = teacher.load(folder)
    torch.manual_seed(seed + step)
    rng = random.Random(f"avatar {seed} {step}")

    def take(share: float, number: int) -> Callable[[], dict[str, float]]:
        lesson = rng.choices(LESSONS, [one.weight for one in LESSONS])[0]
        loss = teacher.step(lesson, rate_at(share, number))
        return lambda: {f"{lesson.kind} {lesson.clean}{' negative' * lesson.negative}": float(loss)}

    step, losses = clock.steps("transformer", step, take, partial(teacher.save, folder))
    return f"{step} steps, loss {sum(losses.values()) / max(1, len(losses)):.4f}"


def write_folder(folder: Path) -> None:
    """What needs no training: configs, the text encoder, the ear, and what the model's world is."""
    for file in (MODEL_FILE, VAE_FILE, TEXT_FILE, EAR_FILE, Path(STATE, CLOCK)):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
    written = {
        MODEL_FILE.parent / "config.json": CONFIG.to_dict(),
        VAE_FILE.parent / "config.json": {"_class_name": "AutoencoderKLWan", "z_dim": 16, "base_dim": BASE_DIM},
        Path(WORLD_FILE): asdict(World("avatar", HEIGHT, WIDTH, FRAMES)),
    }
    for name, values in written.items():
        with atomic_path(folder / name) as temporary:
            temporary.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    with atomic_path(folder / TEXT_FILE) as temporary:
        shutil.copyfile(NANO_TEXT_ENCODER, temporary)
    save_ear(folder / EAR_FILE)


def train_avatar(
    folder: Path,
    *,
    size: str = "avatar",
    minutes: float = 5.0,
    stop_after: float = math.inf,
    seed: int = 0,
    device: torch.device,
) -> bool:
    """Train the nano avatar into `folder`, a model's folder of the official form; returns whether it is finished.

    minutes: of all runs together. stop_after: seconds after which this run ends, to be continued by another with the
    same folder. Raises LongCatError if training diverges.
    """
    recipe = RECIPES[size]
    write_folder(folder)
    clock = Clock(folder / STATE / CLOCK, minutes * 60, stop_after)
    vae = partial(train_vae, folder / VAE_FILE, folder / STATE, VAE_SHAPES, clock, recipe.vae_until)
    with clock.pausing():
        clock.stage("vae", lambda: vae(seed, device, face_clips))
        clock.stage("transformer", lambda: train_transformer(folder, recipe, clock, seed, device))
    return "transformer" in clock.done
