"""The VAE spread over the ranks of a group: each has some rows of the pictures, at every size that they take.

Frames depend on earlier ones, so a clip does not divide in time. Rows do: a convolution needs one row of either
neighbor, which the ranks exchange before it runs, and attention in the middle needs the keys and values of all rows.
The results are those of one rank, as exactly as its convolutions of fewer rows are.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ..vae.layers import Rows
from ..vae.network import WanVAE, channels_last
from ..vae.parts import decoded, encoded, room
from ..vae.tiles import FACTOR


class SpreadVAE:
    """A VAE of which all ranks of a group have the weights; every rank calls the same method with the same tensor.

    Rank 0 gets the result. Ranks beyond the rows of the latents have nothing to do. A rank that fails in between leaves
    the others waiting.

    group: None is the default one. It must also take tensors in CPU memory, as groups without a named backend do.
    """

    def __init__(self, vae: WanVAE, group: dist.ProcessGroup | None = None) -> None:
        self._vae, self._group = vae, group

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Generator[Tensor]:
        """In rank 0 what `vae.parts.decoded` yields for latents [B, z_dim, T, h, w]; the others yield nothing.

        The parts are as long as on one rank, so the memory of each rank goes with its share of the rows. A part is
        begun when rank 0 asks for it. If rank 0 closes the iterator, those of the other ranks end as well.
        """
        strip, most = self._strip(latents.shape[3], latents.device)
        if strip is None:
            return
        for part in decoded(self._vae, strip.cut(latents, 3), most, strip):
            whole = strip.gathered(part, 2, ranks=(0,))
            wanted = torch.zeros(1)
            if strip.rank == 0:
                try:
                    yield whole
                    wanted += 1
                finally:
                    for rank in range(1, len(strip.heights)):
                        dist.send(wanted, strip.name(rank), self._group)
            else:
                dist.recv(wanted, strip.name(0), self._group)
            if not wanted:
                return

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """In rank 0 what `vae.parts.encoded` gives for video [B, 3, F, H, W]; an empty tensor in the others."""
        strip, most = self._strip(video.shape[3] // FACTOR, video.device)
        if strip is None:
            return video.new_empty(0)
        latents = encoded(self._vae, strip.cut(video, 3), most, strip)
        whole = strip.gathered(latents, 3, ranks=(0,))
        return whole if strip.rank == 0 else whole.new_empty(0)

    def _strip(self, rows: int, device: torch.device) -> tuple[Strip | None, int]:
        """This rank's strip of pictures with `rows` rows of latents, and the bytes that its stages may take."""
        if device.type == "cuda":
            channels_last(self._vae)
        size, rank = dist.get_world_size(self._group), dist.get_rank(self._group)
        # All ranks must cut a clip into the same parts, and NCCL wants all of them to communicate before two alone do.
        most = torch.tensor([room(device)], device=device)
        dist.all_reduce(most, dist.ReduceOp.MIN, self._group)
        heights = [len(range(first, rows, size)) for first in range(min(size, rows))]
        if rank >= len(heights):
            return None, 0
        # Activations go with rows, so that each rank counts as many frames for its share as one rank for the whole.
        return Strip(heights, rank, self._group), int(most) * heights[rank] // rows


class Strip(Rows):
    """The rows that one rank has of every picture, between those of its neighbors.

    heights: rows of latents that the ranks have, from above; a picture of another size has them in proportion.
    """

    around = 1

    def __init__(self, heights: Sequence[int], rank: int, group: dist.ProcessGroup | None) -> None:
        self.heights, self.rank, self._group = heights, rank, group

    def name(self, rank: int) -> int:
        """What `torch.distributed` calls a rank of this group."""
        return rank if self._group is None else dist.get_global_rank(self._group, rank)

    def cut(self, whole: Tensor, dim: int) -> Tensor:
        """This rank's rows of a tensor with all of them along `dim`."""
        return whole.split(self._sizes(whole.shape[dim] // sum(self.heights)), dim)[self.rank]

    def gathered(self, x: Tensor, dim: int, ranks: Sequence[int]) -> Tensor:
        """The whole tensor in `ranks`, of which every rank has its rows along `dim`; x itself in the others."""
        sizes = self._sizes(x.shape[dim] // self.heights[self.rank])
        others = [rank for rank in range(len(sizes)) if rank != self.rank]
        into = {}
        if self.rank in ranks:
            into = {rank: x.new_empty((*x.shape[:dim], sizes[rank], *x.shape[dim + 1 :])) for rank in others}
        self._exchange({rank: x for rank in others if rank in ranks}, into)
        if self.rank not in ranks:
            return x
        return torch.cat([into.get(rank, x) for rank in range(len(sizes))], dim)

    def fill(self, x: Tensor, above: int) -> None:
        upper, lower = self.rank - 1, self.rank + 1
        out, edges = {upper: x[:, :, above]}, {lower: x[:, :, -1]}
        if above:
            out[lower], edges[upper] = x[:, :, -2], x[:, :, 0]
        ranks = range(len(self.heights))
        into = {rank: row.new_empty(row.shape) for rank, row in edges.items() if rank in ranks}
        self._exchange({rank: row for rank, row in out.items() if rank in ranks}, into)
        for rank, row in edges.items():
            if rank in into:
                row.copy_(into[rank])
            else:
                row.zero_()

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = self.gathered(torch.stack((k, v)), 3, range(len(self.heights)))
        return super().attend(q, k, v)

    def _sizes(self, scale: int) -> list[int]:
        return [height * scale for height in self.heights]

    def _exchange(self, out: Mapping[int, Tensor], into: Mapping[int, Tensor]) -> None:
        """Send a tensor to each rank in `out`, and receive one from each in `into`."""
        sends = [dist.P2POp(dist.isend, x.contiguous(), self.name(rank), self._group) for rank, x in out.items()]
        receives = [dist.P2POp(dist.irecv, x, self.name(rank), self._group) for rank, x in into.items()]
        # PyTorch refuses an empty list.
        for work in dist.batch_isend_irecv(sends + receives) if sends or receives else ():
            work.wait()
