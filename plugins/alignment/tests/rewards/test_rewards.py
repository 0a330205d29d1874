"""Rewards: what each gives, that one that fails is counted, and which groups of completions teach nothing."""

from __future__ import annotations

import math
import signal
import time
from math import inf, nan
from typing import Any

import pytest

from blockwright import registry
from blockwright.blocks.generation.sample import Sampling
from blockwright.plugins.alignment.rewards.judging import judge
from blockwright.plugins.alignment.rewards.rewards import Reward
from blockwright.plugins.alignment.rollouts.group_sampler import GroupSampler
from blockwright.registry import ConfigError, Node, Scope


def reward(node: Any) -> Any:
    return registry.build("reward", Node(node, "task.reward"), Scope({}, {}))


def given(node: Any, completions: list[str], **columns: list[Any]) -> list[float | None]:
    return reward(node)([""] * len(completions), completions, **columns)


def test_rewards_of_a_text() -> None:
    assert given("exact_match", ["12\n", "12 ", "21", ""], answer=["12", 12, "12", "12"]) == [1, 1, 0, 0]
    with pytest.raises(KeyError, match="'key'"):
        given({"name": "exact_match", "answer": "key"}, [""], answer=[""])
    texts = ["so it is 1,234.50", "3 + 4 = 7", "-2", "none", "0.1 + 0.2 = 0.3", "8"]
    assert given("arithmetic", texts, answer=["1234.5", 7, 2, 1, 0.1 + 0.2, "?"]) == [1, 1, 0, 0, 1, None]
    assert given("arithmetic", [".5", "-.5", "x.5", "$.5", "1..5"], answer=[0.5, -0.5, 5, 0.5, 5]) == [1] * 5
    thinks = {"name": "regex_format", "pattern": r"<think>.*</think>\d+"}
    assert given(thinks, ["<think>\n</think>4", "4", "a<think></think>4"]) == [1, 0, 0]
    softly = {"name": "length", "longest": 20, "buffer": 4}  # DAPO, eq. 13, with L_max 20
    assert given(softly, [""] * 5, n_tokens=[3, 16, 18, 20, 99]) == [0, 0, -0.5, -1, -1]


NUMBERS = {"12-8": 8, "(3)-8": 8, "x-8": 8, "5%-8": 8, "12 - 8": 8, "= -8": -8, "-8": -8, "\u22128": -8, "$-8": -8}
NUMBERS |= {"(-8)": -8, "12*-8": -8, "1e-3": 0.001, "-2.5E+2": -250, "1e999": None}


def test_minus_is_a_sign_unless_it_subtracts() -> None:
    """In a completion, and in the answer of a record."""
    for text, number in NUMBERS.items():
        found = given("arithmetic", [text, f"so {text}.", str(number)], answer=[str(number), number, text])
        assert found == ([1, 1, 1] if number is not None else [None, None, None]), text
        assert given("arithmetic", [text], answer=[str(-number if number else 0)]) == [0]


BOTH = {"name": "weighted", "rewards": ["exact_match", {"name": "arithmetic"}], "weights": [1, 0.5]}
MISTAKES: list[tuple[str, Any]] = [
    ("pattern", {"name": "regex_format", "pattern": "("}),
    ("buffer", {"name": "length", "longest": 4, "buffer": 20}),
    ("weights", {**BOTH, "weights": [1]}),
    ("reward", "shuffled"),
    ("reward", "levelled"),
]


@pytest.mark.parametrize(("key", "node"), MISTAKES)
def test_settings_that_cannot_be_are_refused(key: str, node: Any) -> None:
    with pytest.raises(ConfigError) as refusal:
        reward(node)
    assert refusal.value.path == f"task.reward.{key}"


def test_weighted_sum_leaves_out_what_is_missing_and_has_the_time_of_its_parts() -> None:
    assert given(BOTH, ["3", "x", "x"], answer=["3", "3", "x"]) == [1.5, 0, 1]
    assert {name: weight for name, (weight, _) in reward(BOTH).parts().items()} == {"exact_match": 1, "arithmetic": 0.5}
    twice = reward({**BOTH, "rewards": ["exact_match", {"name": "exact_match", "answer": "other"}]})
    assert [weight for weight, _ in twice.parts().values()] == [1, 0.5]
    tested = {"name": "unit_tests", "weaker": True}
    assert reward({"name": "shuffled", "reward": BOTH}).timeout_s == 120
    assert reward({"name": "shuffled", "reward": {**BOTH, "rewards": ["exact_match", tested]}}).timeout_s == inf


def test_controls_keep_the_mean_and_nothing_else() -> None:
    """So their mean on held-out prompts is that of the reward; and a resumed run judges alike."""
    texts = [str(i) for i in range(40)]
    right = [text if i % 4 else "x" for i, text in enumerate(texts)]
    true = given("exact_match", texts, answer=right)
    shuffled, again = (given({"name": "shuffled", "reward": "exact_match"}, texts, answer=right) for _ in range(2))
    assert shuffled == again != true and sum(shuffled) == sum(true) == 30
    assert given({"name": "levelled", "reward": "exact_match"}, texts, answer=right) == [0.75] * 40
    some = {"name": "levelled", "reward": "arithmetic"}
    assert given(some, ["1", "2", "3"], answer=[1, 1, "?"]) == [0.5] * 3 and given(some, ["3"], answer=["?"]) == [None]


class Odd(Reward):
    """Gives what it is made with, or raises it, for each completion ``odd``; 0.5 for others."""

    bounds = (0.0, 1.0)

    def __init__(self, value: Any) -> None:
        self.value = value

    def __call__(self, prompts: Any, completions: Any, **columns: Any) -> Any:
        if isinstance(self.value, Exception) and "odd" in completions:
            raise self.value
        return [self.value if text == "odd" else 0.5 for text in completions]


BAD = [RuntimeError("no"), nan, inf, -inf, 10**400, "1", b"1", "one", [1.0], 1j, 1.5, -1e9]


@pytest.mark.parametrize("value", BAD, ids=lambda value: str(value)[:9])
def test_bad_answer_is_the_failure_of_one_completion(value: Any) -> None:
    """Of whatever kind: its neighbours keep their rewards, and it is counted."""
    with pytest.warns(UserWarning, match="1 of 3 completions"):
        found, failed = judge(Odd(value), [""] * 3, ["a", "odd", "b"], {"some": [1, 2, 3]})
    assert failed == [0, 1, 0] and found["odd"][::2] == [0.5, 0.5] and math.isnan(found["odd"][1])


def test_no_opinion_and_whole_numbers_are_no_failure() -> None:
    for value, expected in ((1, 1.0), (True, 1.0), (None, None)):
        found, failed = judge(Odd(value), ["", ""], ["a", "odd"], {})
        assert failed == [0, 0] and (found["odd"][1] == expected or (expected is None and math.isnan(found["odd"][1])))


def test_reward_that_fails_for_all_or_looks_at_others_is_not_asked_again_for_each() -> None:
    """Levelled for each by itself, every completion would get its own reward."""

    class Short(Reward):
        def __call__(self, *args: Any, **columns: Any) -> Any:
            return [1.0]

    levelled = reward({"name": "levelled", "reward": "exact_match"})
    levelled.reward = Odd(RuntimeError("no"))
    for failing, texts in ((Short(), ["a", "b"]), (levelled, ["a", "odd"])):
        with pytest.warns(UserWarning, match="2 of 2 completions"):
            found, failed = judge(failing, ["", ""], texts, {})
        assert failed == [1, 1] and all(math.isnan(value) for row in found.values() for value in row)
    levelled.reward = Odd(nan)
    found = levelled(["", "", ""], ["a", "odd", "b"])
    assert found[0] == found[2] == 0.5 and math.isnan(found[1])


@pytest.mark.parametrize("value", [RuntimeError("no"), nan, 2.0])
def test_completion_gains_nothing_by_the_failure_of_a_penalty(value: Any) -> None:
    """It has no reward from the other parts either; where a part has no opinion, the others count alone."""
    penalised = reward({**BOTH, "weights": [1, -1]})
    penalised.rewards[1] = Odd(value)
    with pytest.warns(UserWarning, match="1 of 2 completions"):
        found, failed = judge(penalised, ["", ""], ["a", "odd"], {"answer": ["a", "odd"]})
    assert failed == [0, 1] and [row[0] for row in found.values()] == [1, 0.5]
    assert all(math.isnan(row[1]) for row in found.values())
    penalised.rewards[1] = Odd(None)
    assert judge(penalised, [""], ["odd"], {"answer": ["odd"]})[0]["exact_match"] == [1]


class Stubborn(Reward):
    """Never ends, and catches whatever it can."""

    timeout_s = 0.2

    def __call__(self, *args: Any, **columns: Any) -> Any:
        while True:
            try:
                time.sleep(30)
            except Exception:
                continue


def test_reward_that_hangs_is_counted_and_leaves_the_others_their_rewards() -> None:
    """One that catches every exception, and one inside a regular expression."""
    before, alarm = time.monotonic(), signal.getsignal(signal.SIGALRM)
    expression = reward({"name": "regex_format", "pattern": "(a+)+b", "timeout_s": 0.2})
    for hangs, texts in ((Stubborn(), ["a"]), (expression, ["ab", "a" * 64, "c"])):
        with pytest.warns(UserWarning, match=f"1 of {len(texts)} completions"):
            found, failed = judge(hangs, [""] * len(texts), texts, {})
        (row,) = found.values()
        assert (
            sum(failed) == failed[len(texts) // 2] == 1
            and math.isnan(row[len(texts) // 2])
            and row[::2] in (row, [1.0, 0.0])
        )
        assert signal.getsignal(signal.SIGALRM) == alarm and signal.getitimer(signal.ITIMER_REAL) == (0, 0)
    assert time.monotonic() - before < 40
    assert judge(reward("exact_match"), [""], ["1"], {"answer": ["1"]}) == ({"exact_match": [1.0]}, [0])


# ---- groups ----------------------------------------------------------------------------------------------------------


def sampler(node: Any) -> GroupSampler:
    advantage = registry.build("advantage", Node("group", "task"), Scope({}, {}))
    return GroupSampler(None, reward(node), advantage, Sampling(1.0), 3, 4, 1, 0)  # type: ignore[arg-type] # samples nothing


FLAT = [[1, 1, 1], [1, nan, 1], [nan, 0.5, nan], [nan, nan, nan], [-1, nan, -1]]


def test_group_is_flat_where_all_that_is_judged_is_equal() -> None:
    for group in (*FLAT, [0, 1, 0], [1, nan, 0]):
        found = sampler("exact_match")._flat({"exact_match": [float(r) for r in group] + [0.0, 1.0, 0.0]})
        assert found.tolist() == [group in FLAT, False], group
    both = sampler({**BOTH, "weights": [2, 1]})
    total = both.total({"exact_match": [1, nan, nan], "arithmetic": [nan, 0.5, nan]})
    assert total[:2].tolist() == [2, 0.5] and total[2].isnan()
