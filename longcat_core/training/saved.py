"""The files of a training: the LoRA, and the state beside it that a resumed run goes on from.

    FILE.safetensors          adapters and alphas; header: rank, alpha, steps, the base model's fingerprint, settings
    FILE.state.safetensors    adapters and the optimizer's moments; header: settings, steps, a checksum of everything

The state is written first, so that the LoRA can always be written again from it. Equal trainings write equal bytes.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, LongCatError
from ..files.claims import claimed
from ..files.differences import as_read, differences, differences_in_words
from ..files.records import parse_record
from ..files.safetensors_io import SafetensorsFile, read_tensors, write_safetensors
from ..generate.segments import checksum

PREFIX = "diffusion_model."
# What an optimizer remembers of a parameter.
MOMENTS = ("exp_avg", "exp_avg_sq")
_SHOWN = 3

Shapes = Mapping[str, tuple[int, ...]]


def state_shapes(adapters: Shapes) -> dict[str, tuple[int, ...]]:
    """Shapes of a state's tensors, all fp32, by those of its adapters."""
    return dict(adapters) | {f"{key}.{name}": shape for name, shape in adapters.items() for key in MOMENTS}


def check_state(source: object, found: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], adapters: Shapes) -> None:
    """Raise CheckpointError, naming tensors, unless these are exactly the tensors of a state with these adapters."""
    wanted = {name: (torch.float32, tuple(shape)) for name, shape in state_shapes(adapters).items()}
    wrong = [name for name in {**wanted, **found} if found.get(name) != wanted.get(name)]
    if wrong:
        missing = [name for name in wrong if name not in found]
        what = f"lacks {', '.join(missing[:_SHOWN])}" if missing else f"has other tensors ({', '.join(wrong[:_SHOWN])})"
        raise CheckpointError(
            f"{source} {what}, {len(wrong)} of {len(wanted)} in all; name another file with --output, or delete it and "
            "the LoRA to begin again"
        )


@dataclass
class LoraFile:
    """The LoRA that is written, and the state beside it.

    rank, alpha: of the adapters. settings: those that a resumed run must share, JSON values. adapters: shapes of the
    adapters by their names in the file.
    """

    path: Path
    rank: int
    alpha: float
    settings: dict[str, Any]
    adapters: Shapes
    # Steps done according to the state; 0 without one.
    done: int = field(init=False, default=0)

    @property
    def state(self) -> Path:
        return self.path.with_suffix(".state.safetensors")

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep other runs from training the same file. Raises LongCatError if one does."""
        refusal = f"another run is training {self.path}; wait for its end or name another file with --output"
        with claimed(self.path, refusal), claimed(self.state, refusal):
            yield

    def open(self) -> None:
        """Read and check the state. Raises LongCatError for a LoRA that is not this training's, for a state with other
        settings, and for one that is damaged; warns of one without a checksum, from an older version.
        """
        if not self.state.exists():
            if self.path.exists():
                raise LongCatError(
                    f"{self.path} exists, without {self.state.name} to go on from; name another file with --output"
                )
            return
        remedy = f"name another file with --output, or delete it and {self.path.name} to begin again"
        try:
            file = SafetensorsFile(self.state)
        except CheckpointError as error:
            raise CheckpointError(f"{str(error).partition(';')[0]}, so training cannot go on; {remedy}") from error
        source, step = f"{self.state}", file.metadata.get("step", "")
        there = parse_record(
            file.metadata.get("settings", ""), dict[str, Any], source, "a training state", remedy, CheckpointError
        )
        if not re.fullmatch("[1-9][0-9]{0,7}", step):
            raise CheckpointError(f"{source} is not a training state (it has no number of steps); {remedy}")
        if words := differences_in_words(there, as_read(self.settings)):
            raise LongCatError(
                f"{self.state} has other settings ({words}); give the same ones to continue, or another --output"
            )
        check_state(source, file.header, self.adapters)
        tensors = file.tensors()
        if "checksum" not in file.metadata:
            if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
                raise CheckpointError(f"{source} has NaN or infinite values; {remedy}")
            warnings.warn(f"{source} is of an older version and has no checksum; it is taken for whole", stacklevel=2)
        elif file.metadata["checksum"] != _checksum(tensors, file.metadata["settings"], step):
            raise CheckpointError(f"{source} is damaged (its content does not match its checksum); {remedy}")
        self.done = int(step)
        self._check_own()

    def _check_own(self) -> None:
        """Raise LongCatError for another's LoRA of this name, which would be replaced."""
        try:
            file = SafetensorsFile(self.path)
        except CheckpointError:
            return
        if not {"settings", "steps"} <= file.metadata.keys() and not self.adapters.keys() <= file.header.keys():
            raise LongCatError(
                f"{self.path} is not the LoRA of {self.state.name}; move it away, or name another file with --output"
            )

    def write(self, state: Mapping[str, Tensor], done: int) -> None:
        """Write the state, then the LoRA: after an interrupt in between, `finish` writes the LoRA from the state."""
        settings = json.dumps(self.settings)
        total = _checksum(state, settings, f"{done}")
        write_safetensors(self.state, state, {"settings": settings, "step": f"{done}", "checksum": total})
        self.done = done
        write_safetensors(self.path, *self._lora(state))

    def finish(self) -> None:
        """Write the LoRA from the state unless it is there and whole; warns if it is written."""
        tensors, metadata = self._lora(read_tensors(self.state))
        if self._holds(tensors, metadata):
            return
        warnings.warn(
            f"{self.path} was missing or did not match its state; it is written again from {self.state.name}",
            stacklevel=2,
        )
        write_safetensors(self.path, tensors, metadata)

    def _lora(self, state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Tensors and header of the LoRA, in an order that depends on nothing else."""
        lora = {name: state[name] for name in self.adapters}
        modules = dict.fromkeys(name.rpartition(".lora_")[0] for name in self.adapters)
        lora |= {f"{module}.alpha": torch.tensor(float(self.alpha)) for module in modules}
        notes = {"rank": self.rank, "alpha": f"{self.alpha:g}", "steps": self.done}
        notes |= {"base": self.settings["model"], "settings": json.dumps(self.settings)}
        return lora, {"format": "pt"} | {name: str(value) for name, value in notes.items()}

    def _holds(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bool:
        try:
            file = SafetensorsFile(self.path)
            found = file.tensors()
        except CheckpointError:
            return False
        same = not differences(file.metadata, metadata) and found.keys() == tensors.keys()
        return same and all(_equal(found[name], tensor) for name, tensor in tensors.items())


def _equal(one: Tensor, two: Tensor) -> bool:
    # By their bytes: -0 is not 0 here.
    return one.dtype == two.dtype and one.shape == two.shape and torch.equal(*(_bytes(tensor) for tensor in (one, two)))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def _checksum(state: Mapping[str, Tensor], settings: str, step: str) -> str:
    arrays = (part for name in sorted(state) for part in (name, state[name].detach().cpu().numpy()))
    return checksum(settings, step, *arrays)
