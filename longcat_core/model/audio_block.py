"""A block of the avatar network: after the text, every noisy frame hears its own audio tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn

from .attention import CrossAttention, Groups
from .audio import class_positions
from .audio_tokens import BlockAudio
from .block import Block, behind_clean
from .config import AudioConfig, ModelConfig
from .layers import LayerNorm
from .ops import Activations, Once, Ops, Rope
from .rope import apply_rope, line_table
from .text import BlockText


class AudioAttention(CrossAttention):
    """Attention from each frame's video tokens to the audio tokens of that frame.

    Weights as in `CrossAttention`; source_norm: of the audio tokens, in networks that have it.
    """

    def __init__(self, dim: int, num_heads: int, audio: AudioConfig, **kwargs: Any) -> None:
        super().__init__(dim, num_heads, audio.width, **kwargs)
        self.source_norm = LayerNorm(audio.width, **kwargs) if audio.prenorm else nn.Identity()

    def frame_keys(self, audio: BlockAudio, ops: Ops) -> tuple[Tensor, Tensor]:
        """Keys, rotated to their speaker's position, and values [B, T, M, heads, head_dim] of the audio's tokens."""
        k, v = self.keys_values(self.source_norm(cast(Tensor, audio.tokens)), ops)
        return k if audio.rope is None else apply_rope(k.flatten(0, 1), *audio.rope).view_as(k), v

    def hear(self, inputs: Once[Activations], audio: BlockAudio, rope: Rope | None, ops: Ops) -> Tensor:
        """inputs: x [B, T, S, C]; rope: tables of its tokens among several speakers -> [B*T, S, C]."""
        q = ops.linear(self.q, inputs.take()).flatten(1, 2).unflatten(-1, (self.num_heads, -1))
        k, v = audio.keys or self.frame_keys(audio, ops)
        return ops.linear(self.proj, ops.attend_frames(q, self.q_norm, rope, k, v, self.proj))


class _Hearing:
    """Of one call of a block: the modulation of what it hears and, among several speakers, where its tokens look."""

    def __init__(
        self, shift: Tensor, scale: Tensor, gate: Tensor, audio: BlockAudio, config: AudioConfig, ops: Ops
    ) -> None:
        """shift and scale of noisy frames; gate of all, since clean frames hear zeros."""
        self.shift, self.scale, self.gate = shift, scale, gate
        self.audio, self.config, self.ops = audio, config, ops
        self.rope: Rope | None = None
        self.look: Callable[[Tensor, Tensor], None] | None = None if audio.classes is None else self._look

    def _look(self, q: Tensor, k: Tensor) -> None:
        maps = self.ops.class_maps(q, k, cast(Tensor, self.audio.classes))
        positions = class_positions(self.config, maps[0], self.ops.class_bounds(maps[0]))
        self.rope = line_table(q.shape[-1], positions)


class AudioBlock(Block):
    """`Block` with attention to audio between text and SwiGLU, whose output is normed, modulated and gated."""

    def __init__(self, config: ModelConfig, *, operations: Any, dtype: Any, device: Any) -> None:
        kwargs = {"operations": operations, "dtype": dtype, "device": device}
        super().__init__(config, **kwargs)
        self.audio, dim = cast(AudioConfig, config.audio), config.hidden_size
        self.audio_modulation = operations.Linear(config.adaln_dim, 3 * dim, dtype=dtype, device=device)
        self.audio_norm = LayerNorm(dim, **kwargs)
        self.audio_attn = AudioAttention(dim, config.num_heads, self.audio, **kwargs)

    def _beside(self, temb: Tensor, text: BlockText, groups: Groups, ops: Ops) -> _Hearing:
        with ops.fp32_region(temb.device):
            modulation = self.linear_fp32(self.audio_modulation, F.silu(temb))[:, :, None]
        shift, scale, gate = modulation.chunk(3, dim=-1)
        noisy = slice(groups.clean if temb.shape[1] > 1 else 0, None)
        return _Hearing(shift[:, noisy], scale[:, noisy], gate, cast(BlockAudio, text.audio), self.audio, ops)

    def _cross(
        self, x: Tensor, update: Once[Tensor], gate: Tensor, text: BlockText, clean: int, beside: Any, ops: Ops
    ) -> tuple[Tensor, Once[Tensor], Tensor | None]:
        x, read, _ = super()._cross(x, update, gate, text, clean, None, ops)
        x, h = ops.residual_norm(x, read, None, self.audio_norm, clean, self.audio_attn.q)
        inputs = Once(h)
        del h
        heard = self.audio_attn.hear(inputs, beside.audio, beside.rope, ops).view_as(x[:, clean:])
        _, heard = ops.norm_modulate(heard, None, None, beside.scale, beside.shift, None)
        return x, Once(behind_clean(heard, clean)), beside.gate
