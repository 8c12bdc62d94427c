"""How a network runs: switches become an `Ops`, a token layout, a KV cache and a way of calling each block.

An `Execution` changes nothing in the network, so several executions can share a network: each clone of a ComfyUI MODEL
has its own.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import LongCatError
from ..model.audio_tokens import AudioTokens
from ..model.block import Block, run_block
from ..model.config import ModelConfig
from ..model.kv_cache import Filling, KVCache, NoCache, Reference
from ..model.text import TextTokens, arrange_text
from ..model.transformer import BlockCache, LongCatTransformer, Run, Shared
from . import attention
from .block_sparse import BlockSparse
from .compilation import Regional
from .compiled_blocks import COMPILED_BLOCK, Compilers, compiled_call
from .fused import FusedOps, OpSwitches, TorchOps, ffn_pieces, sliceable
from .guard import SPARSE, is_spoiled, lossy_switches
from .kernels import text_attention
from .kernels.elementwise import usable as kernels_usable
from .kv_offload import OffloadableKVCache
from .layouts import check_reference, choose_layout
from .recomputation import recomputed
from .requirement import Inputs
from .sharing import Ranks, Sharing
from .sparse.choose import check_sparse, in_use
from .sparse.passes import SparsePass, like_sparse
from .sparse.settings import Sparse
from .streaming import BlockStream, BlockWeights, late, streamed
from .switches import Optimizations
from .text_keys import CachedTexts, NoText, TokenTexts, check_audio

# A hook: around_block(i, run, tokens) with tokens [B, T, S, C] returns tokens; run(tokens) is block i.
AroundBlock = Callable[[int, Callable[[Tensor], Tensor], Tensor], Tensor]


def _warn(sentence: str) -> None:
    warnings.warn(sentence, stacklevel=2)


class Execution:
    """One network under one set of switches.

    optimizations: the switches in force. requested: the switches that were set, which differ after a lossy one was
    turned off. block_sparse: settings of block-sparse self-attention, which changes the output; None: full attention.
    sparse: settings of sparse self-attention, which changes the output, or None; `block_sparse` takes precedence.
    stream: holds the blocks whose weights wait in CPU memory or on several devices, or None. ranks: runs each pass on
    several devices, or None. announce: receives sentences for the user, when compiling begins or a lossy switch is
    turned off.
    """

    compiled_block: Regional = COMPILED_BLOCK

    def __init__(
        self,
        network: LongCatTransformer,
        optimizations: Optimizations | None = None,
        *,
        block_sparse: BlockSparse | None = None,
        sparse: Sparse | None = None,
        dtype: torch.dtype | None = None,
        sliceable: Callable[[nn.Module, Tensor], bool] = sliceable,
        uncompiled: Callable[[Block, torch.device], bool] | None = None,
        announce: Callable[[str], None] = _warn,
    ) -> None:
        """dtype: of activations; None: the network's. sliceable: see `optimize.fused`. uncompiled: whether a block must
        not be compiled for tokens on a device; None: all may be.
        """
        self.network, self.block_sparse, self.sliceable = network, block_sparse, sliceable
        self.uncompiled, self.announce, self._dtype = uncompiled, announce, dtype
        self.stream: BlockStream | None = None
        self.ranks: Ranks | None = None
        self._said: set[str] = set()
        self.sparse = sparse
        self.set_optimizations(optimizations or Optimizations())

    @property
    def config(self) -> ModelConfig:
        return self.network.config

    @property
    def sparse(self) -> Sparse | None:
        """The settings in force; None too if the guard turned sparse attention off. Setting them raises what
        `check_sparse` raises."""
        return self._sparse

    @sparse.setter
    def sparse(self, settings: Sparse | None) -> None:
        self.check_sparse(settings)
        self._sparse, self._sparse_trusted = settings, False

    def check_sparse(self, settings: Sparse | None) -> None:
        """Raise LongCatError for settings of another network, BackendUnavailable if this machine lacks their kernel."""
        if settings is not None:
            settings.check(self.config.depth, self.config.num_heads)
            check_sparse(settings.kernel)

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of activations."""
        return self._dtype or self.network.dtype

    def set_optimizations(self, optimizations: Optimizations) -> None:
        """Change how the network runs, without changing weights.

        Raises BackendUnavailable for an attention backend that this machine lacks; nothing changes then.
        """
        attention.check(optimizations.attention)
        self.requested = self.optimizations = optimizations
        self._trusted = False

    @property
    def eight_bit(self) -> bool:
        """Whether the network has 8-bit layers, its owner's or those of `optimize.quantization`."""
        return any(getattr(m, "eight_bit", False) for block in self.network.blocks for m in block.modules())

    def stream_blocks(
        self,
        device: torch.device | str,
        streamed: Iterable[int],
        shards: Mapping[int, BlockWeights] | None = None,
        buffers: Mapping[int, Tensor] | None = None,
    ) -> None:
        """Keep these blocks' weights in CPU memory until they run on `device`, in addition to those already there.

        The network then has no backward pass. All other weights must be on the device. shards: blocks whose weights
        come from elsewhere, by index; None: as before. buffers: memory that has the weights of some of the streamed
        blocks already, if none was streamed before.
        """
        if self.stream is None:
            self.stream = BlockStream(self.network.blocks, device, streamed, late, shards, buffers)
            return
        self.stream.extend(streamed)
        if shards is not None:
            self.stream.shards = shards

    def embed_text(self, context: Tensor, mask: Tensor | None = None, length: int | None = None) -> TextTokens:
        """Text for every block, computed once per prompt.

        context [B, L, caption]; mask [B, L] (1: real token) or None: all tokens are real; length: tokens with all
        padding, if context was cut shorter.
        """
        mode, zero_pad = self.optimizations.text_mode, self.config.text_tokens_zero_pad
        context = context.to(self.compute_dtype)
        return arrange_text(context, mask, mode, zero_pad, self.network.embed_tokens, length)

    def embed_audio(
        self, windows: Tensor, classes: Tensor | None = None, dtype: torch.dtype | None = None
    ) -> AudioTokens:
        """Audio for every block, computed once per segment; see `LongCatTransformer.embed_audio`.

        The result belongs into `TextTokens.audio` of the texts that the network is given.
        """
        if self.block_sparse is not None:
            raise LongCatError("block-sparse attention does not run with audio; turn it off, or take sparse attention")
        return LongCatTransformer.embed_audio(self.network, windows, classes, dtype or self.compute_dtype)

    def choose_kernels(self, device: torch.device) -> attention.Kernels:
        """The attention kernels that `optimizations` select for tensors on `device`."""
        inputs = Inputs(device, self.active_dtype(device), self.config.head_dim, self._learns())
        return attention.resolve_kernels(self.optimizations.attention, inputs)

    def sparse_in_words(self, device: torch.device) -> str:
        """The sparse attention in force and its kernel for tensors on `device`, in words, or "" if it is off."""
        if self.sparse is None or self.block_sparse is not None:
            return ""
        return in_use(self.sparse, Inputs(device, self.active_dtype(device), self.config.head_dim, False))

    def own_kernels(self, x: Tensor) -> bool:
        """Whether element-wise work on activations like x goes through our Triton kernels."""
        # They compute in explicit fp32 and cannot replace autocast regions.
        return self.optimizations.fused_kernels and self.optimizations.explicit_fp32 and kernels_usable(x)

    def own_text_kernel(self, x: Tensor, text: TextTokens) -> bool:
        """Whether attention from activations like x to a text goes through our Triton kernel."""
        wanted = self.optimizations.fused_text and self.own_kernels(x)
        return wanted and not text_attention.refuses(self.config.head_dim, text.tokens.shape[1])

    def new_kv_cache(
        self,
        num_latents: int,
        height: int,
        width: int,
        batch: int = 1,
        device: torch.device | str | None = None,
        reference: Reference | None = None,
    ) -> KVCache:
        """An empty cache for `num_latents` conditioning frames of `height` x `width` latents, beside the weights.

        reference: the first frame is a reference frame.
        """
        _, ph, pw = self.config.patch_size
        device = self.network.patch_embed.weight.device if device is None else device
        grid = (num_latents, height // ph, width // pw)
        position = None if reference is None else reference.position
        options: dict[str, Any] = {"batch": batch, "dtype": self.compute_dtype, "device": device, "reference": position}
        return OffloadableKVCache(self.config, *grid, **options)

    def fill_kv_cache(
        self,
        cond_latents: Tensor,
        device: torch.device | str | None = None,
        kernels: attention.Kernels | None = None,
        around_block: AroundBlock | None = None,
        reference: Reference | None = None,
    ) -> KVCache:
        """One pass over clean latents [B, C, n, H, W] at timestep 0 and without text; returns the filled cache.

        The network's output for these frames is kept in it as `out`. device: where the cache lies; None: beside the
        latents. kernels, around_block, reference: see `__call__`.
        """
        device = torch.device(device or cond_latents.device)
        batch, _, frames, height, width = cond_latents.shape
        cache = self.new_kv_cache(frames, height, width, batch, device, reference)
        timesteps = cond_latents.new_zeros(batch)
        options: dict[str, Any] = {"kernels": kernels, "around_block": around_block, "reference": reference}
        cache.out = self(cond_latents, timesteps, None, fill=cache, **options)
        cache.rotate(cond_latents.device)
        return cache

    def __call__(
        self,
        x: Tensor,
        timestep: Tensor,
        context: Tensor | TextTokens | None,
        mask: Tensor | None = None,
        *,
        num_cond_latents: int = 0,
        kv_cache: KVCache | None = None,
        fill: KVCache | None = None,
        kernels: attention.Kernels | None = None,
        around_block: AroundBlock | None = None,
        compilers: Compilers | None = None,
        progress: float | None = None,
        reference: Reference | None = None,
    ) -> Tensor:
        """Latents x [B, C_in, T, H, W] -> x0 - noise [B, C_out, T, H, W] fp32; see `LongCatTransformer.forward`.

        context: text [B, L, caption] with mask [B, L] (1: real), or the result of `embed_text`; None: no
        cross-attention. kv_cache: of clean frames that stand in front of x and are not part of it. fill: a cache that
        receives this pass's keys (before RoPE) and values. kernels: replace those that the optimizations select.
        around_block: called in place of every block; with `block_sparse` the tokens are chunk after chunk, in slabs,
        with `sparse` they are permuted. compilers: what compiles a block, in place of `compiled_block`. progress: the
        share of the steps that is done, 0 <= progress < 1, or None if unknown; `sparse` attention depends on it.
        reference: the first clean frame, of x or of a cache, is a reference frame; its position must be the cache's.
        """
        text = context if context is None or isinstance(context, TextTokens) else self.embed_text(context, mask)
        if text is not None and text.tokens.shape[0] not in (1, x.shape[0]):
            raise LongCatError(f"{text.tokens.shape[0]} texts for {x.shape[0]} videos; give one, or one for each")
        check_audio(text, self.config, x.shape[0])
        check_reference(fill or kv_cache, reference)
        grad = self._learns(x, *(() if text is None else (text.tokens,)))
        if grad and self.stream is not None:
            raise LongCatError("streamed blocks have no backward pass; train with the whole model on the device")
        evaluate = self.evaluate if self.ranks is None or grad else partial(self.ranks.evaluate, self)
        switches = self.optimizations
        options: dict[str, Any] = {
            "num_cond_latents": num_cond_latents,
            "kv_cache": kv_cache,
            "fill": fill,
            "around_block": around_block,
            "compilers": compilers,
            "progress": progress,
            "reference": reference,
        }
        out, sparse = evaluate(x, timestep, text, reused=context is text, kernels=kernels, **options)
        if (self._sparse_trusted if sparse else self._trusted) or grad or torch.compiler.is_compiling():
            return out
        before = self._trusted
        # The output of filling a cache is checked too, but does not count as the first step.
        self._trusted, self._sparse_trusted = fill is None, sparse
        if not self._give_up(out, sparse, before):
            return out
        del out
        kernels = kernels if kernels is None or switches is self.optimizations else self.choose_kernels(x.device)
        return self(x, timestep, context, mask, kernels=kernels, **options)

    def evaluate(
        self,
        x: Tensor,
        timestep: Tensor,
        text: TextTokens | None,
        *,
        reused: bool = True,
        num_cond_latents: int = 0,
        kv_cache: KVCache | None = None,
        fill: KVCache | None = None,
        kernels: attention.Kernels | None = None,
        around_block: AroundBlock | None = None,
        compilers: Compilers | None = None,
        progress: float | None = None,
        reference: Reference | None = None,
        sharing: Sharing | None = None,
    ) -> tuple[Tensor, bool]:
        """One pass of `__call__` on this device, with checked arguments: the output, and whether attention was sparse.

        reused: `text` will be given again at the next step. sharing: other devices have the rest of the tokens.
        """
        grad = self._learns(x, *(() if text is None else (text.tokens,)))
        chosen = kernels or self.choose_kernels(x.device)
        cache: BlockCache = NoCache()
        if kv_cache is not None:
            kv_cache.rotate()
            cache = kv_cache
        start = cache.num_latents
        if reference is not None and fill is not None:
            # All frames are clean, and see what clean frames see.
            num_cond_latents = x.shape[2]
        plan = x, timestep, num_cond_latents, start, fill is not None, chosen, grad, progress, reference
        layout, chosen, sparse = choose_layout(self, *plan)
        varies = self.sparse is not None and self.block_sparse is None and fill is None and not grad
        if varies and sparse is None and self._compiles(compilers):
            chosen = like_sparse(chosen)
        grid = self.grid(x)
        if sharing is not None:
            chosen, layout = sharing.kernels(chosen, layout, grid, sparse), sharing.layout(layout, grid)
        if fill is not None:
            cache = Filling(fill, layout.restore_rows)
        sizes = layout.sizes(grid)
        ops = self._ops(x, text, chosen, sizes, grad)
        noisy = x.shape[2] - num_cond_latents
        texts = self._texts(text, ops, x.shape[0], noisy, reused=reused and not grad)
        run = self._run(ops, texts, sizes, grad, fill is not None, around_block, compilers, sparse)
        out = LongCatTransformer.forward(
            self.network,
            x.to(self.compute_dtype),
            self._timesteps(timestep, x),
            texts,
            ops,
            num_cond_latents=num_cond_latents,
            cache=layout.cached(cache),
            layout=layout,
            run=run,
        )
        return out, sparse is not None

    def _give_up(self, out: Tensor, sparse: bool, trusted: bool) -> bool:
        """Check the first output [B, ...] under lossy switches; if it is spoiled, turn one off and announce it.

        sparse: whether attention was sparse. trusted: whether the other switches gave good output before.
        """
        lossy = [] if trusted else lossy_switches(self.optimizations, self.eight_bit)
        if not (lossy or sparse) or not is_spoiled(out):
            return False
        if lossy:
            what, without = lossy[0]
            requested = self.requested
            self.set_optimizations(without)
            self.requested = requested
        else:
            what, self.sparse = SPARSE, None
        self.announce(f"{what} gave NaN or a black picture at the first step; going on without it")
        return True

    def _learns(self, *inputs: Tensor) -> bool:
        return torch.is_grad_enabled() and any(t.requires_grad for t in (*inputs, *self.network.parameters()))

    def active_dtype(self, device: torch.device) -> torch.dtype:
        autocast = torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
        return torch.get_autocast_dtype(device.type) if autocast else self.compute_dtype

    def grid(self, x: Tensor) -> tuple[int, int, int]:
        frames, rows, columns = (n // step for n, step in zip(x.shape[2:], self.config.patch_size, strict=True))
        return frames, rows, columns

    def say(self, sentence: str) -> None:
        """Announce it, once."""
        if sentence not in self._said:
            self._said.add(sentence)
            self.announce(sentence)

    def _timesteps(self, timestep: Tensor, x: Tensor) -> Tensor:
        timestep = timestep[:, None] if timestep.ndim == 1 else timestep
        if self.optimizations.reuse_modulation or timestep.shape[0] not in (1, len(x)):
            return timestep
        return timestep if timestep.shape[1] not in (1, x.shape[2]) else timestep.expand(len(x), x.shape[2])

    def _ops(
        self, x: Tensor, text: TextTokens | None, kernels: attention.Kernels, sizes: tuple[int, int], grad: bool
    ) -> TorchOps:
        """The operations of one pass. sizes: number of frames or slabs, and of the tokens in each."""
        chosen = self.optimizations
        like = x.new_empty(0, dtype=self.active_dtype(x.device))
        own = not grad and self.own_kernels(like)
        pieces = 0 if grad else ffn_pieces(self.config, len(x), *sizes, like.element_size())
        fused_text = own and text is not None and self.own_text_kernel(like, text)
        numerics = chosen.fused_qkv, chosen.fused_ffn, chosen.explicit_fp32, chosen.fp8
        return (FusedOps if own else TorchOps)(kernels, OpSwitches(*numerics, pieces, fused_text), self.sliceable)

    def _texts(
        self, text: TextTokens | None, ops: TorchOps, batch: int, noisy: int, reused: bool
    ) -> NoText | TokenTexts | CachedTexts:
        """What blocks attend to. noisy: frames that hear audio. reused: `text` will be given again at the next step."""
        if text is None:
            return NoText()
        form, audio = ops.text_form(text, batch), None if text.audio is None else text.audio.block(noisy)
        if not (reused and self.optimizations.reuse_text) or torch.compiler.is_compiling():
            return TokenTexts(text, form, audio)
        switches = self.optimizations.fused_qkv, self.optimizations.fp8
        return CachedTexts(text, form, self.network.blocks, ops, switches, audio)

    def _compiles(self, compilers: Compilers | None) -> bool:
        return compilers is not None or self.optimizations.compile == "blocks"

    def _run(
        self,
        ops: TorchOps,
        texts: NoText | TokenTexts | CachedTexts,
        sizes: tuple[int, int],
        grad: bool,
        filling: bool,
        around_block: AroundBlock | None,
        compilers: Compilers | None,
        sparse: SparsePass | None,
    ) -> Run:
        """How a block is called, from the inside out: compiled, recomputed, hooked, streamed."""
        call: Callable[..., Tensor] = run_block
        if compilers is None and self.optimizations.compile == "blocks":
            compilers = lambda block: self.compiled_block  # noqa: E731
        if compilers is not None and not filling and not torch.compiler.is_compiling():
            call = compiled_call(compilers, ops, sizes, self.announce, self.uncompiled)
        if self.optimizations.gradient_checkpointing and grad:
            call = recomputed(call)

        def plain(i: int, block: Block, x: Tensor, shared: Shared) -> Tensor:
            if sparse is not None:
                sparse.layer = i
            return call(block, x, *shared.of(i, x))

        run: Run = plain if around_block is None else _hooked(plain, around_block)
        return run if self.stream is None else streamed(run, self.stream, texts.need_weights)


def _hooked(run: Run, around_block: AroundBlock) -> Run:
    def hooked(i: int, block: Block, x: Tensor, shared: Shared) -> Tensor:
        return around_block(i, lambda tokens: run(i, block, tokens, shared), x)

    return hooked
