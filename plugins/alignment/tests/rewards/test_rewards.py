"""Rewards: what each gives, and that one that fails is counted."""

from __future__ import annotations

import math
import signal
import time
from typing import Any

import pytest

from blockwright import registry
from blockwright.plugins.alignment.rewards.base import Reward
from blockwright.plugins.alignment.rewards.judging import judge
from blockwright.registry import ConfigError, Node, Scope


def reward(node: Any) -> Reward:
    return registry.build("reward", Node(node, "task.reward"), Scope({}, {}))


def given(node: Any, completions: list[str], **columns: list[Any]) -> list[float | None]:
    return reward(node)([""] * len(completions), completions, **columns)


def test_exact_match() -> None:
    assert given("exact_match", ["12\n", "12 ", "21", ""], answer=["12", 12, "12", "12"]) == [1, 1, 0, 0]
    with pytest.raises(KeyError, match="reads the column 'key'; the data has answer"):
        given({"name": "exact_match", "answer": "key"}, [""], answer=[""])


def test_arithmetic() -> None:
    texts = ["so it is 1,234.50", "3 + 4 = 7", "-2", "none", "0.1 + 0.2 = 0.3", "8"]
    assert given("arithmetic", texts, answer=["1234.5", 7, 2, 1, 0.1 + 0.2, "?"]) == [1, 1, 0, 0, 1, None]
    assert given("arithmetic", [".5", "-.5", "x.5", "$.5", "1..5"], answer=[0.5, -0.5, 5, 0.5, 5]) == [1] * 5


@pytest.mark.parametrize(
    ("text", "number"),
    [
        *(("12-8", 8), ("(3)-8", 8), ("x-8", 8), ("5%-8", 8), ("12 - 8", 8), ("= -8", -8), ("-8", -8), ("\u22128", -8)),
        *(("$-8", -8), ("(-8)", -8), ("12*-8", -8), ("1e-3", 0.001), ("-2.5E+2", -250), ("1e999", None)),
    ],
)
def test_minus_is_a_sign_unless_it_subtracts(text: str, number: float | None) -> None:
    """As a completion, and as the answer of a record."""
    assert given("arithmetic", [text, f"so {text}.", str(number)], answer=[str(number), number, text]) == (
        [1, 1, 1] if number is not None else [None, None, None]
    )
    assert given("arithmetic", [text], answer=[str(-number if number else 0)]) == [0]


def test_regex_format() -> None:
    pattern = r"<think>.*</think>\d+"
    assert given({"name": "regex_format", "pattern": pattern}, ["<think>\n</think>4", "4", "a<think></think>4"]) == [
        1,
        0,
        0,
    ]
    with pytest.raises(ConfigError, match="is no regular expression") as refusal:
        reward({"name": "regex_format", "pattern": "("})
    assert refusal.value.path == "task.reward.pattern"


def test_length_is_punished_softly() -> None:
    """DAPO, eq. 13, with L_max 20 and a buffer of 4."""
    found = given({"name": "length", "longest": 20, "buffer": 4}, [""] * 5, n_tokens=[3, 16, 18, 20, 99])
    assert found == [0, 0, -0.5, -1, -1]
    with pytest.raises(ConfigError, match="must not exceed longest"):
        reward({"name": "length", "longest": 4, "buffer": 20})


BOTH = {"name": "weighted", "rewards": ["exact_match", {"name": "arithmetic"}], "weights": [1, 0.5]}


def test_weighted_sum_leaves_out_what_is_missing() -> None:
    assert given(BOTH, ["3", "x", "x"], answer=["3", "3", "x"]) == [1.5, 0, 1]
    assert {name: weight for name, (weight, _) in reward(BOTH).parts().items()} == {"exact_match": 1, "arithmetic": 0.5}
    twice = reward({**BOTH, "rewards": ["exact_match", {"name": "exact_match", "answer": "other"}]})
    assert [weight for weight, _ in twice.parts().values()] == [1, 0.5]
    with pytest.raises(ConfigError, match="one for each of the 2 rewards"):
        reward({**BOTH, "weights": [1]})


@pytest.mark.parametrize("name", ["shuffled", "levelled"])
def test_control_without_a_reward_says_where_to_name_one(name: str) -> None:
    with pytest.raises(ConfigError, match="requires a block of kind 'reward'") as refusal:
        given(name, ["a"])
    assert refusal.value.path == "task.reward.reward"
    assert refusal.value.remedy.startswith("Name one: task.reward.reward=<")


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


def test_mean_leaves_out_what_failed() -> None:
    levelled = reward({"name": "levelled", "reward": "exact_match"})
    levelled.reward = Odd(math.nan)
    found = levelled(["", "", ""], ["a", "odd", "b"])
    assert found[0] == found[2] == 0.5 and math.isnan(found[1])


class Odd(Reward):
    """Gives what it is made with, or raises it, for each completion ``odd``; 0.5 for others."""

    bounds = (0.0, 1.0)

    def __init__(self, value: Any) -> None:
        self.value = value

    def __call__(self, prompts: Any, completions: Any, **columns: Any) -> Any:
        if isinstance(self.value, Exception) and "odd" in completions:
            raise self.value
        return [self.value if text == "odd" else 0.5 for text in completions]


@pytest.mark.parametrize(
    "value",
    [RuntimeError("no"), math.nan, math.inf, -math.inf, 10**400, "1", b"1", "one", [1.0], 1j, 1.5, -1e9],
)
def test_bad_answer_is_the_failure_of_one_completion(value: Any) -> None:
    """Of whatever kind: its neighbours keep their rewards, and it is counted."""
    with pytest.warns(UserWarning, match="the reward odd failed for 1 of 3 completions: "):
        found, failed = judge(Odd(value), [""] * 3, ["a", "odd", "b"], {"some": [1, 2, 3]})
    assert failed == 1 and found["odd"][::2] == [0.5, 0.5] and math.isnan(found["odd"][1])


def test_no_opinion_and_whole_numbers_are_no_failure() -> None:
    for value, expected in ((1, 1.0), (True, 1.0), (None, None)):
        found, failed = judge(Odd(value), ["", ""], ["a", "odd"], {})
        assert failed == 0 and (found["odd"][1] == expected or (expected is None and math.isnan(found["odd"][1])))


def test_wrong_number_of_values_is_the_failure_of_all() -> None:
    class Short(Reward):
        def __call__(self, *args: Any, **columns: Any) -> Any:
            return [1.0]

    with pytest.warns(UserWarning, match="the reward short failed for 2 of 2 completions: gave 1 values for 2"):
        found, failed = judge(Short(), ["", ""], ["a", "b"], {})
    assert failed == 2 and all(map(math.isnan, found["short"]))


@pytest.mark.parametrize("value", [RuntimeError("no"), math.nan, 2.0])
def test_completion_gains_nothing_by_the_failure_of_a_penalty(value: Any) -> None:
    """It has no reward from the other parts either; where a part has no opinion, the others count alone."""
    penalised = reward({**BOTH, "weights": [1, -1]})
    penalised.rewards[1] = Odd(value)
    with pytest.warns(UserWarning, match="the reward odd failed for 1 of 2 completions"):
        found, failed = judge(penalised, ["", ""], ["a", "odd"], {"answer": ["a", "odd"]})
    assert failed == 1 and [row[0] for row in found.values()] == [1, 0.5]
    assert all(math.isnan(row[1]) for row in found.values())
    penalised.rewards[1] = Odd(None)
    assert judge(penalised, [""], ["odd"], {"answer": ["odd"]})[0]["exact_match"] == [1]


def test_sum_has_the_time_of_its_parts() -> None:
    """Which a control around it takes: programs have limits of their own."""
    tested = {"name": "unit_tests", "weaker": True}
    assert reward({"name": "shuffled", "reward": BOTH}).timeout_s == 120
    assert reward({"name": "shuffled", "reward": {**BOTH, "rewards": ["exact_match", tested]}}).timeout_s == math.inf


def test_reward_that_looks_at_others_is_not_asked_again_for_each() -> None:
    """Levelled for each by itself, every completion would get its own reward."""
    levelled = reward({"name": "levelled", "reward": "exact_match"})
    levelled.reward = Odd(RuntimeError("no"))
    with pytest.warns(UserWarning, match="failed for 2 of 2 completions: RuntimeError: no"):
        assert judge(levelled, ["", ""], ["a", "odd"], {})[1] == 2


class Stubborn(Reward):
    """Never ends, and catches whatever it can."""

    timeout_s = 0.2

    def __call__(self, *args: Any, **columns: Any) -> Any:
        while True:
            try:
                time.sleep(30)
            except Exception:
                continue


@pytest.mark.parametrize("pattern", [None, "(a+)+b"])
def test_reward_that_hangs_is_counted_and_ends_nothing(pattern: str | None) -> None:
    """One that catches every exception, and one inside a regular expression."""
    node = {"name": "regex_format", "pattern": pattern, "timeout_s": 0.2}
    hangs = Stubborn() if pattern is None else reward(node)
    before, alarm = time.monotonic(), signal.getsignal(signal.SIGALRM)
    with pytest.warns(UserWarning, match="failed for 1 of 1 completions: Overdue: took longer than 0.2 seconds"):
        found, failed = judge(hangs, [""], ["a" * 64], {})
    assert failed == 1 and all(map(math.isnan, *found.values())) and time.monotonic() - before < 20
    assert signal.getsignal(signal.SIGALRM) == alarm and signal.getitimer(signal.ITIMER_REAL) == (0, 0)
    assert judge(reward("exact_match"), [""], ["1"], {"answer": ["1"]}) == ({"exact_match": [1.0]}, 0)


def test_completion_that_hangs_leaves_the_others_their_rewards() -> None:
    node = {"name": "regex_format", "pattern": "(a+)+b", "timeout_s": 0.3}
    with pytest.warns(UserWarning, match="failed for 1 of 3 completions: Overdue"):
        found, failed = judge(reward(node), [""] * 3, ["ab", "a" * 64, "c"], {})
    assert failed == 1 and found["regex_format"][::2] == [1.0, 0.0] and math.isnan(found["regex_format"][1])
