"""Training a LoRA: adapters on a frozen network, by flow matching, on clips that were encoded once.

The randomness of a step follows from the seed and the step's number alone, so a resumed run equals, on one machine with
one number of threads, a run that was never stopped. The LoRA is saved every `save_every` steps, with a state beside it
to resume from.
"""

from __future__ import annotations

import gc
import hashlib
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ..checkpoints.load import load_transformer
from ..errors import CheckpointError, LongCatError, check_type, is_whole, plain_fields
from ..files.places import check_place, check_suffix
from ..files.safetensors_io import read_tensors
from ..generate.opened import OpenedModel, open_model
from ..generate.options import LEARNED, TRAINING, of_command
from ..generate.paths import ModelPaths
from ..generate.request import check_frames, check_number, check_seed, check_side
from ..generate.text import MAX_LENGTH, load_text_encoder
from ..generate.vae import load_vae
from ..model.config import ModelConfig
from ..optimize.adapters import adapt
from ..optimize.optimized import OptimizedTransformer
from ..optimize.switches import Optimizations
from ..sampling.schedules import SHIFT
from .clips import Clip, Sample, clips_fingerprint, encode_captions, encode_clips
from .saved import MOMENTS, PREFIX, LoraFile, check_state
from .step import drop_text, flow_matching_loss, sample_sigmas

# Layers of a block. The rest of the network is small and in fp32.
LAYERS = ("attn.qkv", "attn.proj", "cross_attn.q", "cross_attn.kv", "cross_attn.proj", "ffn.gate_up", "ffn.down")
# Steps until the learning rate is reached.
WARM_UP = 20
# Most latent frames of a clip that are conditioning frames: those of the default 13 frames of a continuation.
MOST_GIVEN = 4

# What is done, how many pieces of it, of how many, and the loss if there is one.
Report = Callable[[str, int, int, float | None], None]


@dataclass(frozen=True)
class Recipe:
    """How a LoRA is trained. alpha: None for the rank; the LoRA counts by alpha / rank.

    steps of `batch` clips at `learning_rate`, reached after 20 steps; sides in pixels, multiples of 16; frames 4k+1.
    caption_dropout: share of clips without their caption. cond_share: share of steps in which the first frames are
    given. shift: of the noise levels, 12 is the sampler's. save_every: steps between two files.
    """

    height: int
    width: int
    frames: int
    rank: int = 16
    alpha: float | None = None
    steps: int = 1000
    batch: int = 1
    learning_rate: float = 1e-4
    layers: tuple[str, ...] = LAYERS
    caption_dropout: float = 0.1
    cond_share: float = 0.25
    shift: float = SHIFT
    seed: int = 0
    gradient_checkpointing: bool = True
    save_every: int = 100

    def __post_init__(self) -> None:
        """Raise LongCatError for a value out of range."""
        plain_fields(self)
        for name, side in (("height", self.height), ("width", self.width)):
            check_side(name, side)
        check_frames(self.frames)
        check_seed(self.seed)
        for row in of_command("train-lora", LEARNED, TRAINING):
            if row.least is None or row.most is None or row.name in ("frames", "seed"):
                continue
            name = row.name.replace("_", " ")
            value = self.scaling if row.name == "alpha" else getattr(self, row.name)
            if row.kind == "number":
                check_number(name, value, row.least, row.most)
            elif not is_whole(value) or not row.least <= value <= row.most:
                raise LongCatError(
                    f"{name} {value} is out of range; give a whole number from {row.least} to {row.most}"
                )
        check_type("layers", self.layers, (tuple, list), f"a tuple of {', '.join(LAYERS)}")
        unknown = [layer for layer in self.layers if layer not in LAYERS]
        if unknown or not self.layers:
            raise LongCatError(f"no layers {', '.join(unknown) or 'at all'} to train; choose from {', '.join(LAYERS)}")

    @property
    def scaling(self) -> float:
        """alpha, filled in."""
        value = self.rank if self.alpha is None else self.alpha
        check_type("alpha", value, (int, float), "a number or None")
        return float(value)

    def decides(self) -> dict[str, Any]:
        """Settings that a resumed run must share with its state; JSON values."""
        values = asdict(self) | {"alpha": self.scaling, "layers": list(self.layers)}
        return {k: v for k, v in values.items() if k not in ("steps", "save_every", "gradient_checkpointing")}


class LoraTrainer:
    """A frozen network with adapters that learn, and their optimizer."""

    def __init__(self, model: OptimizedTransformer, recipe: Recipe) -> None:
        self.model, self.recipe = model.requires_grad_(False), recipe
        self.parameters: dict[str, Tensor] = {}
        generator = torch.Generator().manual_seed(recipe.seed)
        for i in range(model.config.depth):
            for name in recipe.layers:
                # fp32 on any base: 16 bits would lose the steps.
                layer = adapt(model.get_submodule(f"blocks.{i}.{name}"), recipe.rank, torch.float32)
                with torch.no_grad():
                    bound = layer.lora_down.shape[1] ** -0.5
                    drawn = torch.rand(layer.lora_down.shape, generator=generator)
                    layer.lora_down.copy_((2 * drawn - 1) * bound)
                    layer.lora_scale.fill_(recipe.scaling / recipe.rank)
                for end, parameter in (("lora_A", layer.lora_down), ("lora_B", layer.lora_up)):
                    self.parameters[f"{PREFIX}blocks.{i}.{name}.{end}.weight"] = parameter.requires_grad_(True)
        self.optimizer = torch.optim.AdamW(self.parameters.values(), lr=recipe.learning_rate, betas=(0.9, 0.99))

    def step(self, number: int, samples: Mapping[int, Sequence[Sample]], null: Tensor) -> float:
        """Step `number`, from 0, on samples by their latent frames; null [L, D]: the empty caption. The loss."""
        seed = int.from_bytes(hashlib.sha256(f"{self.recipe.seed} {number}".encode()).digest()[:8], "big") >> 1
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            inputs = self._draw(samples, null)
        rate = self.recipe.learning_rate * min(1.0, (number + 1) / WARM_UP)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        with torch.enable_grad():
            loss = self._loss(*inputs)
            loss.backward()
        value, norm = loss.item(), nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
        # The norm is not finite if the loss is not.
        if not math.isfinite(norm):
            raise LongCatError(
                f"the loss is {value} at step {number + 1}, its gradient {float(norm)}; what was saved before is kept: "
                f"try a lower --learning-rate than {self.recipe.learning_rate:g}, or --dtype float32"
            )
        self.optimizer.step()
        return value

    def _draw(self, samples: Mapping[int, Sequence[Sample]], null: Tensor) -> tuple[Any, ...]:
        """A batch of clips of one length: latents, noise, sigmas, conditioning frames, text, mask. On the CPU."""
        sizes = list(samples)
        counts = torch.tensor([len(samples[size]) for size in sizes], dtype=torch.float)
        frames = sizes[int(torch.multinomial(counts, 1))]
        rows = torch.randint(len(samples[frames]), (self.recipe.batch,)).tolist()
        chosen = [samples[frames][row] for row in rows]
        given = 0
        if frames > 1 and float(torch.rand(())) < self.recipe.cond_share:
            # An image, or the end of a clip.
            most = min(MOST_GIVEN, frames - 1)
            given = 1 if most < 2 or float(torch.rand(())) < 0.5 else int(torch.randint(2, most + 1, ()))
        sigmas = sample_sigmas(len(chosen), self.recipe.shift)
        latents = torch.stack([sample.latents for sample in chosen])
        texts = pad_sequence([*(sample.context for sample in chosen), null], batch_first=True)
        lengths = torch.tensor([*(len(sample.context) for sample in chosen), len(null)])
        mask = (torch.arange(texts.shape[1])[None] < lengths[:, None]).long()
        dropped = drop_text(texts[:-1], mask[:-1], texts[-1:], mask[-1:], self.recipe.caption_dropout)
        return latents, torch.randn_like(latents), sigmas, given, *dropped

    def _loss(
        self, latents: Tensor, noise: Tensor, sigmas: Tensor, given: int, context: Tensor, mask: Tensor
    ) -> Tensor:
        device = self.model.patch_embed.weight.device
        text = self.model.embed_text(context.to(device), mask.to(device), MAX_LENGTH)
        latents, noise, sigmas = latents.to(device), noise.to(device), sigmas.to(device)
        return flow_matching_loss(self.model, latents, sigmas, text, num_cond_latents=given, noise=noise)

    def state(self) -> dict[str, Tensor]:
        """The LoRA under the names of its file, and the optimizer's moments."""
        tensors: dict[str, Tensor] = dict(self.parameters)
        for name, parameter in self.parameters.items():
            tensors |= {f"{key}.{name}": self.optimizer.state[parameter][key] for key in MOMENTS}
        return tensors

    @torch.no_grad()
    def load_state(self, tensors: Mapping[str, Tensor], steps: int) -> None:
        """Restore what `state` returned after `steps` steps. Raises CheckpointError for other tensors than those."""
        found = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
        check_state("the training state", found, {name: tuple(p.shape) for name, p in self.parameters.items()})
        for name, parameter in self.parameters.items():
            parameter.copy_(tensors[name])
            moments = {key: tensors[f"{key}.{name}"].to(parameter.device, copy=True) for key in MOMENTS}
            self.optimizer.state[parameter] = {"step": torch.tensor(float(steps)), **moments}


def adapter_shapes(config: ModelConfig, recipe: Recipe) -> dict[str, tuple[int, ...]]:
    """Shapes of the adapters by their names in the file, as `LoraTrainer` has them."""
    with torch.device("meta"):
        block = OptimizedTransformer(ModelConfig(**{**config.to_dict(), "depth": 1})).blocks[0]
    shapes: dict[str, tuple[int, ...]] = {}
    for i in range(config.depth):
        for name in recipe.layers:
            rows, columns = block.get_parameter(f"{name}.weight").shape
            module = f"{PREFIX}blocks.{i}.{name}"
            shapes |= {f"{module}.lora_A.weight": (recipe.rank, columns)}
            shapes |= {f"{module}.lora_B.weight": (rows, recipe.rank)}
    return shapes


def estimate_bytes(adapters: Mapping[str, tuple[int, ...]]) -> int:
    """Bytes of the file and its state, each of which exists twice while it is written."""
    return 8 * 4 * sum(math.prod(shape) for shape in adapters.values()) + (1 << 20)


def train_lora(
    model: ModelPaths | OpenedModel,
    clips: Sequence[Clip],
    recipe: Recipe,
    output: Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    optimizations: Optimizations | None = None,
    report: Report = lambda what, done, of, loss: None,
) -> LoraFile:
    """Train a LoRA for `model` on `clips` and write it to `output`, every `save_every` steps and at the end.

    Continues from the state beside `output`. VAE and text encoder are loaded, used and freed before the transformer is
    loaded. Raises LongCatError for files and settings that do not fit together, before anything is loaded; for a loss
    that is not finite, which leaves the last save; and if another run trains the same file.
    """
    optimizations = Optimizations() if optimizations is None else optimizations
    opened = model if isinstance(model, OpenedModel) else open_model(model, attention=optimizations.attention)
    paths, checkpoint = opened.paths, opened.checkpoint
    check_output(output)
    adapters = adapter_shapes(checkpoint.config, recipe)
    check_place(output, estimate_bytes(adapters))
    settings = recipe.decides() | paths.fingerprints() | {"clips": clips_fingerprint(clips)}
    settings |= {"dtype": str(dtype).removeprefix("torch.")}
    file = LoraFile(output, recipe.rank, recipe.scaling, settings, adapters)
    check_place(file.state)
    with file.held():
        file.open()
        if file.done >= recipe.steps:
            file.finish()
            return file
        samples, null = _encode(paths, clips, recipe, checkpoint.config, dtype, device, report)
        network = load_transformer(checkpoint, dtype=dtype, device=device, optimizations=optimizations)
        trainer = LoraTrainer(network, recipe)
        if file.done:
            trainer.load_state(read_tensors(file.state), file.done)
        for number in range(file.done, recipe.steps):
            loss = trainer.step(number, samples, null)
            report("training", number + 1, recipe.steps, loss)
            if (number + 1) % recipe.save_every == 0 or number + 1 == recipe.steps:
                file.write(trainer.state(), number + 1)
        return file


def check_output(output: Path) -> None:
    """Raise LongCatError unless `output` is named like a LoRA, and not like the state beside it."""
    check_suffix(output, (".safetensors",))
    if output.name.endswith(".state.safetensors"):
        raise LongCatError(f"output {output} must end in .safetensors, and not in .state.safetensors")


def _encode(
    paths: ModelPaths,
    clips: Sequence[Clip],
    recipe: Recipe,
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device | str,
    report: Report,
) -> tuple[dict[int, list[Sample]], Tensor]:
    """Samples by their latent frames, and the empty caption [L, D]."""
    encoder = load_text_encoder(paths.text_encoder, dtype=dtype, device=device)
    if encoder.channels != config.caption_channels:
        raise CheckpointError(
            f"text encoder {paths.text_encoder} gives {encoder.channels} channels but the model takes "
            f"{config.caption_channels}; give the text encoder that belongs to it"
        )
    contexts = encode_captions([*(clip.caption for clip in clips), ""], encoder)
    del encoder
    _free()
    vae = load_vae(paths.vae, dtype=dtype, device=device)
    latents = encode_clips(clips, vae, recipe.height, recipe.width, lambda done, of: report("encoding", done, of, None))
    del vae
    _free()
    samples: dict[int, list[Sample]] = defaultdict(list)
    for clip, context in zip(latents, contexts[:-1], strict=True):
        samples[clip.shape[1]].append(Sample(clip, context))
    return dict(samples), contexts[-1]


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
