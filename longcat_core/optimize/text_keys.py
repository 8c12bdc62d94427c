"""Each block's keys and values of a text and of audio, computed once for all steps (`Optimizations.reuse_text`)."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

from torch import Tensor, nn

from ..errors import LongCatError
from ..model.audio_block import AudioBlock
from ..model.audio_tokens import AudioTokens, BlockAudio
from ..model.block import Block
from ..model.config import ModelConfig
from ..model.ops import Ops
from ..model.text import BlockText, TextForm, TextTokens
from .stamps import stamp


def check_audio(text: TextTokens | None, config: ModelConfig, batch: int) -> None:
    """Raise LongCatError unless audio comes with a text for a network that hears, and fits a batch of videos."""
    if text is None:
        return
    audio = text.audio
    if (audio is None) != (config.audio is None):
        what = "LongCat-Video-Avatar needs audio" if audio is None else "LongCat-Video does not hear audio"
        raise LongCatError(f"{what}; give the text {'its audio' if audio is None else 'alone'}")
    if audio is not None and audio.tokens.shape[0] not in (1, batch):
        raise LongCatError(f"audio of {audio.tokens.shape[0]} videos for {batch}; give one, or one for each")
    if audio is not None and audio.classes is not None and batch > 1:
        raise LongCatError("several people speak in one video at a time; set the batch to 1 and split guidance")


class NoText:
    """A pass without cross-attention."""

    def __call__(self, i: int) -> None:
        return None

    def need_weights(self, i: int) -> bool:
        """Whether block i's text is computed by the block's weights."""
        return False


class TokenTexts:
    """Every block computes keys and values from the text's tokens, and from the audio's."""

    def __init__(self, text: TextTokens, form: TextForm, audio: BlockAudio | None = None) -> None:
        self.text = form.tokens(text.tokens)._replace(audio=audio)

    def __call__(self, i: int) -> BlockText:
        return self.text

    def need_weights(self, i: int) -> bool:
        return True


class CachedTexts:
    """Keys and values stay with the text, and those of audio with the audio, until the weights that produce them
    change."""

    def __init__(
        self,
        text: TextTokens,
        form: TextForm,
        blocks: Sequence[Block],
        ops: Ops,
        switches: Hashable,
        audio: BlockAudio | None = None,
    ) -> None:
        """switches: what keys and values depend on besides the weights and the text. audio: of `text.audio`."""
        self.text, self.form, self.blocks, self.ops, self.audio = text, form, blocks, ops, audio
        attentions = [block.cross_attn for block in blocks]
        self.cached = _kept(text, switches, [layer for each in attentions for layer in (each.kv, each.k_norm)])
        self.heard: dict[int, tuple[Tensor, Tensor]] = {}
        if audio is not None and text.audio is not None and audio.tokens is not None:
            listening = [block.audio_attn for block in blocks if isinstance(block, AudioBlock)]
            sources = [layer for each in listening for layer in (each.source_norm, each.kv, each.k_norm)]
            self.heard = _kept(text.audio, (switches, audio.tokens.shape), sources)

    def __call__(self, i: int) -> BlockText:
        block = self.blocks[i]
        if i not in self.cached:
            self.cached[i] = block.cross_attn.keys_values(self.text.tokens, self.ops)
        text = self.form.keys(*self.cached[i])
        if self.audio is None or not isinstance(block, AudioBlock):
            return text
        if i not in self.heard:
            self.heard[i] = block.audio_attn.frame_keys(self.audio, self.ops)
        return text._replace(audio=self.audio._replace(tokens=None, keys=self.heard[i]))

    def need_weights(self, i: int) -> bool:
        return i not in self.cached or (self.audio is not None and i not in self.heard)


def _kept(held: TextTokens | AudioTokens, switches: Hashable, layers: Sequence[nn.Module]) -> dict[int, Any]:
    """Each block's keys and values that `held` keeps, or none if they are not those of these layers, which make
    them."""
    now, weights = stamp(layers)
    state = held.tokens.device, held.tokens.dtype, switches, now
    if held.cached is None or held.cached[0] != state:
        held.cached = state, {}, weights
    return held.cached[1]
