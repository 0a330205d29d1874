"""Figures against sums done by hand."""

from __future__ import annotations

import math

import pytest
import torch

from blockwright.training import metrics
from blockwright.training.metrics import ExpertLoad, TokenLoss


def number(value: float) -> torch.Tensor:
    return torch.tensor(value)


def losses(metric: TokenLoss, *batches: tuple[float, float, float]) -> dict[str, float]:
    """After batches of nats, tokens and bytes."""
    for batch in batches:
        metric.update(*map(number, batch))
    return {name: float(value) for name, value in metric.compute().items()}


def figures(metric: ExpertLoad, *batches: list[float]) -> dict[str, float]:
    """After batches of tokens by expert."""
    for batch in batches:
        metric.update(torch.tensor(batch))
    return {name: float(value) for name, value in metric.compute().items() if value.ndim == 0}


def test_loss_is_nats_over_tokens_whatever_the_size_of_batches_and_carries_no_graph() -> None:
    metric = TokenLoss()
    values = losses(metric, (6.0, 2, 4), (1.0, 5, 8))  # and not (3 + 0.2) / 2
    assert values == pytest.approx({"loss": 1, "perplexity": math.e, "bits_per_byte": 7 / 12 / math.log(2)})
    metric.reset()
    metric.update(torch.ones((), requires_grad=True) * 2, number(1), number(1))
    assert float(metric.compute()["loss"]) == 2 and not metric.compute()["loss"].requires_grad


def test_many_small_sums_lose_nothing() -> None:
    metric = TokenLoss()
    losses(metric, (2.0**26, 1, 1), *[(1.0, 0, 0)] * 100)
    assert float(metric.nats) == 2.0**26 + 100  # in fp32 the ones would vanish


BETWEEN = -(0.5 * math.log(0.5) + 0.25 * math.log(0.25) + 2 * 0.125 * math.log(0.125)) / math.log(4)


@pytest.mark.parametrize(
    ("batches", "violation", "entropy", "busiest"),
    [
        ([[8.0, 0, 0, 0]], 3.0, 0.0, 1.0),  # the worst
        ([[2.0, 0, 2, 0], [0.0, 2, 0, 2]], 0.0, 1.0, 0.25),  # the best
        ([[4.0, 2, 1, 1]], 1.0, BETWEEN, 0.5),
    ],
)
def test_load_of_experts(batches: list[list[float]], violation: float, entropy: float, busiest: float) -> None:
    metric = ExpertLoad(4)
    found = figures(metric, *batches)
    assert found == pytest.approx({"max_violation": violation, "entropy": entropy, "busiest": busiest}, abs=1e-9)
    total = torch.tensor(batches).sum(0)
    torch.testing.assert_close(metric.compute()["shares"].float(), total / total.sum())


def test_a_single_expert_and_no_tokens_are_no_trouble() -> None:
    assert all(map(math.isfinite, figures(ExpertLoad(1)).values()))
    assert figures(ExpertLoad(1), [3.0])["max_violation"] == 0


@pytest.mark.parametrize("persistent", [False, True])
def test_sums_are_in_checkpoints_when_asked(persistent: bool) -> None:
    loss, load = TokenLoss(persistent), ExpertLoad(2, persistent)
    losses(loss, (6.0, 2, 4)), figures(load, [3.0, 1.0])
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
    losses(loss, *[(1.5, 201, 3)] * 600)
    figures(load, *[[201.0, 1.0]] * 600)
    assert (float(loss.nats), float(loss.tokens), float(loss.bytes)) == (900, 120600, 1800)
    assert load.load.tolist() == [120600, 600]


def test_sums_stay_on_the_cpu_beside_a_device_without_fp64(monkeypatch: pytest.MonkeyPatch) -> None:
    metric = TokenLoss()
    monkeypatch.setattr(metrics, "WITHOUT_FP64", ("meta",))
    torch.nn.ModuleList([metric]).to("meta")
    losses(metric, (6.0, 2, 4))
    metric.reset()
    assert losses(metric, (6.0, 3, 4))["loss"] == 2 and metric.nats.device.type == "cpu"
