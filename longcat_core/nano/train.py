"""The recipe of LongCat-nano: VAE, text encoder, then transformer, on the procedural world.

`longcat train-nano` runs it; on one H100 it takes well under 25 minutes in all. Weights are written in bf16 to the
folder that the command line and ComfyUI read.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, autocast

from ..checkpoints.formats import OFFICIAL
from ..checkpoints.load import official_state
from ..errors import LongCatError
from ..files.safetensors_io import read_tensors, write_safetensors
from ..generate.paths import NANO_MODEL, NANO_TEXT_ENCODER, NANO_VAE, NANO_WEIGHTS
from ..generate.text import TextEncoder, load_text_encoder
from ..generate.vae import load_vae
from ..model.block import Block
from ..model.config import ModelConfig
from ..model.text import fold_padding
from ..optimize.optimized import OptimizedTransformer
from ..optimize.switches import Optimizations
from ..sampling.guidance import DEFAULT_NEGATIVE_PROMPT
from ..training.step import WeightAverage, captured, drop_text, flow_matching_errors, initialize, sample_sigmas
from .autoencoder import encode_whole, train_autoencoder
from .reading import train_text_encoder
from .world import caption, corpus, place, render, sample_scene

MODEL_FILE, TEXT_FILE, VAE_FILE = (file.relative_to(NANO_WEIGHTS) for file in (NANO_MODEL, NANO_TEXT_ENCODER, NANO_VAE))

CONFIG = ModelConfig(
    hidden_size=192, depth=6, num_heads=3, caption_channels=128, ffn_hidden=512, adaln_dim=64, frequency_dim=256
)
TEXT_LENGTH = 512
TOKENS = 32  # of a caption in training; the rest of TEXT_LENGTH is padding, which `exact` folds into one key
PARAPHRASES = 4
TWO_SHAPES = 0.65  # share of the training clips; the world has 0.35, but scenes of two teach more

LEARNING_RATE = 1e-3
AVERAGE_DECAY = 0.999
SIGMA_SHIFTS = (12.0, 3.0)  # for half the samples each: the sampler's noise levels, and enough low ones
EMPTY_TEXT = 0.05
COMPILED_WEIGHT = 4  # a lesson of at least this weight is compiled separately
LOG_EVERY, SAVE_EVERY = 500, 2000  # steps


@dataclass(frozen=True)
class Bucket:
    """Clips of one size: pixels, frames, frames per second, number of clips, and clips per step."""

    height: int
    width: int
    frames: int
    fps: int
    clips: int
    batch: int


BUCKETS = {
    "wide": Bucket(64, 96, 33, 15, 28672, 64),
    "long": Bucket(64, 96, 93, 15, 3072, 24),
    "square": Bucket(64, 64, 33, 15, 3072, 64),
    "tall": Bucket(96, 64, 33, 15, 3072, 64),
    "double": Bucket(128, 192, 33, 15, 1024, 16),
}


@dataclass(frozen=True)
class Lesson:
    """One kind of training step: clips cut to `latents` latent frames, of which the first `cond` stay clean.

    weight: how often it is drawn. negative: the whole batch gets the default negative prompt instead of captions.
    """

    bucket: str
    latents: int
    cond: int
    weight: float
    negative: bool = False


# Text alone, an image, or the end of a clip of two to four latent frames (thirteen video frames).
LESSONS = (
    *(Lesson("wide", 9, cond, weight) for cond, weight in ((0, 16), (1, 4), (2, 0.5), (3, 0.3), (4, 4))),
    *(Lesson("long", 13, cond, weight) for cond, weight in ((0, 0.6), (1, 0.2), (4, 0.6))),
    *(Lesson("wide", 5, cond, weight) for cond, weight in ((0, 0.5), (1, 0.3), (2, 0.2))),
    *(Lesson("long", 24, cond, weight) for cond, weight in ((0, 0.4), (1, 0.2), (4, 0.4))),
    *(Lesson(name, 9, cond, weight) for name in ("square", "tall") for cond, weight in ((0, 0.3), (1, 0.1), (4, 0.1))),
    *(Lesson("double", 9, cond, weight) for cond, weight in ((0, 0.3), (1, 0.1), (4, 0.1))),
    *(Lesson("wide", 9, cond, weight, negative=True) for cond, weight in ((0, 1.2), (1, 0.3), (4, 0.4))),
    Lesson("long", 24, 4, 0.1, negative=True),
    Lesson("double", 9, 0, 0.1, negative=True),
)


@dataclass
class Clips:
    """One bucket's training data: latents [N, 16, T, h, w] and text [N, PARAPHRASES, TOKENS, D], both bf16, and the
    text's mask [N, PARAPHRASES, TOKENS]."""

    bucket: Bucket
    latents: Tensor
    context: Tensor
    mask: Tensor


def _embed(encoder: TextEncoder, texts: list[str], length: int = TOKENS) -> tuple[Tensor, Tensor]:
    """Text [N, length, D] bf16 and its mask [N, length]."""
    parts = [encoder.encode(texts[start : start + 4096], length) for start in range(0, len(texts), 4096)]
    context, mask = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return context.to(torch.bfloat16), mask


@torch.no_grad()
def encode_clips(vae: Any, bucket: Bucket, encoder: TextEncoder, seed: int, device: torch.device) -> Clips:
    """Render and encode a bucket's clips, with several captions each."""
    rng = random.Random(seed)
    scenes = [sample_scene(rng, TWO_SHAPES) for _ in range(bucket.clips)]
    placements = place(scenes, seed)
    chunk = max(8, 64 * 33 * 64 * 96 // (bucket.frames * bucket.height * bucket.width))
    mean, std = vae.mean.to(device), vae.std.to(device)
    latents = []
    for start in range(0, bucket.clips, chunk):
        rows = slice(start, start + chunk)
        video = render(placements[rows].to(device), bucket.frames, bucket.height, bucket.width, fps=bucket.fps)
        with autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            mu = encode_whole(vae.model, video * 2 - 1).float()
        latents.append(((mu - mean) / std).to(torch.bfloat16))
    text = _embed(encoder, [caption(s, rng if k else None) for s in scenes for k in range(PARAPHRASES)])
    return Clips(bucket, torch.cat(latents), *(tensor.unflatten(0, (-1, PARAPHRASES)) for tensor in text))


@torch.no_grad()
def prefer_text(model: OptimizedTransformer) -> None:
    """Initialize cross-attention so that it looks at the text and not at its padding.

    A caption of nano has about ten tokens and 500 of padding, which weigh as much as one key raised by ln(500): with
    plain weights real text gets a hundredth of the attention, and training does not recover from that. Here each head's
    queries share a direction that the padding's key (a zero token's, so the bias alone) points away from.
    """
    for layer in model.text_embed:
        torch.nn.init.xavier_uniform_(layer.weight)
    width, head = model.config.hidden_size, model.config.head_dim
    for block in model.blocks:
        block.cross_attn.q.bias[::head] = -8.0
        block.cross_attn.kv.bias[:width:head] = 0.1


class Trainer:
    """The transformer with its optimizer; one captured CUDA graph per lesson, eager elsewhere.

    The network is so small that launching its kernels one by one costs more than running them. For the same reason
    its blocks are compiled for the lessons that come often.
    """

    decay = AVERAGE_DECAY

    def __init__(self, model: OptimizedTransformer, device: torch.device) -> None:
        self.model, self.device = model, device
        self.parameters = list(model.parameters())
        self.rate = torch.tensor(0.0, device=device)
        groups = [
            {"params": [p for p in self.parameters if p.ndim > 1], "weight_decay": 0.02},
            {"params": [p for p in self.parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
        cuda = device.type == "cuda"
        self.optimizer = torch.optim.AdamW(groups, lr=self.rate, betas=(0.9, 0.98), capturable=cuda, fused=cuda)
        self.average = WeightAverage(model, self.decay)
        self.pool = torch.cuda.graph_pool_handle() if cuda else None
        self.steps: dict[Lesson, tuple[list[Tensor], Callable[[], Tensor]]] = {}

    def train(self, lesson: Lesson, rate: float, *inputs: Tensor) -> Tensor:
        """One step on latents [B, C, T, h, w] fp32, sigmas [B], text [B or 1, L, D] and its mask [B or 1, L]; returns
        the loss of each sample [B]."""
        if lesson not in self.steps:
            self.steps[lesson] = self._prepare(lesson, [tensor.clone() for tensor in inputs])
        buffers, step = self.steps[lesson]
        for buffer, tensor in zip(buffers, inputs, strict=True):
            buffer.copy_(tensor)
        self.rate.fill_(rate)
        return step()

    def _step(self, lesson: Lesson, latents: Tensor, sigmas: Tensor, context: Tensor, mask: Tensor) -> Tensor:
        # Without the weight cache, which a captured graph would read stale.
        cuda = self.device.type == "cuda"
        with autocast(self.device.type, torch.bfloat16, enabled=cuda, cache_enabled=False):
            text = fold_padding(context, mask != 0, self.model.embed_tokens, TEXT_LENGTH).expand(len(latents))
            losses = flow_matching_errors(self.model, latents, sigmas, text, num_cond_latents=lesson.cond)
        losses.mean().backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.average.update()
        return losses.detach()

    def _compile(self, block: Block, lesson: Lesson) -> None:
        # One graph serves every size without conditioning frames. With them the compiler fails on symbolic sizes
        # (PyTorch 2.11), so sizes are fixed; lessons too rare to be worth a graph run uncompiled.
        if lesson.cond == 0 or lesson.weight >= COMPILED_WEIGHT:
            block.compile(dynamic=lesson.cond == 0)

    def state(self, step: int) -> dict[str, Tensor]:
        """All that training needs to resume after `step` steps: weights, their averages and Adam's moments."""
        tensors = {"step": torch.tensor(step)}
        for i, (parameter, average) in enumerate(zip(self.parameters, self.average.average, strict=True)):
            tensors |= {f"{i}.weight": parameter, f"{i}.average": average}
            tensors |= {f"{i}.{key}": self.optimizer.state[parameter][key] for key in ("step", "exp_avg", "exp_avg_sq")}
        return tensors

    @torch.no_grad()
    def load_state(self, tensors: dict[str, Tensor]) -> int:
        """Restore a saved state before the first step; returns the number of steps done."""
        for i, (parameter, average) in enumerate(zip(self.parameters, self.average.average, strict=True)):
            parameter.copy_(tensors[f"{i}.weight"])
            average.copy_(tensors[f"{i}.average"])
            moments = {key: tensors[f"{i}.{key}"].to(self.device) for key in ("exp_avg", "exp_avg_sq")}
            # Adam counts on the CPU unless its step is captured.
            step = tensors[f"{i}.step"].to(self.device if self.device.type == "cuda" else "cpu")
            self.optimizer.state[parameter] = {"step": step, **moments}
        return int(tensors["step"])

    def _prepare(self, lesson: Lesson, buffers: list[Tensor]) -> tuple[list[Tensor], Callable[[], Tensor]]:
        if self.device.type == "cuda":
            for block in self.model.blocks:
                self._compile(block, lesson)
        step = captured(lambda: self._step(lesson, *buffers), self.optimizer, self.rate, self.device, self.pool)
        for block in self.model.blocks:
            block._compiled_call_impl = None
        return buffers, step


def train_transformer(
    weights: Path,
    *,
    steps: int,
    seed: int,
    device: torch.device,
    clips_scale: float = 1.0,
    batch_scale: float = 1.0,
    gradient_checkpointing: bool = False,
    state: Path | None = None,
    stop_after: float = math.inf,
) -> None:
    """Train the transformer for `steps` steps on the VAE and the text encoder in `weights`; write it there.

    The file is written every SAVE_EVERY steps and at the end: the averaged weights, rounded to bf16.
    state: file with the training state, written with the weights; training resumes from it if it exists, with other
    random numbers than an uninterrupted run. stop_after: seconds of steps after which this run ends, for machines
    rented by the hour. clips_scale and batch_scale shrink data and batches for a rehearsal on small machines.
    """
    torch.manual_seed(seed)
    rng = random.Random(seed)
    vae = load_vae(weights / VAE_FILE, device=device)
    encoder = load_text_encoder(weights / TEXT_FILE, device=device)
    started = time.monotonic()
    data = {}
    for i, (name, bucket) in enumerate(BUCKETS.items()):
        count, batch = max(4, int(bucket.clips * clips_scale)), max(2, int(bucket.batch * batch_scale))
        data[name] = encode_clips(vae, replace(bucket, clips=count, batch=batch), encoder, seed + 1 + i, device)
    print(f"encoded {sum(len(c.latents) for c in data.values())} clips, {time.monotonic() - started:.0f} s", flush=True)

    optimizations = Optimizations(attention="sdpa", gradient_checkpointing=gradient_checkpointing)
    model = OptimizedTransformer(CONFIG, optimizations).to(device).train()
    initialize(model)
    prefer_text(model)
    trainer = Trainer(model, device)
    nothing = _embed(encoder, [""])
    negative = _embed(encoder, [DEFAULT_NEGATIVE_PROMPT], int(encoder.tokens([DEFAULT_NEGATIVE_PROMPT])[1].sum()))

    done = 0
    if state is not None and state.exists():
        done = trainer.load_state(read_tensors(state))
        torch.manual_seed(seed + done)
        rng.seed(f"{seed} {done}")
        print(f"resuming after step {done}", flush=True)
    started, smooth = time.monotonic(), math.nan
    for step in range(done, steps):
        lesson = rng.choices(LESSONS, [item.weight for item in LESSONS])[0]
        clips = data[lesson.bucket]
        rows = torch.randint(len(clips.latents), (clips.bucket.batch,), device=device)
        if lesson.negative:
            context, mask = negative
        else:
            version = torch.randint(PARAPHRASES, rows.shape, device=device)
            captions = clips.context[rows, version], clips.mask[rows, version]
            context, mask = drop_text(*captions, *nothing, EMPTY_TEXT)
        shifts = zip((len(rows) // 2, (len(rows) + 1) // 2), SIGMA_SHIFTS, strict=True)
        sigmas = torch.cat([sample_sigmas(n, shift, device=device) for n, shift in shifts])
        rate = LEARNING_RATE * min(1.0, (step + 1) / 500) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        latents = clips.latents[rows, :, : lesson.latents].float()
        losses = trainer.train(lesson, rate, latents, sigmas, context.float(), mask)
        if step % 20 == 0 or step == done:
            loss = losses.mean().item()
            smooth = loss if step == done else 0.95 * smooth + 0.05 * loss
        if step % LOG_EVERY == LOG_EVERY - 1:
            print(f"step {step + 1}/{steps} {time.monotonic() - started:.0f} s: loss {smooth:.4f}", flush=True)
        late = time.monotonic() - started > stop_after
        if step % SAVE_EVERY == SAVE_EVERY - 1 or step == steps - 1 or late:
            if not math.isfinite(smooth):
                raise LongCatError(f"training diverged before step {step + 1}; try another --seed")
            with trainer.average.applied():
                tensors = {k: v.to(torch.bfloat16) for k, v in official_state(model, OFFICIAL).items()}
                write_safetensors(weights / MODEL_FILE, tensors, {"format": "pt"})
            if state is not None:
                write_safetensors(state, trainer.state(step + 1))
        if late:
            break


def train_reader(weights: Path, *, steps: int, seed: int, device: torch.device) -> None:
    """Train vocabulary and text encoder and write both into `weights`, as one file."""
    import sentencepiece

    from .vocabulary import new_text_encoder, save_text_encoder, train_vocabulary

    vocabulary = train_vocabulary([*corpus(20000, seed), *[DEFAULT_NEGATIVE_PROMPT] * 100])
    processor = sentencepiece.SentencePieceProcessor(model_proto=vocabulary)
    torch.manual_seed(seed)
    encoder = new_text_encoder(vocabulary, d_model=CONFIG.caption_channels).to(device).train()
    train_text_encoder(encoder, processor, tokens=TOKENS, steps=steps, seed=seed, device=device)
    save_text_encoder(weights / TEXT_FILE, encoder, vocabulary)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `longcat train-nano`."""
    parser.add_argument(
        "--size",
        choices=("nano", "mini", "mini-tiny", "avatar", "avatar-tiny"),
        default="nano",
        help="which model to train",
    )
    parser.add_argument(
        "--minutes", type=float, default=24.0, help="time for the training of mini or avatar, of all runs together"
    )
    parser.add_argument(
        "--output", type=Path, default=NANO_WEIGHTS, help="folder for the weights (default: the pack's own)"
    )
    parser.add_argument(
        "--stage", choices=("all", "vae", "decoder", "text", "transformer"), default="all", help="what to train"
    )
    parser.add_argument("--vae-steps", type=int, default=31919, help="training steps of the VAE")
    parser.add_argument("--decoder-steps", type=int, default=20260, help="more steps for the VAE's decoder alone")
    parser.add_argument("--text-steps", type=int, default=600, help="training steps of the text encoder")
    parser.add_argument("--steps", type=int, default=54759, help="training steps of the transformer")
    parser.add_argument("--seed", type=int, default=0, help="seed of data and weights")
    parser.add_argument("--device", default="cuda", help="device to train on; a GPU is needed for the full recipe")
    parser.add_argument("--clips-scale", type=float, default=1.0, help="share of the training clips to render")
    parser.add_argument("--batch-scale", type=float, default=1.0, help="share of the batch sizes")
    parser.add_argument("--state", type=Path, help="file to keep the transformer's training state in, to go on later")
    parser.add_argument("--stop-after", type=float, default=math.inf, help="seconds of steps after which to stop")
    parser.add_argument(
        "--start-from", type=Path, metavar="DIR", help="folder whose text encoder and VAE mini takes over, finished"
    )
    parser.add_argument("--gradient-checkpointing", action="store_true", help="less memory, about a third slower")


def training_device(name: str) -> torch.device:
    """The device of that name. Raises LongCatError for a GPU that is not there."""
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise LongCatError("training needs a CUDA device, but none was found; use --device cpu for a slow rehearsal")
    return device


def run(args: argparse.Namespace) -> int:
    """Train the stages that the options name; returns the exit code."""
    device = training_device(args.device)
    for name in ("--vae-steps", "--decoder-steps", "--text-steps", "--steps"):
        count = getattr(args, name.removeprefix("--").replace("-", "_"))
        if count < 1:
            raise LongCatError(f"{name} {count} must be at least 1")
    for file in (VAE_FILE, TEXT_FILE, MODEL_FILE):
        (args.output / file).parent.mkdir(parents=True, exist_ok=True)
    vae = partial(train_autoencoder, args.output / VAE_FILE, device=device)
    if args.stage in ("all", "vae"):
        vae(steps=args.vae_steps, seed=args.seed)
    if args.stage in ("all", "decoder"):
        vae(steps=args.decoder_steps, seed=args.seed + 1, decoder_alone=True)
    if args.stage in ("all", "text"):
        train_reader(args.output, steps=args.text_steps, seed=args.seed, device=device)
    if args.stage in ("all", "transformer"):
        names = ("steps", "seed", "clips_scale", "batch_scale", "gradient_checkpointing", "state", "stop_after")
        train_transformer(args.output, device=device, **{name: getattr(args, name) for name in names})
    return 0
