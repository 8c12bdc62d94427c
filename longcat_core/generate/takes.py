"""What tells the takes of one folder apart: settings that decide a video, settings that change it a little, and words.

A setting is decisive (the prompt, the seed, the weights), lossy (8-bit attention, a step cache), or without effect on
the result (compiling, exact kernels, streaming). Decisive ones must match. Lossy ones are stored in words under
"lossy", and only where they are not at their exact default, so that a switch that is added later never locks a folder.
The rest is not stored. `comparable` reads the settings of earlier versions, which stored all three kinds side by side.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from ..files.differences import as_read, differences, differences_in_words
from ..optimize.attention import is_exact
from ..optimize.block_sparse import BlockSparse
from ..optimize.sparse.settings import Sparse
from ..optimize.switches import Optimizations
from .options import words

Settings = dict[str, Any]

# Keys of stored settings.
LOSSY, LORA_MODE = "lossy", "LoRA mode"
EXACT_PRECISION = "float32"
# Stored for readers, or by earlier versions, and without effect on what a video shows. The frames of a piece are its
# source, so its largest length is not a setting of its own.
_WITHOUT_EFFECT = ("compile", "device", "piece")
# Of segments after the first.
_LATER = ("overlap", "hand_off")
# Under these names a step cache and compiling are installed in ComfyUI, which earlier versions listed among wrappers.
_WRAPPERS = ("longcat_step_cache", "torch.compile")


def lossy_settings(
    *,
    precision: str = EXACT_PRECISION,
    switches: Optimizations | None = None,
    step_cache: float = 0.0,
    guidance_until: float = 1.0,
    block_sparse: BlockSparse | None = None,
    sparse: Sparse | None = None,
    eight_bit: bool = False,
) -> dict[str, str]:
    """What makes a result differ a little from the exact one, each by its name and in words; nothing that is exact.

    precision: dtype of the computation. eight_bit: weights were quantized to fp8 for 8-bit products.
    """
    switches = switches or Optimizations()
    found = {} if precision == EXACT_PRECISION else {"precision": precision}
    if not is_exact(switches.attention):
        found["attention"] = switches.attention
    if switches.text_mode == "packed":
        found["text mode"] = switches.text_mode
    if eight_bit and switches.fp8:
        found["fp8"] = "on"
    if switches.lossy_exchange:
        found["exchange"] = switches.exchange
    if step_cache > 0:
        found["step cache"] = words(float(step_cache))
    if guidance_until < 1:
        found["guidance until"] = words(float(guidance_until))
    if block_sparse is not None:
        found["block-sparse"] = _sparse_in_words(asdict(block_sparse))
    if sparse is not None:
        found["sparse"] = sparse.in_words()
    return found


def comparable(settings: Mapping[str, Any], first: bool = False) -> tuple[Settings, dict[str, str]]:
    """What is compared of a segment's settings, of this version or an earlier one: decisive ones and lossy ones.

    first: they are those of a first segment, which does not start from the end of another.
    """
    decisive = as_read(settings)
    kept = decisive.pop(LOSSY, None)
    lossy = {name: str(value) for name, value in kept.items()} if isinstance(kept, dict) else {}
    for name in (*_WITHOUT_EFFECT, *(_LATER if first else ())):
        decisive.pop(name, None)
    _translate(decisive, lossy)
    if decisive.get("guidance_scale") == 1:
        decisive.pop("negative_prompt", None)
    guided = decisive.get("guidance_scale") != 1
    sees_frames = not first or decisive.get("given frames") is not None
    if decisive.get("kv_cache") != "official" or not guided or not sees_frames:
        # Exact and off give the same result.
        decisive.pop("kv_cache", None)
    return {name: value for name, value in decisive.items() if value is not None}, lossy


def _translate(decisive: Settings, lossy: dict[str, str]) -> None:
    """Move what earlier versions stored about lossy and exact settings to `lossy`, or leave it out."""
    precision = decisive.pop("dtype", EXACT_PRECISION)
    if precision != EXACT_PRECISION:
        lossy["precision"] = str(precision)
    if decisive.pop("fp8", False) is True:
        lossy["fp8"] = "on"
    if not is_exact(str(attention := decisive.pop("attention", "auto"))):
        lossy["attention"] = str(attention)
    if mode := decisive.pop("lora_mode", None):
        lossy[LORA_MODE] = str(mode)
    for name in ("step_cache", "step cache"):
        if threshold := decisive.pop(name, None):
            lossy["step cache"] = words(threshold)
    for name in ("block_sparse", "block-sparse"):
        value = decisive.pop(name, None)
        fields = value if isinstance(value, dict) else _fields_of(value)
        if fields:
            lossy["block-sparse"] = _sparse_in_words(fields)
        elif value is not None:
            decisive[name] = value
    _translate_nodes(decisive, lossy)


def _translate_nodes(decisive: Settings, lossy: dict[str, str]) -> None:
    """The same of what ComfyUI's nodes stored: switches as their repr, and names of wrappers and injections."""
    switches = decisive.pop("optimizations", None)
    fields = _fields_of(switches)
    if not fields and switches not in (None, "defaults"):
        decisive["optimizations"] = switches
    if not is_exact(str(fields.get("attention", "auto"))):
        lossy["attention"] = str(fields["attention"])
    if fields.get("text_mode") == "packed":
        lossy["text mode"] = "packed"
    if isinstance(wrappers := decisive.get("wrappers"), list):
        decisive["wrappers"] = [name for name in wrappers if name not in _WRAPPERS]
    for name in ("wrappers", "injections"):
        if not decisive.get(name):
            decisive.pop(name, None)


def _fields_of(text: Any) -> Settings:
    """The fields of a dataclass by its repr; {} for anything else."""
    try:
        call = ast.parse(text, mode="eval").body
        assert isinstance(call, ast.Call)
        return {str(field.arg): ast.literal_eval(field.value) for field in call.keywords}
    except (SyntaxError, TypeError, ValueError, AssertionError, RecursionError, MemoryError):
        return {}


def _sparse_in_words(fields: Mapping[str, Any]) -> str:
    """Settings of block-sparse attention without the kernel that computes them."""
    values = {name: fields.get(name) for name in ("sparsity", "cdf_threshold", "chunk", "query_chunk")}
    texts = {name: _in_words(value) for name, value in values.items() if value is not None}
    return ", ".join(f"{name.replace('_', ' ')} {text}" for name, text in texts.items())


def _in_words(value: Any) -> str:
    return "x".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def matches(there: Mapping[str, Any], now: Mapping[str, Any], first: bool = False, any_lossy: bool = False) -> bool:
    """Whether stored settings and current ones give the same segment from the same beginning.

    first: of a first segment. any_lossy: lossy settings may differ.
    """
    (stored, stored_lossy), (current, lossy) = comparable(there, first), comparable(now, first)
    return (any_lossy or stored_lossy == lossy) and not differences(stored, current)


def nearest(there: Sequence[Mapping[str, Any]], now: Mapping[str, Any]) -> tuple[int, str, bool]:
    """Of the settings of several takes' first segments those most like the current ones: the index, the differences
    in words, and whether only lossy settings differ."""
    current, lossy = comparable(now, first=True)
    found = []
    for index, settings in enumerate(there):
        stored, stored_lossy = comparable(settings, first=True)
        decisive, other = differences(stored, current), differences(stored_lossy, lossy)
        said = differences_in_words({**stored, **stored_lossy}, {**current, **lossy})
        found.append((bool(decisive), len(decisive) + len(other), index, said))
    decides, _, index, said = min(found)
    return index, said, not decides
