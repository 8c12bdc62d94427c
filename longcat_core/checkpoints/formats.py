"""Known checkpoint forms as tables of names: which file modules make up each module of the network.

A form is recognized by keys that no other form has. Where several file modules make up one module (such as w1 and w3),
their rows are stacked in the order listed: weights, biases, quantization scales and LoRA targets alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import CheckpointError
from .quantized import refuse_packed

Table = Mapping[str, tuple[str, ...]]

# The network's modules outside the blocks: their names in official files, in ComfyUI's and in FastVideo's.
_OUTER = {
    "patch_embed": ("x_embedder.proj", "patch_embedding", "patch_embed.proj"),
    "time_embed.0": ("t_embedder.mlp.0", "time_embedding.mlp.0", "time_embedder.linear_1"),
    "time_embed.1": ("t_embedder.mlp.2", "time_embedding.mlp.2", "time_embedder.linear_2"),
    "text_embed.0": ("y_embedder.y_proj.0", "text_embedding.0", "caption_embedder.linear_1"),
    "text_embed.1": ("y_embedder.y_proj.2", "text_embedding.2", "caption_embedder.linear_2"),
    "final_layer.modulation": ("final_layer.adaLN_modulation.1", "head.modulation.1", "final_layer.adaln_linear"),
    "final_layer.linear": ("final_layer.linear", "head.head", "final_layer.proj"),
}
# The same inside a block. Where a form splits a module, its parts are separated by blanks.
_BLOCK = {
    "modulation": ("adaLN_modulation.1", "modulation.1", "adaln_linear_1"),
    "attn.qkv": ("attn.qkv", "self_attn.q self_attn.k self_attn.v", "self_attn.to_q self_attn.to_k self_attn.to_v"),
    "attn.q_norm": ("attn.q_norm", "self_attn.norm_q", "self_attn.q_norm"),
    "attn.k_norm": ("attn.k_norm", "self_attn.norm_k", "self_attn.k_norm"),
    "attn.proj": ("attn.proj", "self_attn.o", "self_attn.to_out"),
    "cross_norm": ("pre_crs_attn_norm", "norm3", "norm_cross"),
    "cross_attn.q": ("cross_attn.q_linear", "cross_attn.q", "cross_attn.to_q"),
    "cross_attn.kv": ("cross_attn.kv_linear", "cross_attn.k cross_attn.v", "cross_attn.to_k cross_attn.to_v"),
    "cross_attn.q_norm": ("cross_attn.q_norm", "cross_attn.norm_q", "cross_attn.q_norm"),
    "cross_attn.k_norm": ("cross_attn.k_norm", "cross_attn.norm_k", "cross_attn.k_norm"),
    "cross_attn.proj": ("cross_attn.proj", "cross_attn.o", "cross_attn.to_out"),
    "ffn.gate_up": ("ffn.w1 ffn.w3", "ffn.w1 ffn.w3", "ffn.w1 ffn.w3"),
    "ffn.down": ("ffn.w2", "ffn.w2", "ffn.w2"),
}
# What an avatar has besides, in official files and in ComfyUI's. Some of the latter keep an official name outside.
_AUDIO_OUTER = {
    "audio_embed.first": ("audio_proj.proj1", "multitalk_audio_proj.proj1"),
    "audio_embed.later": ("audio_proj.proj1_vf", "multitalk_audio_proj.proj1_vf"),
    "audio_embed.hidden": ("audio_proj.proj2", "multitalk_audio_proj.proj2"),
    "audio_embed.out": ("audio_proj.proj3", "multitalk_audio_proj.proj3"),
    "audio_embed.norm": ("audio_proj.norm", "multitalk_audio_proj.norm"),
}
_AUDIO_BLOCK = {
    "audio_modulation": ("audio_adaLN_modulation.1", "audio_modulation.1"),
    "audio_norm": ("pre_video_crs_attn_norm", "norm_x"),
    "audio_attn.q": ("audio_cross_attn.q_linear", "audio_cross_attn.q_linear"),
    "audio_attn.kv": ("audio_cross_attn.kv_linear", "audio_cross_attn.kv_linear"),
    "audio_attn.proj": ("audio_cross_attn.proj", "audio_cross_attn.proj"),
    "audio_attn.q_norm": ("audio_cross_attn.q_norm", "audio_cross_attn.q_norm"),
    "audio_attn.k_norm": ("audio_cross_attn.k_norm", "audio_cross_attn.k_norm"),
    # Not in the released models.
    "audio_attn.source_norm": ("pre_audio_crs_attn_norm", "pre_audio_crs_attn_norm"),
}


# More blocks than any model has. A file may name a block in a few bytes.
MAX_BLOCKS = 1000


@dataclass(frozen=True)
class Format:
    """One form of checkpoint.

    signature: prefixes of keys, all of which a file must have. outer: the network's module -> file modules, outside
    the blocks; block: the same inside a block. block_prefix: of a block's names in the file, with {i} for its number;
    target_prefix: of its names in the network. model: what the form is a form of.
    """

    name: str
    signature: tuple[str, ...]
    outer: Table
    block: Table
    block_prefix: str = "blocks.{i}."
    target_prefix: str = "blocks.{i}."
    model: str = "LongCat-Video transformer"

    def modules(self, depth: int) -> Iterator[tuple[str, tuple[str, ...]]]:
        """(module of the network, file modules) of a network with `depth` blocks."""
        yield from self.outer.items()
        for i in range(depth):
            prefix, target = self.block_prefix.format(i=i), self.target_prefix.format(i=i)
            for canonical, sources in self.block.items():
                yield target + canonical, tuple(prefix + s for s in sources)


def _format(column: int, name: str, signature: tuple[str, ...]) -> Format:
    """The form whose names are in a column of the tables above."""
    outer, block = (
        {module: tuple(names[column].split()) for module, names in table.items()} for table in (_OUTER, _BLOCK)
    )
    return Format(name, signature, outer, block)


OFFICIAL = _format(
    0,
    "official",
    ("x_embedder.proj.", "t_embedder.mlp.", "blocks.0.attn.qkv.", "blocks.0.cross_attn.kv_linear.", "blocks.0.ffn.w1."),
)
# Single files for ComfyUI: its names for Wan where Wan has such a module, with all projections split.
COMFYUI = _format(
    1,
    "ComfyUI",
    ("patch_embedding.", "time_embedding.mlp.", "blocks.0.modulation.1.", "blocks.0.self_attn.q.", "blocks.0.ffn.w1."),
)
FASTVIDEO = _format(
    2,
    "FastVideo",
    ("patch_embed.proj.", "time_embedder.linear_1.", "blocks.0.adaln_linear_1.", "blocks.0.self_attn.to_q.",
     "blocks.0.ffn.w1."),
)  # fmt: skip
FORMATS: tuple[Format, ...] = (OFFICIAL, COMFYUI, FASTVIDEO)


def _avatar(base: Format, outer: int, block: int) -> Format:
    """The form of an avatar's network: that of `base` with names in columns of the audio's tables."""
    outers, blocks = (
        {module: (names[column],) for module, names in table.items()}
        for table, column in ((_AUDIO_OUTER, outer), (_AUDIO_BLOCK, block))
    )
    return replace(
        base,
        signature=(*base.signature, f"{outers['audio_embed.first'][0]}.", HEARS),
        outer={**base.outer, **outers},
        block={**base.block, **blocks},
        model="LongCat-Video-Avatar transformer",
    )


# What the first block of every avatar has, in any form.
HEARS = "blocks.0.audio_cross_attn."
AVATARS: tuple[Format, ...] = (_avatar(OFFICIAL, 0, 0), _avatar(COMFYUI, 1, 1), _avatar(COMFYUI, 0, 1))


def for_network(form: Format, hears: bool) -> Format:
    """A form of LongCat-Video, or the same of its avatar if the network hears."""
    return next(avatar for avatar in AVATARS if avatar.name == form.name) if hears else form


# Prefixes that files put before the names of a whole network.
PREFIXES = ("", "model.diffusion_model.", "diffusion_model.", "transformer.", "model.", "module.", "_orig_mod.", "dit.")

# How any form may store a weight: the suffix of its numbers after the module's name, and that of the scale that
# multiplies them, which is one number or one for each row.
STORED_WEIGHTS: tuple[tuple[str, str | None], ...] = (
    ("weight_int8", "weight_scale"),  # official INT8
    ("weight", "scale_weight"),  # ComfyUI, fp8 "scaled"
    ("weight", "weight_scale"),  # ComfyUI, each layer with its own description
    ("weight", None),
)


def times_scale(name: str, tensor: Tensor, state: Mapping[str, Tensor]) -> Tensor:
    """Rows of the stored weight `name` times their scale in `state`, in fp32; as stored if `state` has no scale.

    tensor [rows, ..]; the scale is one number, or one for each of these rows: CheckpointError for another count.
    """
    module, _, suffix = name.rpartition(".")
    scales = (f"{module}.{scale}" for stored, scale in STORED_WEIGHTS if stored == suffix and scale is not None)
    found = next((scale for scale in scales if scale in state), None)
    if found is None:
        return tensor
    scale = state[found].float().flatten()
    if len(scale) not in (1, len(tensor)):
        raise CheckpointError(f"{found} holds {len(scale)} scales for {len(tensor)} rows of {name}; download it again")
    return tensor.float() * scale.view(-1, *[1] * (tensor.ndim - 1))


# Tensors beside a quantized weight that say how its layer's input is quantized; the weight does not depend on them.
BESIDE = ("comfy_quant", "input_scale", "scale_input")


def is_setting(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> bool:
    """Whether a tensor holds a layer's settings as text, as ComfyUI writes them, and not weights.

    Such is `MODULE.comfy_attention.config`, and others may come; `comfy_quant` belongs to a weight.
    """
    marked = any(part.startswith("comfy_") and part not in BESIDE for part in name.split("."))
    return marked and dtype == torch.uint8 and len(shape) == 1


# Other models whose files are easily mistaken for LongCat-Video's: (name, prefixes of keys, all of which they have).
FOREIGN: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("LongCat-Image", ("single_transformer_blocks.0.", "transformer_blocks.0.", "x_embedder.")),
    ("LongCat-Image or FLUX", ("single_blocks.0.", "double_blocks.0.")),
    ("PixArt", ("x_embedder.", "blocks.0.cross_attn.kv_linear.", "blocks.0.mlp.")),
    ("InfiniteTalk, MultiTalk or SkyReels", ("blocks.0.audio_cross_attn.", "blocks.0.ffn.0.")),
    ("Wan", ("patch_embedding.", "blocks.0.self_attn.q.", "blocks.0.ffn.0.")),
    ("Wan (diffusers names)", ("patch_embedding.", "blocks.0.attn1.to_q.", "blocks.0.ffn.net.")),
    ("LoRA", ("lora___lorahyphen___",)),
    ("LoRA", ("lora_unet_",)),
    ("LoRA", ("base_model.model.",)),
    ("VAE", ("decoder.", "encoder.")),
    ("UMT5 text encoder", ("shared.weight", "encoder.block.0.")),
)
# The same, for files with so few names that a damaged file of ours has them too.
FOREIGN_PARTS = (("InfiniteTalk, MultiTalk or SkyReels", ("blocks.0.audio_cross_attn.",)),)


def detect(keys: Iterable[str], source: str) -> tuple[Format, str]:
    """The form of a checkpoint with these keys, and the prefix of its names.

    Raises CheckpointError, which says what the file seems to be instead; source: the file's name in that sentence.
    """
    keys = list(keys)
    damaged: tuple[Format, str] | None = None
    for prefix in PREFIXES:
        for form in AVATARS if _any_starts(keys, prefix + HEARS) else FORMATS:
            missing = sum(not _any_starts(keys, prefix + mark) for mark in form.signature)
            if not missing:
                return form, prefix
            if missing == 1 and damaged is None:
                damaged = form, prefix
    _refuse(keys, FOREIGN, source)
    if any(".lora_" in key for key in keys):
        raise CheckpointError(f"{source} holds LoRA, {_REMEDY}")
    if damaged is not None:
        return damaged  # the loader names the missing tensor
    _refuse(keys, FOREIGN_PARTS, source)
    refuse_packed(keys, source)
    sample = ", ".join(keys[:3]) or "no tensors"
    raise CheckpointError(f"{source} is not a known LongCat-Video checkpoint (it holds {sample}); {_GIVE}")


_GIVE = "give the dit folder of LongCat-Video or a single file of its transformer"
_REMEDY = f"not a LongCat-Video transformer; {_GIVE}"


def _refuse(keys: list[str], models: Iterable[tuple[str, tuple[str, ...]]], source: str) -> None:
    for prefix in PREFIXES:
        for name, marks in models:
            if all(_any_starts(keys, prefix + mark) for mark in marks):
                raise CheckpointError(f"{source} holds {name}, {_REMEDY}")


def _any_starts(keys: list[str], beginning: str) -> bool:
    return any(key.startswith(beginning) for key in keys)


def targets(depth: int) -> dict[str, tuple[str, int, int]]:
    """Module by its name in any form or in the network -> (module of the network, index of its part, number of parts).

    For files that name single modules, such as LoRAs. Those of an avatar are among them, which other networks lack.
    """
    found = {}
    for form in (*FORMATS, *AVATARS):
        for canonical, sources in form.modules(depth):
            found[canonical] = canonical, 0, 1
            found |= {source: (canonical, i, len(sources)) for i, source in enumerate(sources) if source != canonical}
    return found
