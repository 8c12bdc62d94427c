"""Where a LoRA's alpha is written when it is not a tensor of the file: its header, or PEFT's config beside it.

    file's tensors    `.alpha`, `.lora_alpha`: kohya, musubi, OneTrainer, FastVideo, ComfyUI, `longcat train-lora`
    header            `lora_adapter_metadata`, a PEFT config with the model's part before each name: diffusers,
                      SimpleTuner; `lora_config`, a PEFT config: finetrainers; `ss_network_alpha`: kohya, musubi;
                      `lora_alpha` and the like, plain numbers
    config beside it  `adapter_config.json` of `adapter_model.safetensors`: PEFT, diffusion-pipe
    nowhere           scale 1: DiffSynth, ai-toolkit, which fold it into the matrices

The first place that says something counts, and another that says something else is noted. By PEFT, the scale of a
layer is alpha / rank, or alpha / sqrt(rank) with `use_rslora`, and patterns give single modules another alpha.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..files.records import FiniteFloat, parse_record, read_record
from ..files.regular import check_regular
from .lora_names import flat, short

PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
# Keys of a header that hold a PEFT config as JSON, and those that hold alpha itself.
_CONFIGS = ("lora_adapter_metadata", "lora_config", "peft_config", "adapter_config")
_NUMBERS = ("lora_alpha", "network_alpha", "networkAlpha", "alpha", "ss_network_alpha")
# Parts of a pipeline that are not the network.
_OTHER_PARTS = ("text_encoder", "vae", "tokenizer")
# A pattern is a regular expression of the file's writer. Bounded, because some take exponential time.
_MAX_PATTERNS, _MAX_PATTERN, _MAX_REPEATS = 10_000, 200, 2
_LITERAL = re.compile(r"[\w.]+")
_NESTED = re.compile(r"\)[*+?{]|\(\?|\\[1-9]")
_REMEDY = "get the LoRA again, or give a file without it"


@dataclass(frozen=True)
class PeftConfig:
    """What decides the scale in a PEFT config; every field may be missing or null."""

    r: int | None = None
    lora_alpha: FiniteFloat | None = None
    use_rslora: bool | None = None
    use_dora: bool | None = None
    alpha_pattern: dict[str, FiniteFloat] | None = None
    rank_pattern: dict[str, int] | None = None


@dataclass(frozen=True)
class Stated:
    """What one place outside the tensors says about alpha. place: for sentences."""

    place: str
    config: PeftConfig

    def alpha(self, module: str) -> float | None:
        """The alpha of a module; None if the place says nothing about it."""
        found = _of_pattern(self.config.alpha_pattern, module, self.place)
        return self.config.lora_alpha if found is None else found

    def scale(self, alpha: float, rank: int) -> float:
        """The scale of a module of this rank."""
        return alpha / (math.sqrt(rank) if self.config.use_rslora else rank) if rank else 0.0

    def check_rank(self, module: str, rank: int) -> None:
        """Raise CheckpointError for another rank, because place and matrices then belong to different LoRAs."""
        wanted = _of_pattern(self.config.rank_pattern, module, self.place)
        wanted = self.config.r if wanted is None else wanted
        if wanted not in (None, rank):
            raise CheckpointError(
                f"{self.place} says rank {wanted} for {short(module)}, whose matrices have rank {rank}; {_REMEDY}"
            )


class Scales:
    """The scales of a file's layers, each from the first place that says something, and notes about them."""

    def __init__(self, source: str | Path, stated: Sequence[Stated]) -> None:
        self.source, self.stated = source, stated
        # Whether some layer has no alpha among the tensors.
        self.needed = False
        self._used: dict[str, list[tuple[float, int, float]]] = {}
        self._contradiction = ""

    def of(self, module: str, rank: int, own: float | None) -> float:
        """The scale of a module of this rank; own: the alpha that is a tensor of the file."""
        said = [(place, alpha) for place in self.stated if (alpha := place.alpha(module)) is not None]
        if own is not None:
            scale, by = own / max(1, rank), "its alpha tensor"
            # Of kohya's programs, which also have layers with an alpha of their own.
            said = [(place, alpha) for place, alpha in said if not place.place.startswith("ss_")]
        else:
            self.needed = True
            if not said:
                return 1.0
            place, alpha = said[0]
            place.check_rank(module, rank)
            scale, by = place.scale(alpha, rank), place.place
            self._used.setdefault(by, []).append((alpha, rank, scale))
        for place, alpha in said:
            other = place.scale(alpha, rank)
            if not self._contradiction and not math.isclose(other, scale, rel_tol=1e-3):
                self._contradiction = (
                    f"{self.source} counts {scale:g} times in {short(module)}, by {by}; {place.place} says {other:g}"
                )
        return scale

    def notes(self) -> list[str]:
        """Where alphas outside the tensors were found, unless they change nothing, and the first contradiction."""
        notes = []
        for place, used in self._used.items():
            alphas, ranks, scales = (_span(numbers) for numbers in zip(*used, strict=True))
            if scales != "1":
                notes.append(f"the LoRA counts {scales} times, by alpha {alphas} at rank {ranks} of {place}")
        return [*notes, self._contradiction] if self._contradiction else notes

    def label(self) -> str:
        """Eight digits that differ with the scales from outside the tensors; "" without any."""
        used = [scale for numbers in self._used.values() for *_, scale in numbers]
        return hashlib.sha256(repr(used).encode()).hexdigest()[:8] if any(scale != 1 for scale in used) else ""


def _span(numbers: Sequence[float]) -> str:
    least, most = f"{min(numbers):g}", f"{max(numbers):g}"
    return least if least == most else f"{least} to {most}"


def file_of(path: str | Path) -> Path:
    """The file of a LoRA: `path` itself, or PEFT's file in the folder that it is, or the only file there.

    Raises CheckpointError for a folder without one, or with several, and for a path that is not a regular file.
    """
    path = Path(path)
    if path.is_dir():
        files = sorted(file for file in path.glob("*.safetensors") if not file.name.startswith("."))
        named = [file for file in files if file.name == PEFT_FILE] or files
        if len(named) != 1:
            found = f"holds {len(files)} LoRAs ({', '.join(short(file.name) for file in files[:3])})"
            raise CheckpointError(f"{path} {found if files else 'holds no .safetensors file'}; give one LoRA file")
        path = named[0]
    check_regular(path, error=CheckpointError)
    return path


def stated_alphas(path: str | Path, metadata: Mapping[str, str], kohya_names: bool) -> tuple[list[Stated], list[str]]:
    """(what the header and a config beside the file say about alpha, the place that counts first; notes).

    kohya_names: whether parts are called lora_down and lora_up. Raises CheckpointError for a place that cannot be read,
    or that asks for DoRA.
    """
    notes: list[str] = []
    found = [*_in_header(path, metadata, kohya_names, notes)]
    if (config := _beside(Path(path), notes)) is not None:
        found.append(config)
    for place in found:
        if place.config.use_dora:
            raise CheckpointError(f"{place.place} asks for DoRA, which cannot be merged here; give a plain LoRA")
    return found, notes


def _in_header(path: str | Path, metadata: Mapping[str, str], kohya_names: bool, notes: list[str]) -> Iterator[Stated]:
    for key in _CONFIGS:
        if key in metadata:
            place = f"{key} in the header of {path}"
            content = parse_record(metadata[key], dict[str, Any], place, "a PEFT config", _REMEDY, CheckpointError)
            fields = _of_network(content)
            text = json.dumps(fields)
            yield Stated(place, parse_record(text, PeftConfig, place, "a PEFT config", _REMEDY, CheckpointError))
    for key in _NUMBERS:
        if key not in metadata:
            continue
        place, text = f"{key} in the header of {path}", metadata[key].strip()
        try:
            alpha = float(text)
        except ValueError:
            # kohya writes "Dynamic" or "None" for LoRAs whose layers differ.
            continue
        if not math.isfinite(alpha):
            raise CheckpointError(f"{place} is {short(text)}, not a number to scale by; {_REMEDY}")
        if key == "ss_network_alpha" and "sshs_model_hash" in metadata and not kohya_names:
            # kohya's programs hash what they write and keep an alpha for each layer. Converters to PEFT's names drop
            # these alphas, after they multiplied the matrices by them.
            notes.append(
                f"{path} was converted from kohya's names; it counts at scale 1, because converters put alpha into the "
                "matrices; give another strength if this one did not"
            )
        else:
            yield Stated(place, PeftConfig(lora_alpha=alpha))


def _of_network(content: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a PEFT config that belong to the network, of names such as `transformer.lora_alpha`."""
    parts: dict[str, dict[str, Any]] = {}
    names = PeftConfig.__dataclass_fields__
    for key, value in content.items():
        part, _, name = key.rpartition(".")
        if name in names:
            parts.setdefault(part, {})[name] = value
        elif isinstance(value, dict) and key not in names:
            parts.setdefault(key, {}).update({name: inner for name, inner in value.items() if name in names})
    networks = [part for part in parts if not part.startswith(_OTHER_PARTS)]
    chosen = next((part for part in ("transformer", "") if part in networks), networks[0] if networks else None)
    return parts[chosen] if chosen is not None else {}


def _beside(path: Path, notes: list[str]) -> Stated | None:
    """The PEFT config of this very file: of PEFT's own name, or the only weights beside the config."""
    config = path.with_name(PEFT_CONFIG)
    if not config.exists():
        return None
    if path.name != PEFT_FILE:
        others = [file.name for file in path.parent.glob("*.safetensors") if file.name != path.name]
        if others:
            owner = PEFT_FILE if PEFT_FILE in others else "another file"
            notes.append(f"{config} is taken for that of {owner}; {path.name} counts without it")
            return None
    return Stated(f"{config}", read_record(config, PeftConfig, "a PEFT config", _REMEDY, error=CheckpointError))


def _of_pattern(pattern: Mapping[str, Any] | None, module: str, place: str) -> Any:
    """The value of the first pattern that matches a module: PEFT's rule, the module's name or the end of it."""
    if not pattern:
        return None
    if len(pattern) > _MAX_PATTERNS:
        raise CheckpointError(f"{place} has more than {_MAX_PATTERNS:,} patterns; {_REMEDY}")
    name = flat(module)
    for key, value in pattern.items():
        if _LITERAL.fullmatch(key):
            if f"_{name}".endswith(f"_{flat(key)}"):
                return value
            continue
        repeats = sum(key.count(sign) for sign in "*+?{")
        if len(key) > _MAX_PATTERN or repeats > _MAX_REPEATS or _NESTED.search(key):
            raise CheckpointError(f"{place} has a pattern that is too complex ({short(key)}); {_REMEDY}")
        try:
            if re.match(rf"(?:.*\.)?(?:{key})$", module):
                return value
        except re.error as error:
            raise CheckpointError(f"{place} has a broken pattern ({short(key)}: {error}); {_REMEDY}") from error
    return None
