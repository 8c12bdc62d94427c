"""Several GPUs in ComfyUI: its network is rank 0 of a group whose other ranks are processes of the core's.

The group is started by the first MODEL that wants it, stays warm for all that follow, and ends with ComfyUI. The other
ranks get weights as ComfyUI uses them: with LoRAs, cast, wherever it keeps them. They read no file.
"""

from __future__ import annotations

import atexit
import logging
import threading
import weakref
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import comfy.model_management
import comfy.ops
import torch
from torch import Tensor

from ..longcat_core.model.config import ModelConfig
from ..longcat_core.optimize.kernels.elementwise import quantize_rows
from ..longcat_core.optimize.plan import Work
from ..longcat_core.optimize.quantization import dequantized, without_scales
from ..longcat_core.optimize.stamps import writes
from ..longcat_core.parallel.bandwidth import Bandwidth
from ..longcat_core.parallel.devices import AUTO, Gpus, devices_of
from ..longcat_core.parallel.group import Group
from ..longcat_core.parallel.layout import layout_on, measured_links
from ..longcat_core.parallel.mirror import Leader
from ..longcat_core.parallel.start import start
from ..longcat_core.parallel.weights import Layer
from . import comfy_fp8
from .comfy_fp8 import is_replaced


class ComfyWeights:
    """Where a `Leader` finds the weights of a network of ComfyUI's; see `parallel.weights.Source`."""

    def __init__(self, network: torch.nn.Module, dtype: torch.dtype, device: torch.device) -> None:
        """network: a `DiffusionModel`. dtype: of activations; device: where it runs."""
        self._network, self.dtype, self._device = weakref.ref(network), dtype, device
        self._held: list[torch.nn.Parameter] = []

    @property
    def network(self) -> torch.nn.Module:
        network = self._network()
        assert network is not None, "a pass of a network that is gone"
        return network

    @property
    def config(self) -> ModelConfig:
        return self.network.config

    def layers(self) -> dict[str, Layer]:
        return {name: Layer(self.dtype, 0, None) for name in comfy_fp8.layers(self.network)}

    def versions(self) -> dict[str, Hashable]:
        found: dict[str, Hashable] = {}
        self._held = []
        for name, layer in weighted(self.network):
            own = [parameter for parameter in (layer.weight, layer.bias) if parameter is not None]
            self._held += own
            stamp = (*((id(p), writes(p)) for p in own), *map(id, (*layer.weight_function, *layer.bias_function)))
            for leaf in self._leaves(layer):
                # ComfyUI patches weights in place, and says by which patches.
                found[f"{name}.{leaf}"] = self.network.patched_as, stamp
        return found

    def stamp(self) -> object:
        return self.layers(), self.versions()

    def weights(self, names: Sequence[str]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for owner in dict.fromkeys(name.rpartition(".")[0] for name in names):
            layer = self.network.get_submodule(owner)
            values = self._fp8(layer) if isinstance(layer, comfy_fp8.Linear) else self._plain(layer)
            found |= {f"{owner}.{leaf}": value for leaf, value in values.items()}
        return {name: found[name] for name in names}

    def _leaves(self, layer: torch.nn.Module) -> list[str]:
        leaves = ["weight"] if layer.bias is None else ["weight", "bias"]
        return [*leaves, "weight_scale"] if isinstance(layer, comfy_fp8.Linear) else leaves

    def _plain(self, layer: torch.nn.Module) -> dict[str, Tensor]:
        # Layers that compute in fp32 take their weights as precise as the file has them.
        wide = layer.weight.dtype == torch.float32
        dtype = layer.weight.dtype if wide and layer in self.network.fp32_layers() else self.dtype
        weight, bias, stream = comfy.ops.cast_bias_weight(
            layer, device=self._device, dtype=dtype, bias_dtype=dtype, offloadable=True
        )
        found = {"weight": weight.detach().clone()}
        if bias is not None:
            found["bias"] = bias.detach().clone()
        comfy.ops.uncast_bias_weight(layer, weight, bias, stream)
        return found

    def _fp8(self, layer: comfy_fp8.Linear) -> dict[str, Tensor]:
        packed, bias, streamed = layer.bare(torch.empty(0, dtype=self.dtype, device=self._device))
        weight, scale = without_scales(packed, layer.out_features)
        if layer.weight_function:
            full = dequantized(weight, scale, self.dtype)
            for function in layer.weight_function:
                full = function(full)
            weight, scale = quantize_rows(full)
        found = {"weight": weight.clone(), "weight_scale": scale.clone()}
        if bias is not None:
            found["bias"] = bias.detach().to(self.dtype, copy=True)
        if streamed is not None:
            comfy.ops.uncast_bias_weight(*streamed)
        return found


class ComfyLeader(Leader):
    """A `Leader` that the user interrupts between two passes: in one, an exception would end the other processes."""

    def evaluate(self, *args: Any, **options: Any) -> tuple[Tensor, bool]:
        with interrupts_outside():
            return super().evaluate(*args, **options)


@contextmanager
def interrupts_outside() -> Iterator[None]:
    """Raise what ComfyUI raises for an interrupt before or after what is inside, but not in it.

    ComfyUI's layers look for an interrupt whenever they run, and nothing but this function keeps them from it.
    """
    management = comfy.model_management
    check = management.throw_exception_if_processing_interrupted
    check()
    management.throw_exception_if_processing_interrupted = lambda: None
    try:
        yield
    finally:
        management.throw_exception_if_processing_interrupted = check
    check()


class Workers:
    """The one group of this process, and the leader of each network on it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._group: Group | None = None
        # The group that has the last pass.
        self._active: Group | None = None
        # Of each network, what its last pass was and how many GPUs share it.
        self._counts: weakref.WeakKeyDictionary[torch.nn.Module, tuple[Hashable, int]] = weakref.WeakKeyDictionary()
        # How fast these devices exchange data, also after their group has ended.
        self._links: dict[Sequence[torch.device], Mapping[int, Bandwidth]] = {}
        self._leaders: weakref.WeakKeyDictionary[torch.nn.Module, tuple[Hashable, ComfyLeader]] = (
            weakref.WeakKeyDictionary()
        )

    def leader(
        self, network: torch.nn.Module, gpus: Gpus, dtype: torch.dtype, device: torch.device, work: Work
    ) -> Leader | None:
        """What runs the network's passes on several GPUs, or None if one GPU is all there is, or is faster.

        work: the pass that is about to run; all passes of one size run as the first one. Starts the group the first
        time, after a failure, and for another number of GPUs. Raises LongCatError if the GPUs are not there or a
        process cannot start.
        """
        devices = devices_of(gpus, device)
        if len(devices) == 1:
            return None
        with self._lock:
            devices = devices[: self._count(network, gpus, dtype, devices, work)]
            if len(devices) == 1:
                self._end()
                return None
            group = self._active = self._of(devices)
            key = id(group), dtype
            known = self._leaders.get(network)
            if known is None or known[0] != key:
                known = self._leaders[network] = key, ComfyLeader(group, ComfyWeights(network, dtype, device))
            return known[1]

    def _count(self, network: Any, gpus: Gpus, dtype: torch.dtype, devices: Sequence[torch.device], work: Work) -> int:
        """How many of the devices share a pass; says how."""
        key = gpus, dtype, devices, tuple(work.latents[2:])
        known = self._counts.get(network)
        if known is None or known[0] != key:
            if devices not in self._links:
                self._links[devices] = measured_links(self._of(devices))
            counts = range(1, len(devices) + 1) if gpus == AUTO else [len(devices)]
            layout = layout_on(devices[0], self._links[devices], network.config, work, dtype, False, counts)
            noun = "processes" if devices[0].type == "cpu" else "GPUs"
            logging.info("LongCat: %s", layout.describe(noun))
            known = self._counts[network] = key, layout.count
        return known[1]

    def group(self, devices: Sequence[torch.device]) -> Group:
        """The group of these devices, which is started if it is not there. Raises LongCatError if that fails."""
        with self._lock:
            return self._of(devices)

    def _of(self, devices: Sequence[torch.device]) -> Group:
        group = self._group
        if group is not None and (group.devices != devices or group.failed):
            self._end()
            group = None
        if group is None:
            logging.info("LongCat: starting processes on %d more GPUs", len(devices) - 1)
            group = self._group = start(devices)
        return group

    def rest(self) -> None:
        """Say that the last pass of a network is on one GPU."""
        self._active = None

    def active(self, device: torch.device) -> Group | None:
        """The group that has the last pass of a network, if its first device is `device`: what follows that pass, such
        as decoding, may use it too."""
        group = self._active
        return group if group is not None and not group.failed and group.device == device else None

    def _end(self) -> None:
        group, self._group, self._active = self._group, None, None
        self._leaders.clear()
        if group is not None:
            group.end()

    def end(self) -> None:
        """End the processes; the next pass that wants them starts others."""
        with self._lock:
            self._end()


WORKERS = Workers()
atexit.register(WORKERS.end)


def bypassed(network: torch.nn.Module) -> bool:
    """Whether another function takes the place of a layer's, as with a bypass LoRA; other ranks would not have it."""
    return any(is_replaced(layer) for _, layer in weighted(network))


def weighted(network: torch.nn.Module) -> list[tuple[str, torch.nn.Module]]:
    """The layers of a network that have weights, by name."""
    return [(name, layer) for name, layer in network.named_modules() if getattr(layer, "weight", None) is not None]
