"""Losses on pairs of answers: golden values, gradients, and the reward models' loss."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from blockwright import registry
from blockwright.plugins.alignment.preferences import Answers, bradley_terry
from blockwright.registry import ConfigError, Node, Scope

GOLDEN = json.loads((Path(__file__).parent / "golden.json").read_text())["more"]


def loss(node: Any) -> Any:
    return registry.build("preference", Node(node, "task.preference"), Scope({}, {}))


def golden() -> tuple[Answers, Answers]:
    def side(name: str) -> Answers:
        logp, reference, tokens = (torch.tensor(GOLDEN["dpo"][key]) for key in (name, f"r{name}", f"len_{name}"))
        return Answers(logp.double().requires_grad_(), tokens.double(), reference.double())

    return side("c"), side("r")


MEANS = {
    "mean": "sigmoid",
    "hinge mean": "hinge",
    "ipo mean": "ipo",
    "robust .1 mean": "robust",
    "cdpo .1 mean": {"name": "sigmoid", "label_smoothing": 0.1},
    "sigmoid_norm mean": "sigmoid_norm",
    "apo_zero mean": "apo_zero",
}


@pytest.mark.parametrize("key", MEANS)
def test_golden_losses(key: str) -> None:
    assert loss(MEANS[key])(*golden()).mean().item() == pytest.approx(GOLDEN["dpo"][key], abs=1e-6)


def test_golden_margins_and_single_losses() -> None:
    dpo, (chosen, rejected) = loss("sigmoid"), golden()
    assert dpo(chosen, rejected).tolist() == pytest.approx(GOLDEN["dpo"]["sigmoid"], abs=1e-6)
    assert dpo.margin(chosen, rejected).tolist() == pytest.approx(GOLDEN["dpo"]["margins"], abs=1e-6)


def test_losses_without_a_reference_by_hand() -> None:
    chosen, rejected = (Answers(torch.tensor([-sum(x)]), torch.tensor([len(x)])) for x in ([0.5, 0.3], [0.9, 0.2, 1.0]))
    margin = 2.0 * (-0.4 + 0.7) - 1.0
    found = loss({"name": "simpo", "beta": 2.0, "gamma": 1.0})(chosen, rejected)
    assert found.item() == pytest.approx(-torch.tensor(margin).sigmoid().log().item(), abs=1e-6)
    p, q = torch.tensor([-0.4, -0.7]).double().exp()
    odds = (p / (1 - p)).log() - (q / (1 - q)).log()
    expected = 0.4 - 0.1 * odds.sigmoid().log()
    assert loss("orpo")(chosen, rejected).item() == pytest.approx(expected.item(), abs=1e-6)
    sure = Answers(torch.zeros(1), torch.ones(1))
    assert loss("orpo")(sure, rejected).isfinite() and not loss("orpo").compares and not loss("simpo").compares


@pytest.mark.parametrize("name", registry.names("preference"))
def test_gradient_raises_the_chosen_answer(name: str) -> None:
    chosen, rejected = golden()
    loss({"name": name, "beta": 0.01} if name == "ipo" else name)(chosen, rejected).sum().backward()
    gradients: list[Tensor | None] = [chosen.logp.grad, rejected.logp.grad]
    assert gradients[0] is not None and gradients[1] is not None
    assert (gradients[0] < 0).all() and (gradients[1] > 0).all()


def test_bradley_terry() -> None:
    scores = [torch.tensor(GOLDEN["rm"][side]) for side in ("chosen", "rejected")]
    assert bradley_terry(*scores).mean().item() == pytest.approx(GOLDEN["rm"]["pair"], abs=1e-6)
    assert bradley_terry(*scores, 0.01).mean().item() == pytest.approx(GOLDEN["rm"]["pair + .01 centre"], abs=1e-6)


@pytest.mark.parametrize(("node", "key"), [({"name": "ipo", "beta": 0}, "beta"), ("robust", "label_smoothing")])
def test_numbers_out_of_range_are_refused(node: Any, key: str) -> None:
    node = node if isinstance(node, dict) else {"name": node, "label_smoothing": 0.5}
    with pytest.raises(ConfigError) as refusal:
        loss(node)
    assert refusal.value.path == f"task.preference.{key}"
