"""How many GPUs share a task, and what is said of it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from longcat_core.generate.pipeline import Pipeline
from longcat_core.generate.request import GenerateRequest
from longcat_core.model.config import ModelConfig
from longcat_core.optimize.optimized import OptimizedTransformer
from longcat_core.optimize.plan import Plan, Work
from longcat_core.optimize.shared_memory import can_share
from longcat_core.parallel import layout
from longcat_core.parallel.bandwidth import Bandwidth, fewest
from longcat_core.parallel.group import current, end_current
from longcat_core.parallel.layout import choose_layout, flops, pass_seconds
from longcat_core.parallel.start import start

from ..support.ranks import SERVE
from ..support.tiny import tiny_config
from .work import chosen as chosen_windows
from .work import do

# The released model, and a video of 93 frames at 480p.
RELEASED, VIDEO = ModelConfig(), (1, 16, 24, 60, 104)
GUIDED, SINGLE = Work(VIDEO), Work(VIDEO, guided=False)
# FLOP per second of a product; a pass without guidance takes 3.1 s then, as on an H200.
FAST = 7e14
GB = 1e9


def chosen(work: Work, speed: float, there: int, counts: range | None = None, **options: bool) -> str:
    speeds = {n: speed * GB for n in range(2, there + 1) if there % n == 0}
    found = choose_layout(RELEASED, work, 2, rate=FAST, speeds=speeds, counts=counts or range(1, there + 1), **options)
    return found.describe("GPUs")


@pytest.mark.parametrize(
    ("work", "speed", "there", "said"),
    [
        (GUIDED, 300, 2, "2 GPUs share each step, one half of guidance each"),
        (GUIDED, 1, 2, "2 GPUs share each step, one half of guidance each"),
        (GUIDED, 300, 4, "4 GPUs share each step: 2 take the tokens of each half of guidance and exchange 300 GB/s"),
        (GUIDED, 2, 4, "2 of 4 GPUs share each step, one half of guidance each; more would be slower, because they "
                       "exchange 2 GB/s"),
        (SINGLE, 310, 4, "4 GPUs share the tokens of each video and exchange 310 GB/s"),
        (SINGLE, 2, 2, "1 of 2 GPUs does the work; more would be slower, because they exchange 2 GB/s"),
        # An odd number keeps the halves together.
        (GUIDED, 20, 3, "2 of 3 GPUs share each step, one half of guidance each; more would be slower, because they "
                        "exchange 20 GB/s"),
        (Work((4, *VIDEO[1:]), guided=False), 2, 2, "2 GPUs share each step, one sample each"),
        (Work(VIDEO, parts=3), 2, 3, "3 GPUs share each step, one sample each"),
        (Work(VIDEO, parts=3, speakers=2), 300, 3, "3 GPUs share the tokens of each video and exchange 300 GB/s"),
    ],
)  # fmt: skip
def test_as_many_as_pay_off(work, speed, there, said):
    assert chosen(work, speed, there) == said


def test_a_number_that_was_asked_for_stays():
    assert chosen(GUIDED, 2, 4, range(4, 5)).endswith("and exchange 2 GB/s; 2 would be faster")
    assert chosen(GUIDED, 300, 4, range(4, 5)).endswith("and exchange 300 GB/s")
    assert "share the tokens" in chosen(GUIDED, 300, 2, split=True)


def test_seconds_of_a_pass():
    """Of 10 s in blocks and 1 outside of them, and 4 s to send all of a sample."""

    def seconds(count: int, samples: int) -> float:
        return pass_seconds(count, samples, 10.0, lambda tokens: 4.0, 1.0)

    assert [seconds(count, 1) for count in (1, 2, 4)] == [11.0, 5 + 1 + 4 / 4, 2.5 + 1 + 4 * 3 / 16]
    assert [seconds(count, 2) for count in (1, 2, 4)] == [22.0, 11.0, seconds(2, 1)]
    assert seconds(3, 2) == 2 * seconds(3, 1)


def test_flops_are_those_that_pytorch_counts():
    """Of what is counted here: attention to text and the final layer are the rest."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    config = tiny_config()
    network = OptimizedTransformer(config).eval()
    work = Work((1, config.in_channels, 5, 16, 24), guided=False)
    # It does not know the others.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        text = network.embed_text(torch.zeros(1, 1, config.caption_channels))
        network(torch.zeros(work.latents), torch.ones(1), text)
    assert flops(config, work) == pytest.approx(counter.get_total_flops(), rel=0.15)
    # Given frames are keys only.
    assert flops(config, Work(work.latents, cond_latents=1)) == pytest.approx(flops(config, work) * 4 / 5)


@pytest.mark.skipif(not can_share(), reason="this system has no such memory")
@pytest.mark.parametrize(
    ("written", "kept"),
    [({2: 91.0, 4: 300.0}, {2: 91.0, 4: 300.0}), ({2: 300.0, 4: 89.0}, {2: 300.0}), ({2: 1.0, 4: 1.0}, {})],
)
def test_all_ranks_give_up_windows_where_messages_are_faster(ended, written, kept):
    with start([torch.device("cpu")] * 4, SERVE) as group:
        found = do(group, chosen_windows, written)
    links = {size: Bandwidth(100.0, 1.0, 1.0, kept.get(size, 0.0)) for size in written}
    assert found == [(sorted(kept), links)] * 4
    assert [links[size].exchange for size in written] == [kept.get(size, 100.0) for size in written]


@pytest.fixture
def request_() -> GenerateRequest:
    return GenerateRequest("a red circle", height=32, width=48, frames=9, steps=2, guidance_scale=2.0)


@pytest.fixture
def ended() -> Iterator[None]:
    yield
    end_current()


def test_auto_gives_back_the_gpus_that_do_not_pay_off(monkeypatch, ended, request_):
    """Links that are slow leave one process; the others end."""
    monkeypatch.setattr(layout, "measured_links", lambda group: {2: Bandwidth(1.0, 1.0, 1.0)})
    monkeypatch.setattr("longcat_core.generate.pipeline.devices_of", lambda gpus, device: (device, device))
    pipeline = Pipeline.load(work=Work((1, 16, 3, 4, 6), guided=False), gpus="auto", least=Plan(split_guidance=True))
    assert pipeline.plan_note.startswith("guidance in halves; 1 of 2 processes does the work; more would be slower")
    assert current() is None and pipeline.model.execution.ranks is None and pipeline.vae.spread is None
    assert len(pipeline.generate(request_.filled(pipeline.defaults)).frames) == 9


@pytest.mark.parametrize(
    ("seconds", "count"),
    [
        ({8: 1.0, 16: 1.0, 32: 1.0}, 8),
        ({8: 1.4, 16: 1.1, 32: 1.0}, 8),
        ({8: 1.5, 16: 1.1, 32: 1.0}, 16),
        ({8: 4.0, 16: 2.0, 32: 1.0}, 32),
    ],
)
def test_as_few_programs_write_as_keep_a_link_busy(seconds, count):
    assert fewest(seconds) == count
