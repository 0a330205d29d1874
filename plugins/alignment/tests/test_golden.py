"""Losses and advantages against values of two other implementations (TRL 1.16, verl), and their properties."""

from __future__ import annotations

import json
import re
from math import nan
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pairwise import each

from blockwright import registry
from blockwright.plugins.alignment import policy
from blockwright.plugins.alignment.policy import Completions, PolicyObjective
from blockwright.plugins.alignment.preferences import Answers, bradley_terry
from blockwright.registry import ConfigError, Node, Scope
from blockwright.training.configuration import conf

GOLDEN = json.loads((Path(__file__).parent / "golden.json").read_text())
POLICY, MORE = GOLDEN["policy"], GOLDEN["more"]
MASK = (torch.arange(5) < torch.tensor(POLICY["lengths"])[:, None]).double()


def part(kind: str, node: Any) -> Any:
    scope = Scope({"ratio": Node("token", "task.ratio")}, {"max_new_tokens": 6})
    return None if node is None else registry.build(kind, Node(node, f"task.{kind}"), scope)


def double(values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def value(name: str) -> torch.Tensor:
    return double(POLICY[name])


# ---- policies --------------------------------------------------------------------------------------------------------


def loss_of(surrogate: Any, average: str, penalty: Any = None, correction: Any = None) -> tuple[torch.Tensor, Any, Any]:
    nodes = {"surrogate": surrogate, "average": average, "penalty": penalty, "correction": correction}
    objective = PolicyObjective(*(part(kind, node) for kind, node in nodes.items()))
    logp = value("logp").requires_grad_()
    given = Completions(value("old"), value("advantage"), MASK, value("sampler"), value("ref"))
    total, sums = objective(logp, given)
    loss = total / objective.average.count(MASK)
    loss.backward()
    return loss.detach(), logp.grad, sums


CLIP = {"name": "clip"}
DAPO = {"name": "clip", "low": 0.2, "high": 0.28}
CASES: dict[str, tuple[Any, ...]] = {
    "grpo": (CLIP, "sequence"),
    "grpo beta=.04 k3": (CLIP, "sequence", {"name": "k3", "beta": 0.04}),
    "grpo beta=.04 ratio*k3": (CLIP, "sequence", {"name": "weighted_k3", "beta": 0.04}),
    "token (bnpo)": (CLIP, "token"),
    "dapo .2/.28": (DAPO, "token"),
    "dr_grpo": (CLIP, "constant"),
    "grpo two-sided delta=1.4": (CLIP | {"ceiling": 1.4}, "sequence"),
    "dual clip c=1.3, token": (CLIP | {"ceiling": 1.3}, "token"),
    "gspo 3e-4/4e-4": (CLIP | {"ratio": "sequence", "low": 3e-4, "high": 4e-4}, "sequence"),
    "gspo .2/.28": (DAPO | {"ratio": "sequence"}, "sequence"),
    "cispo cap 1.3, token": ({"name": "cispo", "high": 0.3}, "token"),
    "grpo + off-policy mask delta=.15 (on sampler)": (CLIP, "sequence", None, {"name": "off_policy", "delta": 0.15}),
    "dapo .2/.28 x min(old/sampler,1.1) a token": (DAPO, "token", None, {"name": "truncate", "cap": 1.1}),
    "dapo .2/.28 x sequence weight, 0 if >1.1": (DAPO, "token", None, {"name": "mask", "cap": 1.1}),
}


def test_losses_gradients_and_penalties_of_policies() -> None:
    found = {case: [float(loss_of(*how)[0]), float(loss_of(*how)[1].norm())] for case, how in CASES.items()}
    expected = POLICY["loss_and_gradient_norm"]
    assert found.keys() == expected.keys()
    assert {case: values for case, values in found.items() if values != pytest.approx(expected[case], abs=1e-6)} == {}
    _, gradient, sums = loss_of(CLIP, "sequence")
    torch.testing.assert_close(gradient, value("d grpo/d logp"), atol=1e-6, rtol=0)
    shares = [(sums[name] / MASK.sum()).item() for name in ("clip_low", "clip_high")]
    assert shares == pytest.approx(POLICY["clip low, high (share of tokens)"], abs=1e-6)
    for name, key in (("k3", "kl k3 token mean"), ("weighted_k3", "kl ratio*k3 token mean")):
        kl = part("penalty", name)(value("logp"), value("ref"), value("old"))
        assert ((kl * MASK).sum() / MASK.sum()).item() == pytest.approx(POLICY[key], abs=1e-6)


KL = {"k1": "E grad k1", "k2": "E grad ratio*k3 = E grad k2", "weighted_k3": "E grad ratio*k3 = E grad k2"}
KL |= {"k3": "E grad k3 = grad KL(ref||pi)"}


@pytest.mark.parametrize("penalty", KL)
def test_expected_gradient_of_penalties_by_enumeration(penalty: str) -> None:
    """On policy, over all three symbols: which divergence a penalty lowers."""
    logits = torch.tensor([0.2, -0.1, 0.4], dtype=torch.float64, requires_grad=True)
    reference = double([-0.3, 0.5, 0.1]).log_softmax(0)
    logp = logits.log_softmax(0)
    values = part("penalty", penalty)(logp[None], reference[None], logp.detach()[None])[0]
    (values * logp.detach().exp()).sum().backward()
    expected = MORE["kl oracle, logits [.2,-.1,.4], ref logits [-.3,.5,.1]"][KL[penalty]]
    torch.testing.assert_close(logits.grad, double(expected), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("surrogate", "ratio"), each(registry.names("surrogate"), registry.names("ratio")))
def test_on_policy_gradient_is_that_of_reinforce(surrogate: str, ratio: str) -> None:
    """At ratio 1 the summed gradient of a row is A · d mean log π, whatever the clipping."""
    logp = value("old").requires_grad_()
    loss = part("surrogate", {"name": surrogate, "ratio": ratio})(logp, value("old"), value("advantage"), MASK).loss
    (loss * part("average", "sequence").weights(MASK)).sum().backward()
    lengths = torch.tensor(POLICY["lengths"])[:, None]
    torch.testing.assert_close(logp.grad, -value("advantage")[:, None] * MASK / lengths)


def test_padding_never_reaches_the_loss() -> None:
    """Whatever padding holds, infinite values included, loss and gradient stay."""
    expected, gradient, _ = loss_of(CLIP, "token")
    objective = PolicyObjective(part("surrogate", CLIP), part("average", "token"))
    for filler in (3.0, 1e4, nan):
        logp = torch.where(MASK > 0, value("logp"), filler).requires_grad_()
        total, _ = objective(logp, Completions(value("old"), value("advantage"), MASK))
        (total / MASK.sum()).backward()
        torch.testing.assert_close(total.detach() / MASK.sum(), expected)
        torch.testing.assert_close(logp.grad, gradient)


def test_numbers_out_of_range_are_refused() -> None:
    for kind, node, key in (
        ("surrogate", CLIP | {"ceiling": 1.1}, "ceiling"),  # within the clip range
        ("preference", {"name": "ipo", "beta": 0}, "beta"),
        ("preference", {"name": "robust", "label_smoothing": 0.5}, "label_smoothing"),
    ):
        with pytest.raises(ConfigError) as refusal:
            part(kind, node)
        assert refusal.value.path == f"task.{kind}.{key}"


def test_table_of_published_objectives_is_that_of_the_configuration() -> None:
    head, _, *rows = [re.findall(r"(?<=\| )\w*", line) for line in policy.__doc__.splitlines() if line.startswith("|")]
    table = {name: {kind: part for kind, part in zip(head[1:], parts, strict=True) if part} for name, *parts in rows}
    found: dict[str, dict[str, str]] = {}
    for file in conf.files("task/objective"):
        choices = (choice for each in yaml.safe_load(file.read_text())["defaults"] for choice in each.items())
        found[file.stem] = {group.removeprefix("override /task/"): name for group, name in choices}
    assert table == found


# ---- advantages ------------------------------------------------------------------------------------------------------

REWARDS = double([[1, 0, 0, 1], [1, 1, 1, 1], [0.2, 0.9, 0.5, 0.1]])[..., None]
SECOND = double([[0, 1, 1, 1], [1, 1, 0, 0.5]])
BOTH = GOLDEN["advantages"]["weights [1,.5] of [[1,0,0,1],[.2,.9,.5,.1]] and [[0,1,1,1],[1,1,0,.5]]"]
ADVANTAGES = [
    *((name, REWARDS, [1.0], GOLDEN["advantages"][key]) for name, key in (("centred", "R-mean"), ("rloo", "rloo"))),
    *((name, REWARDS, [1.0], GOLDEN["advantages"][f"{name}, std+1e-4"]) for name in ("group", "batch")),
    ("group", double([[1, nan, 0, 1]])[..., None], [1.0], [GOLDEN["advantages"]["group [1,null,0,1]"]]),
    ("group", torch.stack([REWARDS[[0, 2], :, 0], SECOND], -1), [1.0, 0.5], BOTH["sum then normalise"]),
    ("gdpo", torch.stack([REWARDS[[0, 2], :, 0], SECOND], -1), [1.0, 0.5], BOTH["normalise then sum (GDPO)"]),
]


def test_advantages() -> None:
    for name, rewards, weights, expected in ADVANTAGES:
        found = part("advantage", name)(rewards, double(weights))
        torch.testing.assert_close(found, double(expected), atol=1e-6, rtol=0, msg=name)


@pytest.mark.parametrize("name", registry.names("advantage"))
def test_what_has_no_reward_changes_no_other_advantage(name: str) -> None:
    """Completions without any reward get 0, and the others what they have without them; so do all without spread."""
    advantage = part("advantage", name)
    for parts in (1, 3):
        rewards = torch.randn(3, 6, parts, dtype=torch.float64, generator=torch.Generator().manual_seed(parts))
        lacking, weights = rewards.clone(), torch.ones(parts, dtype=torch.float64)
        lacking[:, ::2] = nan
        found = advantage(lacking, weights)
        assert not found[:, ::2].any()
        torch.testing.assert_close(found[:, 1::2], advantage(rewards[:, 1::2], weights))
    assert not advantage(torch.full((2, 4, 1), nan), torch.ones(1)).any()
    assert not advantage(torch.tensor([[[1.0], [nan]]]), torch.ones(1)).any()
    assert not advantage(torch.full((2, 4, 1), 0.3), torch.ones(1)).abs().gt(1e-3).any()


# ---- preferences -----------------------------------------------------------------------------------------------------


def answers() -> tuple[Answers, Answers]:
    def side(name: str) -> Answers:
        logp, reference, tokens = (double(MORE["dpo"][key]) for key in (name, f"r{name}", f"len_{name}"))
        return Answers(logp.requires_grad_(), tokens, reference)

    return side("c"), side("r")


MEANS = {"mean": "sigmoid", "hinge mean": "hinge", "ipo mean": "ipo", "robust .1 mean": "robust"}
MEANS |= {"sigmoid_norm mean": "sigmoid_norm", "apo_zero mean": "apo_zero"}


def test_losses_on_pairs_of_answers() -> None:
    nodes: dict[str, Any] = {**MEANS, "cdpo .1 mean": {"name": "sigmoid", "label_smoothing": 0.1}}
    for key, node in nodes.items():
        found = part("preference", node)(*answers()).mean().item()
        assert found == pytest.approx(MORE["dpo"][key], abs=1e-6), key
    dpo = part("preference", "sigmoid")
    assert dpo(*answers()).tolist() == pytest.approx(MORE["dpo"]["sigmoid"], abs=1e-6)
    assert dpo.margin(*answers()).tolist() == pytest.approx(MORE["dpo"]["margins"], abs=1e-6)
    scores = [torch.tensor(MORE["rm"][side]) for side in ("chosen", "rejected")]
    assert bradley_terry(*scores).mean().item() == pytest.approx(MORE["rm"]["pair"], abs=1e-6)
    assert bradley_terry(*scores, 0.01).mean().item() == pytest.approx(MORE["rm"]["pair + .01 centre"], abs=1e-6)


def test_losses_without_a_reference_by_hand() -> None:
    chosen, rejected = (Answers(torch.tensor([-sum(x)]), torch.tensor([len(x)])) for x in ([0.5, 0.3], [0.9, 0.2, 1.0]))
    margin = 2.0 * (-0.4 + 0.7) - 1.0
    found = part("preference", {"name": "simpo", "beta": 2.0, "gamma": 1.0})(chosen, rejected)
    assert found.item() == pytest.approx(-torch.tensor(margin).sigmoid().log().item(), abs=1e-6)
    p, q = torch.tensor([-0.4, -0.7]).double().exp()
    odds = (p / (1 - p)).log() - (q / (1 - q)).log()
    orpo = part("preference", "orpo")
    assert orpo(chosen, rejected).item() == pytest.approx(float(0.4 - 0.1 * odds.sigmoid().log()), abs=1e-6)
    sure = Answers(torch.zeros(1), torch.ones(1))
    assert orpo(sure, rejected).isfinite() and not orpo.compares and not part("preference", "simpo").compares


@pytest.mark.parametrize("name", registry.names("preference"))
def test_gradient_raises_the_chosen_answer(name: str) -> None:
    chosen, rejected = answers()
    part("preference", {"name": name, "beta": 0.01} if name == "ipo" else name)(chosen, rejected).sum().backward()
    assert (chosen.logp.grad < 0).all() and (rejected.logp.grad > 0).all()  # type: ignore[operator]
