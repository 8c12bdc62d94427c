"""Blocks whose weights are divided among the ranks: each holds a share on its GPU and gathers a block as it needs it.

It is FSDP's idea of how weights lie, without PyTorch's `fully_shard`. That one carries our dtypes, 8-bit layers and
LoRAs, but it calls blocks through hooks that a compiled block cannot contain, and makes every weight a DTensor, which
all ranks must read and write together. Here rank 0 alone exchanges LoRAs, sends weights, and runs patched passes. So a
block's bytes, of all dtypes, are gathered into one of the two buffers of `optimize.streaming`, to which ranks are
another place where blocks wait.

Rank 0 also keeps these blocks in CPU memory, as if they were streamed. LoRAs are merged into them there, and passes
that it runs alone stream them.
"""

from __future__ import annotations

import weakref

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..optimize.streaming import ALIGN, BlockWeights, Slot
from .group import TIMEOUT, Group
from .sequence import all_gather

_GATHERING: weakref.WeakKeyDictionary[Group, dist.ProcessGroup] = weakref.WeakKeyDictionary()


def gathering(group: Group) -> dist.ProcessGroup:
    """The process group that gathers weights, made by the first call on all ranks at once.

    It is one of its own, so that weights are under way beside what attention exchanges.
    """
    if group not in _GATHERING:
        _GATHERING[group] = dist.new_group(timeout=TIMEOUT)
    return _GATHERING[group]


class Shard(BlockWeights):
    """This rank's share of one block's weights, [nbytes / ranks] uint8 on its device.

    Gathered blocks are not kept for the next pass: all ranks must gather the same blocks, and each frees its buffers at
    its own time.
    """

    kept = False

    @torch.inference_mode(False)
    @torch.no_grad()
    def __init__(self, block: nn.Module, group: dist.ProcessGroup, device: torch.device, keep: bool) -> None:
        """Take the share of a block's weights. keep: they stay where they are, and may be written to there; otherwise
        they are freed, and reading them outside of runs gives NaN."""
        super().__init__(block)
        self.group, size = group, dist.get_world_size(group)
        length = -(-self.nbytes // (size * ALIGN)) * ALIGN
        self.start, self.nbytes = dist.get_rank(group) * length, size * length
        self.share = torch.zeros(length, dtype=torch.uint8, device=device)
        self.written: tuple[int, ...] = ()
        self._refresh()
        self.keeps = keep
        self.home = [parameter.data if keep else _freed(parameter, device) for parameter in self.parameters]
        self.rest()

    def rest(self) -> None:
        self.use(self.home)

    def bring(self, slot: Slot, whole: bool) -> bool:
        if self.keeps:
            self._refresh()
        # A copy that was on its way there must have arrived.
        slot.wait()
        slot.work = all_gather(slot.buffer[: self.nbytes], self.share, self.group, async_op=True)
        return True

    def write(self, parameter: nn.Parameter, values: Tensor) -> bool:
        """Change one of the weights on this rank to `values` of its shape, of which the share takes its part.

        Returns whether it is a weight of this block.
        """
        found = [at for at, own in enumerate(self.parameters) if own is parameter]
        for at in found:
            self._write(at, values.to(parameter.dtype))
            # As writing in place would have done; keys of a text depend on it.
            torch.autograd.graph.increment_version(parameter)
        return bool(found)

    def _refresh(self) -> None:
        """Bring the share up to date with the parameters, outside of runs."""
        stamp = self.stamp()
        for at, (now, then) in enumerate(zip(stamp, self.written or [None] * len(stamp), strict=True)):
            if now != then:
                self._write(at, self.parameters[at].detach())
        self.written = stamp

    def _write(self, at: int, values: Tensor) -> None:
        start, size = self.places[at]
        first, last = max(start, self.start), min(start + size, self.start + len(self.share))
        if first < last:
            data = values.contiguous().view(-1).view(torch.uint8)
            self.share[first - self.start : last - self.start].copy_(data[first - start : last - start])


def _freed(parameter: Tensor, device: torch.device) -> Tensor:
    """A tensor like a parameter that takes no memory."""
    # These bytes are NaN in all our dtypes.
    ones = torch.full((parameter.dtype.itemsize,), 0xFF, dtype=torch.uint8, device=device)
    return ones.view(parameter.dtype).expand(parameter.shape)
