"""Half precision in post-training: its tasks next to fp32, the first ratio of a policy, and its objectives."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pairwise import each
from torch import Tensor
from torch.utils._pytree import tree_leaves

from blockwright import registry
from blockwright.blocks.compose import compose
from blockwright.blocks.precision import default_dtype
from blockwright.plugins.alignment.policy import PolicyObjective
from blockwright.plugins.alignment.preferences import Answers
from blockwright.plugins.alignment.teaching import Lesson
from blockwright.registry import Node, Scope
from tests import built
from tests.training import test_half_precision as half
from tests.training.test_half_precision import CONDITIONS, Run, assert_rounded, assert_same_bits

pytestmark = pytest.mark.xdist_group("half_precision_of_alignment")  # its runs are compared with each other
run = half.run
SORTING = ["data.tokenizer.vocab_size=16", "data.corpus.train=8", "data.corpus.held_out=4"]
CASES = {  # task → its data and objective
    "distill": ["data=sorting", *SORTING, "init_from={start}"],
    "grpo": [
        *("data=sorting_prompts", *SORTING, "data.updates=2", "task.group_size=4", "task.max_new_tokens=4"),
        *("init_from={start}", "task/penalty=k3", "task.reference={start}", "task/correction=mask"),
        *("task/reward=regex_format", "task.reward.pattern='[0-4].*'"),  # about half of random answers: a spread
    ],
    "preference": ["data=sorting_preferences", *SORTING, "init_from={start}"],
    "reward": ["data=sorting_preferences", *SORTING, "init_from={start}"],
}


class _Policies:
    """Records the log-probabilities of each policy update, and what they are compared with."""

    def __enter__(self) -> list[tuple[Tensor, Any]]:
        self.whole, seen = PolicyObjective.__call__, list[tuple[Tensor, Any]]()

        def watched(policy: PolicyObjective, logp: Tensor, given: Any) -> Any:
            seen.append((logp.detach().clone(), given))
            return self.whole(policy, logp, given)

        PolicyObjective.__call__ = watched  # type: ignore[method-assign]
        return seen

    def __exit__(self, *_: object) -> None:
        PolicyObjective.__call__ = self.whole  # type: ignore[method-assign]


@pytest.fixture(scope="module")
def cases() -> half.Cases:
    return CASES


@pytest.fixture(scope="module")
def watch() -> Callable[[], Any]:
    return _Policies


def test_every_task_is_a_case() -> None:
    assert sorted(CASES) == built.names("task", "blockwright.plugins.alignment")


@pytest.mark.slow
@pytest.mark.parametrize("task", CASES)
def test_default_dtype_changes_no_bit_of_a_run(task: str, run: Callable[[str, str], Run]) -> None:
    plain = run(task, "fp32")
    assert_same_bits(plain, run(task, "default dtype"))
    for _, given in plain["seen"]:  # else nothing of a rollout would reach the weights
        assert given.advantage.any()


@pytest.mark.slow
@pytest.mark.parametrize(("task", "condition"), each(list(CASES), CONDITIONS[:0:-1]))
def test_figures_are_those_of_the_same_rounded_weights(
    task: str, condition: str, run: Callable[[str, str], Run]
) -> None:
    assert_rounded(run(task, "fp32"), run(task, condition), same_batches=task != "grpo")


@pytest.mark.slow
@pytest.mark.parametrize("condition", ["fp32", "default dtype", "bf16-true"])
def test_first_ratio_of_a_policy_is_1(condition: str, run: Callable[[str, str], Run]) -> None:
    """And what it is compared with are the numbers that were recorded, in fp32.

    So is the correction. It is 1 where products are fp32; in bf16 it weighs what the sampler's products of single
    tokens, with caches, differ by from those of packed rows.
    """
    found = run("grpo", condition)
    (logp, given), (after, _) = found["seen"]
    assert torch.equal((logp - given.old) * given.mask, torch.zeros_like(logp))
    assert not torch.equal(after, logp)
    for name in ("old", "sampler", "advantage", "reference"):
        assert getattr(given, name).dtype == torch.float32, name
    rounding = 0.1 if condition == "bf16-true" else 1e-5
    for other in (given.sampler, given.reference):
        assert ((given.old - other) * given.mask).abs().max() < rounding
    (rollout,) = found["stored"]["rollouts"][0].values()
    for name in ("old", "sampler"):
        recorded = {value for row in rollout[name] for value in row}
        assert set(getattr(given, name)[given.mask > 0].tolist()) <= recorded, name
    factors = ((given.old - given.sampler).double() * given.mask).sum(1, keepdim=True).exp()
    correction = float((factors * given.mask).sum() / given.mask.sum())
    assert found["figures"][0]["train/correction"] == pytest.approx(correction, 1e-6)
    assert correction == pytest.approx(1, abs=rounding)


# --- objectives -------------------------------------------------------------------------------------------------------

B, T, P, G, F = 3, 5, 2, 4, 2
NODES = {  # of rewards and losses that need settings
    "length": {"longest": 8, "buffer": 4},
    "levelled": {"reward": "arithmetic"},
    "regex_format": {"pattern": ".*1"},
    "shuffled": {"reward": "arithmetic"},
    "weighted": {"rewards": ["arithmetic", "exact_match"], "weights": [0.3, 0.7]},
}
WITHOUT_TENSORS = {"reasoning_gym", "unit_tests"}  # another package, or another process, judges a text
COLUMNS = {"answer": ["1", "257", "3"], "n_tokens": [3, 6, 9]}


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32) * -8


def answers(seed: int) -> Answers:
    return Answers(drawn(B, seed=seed), torch.tensor([3.0, 7.0, 257.0], dtype=torch.float32), drawn(B, seed=seed + 1))


@functools.cache
def lesson() -> Lesson:
    frame = {"vocab_size": 61, "d_model": 32, "n_layers": 2, "max_positions": 64, "ffn": {"name": "swiglu", "d_ff": 24}}
    frame |= {"position": "rope", "norm": "rmsnorm", "residual": "prenorm"}
    models = [compose({**frame, "attention": name}, seed=0) for name in ("gqa", "mha")]
    tokens = torch.randint(61, (2, 9), generator=torch.Generator().manual_seed(0))
    return Lesson(models[0], models[1].requires_grad_(False), tokens, tokens.roll(-1, 1))


MASK = torch.arange(T) < torch.tensor([5, 2, 4])[:, None]
OLD, LOGP = drawn(B, T, seed=1), drawn(B, T, seed=2)
ADVANTAGE = torch.tensor([-1.1, 0.3, 0.8])
CALLS: dict[str, Callable[[Any], Any]] = {
    "advantage": lambda f: f(-drawn(P, G, F), drawn(F)),
    "average": lambda f: (f.weights(MASK), f.weights(MASK.float()), f.count(MASK)),
    "correction": lambda f: f(LOGP, OLD, drawn(B, T, seed=3), ADVANTAGE, MASK.float()),
    "penalty": lambda f: f(LOGP, drawn(B, T, seed=4), OLD),
    "preference": lambda f: (f(answers(0), answers(5)), f.reward(answers(0))),
    "ratio": lambda f: f(LOGP, OLD, MASK.float()),
    "reward": lambda f: torch.tensor(f(["a", "b", "c"], ["1", "256", "2"], **COLUMNS), dtype=torch.float64),
    "surrogate": lambda f: tuple(f(LOGP, OLD, ADVANTAGE, MASK.float())),
    "teaching": lambda f: f(lesson())[0].detach(),
}
KINDS = [
    family.kind
    for family in registry.families()
    if re.match(r"blockwright\.plugins\.alignment\.(?!rollouts)", family.contract.__module__)
]


def check(kind: str, name: str, more: Any) -> None:
    """But for models of its own, which autocast lowers: a teacher."""
    scope = Scope({"ratio": Node("sequence", "task.ratio")}, {"max_new_tokens": 257}, own=True)
    objective = registry.build(kind, Node({"name": name, **more}, f"task.{kind}"), scope)
    plain = tree_leaves(CALLS[kind](objective))
    with default_dtype(torch.bfloat16):
        low = tree_leaves(CALLS[kind](objective))
    with torch.autocast("cpu", torch.bfloat16):
        within = tree_leaves(CALLS[kind](objective)) if kind not in ("teaching", "reward") else plain
    for one, *others in zip(plain, low, within, strict=True):
        assert all(torch.equal(one, other) and one.dtype == other.dtype for other in others), (kind, name)


def test_objectives_depend_on_neither_default_dtype_nor_autocast() -> None:
    for kind in KINDS:
        for name in {*registry.names(kind)} - WITHOUT_TENSORS - {"reward_model"}:
            check(kind, name, NODES.get(name, {}))


@pytest.mark.slow
def test_reward_model_depends_on_neither_default_dtype_nor_autocast(run: Callable[[str, str], Run]) -> None:
    check("reward", "reward_model", {"run": str(run("reward", "fp32")["folder"] / "fp32.ckpt")})
