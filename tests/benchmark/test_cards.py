"""What `bench cards` leaves on the device between its parts."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from longcat_core.benchmark import variants, workload
from longcat_core.benchmark.parts import cards
from longcat_core.measure import results
from longcat_core.measure.clock import Budget
from longcat_core.optimize.quantization import Fp8Linear, quantize

from ..support.pretend_cuda import Properties, pretended
from ..support.tiny import tiny_config

SMALL = tiny_config(depth=3)
CPU = torch.device("cpu")


def fresh() -> variants.Bench:
    model = workload.random_model(SMALL, CPU, torch.float32)
    return variants.Bench(model, workload.Size(32, 48, 5), CPU, 1, Budget(None), say=lambda sentence: None)


@pytest.fixture(autouse=True)
def little_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cards, "COPIED", 1 << 16)
    monkeypatch.setattr(cards, "SHARES", (0.6,))


@pytest.fixture
def report(tmp_path) -> results.ResultsFile:
    return results.ResultsFile("cards", tmp_path, CPU, {})


def test_nothing_of_one_path_is_counted_in_the_next(report, monkeypatch):
    """Left on a GPU, the first model's weights would pass for another model's, and plans would be smaller."""
    made: list[weakref.ref] = []
    done: list[object] = []

    def watched() -> variants.Bench:
        gc.collect()
        assert not [ref for ref in made if ref() is not None]
        bench = fresh()
        made.append(weakref.ref(bench.model))
        return bench

    settle, plans = cards.settle, cards.plans
    monkeypatch.setattr(cards, "settle", lambda *args: (done.append("settled"), settle(*args)))
    monkeypatch.setattr(cards, "plans", lambda bench, fp8: (done.append(fp8), plans(bench, fp8))[1])
    bench = fresh()
    bench.report, bench.remake = report, watched
    cards.run(bench)
    assert len(made) == 2 and len([row for row in report.rows if row["status"] == "ok"]) == 5
    # Quantized weights are laid out again before anything is counted.
    assert done == ["settled", True, False]


def test_settling_moves_and_keeps_everything():
    places = []

    model = fresh().model
    quantize(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.MonkeyPatch.context() as patch:
        to = type(model).to
        patch.setattr(type(model), "to", lambda self, device: (places.append(str(device)), to(self, device))[1])
        cards.settle(model, CPU)
    assert places == ["cpu", "cpu"] and isinstance(model.blocks[0].ffn.down, Fp8Linear)
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == before[name].dtype and torch.equal(tensor.float(), before[name].float()), name


@pytest.mark.parametrize("name", ["cuda", "cuda:0"])
def test_a_limit_holds_while_it_is_entered(name):
    total = Properties.total_memory
    with pretended() as gpu:
        for size in (total // 4, 2 * total, None):
            with cards.within(torch.device(name), size):
                pass
    assert gpu.fractions == [0.25, 1.0, 1.0, 1.0]
