"""What more GPUs and several hosts would take, calculated by hand."""

from __future__ import annotations

import pytest

from longcat_core.benchmark.scaling import NETWORK, Basis, chart, sent_and_attention
from longcat_core.model.config import ModelConfig
from longcat_core.optimize.plan import Work

# 1,000 ms in blocks, half of them attention, 100 outside, and 40 of exchange; a second of the network for all bytes.
ONE = Basis(1, 1000.0, 100.0, 40.0, int(NETWORK), 0.5)


def test_a_video_that_grows_with_the_gpus():
    assert ONE.on(1) == 1100
    # Twice the other work, four times the attention.
    assert ONE.on(1, 2) == pytest.approx(2 * 500 + 4 * 500 + 200)
    assert ONE.on(2, 2) == pytest.approx(3000 / 2 + 200 + 2 * 40 / 4)


@pytest.mark.parametrize("hidden", [0.0, 0.875, 1.0])
def test_what_leaves_a_host_travels_by_the_network(hidden):
    assert ONE.on_hosts(8, hidden) == pytest.approx(1000 / 8 + 100 + 40 * 7 / 64)
    # Of 15 others, 7 are on the same host.
    apart = (40 * 7 + 1000 * (1 - hidden) * 8) / 15
    assert ONE.on_hosts(16, hidden) == pytest.approx(1000 / 16 + 100 + apart * 15 / 256)


def test_halves_of_guidance_stay_on_their_hosts():
    both = Basis(2, 1000.0, 100.0, 40.0, int(NETWORK), 0.5)
    assert both.on_hosts(16, 0.0) == ONE.on_hosts(8, 0.0)


def test_attention_takes_its_share_of_a_longer_video():
    _, short = sent_and_attention(ModelConfig(), Work((1, 16, 24, 60, 104), False), 2)
    sent, long = sent_and_attention(ModelConfig(), Work((1, 16, 48, 60, 104), False), 2)
    assert long / (1 - long) == pytest.approx(2 * short / (1 - short))
    # Queries, keys, values and results of 48 blocks.
    assert sent == 4 * 48 * 48 * 1560 * 4096 * 2


def test_the_plot_has_what_was_measured_and_what_was_calculated():
    plain = chart("Speed", {"a": ONE}, {"a": ONE}, {})
    seen = chart("Speed", {"a": ONE}, {"a": ONE}, {"a": [(2.0, 1.5)], "weak, a": [(2.0, 1.9)]})
    assert plain.size == seen.size and plain.tobytes() != seen.tobytes()
