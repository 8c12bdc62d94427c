"""The LongCat-Video transformer: tokens stay [B, T, H*W, C] from patch embedding to final layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..errors import LongCatError
from . import backends
from .attention import CrossAttention, SelfAttention, TextTokens, arrange_text, project, sliceable
from .config import ModelConfig, Optimizations
from .kv_cache import KVCache
from .rope import rope_table

# Called as around_block(i, run, tokens) with tokens [B, T, S, C]; run(tokens) is block i. Returns tokens.
AroundBlock = Callable[[int, Callable[[Tensor], Tensor], Tensor], Tensor]


def linear_fp32(layer: nn.Module, x: Tensor) -> Tensor:
    """A linear layer in fp32 whatever its weights are stored in (the fp32 islands of the model)."""
    bias = None if layer.bias is None else layer.bias.float()
    return F.linear(x.float(), layer.weight.float(), bias)


@contextmanager
def _fp32_region(x: Tensor, explicit: bool) -> Iterator[None]:
    # Autocast to fp32 exists on CUDA only; elsewhere the explicit casts serve both settings of the switch.
    if explicit or x.device.type != "cuda":
        yield
    else:
        with torch.autocast("cuda", dtype=torch.float32):
            yield


def timestep_features(t: Tensor, dim: int) -> Tensor:
    """Sinusoidal features [..., dim] fp32 of timesteps t [...] in 0..1000, cosines first (DDPM, arXiv 2006.11239)."""
    half = dim // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angles = t.float()[..., None] * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


class FeedForward(nn.Module):
    """SwiGLU (arXiv 2002.05202): down(silu(gate x) * (up x)), no biases; gate and up are one weight."""

    def __init__(self, dim: int, hidden: int, *, operations: Any, dtype: Any, device: Any) -> None:
        super().__init__()
        self.gate_up = operations.Linear(dim, 2 * hidden, bias=False, dtype=dtype, device=device)
        self.down = operations.Linear(hidden, dim, bias=False, dtype=dtype, device=device)
        self.sliceable = getattr(operations, "sliceable", sliceable)

    def forward(self, x: Tensor, fused: bool = True) -> Tensor:
        gate, up = project(self.gate_up, x, 2, fused or not self.sliceable(self.gate_up, x))
        return self.down(F.silu(gate) * up)


class LayerNorm(nn.Module):
    """LayerNorm over C in fp32, back in x's dtype; eps 1e-6. Weight and bias [C]."""

    def __init__(self, dim: int, dtype: torch.dtype | None = None, device: Any = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim, dtype=dtype, device=device))
        self.bias = nn.Parameter(torch.zeros(dim, dtype=dtype, device=device))

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = (p.to(device=x.device, dtype=torch.float32) for p in (self.weight, self.bias))
        return F.layer_norm(x.float(), x.shape[-1:], weight, bias, 1e-6).to(x.dtype)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm without weights, then scale and shift; fp32 inside, back in x's dtype.

    x [B, T, S, C]; shift, scale [B, T, 1, C] fp32.
    """
    normed = F.layer_norm(x.float(), x.shape[-1:], eps=1e-6)
    return (normed * (1 + scale) + shift).to(x.dtype)


def gated(x: Tensor, update: Tensor, gate: Tensor) -> Tensor:
    """x + gate * update, summed in fp32, back in x's dtype. x, update [B, T, S, C]; gate [B, T, 1, C] fp32."""
    return (x.float() + gate * update.float()).to(x.dtype)


class Block(nn.Module):
    """Self-attention, cross-attention to text and SwiGLU, the first and last under adaLN modulation."""

    def __init__(self, config: ModelConfig, *, operations: Any, dtype: Any, device: Any) -> None:
        super().__init__()
        kwargs = {"operations": operations, "dtype": dtype, "device": device}
        dim, heads = config.hidden_size, config.num_heads
        self.modulation = operations.Linear(config.adaln_dim, 6 * dim, dtype=dtype, device=device)
        self.attn = SelfAttention(dim, heads, **kwargs)
        self.cross_norm = LayerNorm(dim, dtype=dtype, device=device)
        self.cross_attn = CrossAttention(dim, heads, **kwargs)
        self.ffn = FeedForward(dim, config.ffn_hidden, **kwargs)
        self.linear_fp32 = getattr(operations, "linear_fp32", linear_fp32)

    def forward(
        self,
        x: Tensor,
        temb: Tensor,
        text: TextTokens | None,
        rope: tuple[Tensor, Tensor],
        optimizations: Optimizations,
        kernels: backends.Kernels,
        num_cond_latents: int = 0,
        cached: tuple[Tensor, Tensor] | None = None,
        keep: Callable[[Tensor, Tensor], None] | None = None,
    ) -> Tensor:
        """x [B, T, S, C] -> the same shape.

        temb [B, T, adaLN] fp32. text None: no cross-attention (filling a cache). num_cond_latents: clean frames at
        the front of x. cached: rotated keys and values of clean frames in front of x. keep: see SelfAttention.
        """
        spatial = x.shape[2]
        explicit = optimizations.explicit_fp32
        with _fp32_region(x, explicit):
            modulation = self.linear_fp32(self.modulation, F.silu(temb))[:, :, None]
            shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = modulation.chunk(6, dim=-1)
            h = modulate(x, shift_a, scale_a)
        h = self.attn(h.flatten(1, 2), rope, num_cond_latents * spatial, cached, optimizations, kernels, keep)
        with _fp32_region(x, explicit):
            x = gated(x, h.view_as(x), gate_a)
        if text is not None:
            x = x + self._cross(x, text, num_cond_latents, optimizations, kernels)
        with _fp32_region(x, explicit):
            h = modulate(x, shift_f, scale_f)
        h = self.ffn(h, optimizations.fused_ffn)
        with _fp32_region(x, explicit):
            x = gated(x, h, gate_f)
        return x

    def _cross(
        self,
        x: Tensor,
        text: TextTokens,
        num_cond_latents: int,
        optimizations: Optimizations,
        kernels: backends.Kernels,
    ) -> Tensor:
        noisy = x[:, num_cond_latents:]
        out = self.cross_attn(self.cross_norm(noisy).flatten(1, 2), text, optimizations, kernels).view_as(noisy)
        # Conditioning frames know nothing of the prompt: their update is zero.
        return F.pad(out, (0, 0, 0, 0, num_cond_latents, 0)) if num_cond_latents else out


class FinalLayer(nn.Module):
    """adaLN and the projection to latents' patches, all in fp32."""

    def __init__(self, config: ModelConfig, *, operations: Any, dtype: Any, device: Any) -> None:
        super().__init__()
        dim = config.hidden_size
        self.modulation = operations.Linear(config.adaln_dim, 2 * dim, dtype=dtype, device=device)
        patch = math.prod(config.patch_size) * config.out_channels
        self.linear = operations.Linear(dim, patch, dtype=dtype, device=device)
        self.linear_fp32 = getattr(operations, "linear_fp32", linear_fp32)

    def forward(self, x: Tensor, temb: Tensor, explicit_fp32: bool) -> Tensor:
        """x [B, T, S, C], temb [B, T, adaLN] fp32 -> [B, T, S, patch * C_out] fp32."""
        with _fp32_region(x, explicit_fp32):
            shift, scale = self.linear_fp32(self.modulation, F.silu(temb))[:, :, None].chunk(2, dim=-1)
            return self.linear_fp32(self.linear, modulate(x.float(), shift, scale))


class LongCatTransformer(nn.Module):
    """LongCat-Video: latents, timesteps and text in, x0 - noise out (the negative of the flow velocity).

    `operations` supplies Linear and Conv3d (default torch.nn), so that an owner can stream, quantise or patch the
    weights; it may carry `linear_fp32(layer, x)` for layers whose weights are not simply there, and `sliceable(layer,
    x)`, which tells whether a slice of the weight may be used alone.
    """

    def __init__(
        self,
        config: ModelConfig,
        optimizations: Optimizations | None = None,
        *,
        operations: Any = nn,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        kwargs = {"dtype": dtype, "device": device}
        dim = config.hidden_size
        self.patch_embed = operations.Conv3d(
            config.in_channels, dim, kernel_size=config.patch_size, stride=config.patch_size, **kwargs
        )
        self.time_embed = nn.ModuleList(
            [
                operations.Linear(config.frequency_dim, config.adaln_dim, **kwargs),
                operations.Linear(config.adaln_dim, config.adaln_dim, **kwargs),
            ]
        )
        self.text_embed = nn.ModuleList(
            [operations.Linear(config.caption_channels, dim, **kwargs), operations.Linear(dim, dim, **kwargs)]
        )
        self.blocks = nn.ModuleList(Block(config, operations=operations, **kwargs) for _ in range(config.depth))
        self.final_layer = FinalLayer(config, operations=operations, **kwargs)
        self.linear_fp32 = getattr(operations, "linear_fp32", linear_fp32)
        self.dtype = dtype or self.patch_embed.weight.dtype
        self.set_optimizations(optimizations or Optimizations())

    def _apply(self, fn: Callable, recurse: bool = True) -> LongCatTransformer:
        # .to(), .half() and .cuda() change the dtype that activations must have.
        result = super()._apply(fn, recurse)
        self.dtype = self.patch_embed.weight.dtype
        return result

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of activations; an owner whose weights are cast at use overrides it."""
        return self.dtype

    def set_optimizations(self, optimizations: Optimizations) -> None:
        """Switch how the loaded network runs; weights stay as they are.

        Raises BackendUnavailable for an attention backend that this machine lacks, and changes nothing then.
        """
        backends.check(optimizations.attention)
        for block in self.blocks:
            block._compiled_call_impl = None
            if optimizations.compile == "blocks":
                block.compile()
        self.optimizations = optimizations

    def embed_text(self, context: Tensor, mask: Tensor | None = None, length: int | None = None) -> TextTokens:
        """Text for every block, computed once per prompt.

        context [B, L, caption]; mask [B, L] (1: real token) or None: all are real; length: tokens with all padding,
        where context was cut to fewer.
        """
        mode, zero_pad = self.optimizations.text_mode, self.config.text_tokens_zero_pad
        return arrange_text(context.to(self.compute_dtype), mask, mode, zero_pad, self.embed_tokens, length)

    def embed_tokens(self, context: Tensor) -> Tensor:
        """Text encoder's output [..., caption] to the network's width [..., C], token by token."""
        first, second = self.text_embed
        return second(F.gelu(first(context), approximate="tanh"))

    def choose_kernels(self, device: torch.device) -> backends.Kernels:
        """The kernels that `optimizations` name, for tensors on `device`."""
        dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else self.compute_dtype
        grad = torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())
        inputs = backends.Inputs(device, dtype, self.config.head_dim, grad)
        return backends.resolve_kernels(self.optimizations.attention, inputs)

    def new_kv_cache(
        self, num_latents: int, height: int, width: int, batch: int = 1, device: torch.device | str | None = None
    ) -> KVCache:
        """An empty cache for `num_latents` conditioning frames of `height` x `width` latents, beside the weights."""
        _, ph, pw = self.config.patch_size
        device = self.patch_embed.weight.device if device is None else device
        grid = (num_latents, height // ph, width // pw)
        return KVCache(self.config, *grid, batch=batch, dtype=self.compute_dtype, device=device)

    def fill_kv_cache(
        self, cond_latents: Tensor, device: torch.device | str | None = None, kernels: backends.Kernels | None = None
    ) -> KVCache:
        """One pass over clean latents [B, C, n, H, W] at timestep 0 and without text; returns the filled cache.

        device: where the cache shall live; None: beside the latents. kernels: see `forward`.
        """
        cache = self.new_kv_cache(*cond_latents.shape[2:], batch=cond_latents.shape[0], device=cond_latents.device)
        timesteps = cond_latents.new_zeros(cond_latents.shape[0])
        # By name: an owner's `forward` may take other arguments.
        LongCatTransformer.forward(self, cond_latents, timesteps, None, fill=cache, kernels=kernels)
        cache.rotate()
        return cache if device is None else cache.to(device)

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        context: Tensor | TextTokens | None,
        mask: Tensor | None = None,
        *,
        num_cond_latents: int = 0,
        kv_cache: KVCache | None = None,
        fill: KVCache | None = None,
        kernels: backends.Kernels | None = None,
        around_block: AroundBlock | None = None,
    ) -> Tensor:
        """Latents x [B, C_in, T, H, W] -> x0 - noise [B, C_out, T, H, W] fp32.

        timestep: [B] or per latent frame [B, T], 0..1000. context: text [B, L, caption] with mask [B, L] (1: real),
        or the result of `embed_text`; None leaves cross-attention out. num_cond_latents: clean frames at the front of
        x (they carry timestep 0). kv_cache: of clean frames that stand in front of x and are not part of it.
        fill: a cache that receives this pass's keys (before RoPE) and values. kernels: instead of those that the
        optimizations name. around_block: called in place of every block.
        """
        config, optimizations = self.config, self.optimizations
        batch, channels, frames, height, width = x.shape
        _, ph, pw = config.patch_size
        if channels != config.in_channels or height % ph or width % pw:
            raise LongCatError(
                f"latents are {tuple(x.shape)}; the network wants {config.in_channels} channels and sides that divide "
                f"by {ph}x{pw}"
            )
        if not 0 <= num_cond_latents <= frames:
            raise LongCatError(f"num_cond_latents is {num_cond_latents} but there are {frames} latent frames")
        if timestep.ndim == 1:
            timestep = timestep[:, None].expand(batch, frames)
        # The reference rounds timesteps to the model's dtype before it embeds them in fp32.
        features = timestep_features(timestep.to(self.compute_dtype), config.frequency_dim)
        first, second = self.time_embed
        with _fp32_region(x, optimizations.explicit_fp32):
            temb = self.linear_fp32(second, F.silu(self.linear_fp32(first, features)))
        text = context if context is None or isinstance(context, TextTokens) else self.embed_text(context, mask)
        if text is not None:
            if text.tokens.shape[0] not in (1, batch):
                raise LongCatError(f"{text.tokens.shape[0]} texts for {batch} videos; give one, or one for each")
            text = text.expand(batch)

        patches = self.patch_embed(x.to(self.compute_dtype))
        grid = patches.shape[2:]
        # Contiguous after the last view: a compiled block takes its first and its later inputs for the same then.
        tokens = patches.flatten(3).permute(0, 2, 3, 1).contiguous()
        start = 0
        if kv_cache is not None:
            kv_cache.rotate()
            start = kv_cache.num_latents
        rope = rope_table(config.head_dim, *grid, start, tokens.device)

        kernels = kernels or self.choose_kernels(x.device)
        recompute = optimizations.gradient_checkpointing and torch.is_grad_enabled()
        for i, block in enumerate(self.blocks):
            cached = None if kv_cache is None else kv_cache.read(i, tokens)
            keep = None if fill is None else (lambda k, v, i=i: fill.store(i, k, v))
            args = (temb, text, rope, optimizations, kernels, num_cond_latents, cached, keep)

            def run(x: Tensor, block: Block = block, args: tuple = args) -> Tensor:
                return checkpoint(block, x, *args, use_reentrant=False) if recompute else block(x, *args)

            tokens = run(tokens) if around_block is None else around_block(i, run, tokens)

        out = self.final_layer(tokens, temb, optimizations.explicit_fp32)
        pattern = "b t (h w) (ph pw c) -> b c t (h ph) (w pw)"
        return rearrange(out, pattern, h=grid[1], w=grid[2], ph=ph, pw=pw)
