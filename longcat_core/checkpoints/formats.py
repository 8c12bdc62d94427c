"""Known checkpoint forms as tables of names: which file modules make up each module of the network.

A form is recognised by keys that only it has. The rows of several file modules (w1 and w3, say) are stacked in the
order listed, for weights, biases, quantisation scales and LoRA targets alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from ..errors import CheckpointError

Table = Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class Format:
    """outer: canonical module -> file modules outside the blocks; block: the same inside block i.

    `block_prefix` is what stands before a block's names in the file, with {i} for its number.
    """

    name: str
    signature: tuple[str, ...]
    outer: Table
    block: Table
    block_prefix: str = "blocks.{i}."

    def modules(self, depth: int) -> Iterator[tuple[str, tuple[str, ...]]]:
        """(canonical module, file modules) of a network of `depth` blocks."""
        yield from self.outer.items()
        for i in range(depth):
            prefix = self.block_prefix.format(i=i)
            for canonical, sources in self.block.items():
                yield f"blocks.{i}.{canonical}", tuple(prefix + s for s in sources)


OFFICIAL = Format(
    name="official",
    signature=(
        "x_embedder.proj.",
        "t_embedder.mlp.",
        "blocks.0.attn.qkv.",
        "blocks.0.cross_attn.kv_linear.",
        "blocks.0.ffn.w1.",
    ),
    outer={
        "patch_embed": ("x_embedder.proj",),
        "time_embed.0": ("t_embedder.mlp.0",),
        "time_embed.1": ("t_embedder.mlp.2",),
        "text_embed.0": ("y_embedder.y_proj.0",),
        "text_embed.1": ("y_embedder.y_proj.2",),
        "final_layer.modulation": ("final_layer.adaLN_modulation.1",),
        "final_layer.linear": ("final_layer.linear",),
    },
    block={
        "modulation": ("adaLN_modulation.1",),
        "attn.qkv": ("attn.qkv",),
        "attn.q_norm": ("attn.q_norm",),
        "attn.k_norm": ("attn.k_norm",),
        "attn.proj": ("attn.proj",),
        "cross_norm": ("pre_crs_attn_norm",),
        "cross_attn.q": ("cross_attn.q_linear",),
        "cross_attn.kv": ("cross_attn.kv_linear",),
        "cross_attn.q_norm": ("cross_attn.q_norm",),
        "cross_attn.k_norm": ("cross_attn.k_norm",),
        "cross_attn.proj": ("cross_attn.proj",),
        "ffn.gate_up": ("ffn.w1", "ffn.w3"),
        "ffn.down": ("ffn.w2",),
    },
)

FORMATS: tuple[Format, ...] = (OFFICIAL,)

# Prefixes under which a whole network may stand in a file.
PREFIXES = ("", "model.diffusion_model.", "diffusion_model.", "transformer.")

# Other models whose files are easily taken for LongCat-Video's: (name, key beginnings that all must be there).
FOREIGN: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("LongCat-Image", ("single_transformer_blocks.0.", "transformer_blocks.0.", "x_embedder.")),
    ("LongCat-Image or FLUX", ("single_blocks.0.", "double_blocks.0.")),
    ("LongCat-Video in ComfyUI names", ("patch_embedding.", "blocks.0.self_attn.q.", "blocks.0.ffn.w1.")),
    ("LongCat-Video in FastVideo names", ("patch_embed.", "blocks.0.self_attn.to_q.", "blocks.0.ffn.w1.")),
    ("PixArt", ("x_embedder.", "blocks.0.cross_attn.kv_linear.", "blocks.0.mlp.")),
    ("Wan", ("patch_embedding.", "blocks.0.self_attn.q.", "blocks.0.ffn.0.")),
    ("Wan (diffusers names)", ("patch_embedding.", "blocks.0.attn1.to_q.", "blocks.0.ffn.net.")),
    ("LoRA", ("lora___lorahyphen___",)),
    ("VAE", ("decoder.", "encoder.")),
    ("UMT5 text encoder", ("shared.weight", "encoder.block.0.")),
)


def detect(keys: Iterable[str], source: str) -> tuple[Format, str]:
    """The form of a checkpoint with these keys and the prefix it stands under.

    Raises CheckpointError that says what the file seems to be instead; `source` names it in the message.
    """
    keys = list(keys)
    damaged: tuple[Format, str] | None = None
    for prefix in PREFIXES:
        for form in FORMATS:
            missing = sum(not _any_starts(keys, prefix + mark) for mark in form.signature)
            if not missing:
                return form, prefix
            if missing == 1 and damaged is None:
                damaged = form, prefix
    for prefix in PREFIXES:
        for name, marks in FOREIGN:
            if all(_any_starts(keys, prefix + mark) for mark in marks):
                raise CheckpointError(
                    f"{source} holds {name}, not a LongCat-Video transformer in official names; "
                    "give the dit folder of LongCat-Video or a single safetensors file with its names"
                )
    if damaged is not None:
        return damaged  # the loader names the tensor that is missing
    sample = ", ".join(keys[:3]) or "no tensors"
    raise CheckpointError(
        f"{source} is no known LongCat-Video checkpoint (it holds {sample}); "
        "give the dit folder of LongCat-Video or a single safetensors file with its names"
    )


def _any_starts(keys: list[str], beginning: str) -> bool:
    return any(key.startswith(beginning) for key in keys)
