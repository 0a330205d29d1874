"""Figures against sums done by hand."""

from __future__ import annotations

import math

import pytest
import torch

from blockwright.training import metrics
from blockwright.training.metrics import ExpertLoad, TokenLoss


def number(value: float) -> torch.Tensor:
    return torch.tensor(value)


def figures(metric: ExpertLoad) -> dict[str, float]:
    return {name: float(value) for name, value in metric.compute().items() if value.ndim == 0}


def test_loss_is_nats_over_tokens_whatever_the_size_of_batches() -> None:
    metric = TokenLoss()
    metric.update(number(6.0), number(2), number(4))
    metric.update(number(1.0), number(5), number(8))
    values = {name: float(value) for name, value in metric.compute().items()}
    assert values["loss"] == pytest.approx(7 / 7)  # and not (3 + 0.2) / 2
    assert values["perplexity"] == pytest.approx(math.e)
    assert values["bits_per_byte"] == pytest.approx(7 / 12 / math.log(2))


def test_many_small_sums_lose_nothing() -> None:
    metric = TokenLoss()
    metric.update(number(2.0**26), number(1), number(1))
    for _ in range(100):
        metric.update(number(1.0), number(0), number(0))
    assert float(metric.nats) == 2.0**26 + 100  # in fp32 the ones would vanish


def test_loss_carries_no_graph() -> None:
    metric = TokenLoss()
    metric.update(torch.ones((), requires_grad=True) * 2, number(1), number(1))
    assert not metric.compute()["loss"].requires_grad


def test_reset_forgets() -> None:
    metric = TokenLoss()
    metric.update(number(6.0), number(2), number(4))
    metric.reset()
    metric.update(number(1.0), number(1), number(1))
    assert float(metric.compute()["loss"]) == 1.0


def test_load_of_one_expert_only_is_the_worst() -> None:
    metric = ExpertLoad(4)
    metric.update(torch.tensor([8.0, 0, 0, 0]))
    values = figures(metric)
    assert values == pytest.approx({"max_violation": 3.0, "entropy": 0.0, "busiest": 1.0}, abs=1e-9)


def test_even_load_is_the_best() -> None:
    metric = ExpertLoad(4)
    metric.update(torch.tensor([2.0, 0, 2, 0]))
    metric.update(torch.tensor([0.0, 2, 0, 2]))
    assert figures(metric) == pytest.approx({"max_violation": 0.0, "entropy": 1.0, "busiest": 0.25})
    assert metric.compute()["shares"].tolist() == [0.25] * 4


def test_load_in_between() -> None:
    metric = ExpertLoad(4)
    metric.update(torch.tensor([4.0, 2, 1, 1]))
    values = figures(metric)
    entropy = -(0.5 * math.log(0.5) + 0.25 * math.log(0.25) + 2 * 0.125 * math.log(0.125)) / math.log(4)
    assert values == pytest.approx({"max_violation": 1.0, "entropy": entropy, "busiest": 0.5})


def test_a_single_expert_and_no_tokens_are_no_trouble() -> None:
    values = ExpertLoad(1).compute()
    assert all(bool(torch.isfinite(value)) for value in values.values())
    metric = ExpertLoad(1)
    metric.update(torch.tensor([3.0]))
    assert float(metric.compute()["max_violation"]) == 0


@pytest.mark.parametrize("persistent", [False, True])
def test_sums_are_in_checkpoints_when_asked(persistent: bool) -> None:
    loss, load = TokenLoss(persistent), ExpertLoad(2, persistent)
    loss.update(number(6.0), number(2), number(4))
    load.update(torch.tensor([3.0, 1.0]))
    assert set(loss.state_dict()) == ({"nats", "tokens", "bytes"} if persistent else set())
    if persistent:
        again, other = TokenLoss(True), ExpertLoad(2, True)
        again.load_state_dict(loss.state_dict())
        other.load_state_dict(load.state_dict())
        assert again.compute() == loss.compute() and figures(other) == figures(load)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_are_exact_in_a_module_cast_to_half_precision(dtype: torch.dtype) -> None:
    loss, load = TokenLoss(), ExpertLoad(2)
    torch.nn.ModuleList([loss, load]).to(dtype)
    for metric in (loss, load):
        metric.reset()
    for _ in range(600):
        loss.update(number(1.5), number(201), number(3))
        load.update(torch.tensor([201.0, 1.0]))
    assert (float(loss.nats), float(loss.tokens), float(loss.bytes)) == (900, 120600, 1800)
    assert load.load.tolist() == [120600, 600]


def test_sums_stay_on_the_cpu_beside_a_device_without_fp64(monkeypatch: pytest.MonkeyPatch) -> None:
    metric = TokenLoss()
    monkeypatch.setattr(metrics, "WITHOUT_FP64", ("meta",))
    torch.nn.ModuleList([metric]).to("meta")
    metric.update(number(6.0), number(2), number(4))
    metric.reset()
    metric.update(number(6.0), number(3), number(4))
    assert metric.nats.device.type == "cpu" and float(metric.compute()["loss"]) == 2
