"""The VAE spread over processes gives the frames and the latents of one, whatever rows there are to share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.connection import Connection

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from longcat_core.parallel.vae import SpreadVAE
from longcat_core.vae import parts
from longcat_core.vae.network import VAEConfig, WanVAE

SIZES = (1, 2, 3, 4)
# More than any part takes; what lets a part have a frame of the last stage at 56 x 24; and less than any takes.
WHOLE, SOME, LEAST = 1 << 30, 60_000, 1


def new_vae() -> WanVAE:
    torch.manual_seed(0)
    vae = WanVAE(VAEConfig(4, 16, [0.0] * 16, [1.0] * 16)).double().requires_grad_(False)
    for name, parameter in vae.named_parameters():
        if name.endswith("gamma"):
            parameter.uniform_(0.5, 1.5)
    return vae


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def members(size: int) -> list[int]:
    """Rank 0 and the last ones, which have other ranks in a small group."""
    return [0, *range(max(SIZES) - size + 1, max(SIZES))]


def join(rank: int, store: str) -> dict[int, dist.ProcessGroup]:
    """A group for each size."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(store, max(SIZES)),
        rank=rank,
        world_size=max(SIZES),
        timeout=timedelta(seconds=60),
    )
    return {size: dist.new_group(members(size)) for size in SIZES}


def serve(rank: int, store: str, messages: Connection) -> None:
    """Do what the tests do, in a rank other than 0."""
    groups, vae = join(rank, store), new_vae()
    while message := messages.recv():
        method, size, parts.MOST_ON_CPU, shape = message
        if rank in members(size):
            spread, x = SpreadVAE(vae, groups[size]), randn(*shape)
            assert not len(list(spread.decode(x)) if method == "decode" else spread.encode(x))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def call(tmp_path_factory) -> Iterator[Callable]:
    """call(method, size, most, *shape): a method in ranks 1 and up, and in this process, which is rank 0."""
    context, store = get_context("spawn"), str(tmp_path_factory.mktemp("ranks") / "store")
    pipes = [context.Pipe() for _ in SIZES[1:]]
    workers = [
        context.Process(target=serve, args=(rank, store, theirs), daemon=True)
        for rank, (_, theirs) in enumerate(pipes, 1)
    ]
    for worker in workers:
        worker.start()
    threads = torch.get_num_threads()
    groups, vae = join(0, store), new_vae()

    def run(method: str, size: int, most: int, *shape: int) -> Iterator[Tensor] | Tensor:
        for ours, _ in pipes:
            ours.send((method, size, most, shape))
        return getattr(SpreadVAE(vae, groups[size]), method)(randn(*shape))

    yield run
    for ours, _ in pipes:
        ours.send(None)
    dist.destroy_process_group()
    torch.set_num_threads(threads)
    for worker in workers:
        worker.join(20)
        assert worker.exitcode == 0


# Three ranks share seven rows as 3, 2 and 2; four share two, and two of them have none.
@pytest.mark.parametrize(
    ("size", "rows", "frames", "most"),
    [
        (1, 2, 2, WHOLE),
        (2, 5, 1, WHOLE),
        (2, 5, 4, SOME),
        (3, 7, 4, WHOLE),
        (3, 7, 2, LEAST),
        (4, 7, 2, WHOLE),
        (4, 2, 3, LEAST),
        (2, 1, 2, WHOLE),
    ],
)
def test_frames_are_those_of_one_process_in_the_same_parts(call, monkeypatch, size, rows, frames, most):
    monkeypatch.setattr(parts, "MOST_ON_CPU", most)
    shape = (2, 16, frames, rows, 3)
    got, want = list(call("decode", size, most, *shape)), list(parts.decoded(new_vae(), randn(*shape)))
    assert [part.shape for part in got] == [part.shape for part in want]
    torch.testing.assert_close(torch.cat(got, dim=1), torch.cat(want, dim=1), atol=1e-10, rtol=0)


@pytest.mark.parametrize(
    ("size", "rows", "frames", "most"),
    [(2, 5, 1, WHOLE), (2, 5, 9, LEAST), (3, 7, 9, WHOLE), (4, 7, 5, WHOLE), (4, 2, 9, LEAST)],
)
def test_latents_are_those_of_one_process(call, monkeypatch, size, rows, frames, most):
    monkeypatch.setattr(parts, "MOST_ON_CPU", most)
    shape = (2, 3, frames, 8 * rows, 24)
    got, want = call("encode", size, most, *shape), parts.encoded(new_vae(), randn(*shape))
    torch.testing.assert_close(got, want, atol=1e-10, rtol=0)


def test_ranks_end_with_the_iterator_of_rank_0(call):
    shape = (1, 16, 4, 5, 3)
    begun = call("decode", 3, LEAST, *shape)
    first = [next(begun), next(begun)]
    begun.close()
    assert [part.shape[1] for part in first] == [1, 1]
    # They have to answer.
    assert len(list(call("decode", 3, WHOLE, *shape))) == 2
