"""The LongCat-Video transformer: tokens stay [B, T, H*W, C] from patch embedding to final layer."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..errors import LongCatError
from ..optimize import attention as backends
from ..optimize.block_sparse import BlockSparse, ChunkLayout, chunk_layout, chunked_rope_table, with_block_sparse
from ..optimize.compilation import Regional
from ..optimize.kernels.elementwise import usable as kernels_usable
from ..optimize.kernels.text_attention import refuses as text_attention_refuses
from ..optimize.streaming import BlockStream
from .attention import BlockText, TextTokens, arrange_text, unfold_padding
from .block import Block, FinalLayer, How, ffn_pieces, fp32_region, linear_fp32, run_block
from .config import ModelConfig, Optimizations
from .kv_cache import KVCache
from .rope import rope_table

# Called as around_block(i, run, tokens) with tokens [B, T, S, C]; run(tokens) is block i. Returns tokens.
AroundBlock = Callable[[int, Callable[[Tensor], Tensor], Tensor], Tensor]


def timestep_features(t: Tensor, dim: int) -> Tensor:
    """Sinusoidal features [..., dim] fp32 of timesteps t [...] in 0..1000, cosines first (DDPM, arXiv 2006.11239)."""
    half = dim // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angles = t.float()[..., None] * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


def _warn(sentence: str) -> None:
    warnings.warn(sentence, stacklevel=2)


def _version(parameter: Tensor) -> tuple[int, int]:
    # Inference tensors count no versions; they are replaced, not written to.
    return id(parameter), 0 if parameter.is_inference() else parameter._version


class _Texts(NamedTuple):
    """What block i attends to, and whether making that takes the block's weights."""

    of: Callable[[int], BlockText | None]
    need_weights: Callable[[int], bool]


class _Patches:
    """Put before an nn.Conv3d whose kernels do not overlap: one matrix product, its output in the order of tokens.

    The convolution kernels want other orders and copy everything two times over.
    """

    kernel_size: tuple[int, int, int]

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None, *args: Any, **kwargs: Any) -> Tensor:
        """x [B, C_in, T, H, W] -> [B, C, t, h, w] as a view of [B, t, h, w, C]."""
        t, h, w = self.kernel_size
        patches = rearrange(x, "b c (t pt) (h ph) (w pw) -> b t h w (c pt ph pw)", pt=t, ph=h, pw=w)
        return F.linear(patches, weight.flatten(1), bias).permute(0, 4, 1, 2, 3)


class LongCatTransformer(nn.Module):
    """LongCat-Video: latents, timesteps and text in, x0 - noise out (the negative of the flow velocity).

    `operations` supplies Linear and Conv3d (default torch.nn), so that an owner can stream, quantise or patch the
    weights; it may carry `linear_fp32(layer, x)` for layers whose weights are not simply there, and `sliceable(layer,
    x)`, which tells whether a slice of the weight may be used alone.
    """

    compiled_block = Regional(run_block, "the transformer block")

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
        self.patch_embed = type("PatchEmbed", (_Patches, operations.Conv3d), {})(
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
        # Told what a user should know: that compiling begins, that a lossy setting was given up.
        self.announce: Callable[[str], None] = _warn
        self.dtype = dtype or self.patch_embed.weight.dtype
        # Self-attention of videos block by block, which changes the output; None: in full.
        self.block_sparse: BlockSparse | None = None
        # Where the weights of some blocks wait in CPU memory; None: all lie on the device.
        self.stream: BlockStream | None = None
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
        for module in self.modules():
            # What optimize.quantization put in place of a linear layer.
            if hasattr(module, "fp8"):
                module.fp8 = optimizations.fp8
        # `asked` stays where a lossy setting is given up.
        self.asked = self.optimizations = optimizations
        self._trusted = False

    def stream_blocks(self, device: torch.device | str, streamed: Iterable[int]) -> None:
        """Have these blocks' weights wait in CPU memory until they run on `device`; more of them than did before.

        No gradients from then on. The other weights must lie on the device.
        """
        if self.stream is None:
            # Keys of the text are made once for a prompt.
            self.stream = BlockStream(self.blocks, device, streamed, lambda name: name.startswith("cross_attn.kv."))
        else:
            self.stream.extend(streamed)

    @property
    def eight_bit(self) -> bool:
        """Whether there are 8-bit layers, the owner's or those of `optimize.quantization`."""
        return any(hasattr(module, "fp8") for module in self.modules())

    def _lossy(self) -> list[tuple[str, Optimizations]]:
        """What in force may spoil the output, in words, and the optimizations without it."""
        now, found = self.optimizations, []
        if not backends.is_exact(now.attention):
            found.append((f"attention backend {now.attention!r}", replace(now, attention="auto")))
        if now.fp8 and self.eight_bit:
            found.append(("fp8", replace(now, fp8=False)))
        return found

    def _give_up(self, out: Tensor) -> bool:
        """Check the first output [B, ...] under lossy settings; if it is spoilt, take one of them back and say so."""
        lossy = self._lossy()
        if not lossy or bool((out.isfinite().flatten(1).all(1) & (out != 0).flatten(1).any(1)).all()):
            return False
        what, rest = lossy[0]
        asked = self.asked
        self.set_optimizations(rest)
        self.asked = asked
        self.announce(f"{what} gave NaN or a black picture at the first step; going on without it")
        return True

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
        inputs = backends.Inputs(device, dtype, self.config.head_dim, self._learns())
        return backends.resolve_kernels(self.optimizations.attention, inputs)

    def own_kernels(self, x: Tensor) -> bool:
        """Whether the element-wise work on activations like x goes through kernels of our own."""
        # They are explicit fp32 throughout: they cannot stand for autocast regions.
        return self.optimizations.fused_kernels and self.optimizations.explicit_fp32 and kernels_usable(x)

    def own_text_kernel(self, x: Tensor, text: TextTokens) -> bool:
        """The same of attention from activations like x to a text."""
        wanted = self.optimizations.fused_text and self.own_kernels(x)
        return wanted and not text_attention_refuses(x, self.config.head_dim, text.tokens.shape[1])

    def _learns(self, *inputs: Tensor) -> bool:
        return torch.is_grad_enabled() and any(t.requires_grad for t in (*inputs, *self.parameters()))

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

        What the network returns for these frames is kept in it as `out`.

        device: where the cache shall live; None: beside the latents. kernels: see `forward`.
        """
        device = torch.device(device or cond_latents.device)
        cache = self.new_kv_cache(*cond_latents.shape[2:], batch=cond_latents.shape[0], device=device)
        timesteps = cond_latents.new_zeros(cond_latents.shape[0])
        # By name: an owner's `forward` may take other arguments.
        cache.out = LongCatTransformer.forward(self, cond_latents, timesteps, None, fill=cache, kernels=kernels)
        cache.rotate(cond_latents.device)
        return cache

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

        timestep: [B] or per latent frame [B, T], 0..1000; what all videos share may be given once, as [1] or [1, T]
        (then the modulation is computed once as well). context: text [B, L, caption] with mask [B, L] (1: real),
        or the result of `embed_text`; None leaves cross-attention out. num_cond_latents: clean frames at the front of
        x (they carry timestep 0). kv_cache: of clean frames that stand in front of x and are not part of it.
        fill: a cache that receives this pass's keys (before RoPE) and values. kernels: instead of those that the
        optimizations name. around_block: called in place of every block. With `block_sparse` set, blocks see tokens
        chunk after chunk, in slabs instead of frames.
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
        text = context if context is None or isinstance(context, TextTokens) else self.embed_text(context, mask)
        if text is not None and text.tokens.shape[0] not in (1, batch):
            raise LongCatError(f"{text.tokens.shape[0]} texts for {batch} videos; give one, or one for each")

        temb = self._embed_time(timestep, batch, frames)
        patches = self.patch_embed(x.to(self.compute_dtype))
        grid = patches.shape[2:]
        # Contiguous in this order, unless an owner's layer made the patches. The strides of a single video are set by
        # the last view: a compiled block takes its first and its later inputs for the same then.
        tokens = patches.flatten(3).permute(0, 2, 3, 1).contiguous()
        tokens = tokens.view(-1).view(tokens.shape)
        del patches
        start = 0
        if kv_cache is not None:
            kv_cache.rotate()
            start = kv_cache.num_latents
        own_kernels = kernels is None
        kernels = kernels or self.choose_kernels(x.device)
        layout = cached_layout = None
        block_temb, num_cond = temb, num_cond_latents
        # A cache is filled for noise frames to come, so the frames are more than one then.
        if self.block_sparse is not None and BlockSparse.applies(start + frames + (fill is not None)):
            layout, keys, cached_layout = self._layouts(tuple(grid), num_cond_latents, start, tokens.device)
            tokens = layout.arrange(tokens.flatten(1, 2)).unflatten(1, (layout.slabs, -1))
            tables = chunked_rope_table(config.head_dim, layout, start, tokens.device)
            block_temb = temb if temb.shape[1] == 1 else temb[:, layout.slab_frames]
            kernels, num_cond = with_block_sparse(kernels, keys, self.block_sparse), layout.cond_slabs
        else:
            tables = rope_table(config.head_dim, *grid, start, tokens.device)
        # Views, since what the compiler is told of a tensor's sizes sticks to it, and these are shared.
        rope = tuple(table[:] for table in tables)

        grad = self._learns(tokens, *(() if text is None else (text.tokens,)))
        if grad and self.stream is not None:
            raise LongCatError("streamed blocks have no backward pass; train with the whole model on the device")
        recompute = optimizations.gradient_checkpointing and grad
        pieces = 0 if grad else ffn_pieces(config, batch, *tokens.shape[1:3], tokens.element_size())
        own = not grad and self.own_kernels(tokens)
        how = How(
            optimizations.fused_qkv,
            optimizations.fused_ffn,
            optimizations.explicit_fp32,
            pieces,
            own,
            fused_text=own and text is not None and self.own_text_kernel(tokens, text),
        )
        texts = self._block_texts(text, context is text and not grad, batch, kernels, how.fused_text)
        call = (
            self._compiled_call(kernels, tokens.shape[1:3])
            if optimizations.compile == "blocks" and fill is None
            else run_block
        )
        for i, block in enumerate(self.blocks):
            cached = None if kv_cache is None else kv_cache.read(i, tokens)
            if cached is not None and cached_layout is not None:
                cached = tuple(map(cached_layout.arrange, cached))
            with nullcontext() if self.stream is None else self.stream.running(i, texts.need_weights(i)):
                args = (block_temb, texts.of(i), rope, cached, kernels, how, num_cond)
                if fill is not None:
                    # A cache is in the order of frames, whatever reads it.
                    plain = (lambda x: x) if layout is None else layout.restore
                    args = (*args, lambda k, v, i=i, plain=plain: fill.store(i, plain(k), plain(v)))

                def run(x: Tensor, block: Block = block, args: tuple = args) -> Tensor:
                    if recompute:
                        return checkpoint(call, block, x, *args, use_reentrant=False)
                    return call(block, x, *args)

                tokens = run(tokens) if around_block is None else around_block(i, run, tokens)
                del run, args, cached

        if layout is not None:
            tokens = layout.restore(tokens.flatten(1, 2)).unflatten(1, (frames, -1))
        out = self.final_layer(tokens, temb, how)
        pattern = "b t (h w) (ph pw c) -> b c t (h ph) (w pw)"
        out = rearrange(out, pattern, h=grid[1], w=grid[2], ph=ph, pw=pw)
        if not (self._trusted or grad or torch.compiler.is_compiling()):
            # A cache that is being filled is checked by itself, and does not stand for the first step.
            self._trusted = fill is None
            del tokens
            if self._give_up(out):
                return LongCatTransformer.forward(
                    self,
                    x,
                    timestep,
                    context,
                    mask,
                    num_cond_latents=num_cond_latents,
                    kv_cache=kv_cache,
                    fill=fill,
                    kernels=None if own_kernels else self.choose_kernels(x.device),
                    around_block=around_block,
                )
        return out

    def _layouts(
        self, grid: tuple[int, int, int], num_cond: int, start: int, device: torch.device
    ) -> tuple[ChunkLayout, ChunkLayout, ChunkLayout | None]:
        """How tokens of this grid are laid out, all keys with `start` cached frames in front, and those alone."""
        shapes = self.block_sparse.chunk, self.block_sparse.query_chunk
        layout = chunk_layout(grid, *shapes, num_cond, device)
        if not start:
            return layout, layout, None
        whole = chunk_layout((start + grid[0], *grid[1:]), *shapes, start, device)
        return layout, whole, chunk_layout((start, *grid[1:]), *shapes, 0, device)

    def _embed_time(self, timestep: Tensor, batch: int, frames: int) -> Tensor:
        """Timesteps [B or 1] or [B or 1, T or 1] -> [B or 1, T or 1, adaLN] fp32; [B, T, ..] without reuse."""
        timestep = timestep[:, None] if timestep.ndim == 1 else timestep
        if timestep.shape[0] not in (1, batch) or timestep.shape[1] not in (1, frames):
            raise LongCatError(
                f"timesteps are {tuple(timestep.shape)} for {batch} videos of {frames} latent frames; give one for "
                "each video, or for each of their frames"
            )
        if not self.optimizations.reuse_modulation:
            timestep = timestep.expand(batch, frames)
        # The reference rounds timesteps to the model's dtype before it embeds them in fp32.
        features = timestep_features(timestep.to(self.compute_dtype), self.config.frequency_dim)
        first, second = self.time_embed
        with fp32_region(features, self.optimizations.explicit_fp32):
            return self.linear_fp32(second, F.silu(self.linear_fp32(first, features)))

    def _block_texts(
        self, text: TextTokens | None, keep: bool, batch: int, kernels: backends.Kernels, folded: bool = False
    ) -> _Texts:
        """What blocks attend to, in the form that the kernels want.

        keep: `text` will be here at the next step. folded: as it is, padding folded under a bias.
        """
        if text is None:
            return _Texts(lambda i: None, lambda i: False)
        bias, packing = text.bias, None
        # Written out, folded padding needs no bias, which only slow kernels know.
        length = text.length if kernels.text is not None and text.pad_counts is not None and not folded else None
        full = text.expand(batch)
        if length is not None:
            bias = None
        elif bias is not None:
            bias = full.bias
            if kernels.varlen is not None and full.lengths is not None and min(full.lengths) > 0 and not folded:
                packing = full.packing()

        def arranged(rows: Tensor) -> Tensor:
            rows = rows if length is None else unfold_padding(rows, length)
            return rows.expand(batch, *rows.shape[1:]).contiguous()

        if not (keep and self.optimizations.reuse_text) or torch.compiler.is_compiling():
            block_text = BlockText(arranged(text.tokens), None, bias, packing)
            return _Texts(lambda i: block_text, lambda i: True)
        kept = self._text_keys(text)

        def of(i: int) -> BlockText:
            if i not in kept:
                kept[i] = self.blocks[i].cross_attn.keys_values(text.tokens, self.optimizations.fused_qkv)
            keys, values = kept[i]
            return BlockText(None, (arranged(keys), arranged(values)), bias, packing)

        return _Texts(of, lambda i: i not in kept)

    def _text_keys(self, text: TextTokens) -> dict[int, tuple[Tensor, Tensor]]:
        """Keys and values by block, kept with the text until the weights that make them change."""
        layers = [block.cross_attn for block in self.blocks]
        how = text.tokens.device, text.tokens.dtype, self.optimizations.fused_qkv, self.optimizations.fp8
        weights = [p for m in layers for p in m.parameters()]
        stamp = (*how, *map(_version, weights))
        if text.kept is None or text.kept[0] != stamp:
            # The weights are held too: another tensor in the place of a freed one would have its id.
            text.kept = stamp, {}, weights
        return text.kept[1]

    def _compiled_call(self, kernels: backends.Kernels, grid: Sequence[int]) -> Callable[..., Tensor]:
        """`run_block` compiled, for tokens of this grid."""
        if torch.compiler.is_compiling():
            return run_block
        known = backends.is_known(kernels.attend)
        within = kernels if known else kernels._replace(attend=backends.attend_foreign, quantised=None)

        def call(
            block: Block,
            x: Tensor,
            temb: Tensor,
            text: BlockText | None,
            rope: tuple[Tensor, Tensor],
            cached: tuple[Tensor, Tensor] | None,
            kernels: backends.Kernels,
            how: How,
            num_cond: int,
        ) -> Tensor:
            frames = temb.shape[1]
            kind = x.shape[0], temb.shape[0], frames == 1, cached is None, num_cond, x.dtype, x.device, within, how
            size = grid, None if cached is None else cached[0].shape[1]
            sized = [(x, (1, 2)), *((table, (0,)) for table in rope), *((part, (1,)) for part in cached or ())]
            if frames > 1:
                sized.append((temb, (1,)))
            varying = []
            if text is not None and text.bias is not None:
                varying = [*((rows, (1,)) for rows in text.keys or (text.tokens,)), (text.bias, (3,))]
                if text.packing is not None:
                    varying.append((text.packing.rows, (0,)))
            with nullcontext() if known else backends.foreign_kernel(kernels.attend):
                return self.compiled_block(
                    *(block, x, temb, text, rope, cached, within, how, num_cond),
                    kind=kind,
                    size=size,
                    varying=varying,
                    sized=sized,
                    announce=self.announce,
                )

        return call
