"""The LongCat-Video transformer: tokens stay [B, T, H*W, C] from patch embedding to final layer.

Nothing here depends on how the network runs. `optimize.execution` chooses the `Ops`, the token layout, the KV cache and
the way each block is called, and passes them in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..errors import LongCatError
from .attention import Groups, Keep
from .audio import AudioEmbed
from .audio_block import AudioBlock
from .audio_tokens import AudioTokens
from .block import Block, FinalLayer, run_block
from .config import ModelConfig
from .kv_cache import NoCache, Reference
from .layers import Patches, linear_fp32, timestep_features
from .ops import PLAIN, Ops, Rope
from .rope import referenced_table, rope_table
from .text import Texts


class BlockCache(Protocol):
    """Keys and values of clean frames in front of x."""

    @property
    def num_latents(self) -> int:
        """The number of these frames."""

    def read(self, block: int, like: Tensor) -> tuple[Tensor, Tensor] | None:
        """Rotated keys and values [B, N, heads, head_dim] of a block, on the device of `like` [B, ...]; None: none."""

    def keep(self, block: int) -> Keep | None:
        """What receives the keys and values of this pass, or None."""


class ArrangedCache:
    """A cache of whole frames whose rows are read in another order, or of which a share is read."""

    def __init__(self, cache: BlockCache, arrange: Callable[[Tensor], Tensor]) -> None:
        """arrange: brings keys and values [B, N, heads, head_dim] into the order of the pass."""
        self.cache, self.arrange, self.num_latents = cache, arrange, cache.num_latents

    def read(self, block: int, like: Tensor) -> tuple[Tensor, Tensor] | None:
        found = self.cache.read(block, like)
        return None if found is None else (self.arrange(found[0]), self.arrange(found[1]))

    def keep(self, block: int) -> Keep | None:
        return self.cache.keep(block)


class FrameLayout:
    """The default order of tokens: frames, rows, columns, as [B, T, H*W, C]."""

    def arrange(self, tokens: Tensor) -> Tensor:
        """Tokens [B, T, S, C] in the order in which the blocks see them."""
        return tokens

    def restore(self, tokens: Tensor) -> Tensor:
        """The reverse of `arrange`."""
        return tokens

    def rope(self, head_dim: int, grid: tuple[int, ...], start: int, device: torch.device) -> Rope:
        """RoPE tables for a grid (frames, rows, columns) of tokens whose first frame has position `start`."""
        return rope_table(head_dim, *grid, start, device)

    def per_frame(self, temb: Tensor) -> Tensor:
        """Time embedding [B or 1, T or 1, adaLN] of what the blocks see as frames."""
        return temb

    def leading(self, frames: int) -> int:
        """How many of what the blocks see as frames belong to the first `frames` frames."""
        return frames

    def groups(self, num_cond: int, start: int, frames: int) -> Groups:
        """Which frames see which: `frames` frames, `num_cond` clean ones in front, behind `start` cached ones."""
        return Groups(self.leading(num_cond))

    def sizes(self, grid: tuple[int, ...]) -> tuple[int, int]:
        """T and S of the tokens [B, T, S, C] that the blocks see for a grid (frames, rows, columns)."""
        return grid[0], grid[1] * grid[2]

    def restore_rows(self, rows: Tensor) -> Tensor:
        """Rows [B, T*S, ...], such as keys, in the order of frames, rows, columns."""
        return rows

    def cached(self, cache: BlockCache) -> BlockCache:
        """The cache as the blocks read it."""
        return cache


class ReferenceLayout(FrameLayout):
    """The default order of tokens, with a reference frame in front, cached or not."""

    def __init__(self, reference: Reference) -> None:
        self.reference = reference

    def rope(self, head_dim: int, grid: tuple[int, ...], start: int, device: torch.device) -> Rope:
        if start:
            return rope_table(head_dim, *grid, start - 1, device)
        return referenced_table(head_dim, *grid, self.reference.position, device)

    def groups(self, num_cond: int, start: int, frames: int) -> Groups:
        position, skip = self.reference
        # The position of the first noisy frame is one less than the number of clean frames, the reference among them.
        first = position - skip - (start + num_cond - 1)
        past = first + 2 * skip + 1
        hidden = (first, past) if skip > 0 and first >= 0 and past <= frames - num_cond else (0, 0)
        return Groups(num_cond, 1, hidden)


class Shared(NamedTuple):
    """What all blocks of one pass share."""

    temb: Tensor
    texts: Texts
    rope: Rope
    cache: BlockCache
    ops: Ops
    groups: Groups

    def of(self, i: int, x: Tensor) -> tuple[Any, ...]:
        """The arguments of block i beside its tokens x; see `Block.forward`."""
        cached, keep = self.cache.read(i, x), self.cache.keep(i)
        args = (self.temb, self.texts(i), self.rope, cached, self.ops, self.groups)
        return args if keep is None else (*args, keep)


# Runs block i on tokens [B, T, S, C]: run(i, block, x, shared) -> tokens.
Run = Callable[[int, Block, Tensor, Shared], Tensor]


def plain_run(i: int, block: Block, x: Tensor, shared: Shared) -> Tensor:
    """Block i as it is."""
    return run_block(block, x, *shared.of(i, x))


class LongCatTransformer(nn.Module):
    """LongCat-Video: latents, timesteps and text in, x0 - noise out (the negative of the flow velocity).

    `operations` supplies Linear and Conv3d (default torch.nn), so that an owner can stream, quantize or patch weights;
    it may carry `linear_fp32(layer, x)` and `affine` for weights in another form; see `layers`. `block`: the blocks'
    class; by default as the config has audio or not.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        operations: Any = nn,
        block: type[Block] | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        kwargs = {"dtype": dtype, "device": device}
        dim, wide, width = config.hidden_size, config.caption_channels, config.adaln_dim
        self.patch_embed = type("PatchEmbed", (Patches, operations.Conv3d), {})(
            config.in_channels, dim, kernel_size=config.patch_size, stride=config.patch_size, **kwargs
        )
        times = [operations.Linear(channels, width, **kwargs) for channels in (config.frequency_dim, width)]
        texts = [operations.Linear(channels, dim, **kwargs) for channels in (wide, dim)]
        audio = config.audio
        block = block or (Block if audio is None else AudioBlock)
        self.audio_embed = None if audio is None else AudioEmbed(audio, operations=operations, **kwargs)
        blocks = [block(config, operations=operations, **kwargs) for _ in range(config.depth)]
        # A module list does not know the type of what it holds.
        self.time_embed = cast("Sequence[nn.Linear]", nn.ModuleList(times))
        self.text_embed = cast("Sequence[nn.Linear]", nn.ModuleList(texts))
        self.blocks = cast("Sequence[Block]", nn.ModuleList(blocks))
        self.final_layer = FinalLayer(config, operations=operations, **kwargs)
        self.linear_fp32 = getattr(operations, "linear_fp32", linear_fp32)
        self.dtype = dtype or self.patch_embed.weight.dtype

    def _apply(self, fn: Callable, recurse: bool = True) -> LongCatTransformer:
        # .to(), .half() and .cuda() change the dtype that activations must have.
        super()._apply(fn, recurse)
        self.dtype = self.patch_embed.weight.dtype
        return self

    def embed_tokens(self, context: Tensor) -> Tensor:
        """Text encoder's output [..., caption] to the network's width [..., C], token by token."""
        first, second = self.text_embed
        return second(F.gelu(first(context), approximate="tanh"))

    def embed_audio(
        self, windows: Tensor, classes: Tensor | None = None, dtype: torch.dtype | None = None
    ) -> AudioTokens:
        """What an avatar network hears, from windows [B, F, window, groups, channels] of its audio encoder's output.

        F = 4(T-1)+1 video frames. classes: [S, K] bool, which tokens of the first frame belong to each of the people
        and to the background; B then counts the speakers of one video. dtype: of activations; None: the network's.
        Raises LongCatError for other shapes.
        """
        if self.audio_embed is None:
            raise LongCatError("LongCat-Video does not hear audio; load LongCat-Video-Avatar")
        return self.audio_embed.hear(windows.to(dtype or self.dtype), classes, self.config.head_dim)

    def embed_time(self, timestep: Tensor, dtype: torch.dtype, ops: Ops = PLAIN) -> Tensor:
        """Timesteps [B or 1, T or 1] in 0..1000 -> [B or 1, T or 1, adaLN] fp32."""
        # The reference rounds timesteps to the model's dtype before it embeds them in fp32.
        features = timestep_features(timestep.to(dtype), self.config.frequency_dim)
        first, second = self.time_embed
        with ops.fp32_region(features.device):
            return self.linear_fp32(second, F.silu(self.linear_fp32(first, features)))

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        texts: Texts,
        ops: Ops = PLAIN,
        *,
        num_cond_latents: int = 0,
        cache: BlockCache | None = None,
        layout: FrameLayout | None = None,
        run: Run = plain_run,
    ) -> Tensor:
        """Latents x [B, C_in, T, H, W] in the dtype of activations -> x0 - noise [B, C_out, T, H, W] fp32.

        timestep: [B or 1] or per latent frame [B or 1, T or 1], 0..1000; 1 if all videos or frames share it.
        texts: what block i attends to. num_cond_latents: clean frames at the front of x (their timestep is 0).
        cache: of clean frames that stand in front of x and are not part of it, or one that this pass fills.
        layout: the order in which blocks see the tokens. run: called in place of every block.
        """
        self._check(x, timestep, num_cond_latents)
        cache, layout = cache or NoCache(), layout or FrameLayout()
        timestep = timestep[:, None] if timestep.ndim == 1 else timestep
        temb = self.embed_time(timestep, x.dtype, ops)
        patches = self.patch_embed(x)
        grid = patches.shape[2:]
        # Contiguous in this order, unless an owner's layer made the patches. The last view resets the strides of a
        # single video, so that its first input and later ones do not need two graphs of a compiled block.
        tokens = patches.flatten(3).permute(0, 2, 3, 1).contiguous()
        tokens = layout.arrange(tokens.view(-1).view(tokens.shape))
        del patches
        # Views, because the compiler marks tensors with what it learns of their sizes, and these tables are shared.
        start = cache.num_latents
        cos, sin = layout.rope(self.config.head_dim, grid, start, tokens.device)
        groups = layout.groups(num_cond_latents, start, grid[0])
        shared = Shared(layout.per_frame(temb), texts, (cos[:], sin[:]), cache, ops, groups)
        for i, block in enumerate(self.blocks):
            tokens = run(i, block, tokens, shared)
        # Restored last, because the output has far fewer channels.
        out = layout.restore(self.final_layer(tokens, shared.temb, ops))
        _, ph, pw = self.config.patch_size
        pattern = "b t (h w) (ph pw c) -> b c t (h ph) (w pw)"
        return rearrange(out, pattern, h=grid[1], w=grid[2], ph=ph, pw=pw)

    def _check(self, x: Tensor, timestep: Tensor, num_cond_latents: int) -> None:
        """Raise LongCatError unless the inputs of a forward fit the network and each other."""
        (batch, channels, frames, height, width), taken = x.shape, self.config.in_channels
        _, ph, pw = self.config.patch_size
        if channels != taken or height % ph or width % pw:
            raise LongCatError(
                f"latents are {tuple(x.shape)}; the network takes {taken} channels and sides that divide by {ph}x{pw}"
            )
        if not 0 <= num_cond_latents <= frames:
            raise LongCatError(
                f"num_cond_latents is {num_cond_latents} but there are {frames} latent frames; give at most that many"
            )
        rows, columns = timestep.shape[0], timestep.shape[1] if timestep.ndim == 2 else 1
        if rows not in (1, batch) or columns not in (1, frames):
            raise LongCatError(
                f"timesteps {tuple(timestep.shape)} for {batch} videos of {frames} frames; give one per video or frame"
            )
