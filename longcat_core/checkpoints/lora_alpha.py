"""Where a LoRA's alpha is written when it is not a tensor of the file: its header, or PEFT's config beside it.

    file's tensors    `.alpha`, `.lora_alpha`: kohya, musubi, OneTrainer, FastVideo, ComfyUI, `longcat train-lora`
    header            `lora_adapter_metadata`, a PEFT config with the model's part before each name: diffusers,
                      SimpleTuner; `lora_config`, a PEFT config: finetrainers; `ss_network_alpha`: kohya, musubi;
                      `lora_alpha` and the like, plain numbers; other forms that are clear (`lora_stated`)
    config beside it  `adapter_config.json` of `adapter_model.safetensors`: PEFT, diffusion-pipe
    nowhere           scale 1: DiffSynth, ai-toolkit, which fold it into the matrices

The first place that says something counts, and another that says something else is noted. By PEFT, the scale of a
layer is alpha / rank, or alpha / sqrt(rank) with `use_rslora`, and patterns give single modules another alpha.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..files.records import read_record
from ..files.regular import check_regular
from ..files.weight_files import SUFFIXES
from .lora_names import short
from .lora_stated import REMEDY, Stated, config_of, in_header

PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"


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
            self._check_rank(module, rank, place)
            scale, by = place.scale(alpha, rank), place.place
            self._used.setdefault(by, []).append((alpha, rank, scale))
        for place, alpha in said:
            other = place.scale(alpha, rank)
            if not self._contradiction and not math.isclose(other, scale, rel_tol=1e-3):
                self._contradiction = (
                    f"{self.source} counts {scale:g} times in {short(module)}, by {by}; {place.place} says {other:g}"
                )
        return scale

    def _check_rank(self, module: str, rank: int, first: Stated) -> None:
        """Raise CheckpointError for another rank, because place and matrices then belong to different LoRAs."""
        for place in (first, *self.stated):
            if (wanted := place.rank(module)) is not None:
                if wanted != rank:
                    raise CheckpointError(
                        f"{place.place} says rank {wanted} for {short(module)}, whose matrices have rank {rank}; "
                        f"{REMEDY}"
                    )
                return

    def notes(self) -> list[str]:
        """Where alphas outside the tensors were found, unless they change nothing, and the first contradiction."""
        notes = [
            f"{place.place} has alphas of modules that are not in {self.source}"
            for place in self.stated
            if self.needed and place.modules and place.place not in self._used
        ]
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
        files = sorted(_weights(path))
        named = [file for file in files if file.name == PEFT_FILE] or files
        if len(named) != 1:
            found = f"holds {len(files)} LoRAs ({', '.join(short(file.name) for file in files[:3])})"
            raise CheckpointError(f"{path} {found if files else 'holds no .safetensors file'}; give one LoRA file")
        path = named[0]
    check_regular(path, error=CheckpointError)
    return path


def _weights(folder: Path) -> list[Path]:
    return [file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES and not file.name.startswith(".")]


def stated_alphas(path: str | Path, metadata: Mapping[str, str], kohya_names: bool) -> tuple[list[Stated], list[str]]:
    """(what the header and a config beside the file say about alpha, the place that counts first; notes).

    kohya_names: whether parts are called lora_down and lora_up. Raises CheckpointError for a place that cannot be read,
    or that asks for DoRA.
    """
    notes: list[str] = []
    unread: list[str] = []
    found = in_header(path, metadata, kohya_names, notes, unread)
    if (config := _beside(Path(path), notes)) is not None:
        found.append(config)
    if not any(place.speaks for place in found):
        notes += unread[:1]
    for place in found:
        if place.config.use_dora:
            raise CheckpointError(f"{place.place} asks for DoRA, which cannot be merged here; give a plain LoRA")
    return found, notes


def _beside(path: Path, notes: list[str]) -> Stated | None:
    """The PEFT config of this very file: of PEFT's own name, or the only weights beside the config."""
    config = path.with_name(PEFT_CONFIG)
    if not config.exists():
        return None
    if path.name != PEFT_FILE:
        others = [file.name for file in _weights(path.parent) if file.name != path.name]
        if others:
            owner = PEFT_FILE if PEFT_FILE in others else "another file"
            notes.append(f"{config} is taken for that of {owner}; {path.name} counts without it")
            return None
    content = read_record(config, dict[str, Any], "a PEFT config", REMEDY, error=CheckpointError)
    return Stated(f"{config}", config_of(content, f"{config}"))
