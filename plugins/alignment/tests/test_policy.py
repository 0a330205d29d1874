"""The loss of policy optimisation against values of two other implementations (TRL 1.16, verl), and its properties."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from blockwright import registry
from blockwright.plugins.alignment import policy
from blockwright.plugins.alignment.policy import Completions, PolicyObjective
from blockwright.registry import ConfigError, Node, Scope
from blockwright.training.configuration import conf

GOLDEN = json.loads((Path(__file__).parent / "golden.json").read_text())
POLICY = GOLDEN["policy"]
MASK = (torch.arange(5) < torch.tensor(POLICY["lengths"])[:, None]).double()


def part(kind: str, node: Any) -> Any:
    scope = Scope({"ratio": Node("token", "task.ratio")}, {"max_new_tokens": 6})
    return None if node is None else registry.build(kind, Node(node, f"task.{kind}"), scope)


def value(name: str) -> torch.Tensor:
    return torch.tensor(POLICY[name], dtype=torch.float64)


def loss_of(surrogate: Any, average: str, penalty: Any = None, correction: Any = None) -> tuple[torch.Tensor, Any, Any]:
    objective = PolicyObjective(
        part("surrogate", surrogate),
        part("average", average),
        part("penalty", penalty),
        part("correction", correction),
    )
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


def test_every_published_value_has_a_case() -> None:
    assert set(CASES) == set(POLICY["loss_and_gradient_norm"])


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradient(case: str) -> None:
    loss, gradient, _ = loss_of(*CASES[case])
    expected = POLICY["loss_and_gradient_norm"][case]
    assert [loss.item(), gradient.norm().item()] == pytest.approx(expected, abs=1e-6), case


def test_each_gradient_and_the_shares_of_clipped_tokens() -> None:
    _, gradient, sums = loss_of(CLIP, "sequence")
    torch.testing.assert_close(gradient, value("d grpo/d logp"), atol=1e-6, rtol=0)
    shares = [(sums[name] / MASK.sum()).item() for name in ("clip_low", "clip_high")]
    assert shares == pytest.approx(POLICY["clip low, high (share of tokens)"], abs=1e-6)


@pytest.mark.parametrize(("name", "key"), [("k3", "kl k3 token mean"), ("weighted_k3", "kl ratio*k3 token mean")])
def test_penalties_as_values(name: str, key: str) -> None:
    kl = part("penalty", name)(value("logp"), value("ref"), value("old"))
    assert ((kl * MASK).sum() / MASK.sum()).item() == pytest.approx(POLICY[key], abs=1e-6)


@pytest.mark.parametrize(
    ("penalty", "key"),
    [
        ("k1", "E grad k1"),
        ("k2", "E grad ratio*k3 = E grad k2"),
        ("weighted_k3", "E grad ratio*k3 = E grad k2"),
        ("k3", "E grad k3 = grad KL(ref||pi)"),
    ],
)
def test_expected_gradient_of_penalties_by_enumeration(penalty: str, key: str) -> None:
    """On policy, over all three symbols: which divergence a penalty lowers."""
    logits = torch.tensor([0.2, -0.1, 0.4], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([-0.3, 0.5, 0.1], dtype=torch.float64).log_softmax(0)
    logp = logits.log_softmax(0)
    values = part("penalty", penalty)(logp[None], reference[None], logp.detach()[None])[0]
    (values * logp.detach().exp()).sum().backward()
    expected = torch.tensor(GOLDEN["more"]["kl oracle, logits [.2,-.1,.4], ref logits [-.3,.5,.1]"][key])
    torch.testing.assert_close(logits.grad, expected.double(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("surrogate", registry.names("surrogate"))
@pytest.mark.parametrize("ratio", registry.names("ratio"))
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
    for filler in (3.0, 1e4, torch.nan):
        logp = torch.where(MASK > 0, value("logp"), filler).requires_grad_()
        total, _ = objective(logp, Completions(value("old"), value("advantage"), MASK))
        (total / MASK.sum()).backward()
        torch.testing.assert_close(total.detach() / MASK.sum(), expected)
        torch.testing.assert_close(logp.grad, gradient)


def test_ceiling_within_the_clip_range_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"must be above 1 \+ high") as refusal:
        part("surrogate", CLIP | {"ceiling": 1.1})
    assert refusal.value.path == "task.surrogate.ceiling"


def test_table_of_published_objectives_is_that_of_the_configuration() -> None:
    head, _, *rows = [re.findall(r"(?<=\| )\w*", line) for line in policy.__doc__.splitlines() if line.startswith("|")]
    table = {name: {kind: part for kind, part in zip(head[1:], parts, strict=True) if part} for name, *parts in rows}
    assert table == {file.stem: parts_of(file) for file in conf.files("task/objective")}


def parts_of(file: Path) -> dict[str, str]:
    """Kind → name of the parts that a named objective chooses."""
    choices = dict(choice for each in yaml.safe_load(file.read_text())["defaults"] for choice in each.items())
    return {group.removeprefix("override /task/"): name for group, name in choices.items()}
