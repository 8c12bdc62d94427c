"""Known bytes, exchanged by all ranks in each way that passes and the VAE use: what arrives shows whose link is bad."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .division import Division
from .group import Group
from .sequence import all_gather

# From each rank to each other one, several packets of any connection.
LENGTH = 1 << 18


class Known(NamedTuple):
    """Call `wrong_bytes` on all ranks."""


def wrong_bytes(group: Group) -> Tensor:
    """How many bytes arrived wrong in any way, [ranks, ranks] int64 by receiver and sender; all ranks call it."""
    ranks, rank, device = range(group.size), group.rank, group.device
    given = torch.stack([_bytes(rank, to) for to in ranks]).to(device)
    wanted = torch.stack([_bytes(sender, rank) for sender in ranks])
    taken = torch.zeros_like(given)
    dist.all_to_all_single(taken, given)
    found = {"all to all": (taken, wanted)}
    # The others receive what rank 0 gives itself in the exchange above.
    sent = group.broadcast(given[rank].clone())
    found["broadcast"] = sent[None], _bytes(0, 0)[None]
    gathered = torch.zeros_like(given)
    all_gather(gathered.view(-1), given[rank])
    found["gather"] = gathered, torch.stack([_bytes(sender, sender) for sender in ranks])
    received = given.clone().zero_()
    received[rank] = given[rank]
    others = [other for other in ranks if other != rank]
    steps = [dist.P2POp(dist.isend, given[other].contiguous(), other) for other in others]
    steps += [dist.P2POp(dist.irecv, received[other], other) for other in others]
    for work in dist.batch_isend_irecv(steps):
        work.wait()
    found["pairs"] = received, wanted
    if windows := Division.of(group).windows.get(group.size):
        places = windows.of("known", given.shape, given.dtype)
        for to in ranks:
            places[to][rank] = given[to]
        windows.arrived()
        found["written"] = places[rank].clone(), wanted
        windows.release()
    wrong = torch.zeros(group.size, group.size, dtype=torch.int64)
    for got, right in found.values():
        wrong[rank, : len(right)] += (got.cpu() != right).sum(1)
    dist.all_reduce(wrong)
    return wrong


def _bytes(sender: int, receiver: int) -> Tensor:
    generator = torch.Generator().manual_seed(1 + 1000 * sender + receiver)
    return torch.randint(256, (LENGTH,), generator=generator, dtype=torch.uint8)
