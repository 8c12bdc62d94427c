"""The model to measure (embedded, from disk, or with random weights), its inputs, and one denoising step.

Parts switch the network only through the functions of this module.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import LongCatError
from ..measure.clock import Laps, peak_gib, reset_peak
from ..measure.speed import SEED, TEXT_TOKENS, kernel_name
from ..model.config import ModelConfig
from ..optimize.attention import import_ahead
from ..optimize.block_sparse import BlockSparse
from ..optimize.optimized import OptimizedTransformer
from ..optimize.sparse.settings import Sparse
from ..optimize.switches import Optimizations
from ..sampling.conditioning import latent_shape
from ..sampling.sampler import sample
from ..sampling.schedules import make_schedule
from ..sampling.step import STEP, take_step
from ..vae.network import VAEConfig
from .baseline import BaselineTransformer

NANO, FULL_RANDOM = "nano", "full-random"
TEXT_LENGTH = 512
# Rows call our own text kernel by this name.
FUSED_TEXT = "fused_text"
# A step in the middle; its numbers do not affect speed.
TIMESTEP, SIGMA, SIGMA_CHANGE, GUIDANCE = 800.0, 0.8, -0.02, 4.0


@dataclass(frozen=True)
class Size:
    """A video in pixels. batch 2: both halves of guidance; 1: the distilled model's steps."""

    height: int
    width: int
    frames: int
    batch: int = 2

    def latents(self, channels: int = 16) -> tuple[int, ...]:
        """[batch, C, T, H/8, W/8]."""
        return self.batch, *latent_shape(self.frames, self.height, self.width, channels)

    def tokens(self, config: ModelConfig) -> int:
        """Tokens of one sample."""
        _, _, frames, height, width = self.latents()
        return frames * (height // config.patch_size[1]) * (width // config.patch_size[2])

    def check(self, config: ModelConfig) -> None:
        """Raises LongCatError for sides or a frame count that the network cannot take."""
        latent_shape(self.frames, self.height, self.width)
        for name, patch in (("height", config.patch_size[1]), ("width", config.patch_size[2])):
            side = getattr(self, name)
            if side < 8 * patch or side % (8 * patch):
                raise LongCatError(f"{name} {side} is not a multiple of {8 * patch}; give such sides in --size HxW")

    def __str__(self) -> str:
        return f"{self.height}x{self.width}x{self.frames}"


def random_model(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> OptimizedTransformer:
    """A network with random weights, made on the device: norms 1, all other weights normal with deviation 0.02."""
    model = OptimizedTransformer(config, dtype=dtype, device="meta").to_empty(device=device)
    generator = torch.Generator(device).manual_seed(SEED)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.fill_(1.0)
            else:
                parameter.normal_(std=0.02, generator=generator)
    return model.eval().requires_grad_(False)


def vae_config(device: torch.device) -> VAEConfig:
    """A VAE of the released one's width on a GPU, and a narrow one on a CPU."""
    return VAEConfig(96 if device.type == "cuda" else 8, 16, [0.0] * 16, [1.0] * 16)


def load_model(name: str, device: torch.device, dtype: torch.dtype, blocks: int | None = None) -> OptimizedTransformer:
    """`nano`, `full-random` (13.58 B parameters, or fewer with fewer `blocks`) or the path of a checkpoint."""
    if name == FULL_RANDOM:
        config = ModelConfig() if blocks is None else replace(ModelConfig(), depth=blocks)
        # Loading a checkpoint does this as well.
        import_ahead(device)
        return random_model(config, device, dtype)
    from ..checkpoints.load import load_transformer
    from ..generate.paths import NANO_MODEL

    model = load_transformer(NANO_MODEL if name == NANO else Path(name), dtype=dtype, device=device)
    model = model.eval().requires_grad_(False)
    if blocks is None:
        return model
    if blocks > model.config.depth:
        raise LongCatError(f"--blocks {blocks} is more than the {model.config.depth} blocks of the model; give fewer")
    return first_blocks(model, blocks)


def first_blocks(model: OptimizedTransformer, depth: int) -> OptimizedTransformer:
    """The network with only its first `depth` blocks; modules are shared, not copied."""
    config = replace(model.config, depth=depth)
    small = OptimizedTransformer(config, model.optimizations, dtype=model.dtype, device="meta")
    for name in ("patch_embed", "time_embed", "text_embed", "final_layer"):
        setattr(small, name, getattr(model, name))
    small.register_module("blocks", torch.nn.ModuleList(list(model.blocks)[:depth]))
    return small.eval()


def random_text(config: ModelConfig, lengths: Sequence[int], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random text [B, TEXT_LENGTH, caption], zero beyond each of the B lengths, and its mask."""
    device = generator.device
    mask = (torch.arange(TEXT_LENGTH)[None] < torch.tensor(lengths)[:, None]).to(device).long()
    context = torch.randn((*mask.shape, config.caption_channels), generator=generator, device=device)
    return context * mask[..., None], mask


class Inputs:
    """Latents [1, C, T, H, W], timestep and text of one denoising step, the same for all variants."""

    def __init__(self, config: ModelConfig, size: Size, device: torch.device) -> None:
        size.check(config)
        self.size, self.config, self.device = size, config, device
        generator = torch.Generator(device).manual_seed(SEED)
        shape = size.latents(config.in_channels)
        self.latents = torch.randn((1, *shape[1:]), generator=generator, device=device)
        lengths = TEXT_TOKENS[-size.batch :]
        # All padding counts as one key.
        self.folded_keys = max(lengths) + 1
        self.context, self.mask = random_text(config, lengths, generator)
        self.sigma, self.sigma_change = (torch.tensor(number, device=device) for number in (SIGMA, SIGMA_CHANGE))
        self.scale = torch.tensor(GUIDANCE, device=device) if size.batch == 2 else None

    def describe(self) -> dict[str, Any]:
        tokens = self.size.tokens(self.config)
        return asdict(self.size) | {"tokens": tokens, "text_tokens": self.mask.sum(1).tolist(), "seed": SEED}

    def prompts(self) -> dict[str, Any]:
        """Text and guidance as arguments of `sample`."""
        text = {"context": self.context[-1:], "mask": self.mask[-1:], "guidance_scale": 1.0}
        if self.size.batch == 1:
            return text
        negative = {"negative_context": self.context[:1], "negative_mask": self.mask[:1]}
        return text | negative | {"guidance_scale": GUIDANCE}

    def given(self) -> Tensor:
        return self.latents.expand(self.size.batch, -1, -1, -1, -1).contiguous()


@contextmanager
def noting(model: OptimizedTransformer) -> Iterator[list[str]]:
    """The sentences that a model announces while this context is open."""
    notes: list[str] = []
    before = model.announce
    # Compiling is expected here.
    model.announce = lambda sentence: None if sentence.startswith("compiling") else notes.append(sentence)
    try:
        yield notes
    finally:
        model.announce = before


@contextmanager
def switched(model: OptimizedTransformer, chosen: Optimizations, name: str = "") -> Iterator[list[str]]:
    """Switch the model, and drop everything that an earlier variant compiled. Gives a list of what it announces.

    name: the variant's; with a name, LongCatError is raised at the end if the network fell back from `chosen`.
    """
    with noting(model) as notes:
        torch._dynamo.reset()
        model.set_optimizations(chosen)
        for function in (model.compiled_block, STEP):
            function.forget()
        yield notes
    if name and model.optimizations != chosen:
        raise LongCatError(f"{name} was given up at its first step: {'; '.join(notes) or model.optimizations}")


@contextmanager
def attending(model: OptimizedTransformer, settings: BlockSparse | Sparse | None) -> Iterator[None]:
    """Self-attention is block-sparse or sparse, or dense for None, while this context is open."""
    before = model.block_sparse, model.sparse
    model.block_sparse = settings if isinstance(settings, BlockSparse) else None
    model.sparse = settings if isinstance(settings, Sparse) else None
    try:
        yield
    finally:
        model.block_sparse, model.sparse = before


def kernels_of(model: OptimizedTransformer, inputs: Inputs) -> dict[str, str]:
    """Names of the kernels in use: `attention` and `text_attention`."""
    kernels = model.choose_kernels(inputs.device)
    text = model.embed_text(inputs.context, inputs.mask)
    own = model.own_text_kernel(text.tokens, text)
    return {
        "attention": kernel_name(kernels.attend),
        "text_attention": FUSED_TEXT if own else kernel_name(kernels.text or kernels.attend),
    }


def network_forward(model: OptimizedTransformer, inputs: Inputs, **options: Any) -> Callable[[], Tensor]:
    """One forward as the sampler makes it: [batch, C, T, H, W] fp32; options: of the network. Call under no_grad."""
    timestep = torch.full((1, 1), TIMESTEP, device=inputs.device)
    # Embedded in the first call, as by the sampler.
    text = cache(lambda: model.embed_text(inputs.context, inputs.mask))

    def forward() -> Tensor:
        given = (text(),) if model.optimizations.reuse_text else (inputs.context, inputs.mask)
        return model(inputs.given(), timestep, *given, **options)

    return forward


def baseline_forward(baseline: BaselineTransformer, inputs: Inputs, compiled: bool = False) -> Callable[[], Tensor]:
    """One forward of the baseline; compiled: as one graph."""
    baseline.prepare(inputs.size.latents())
    network = torch.compile(baseline) if compiled else baseline
    timestep = torch.full((inputs.size.batch,), TIMESTEP, device=inputs.device)
    return lambda: network(inputs.given(), timestep, inputs.context, inputs.mask)


def step_of(forward: Callable[[], Tensor], inputs: Inputs, chosen: Optimizations) -> Callable[[], Tensor]:
    """A whole denoising step: forward, guidance and Euler update. Returns the new latents."""

    def step() -> Tensor:
        with torch.no_grad():
            out, sigmas = forward(), (inputs.sigma, inputs.sigma_change)
            return take_step(chosen, inputs.latents, out, *sigmas, inputs.scale, 0)[0]

    return step


@torch.no_grad()
def timed_sampling(model: OptimizedTransformer, inputs: Inputs, repeats: int, **options: Any) -> dict[str, Any]:
    """Run 1 + `repeats` steps of the sampler, with `options` of `sample`; the first step, which embeds the text and
    compiles, is not timed.

    ms: median of a step; times_ms: each step; peak_gib: of the whole sampling; out: the latents.
    """
    laps = Laps(inputs.device)
    reset_peak(inputs.device)
    schedule = make_schedule("base", 1 + repeats)
    out = sample(model, inputs.latents, schedule, **inputs.prompts(), callback=laps.mark, **options)
    peak, times = peak_gib(inputs.device), laps.times_ms()
    return {"ms": statistics.median(times), "times_ms": times, "peak_gib": peak, "out": out}
