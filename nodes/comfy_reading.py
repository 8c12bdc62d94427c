"""Weights on their way from files into ComfyUI's network: read ahead by threads, quantized on the GPU as they arrive.

ComfyUI maps files, and a thread that copies from a map waits again and again for its next pages.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import reduce
from pathlib import Path

import comfy.model_management
import comfy.ops
import comfy.utils
import numpy as np
import torch
from torch import Tensor

from ..longcat_core.checkpoints.reader import Reader
from ..longcat_core.checkpoints.stored import Part, Stored
from ..longcat_core.errors import CheckpointError
from ..longcat_core.files.read_ahead import THREADS
from ..longcat_core.files.tensor_files import open_file
from ..longcat_core.optimize.kernels.elementwise import quantize_rows
from ..longcat_core.optimize.quantization import scales_as_rows
from ..longcat_core.optimize.streaming import pinned

# An attribute of tensors out of a file: the opened file, and the tensor's name in it.
PLACE = "longcat_place"
# Of weights that are multiplied out.
WIDE = torch.bfloat16
# How layers load that copy what they are given, and do nothing else.
PLAIN = (torch.nn.Module._load_from_state_dict, comfy.ops.disable_weight_init.Linear._load_from_state_dict)


def mark(tensors: Mapping[str, Tensor], path: str) -> None:
    """Let tensors know their places in the file that ComfyUI read them from, if we can read it too."""
    try:
        file = open_file(Path(path))
    except CheckpointError:
        return
    for name, tensor in tensors.items():
        setattr(tensor, PLACE, (file, name))


class Unread(dict):
    """A state dict that lacks the parameters in `parts`, which `read` reads, multiplies out or quantizes."""

    def __init__(self, tensors: dict[str, Tensor], parts: dict[str, list[Part]], stored: Stored) -> None:
        """stored: its one file has their tensors, most of which are maps of real files, and gives them up in `read`."""
        super().__init__(tensors)
        self.parts, self.stored = parts, stored
        (self.state,) = (file.state for file in stored.files.values())
        device = comfy.model_management.get_torch_device()
        self.device = device if device.type == "cuda" else torch.device("cpu")

    def read(self, network: torch.nn.Module, assign: bool) -> dict[str, Tensor]:
        """All tensors. The parameters are read into the network's own or, if it will `assign` what it gets, into CPU
        memory; parameters that are one tensor of the file stay in it then.

        The node's bar counts the bytes. Raises ComfyUI's exception if the user interrupts it.
        """
        targets: dict[str, Tensor] = {}
        for name, parts in self.parts.items():
            module, _, kind = name.rpartition(".")
            layer = network.get_submodule(module)
            keeps = not assign or (kind == "weight" and getattr(layer, "eight_bit", False))
            own = getattr(layer, kind, None) if keeps and type(layer)._load_from_state_dict in PLAIN else None
            if own is None and len(parts) == 1 and not self._widens(parts[0]):
                self[name] = self.state.pop(parts[0].name)
            else:
                self[name] = self._memory(parts) if own is None else own
                targets[name] = self[name].detach()
        bar, reader = comfy.utils.ProgressBar(1), Reader(self.stored, self.device)

        def watch(done: int, of: int) -> None:
            comfy.model_management.throw_exception_if_processing_interrupted()
            bar.update_absolute(done, of)

        wanted = [part for name in targets for part in self.parts[name]]
        places = {name: place for key in targets for name, place in self._places(targets[key], self.parts[key])}
        with torch.no_grad(), Landing(self.device) as landing, reader.ahead(wanted, watch, places):
            for name, target in targets.items():
                self._fill(target, self.parts[name], reader, landing)
                for part in self.parts[name]:
                    self.state.pop(part.name, None)
        return self

    def _fill(self, target: Tensor, parts: list[Part], reader: Reader, landing: Landing) -> None:
        first, scales = 0, []
        eight_bit, stored = self._eight_bit(target, parts)
        for part in parts:
            rows, wide = self.stored.shapes[part.name][0], self._widens(part) and not stored
            if stored:
                scale = reader.scale(part)
                scales.append((torch.ones(1) if scale is None else scale).expand(rows)[:, None])
            for start, piece in reader.pieces(Part(part.name) if stored else part, self.device if wide else "cpu"):
                piece = piece.to(WIDE) if wide else piece
                if eight_bit and not stored:
                    piece, scale = quantize_rows(piece.to(self.device, non_blocking=True))
                    scales.append(scale)
                landing.put(target[first + start : first + start + len(piece)], piece)
                # Release it before the next one is read.
                del piece
            first += rows
        if eight_bit:
            landing.put(target[first:], scales_as_rows(torch.cat(scales), target.shape[1]))

    def _eight_bit(self, target: Tensor, parts: list[Part]) -> tuple[bool, bool]:
        """Whether a target is of an 8-bit layer, whose scales are in further rows, and whether its file has both."""
        eight_bit = len(target) > sum(self.stored.shapes[part.name][0] for part in parts)
        return eight_bit, eight_bit and all(self.stored.dtypes[part.name] == torch.float8_e4m3fn for part in parts)

    def _places(self, target: Tensor, parts: list[Part]) -> Iterator[tuple[str, Tensor]]:
        """Stored tensors that a target on the CPU holds as they are, and where."""
        first, (eight_bit, stored) = 0, self._eight_bit(target, parts)
        for part in parts:
            rows = self.stored.shapes[part.name][0]
            plain = stored or not (eight_bit or self._widens(part))
            if plain and target.device.type == "cpu" and target.dtype == self.stored.dtypes[part.name]:
                yield part.name, target[first : first + rows]
            first += rows

    def _widens(self, part: Part) -> bool:
        return part.scale is not None or part.name in self.stored.packed

    # Parameters need gradients where nodes train, which tensors made in inference mode cannot have.
    @torch.inference_mode(False)
    def _memory(self, parts: list[Part]) -> Tensor:
        shapes = [self.stored.shapes[part.name] for part in parts]
        dtypes = [WIDE if self._widens(part) else self.stored.dtypes[part.name] for part in parts]
        shape = sum(shape[0] for shape in shapes), *shapes[0][1:]
        return torch.empty(shape, dtype=reduce(torch.promote_types, dtypes))


class Landing:
    """Copies numbers to where they stay. From a GPU to the CPU they pass through pinned buffers, which threads empty: a
    copy straight to new memory would wait for each of its pages, and everybody for the copy. Ends with its `with`."""

    def __init__(self, device: torch.device) -> None:
        self._device, workers = device, max(2, THREADS // 2)
        self._pool = ThreadPoolExecutor(workers, "longcat-land")
        # In order of use, and what is on its way through the last ones.
        self._buffers = deque(torch.empty(0, dtype=torch.uint8) for _ in range(workers + 2))
        self._arriving: deque[Future[None]] = deque()

    def put(self, target: Tensor, values: Tensor) -> None:
        """Copy values, now or in another thread."""
        if target.device.type != "cpu" or values.device.type == "cpu":
            # A copy that does not wait also converts on the GPU, not on the CPU.
            if target.data_ptr() != values.data_ptr():
                target.copy_(values, non_blocking=target.device == self._device)
            return
        if len(self._arriving) == len(self._buffers):
            self._arriving.popleft().result()
        values, buffer = values.to(target.dtype), self._buffers.popleft()
        if len(buffer) < values.nbytes:
            buffer = pinned(values.nbytes)
        self._buffers.append(buffer)
        # Threads that wait for this event leave their cores to those that read.
        room, event = buffer[: values.nbytes], torch.cuda.Event(blocking=True)
        room.copy_(values.view(torch.uint8).flatten(), non_blocking=True)
        event.record(torch.cuda.current_stream(self._device))
        there = target.view(torch.uint8).flatten().numpy()
        self._arriving.append(self._pool.submit(_empty, event, room.numpy(), there))

    def __enter__(self) -> Landing:
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        self._pool.shutdown()
        if kind is None:
            for copied in self._arriving:
                copied.result()


def _empty(event: torch.cuda.Event, room: np.ndarray, target: np.ndarray) -> None:
    event.synchronize()
    target[:] = room
