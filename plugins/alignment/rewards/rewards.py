"""The contract of ``reward``: how good completions are; rewards by rules, and rewards made of other rewards."""

from __future__ import annotations

import json
import math
import random
import re
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from blockwright.registry import BlockError, Composable, family, register
from blockwright.registry.errors import require
from blockwright.registry.ranges import Count, NonNegative, Number, Positive

Texts = Sequence[str]
Column = Sequence[Any]  # of the data, one value a completion
Rewards = list[float | None]  # one a completion


@family("reward", root="task")
class Reward(Composable):
    """Judges completions: a pure function, so that a resumed run judges alike. Importing it must not import torch.

    Attributes:
        timeout_s: seconds that one call may take; after them it counts as failed
        bounds: least and greatest value; one outside counts as failed, as one that is not finite does
        together: a value depends on the other completions too. If not, a call that fails is repeated for each
            completion by itself, so that the failure is that of one
    """

    timeout_s: float = 60.0
    bounds: tuple[float, float] = (-math.inf, math.inf)
    together: bool = False

    def __init__(self) -> None: ...  # for rewards without settings

    @abstractmethod
    def __call__(self, prompts: Texts, completions: Texts, **columns: Column) -> Rewards:
        """One reward a completion; None where this function has no opinion, for reasons of the prompt and its columns.

        A completion that cannot be judged is a failure: raise, or give NaN. None would leave this function out of a
        weighted sum, to which a completion must not have the key.

        Args:
            prompts: the last message of each conversation before the completion
            completions: the text of each, without special tokens
            columns: columns of the data, one value a completion; also ``messages``, the conversation before each,
                ``n_tokens``, tokens of each completion with its end, and ``ended``, whether it ended by itself
        """

    def needs(self) -> tuple[str, ...]:
        """Columns that every record of the data must have; a run whose data lack one is refused."""
        return ()

    def parts(self) -> dict[str, tuple[float, Reward]]:
        """The rewards that are judged and logged separately: name → weight, reward."""
        registered: Any = getattr(type(self), "Config", None)
        return {registered.name if registered else type(self).__name__.lower(): (1.0, self)}


def column(columns: Mapping[str, Column], name: str, reward: str) -> Column:
    """A column of the data, which ``reward`` reads.

    Raises:
        KeyError: the data has none of this name
    """
    if name not in columns:
        raise KeyError(f"the reward {reward} reads the column {name!r}; the data has {', '.join(sorted(columns))}")
    return columns[name]


@register("reward", "exact_match")
class ExactMatch(Reward):
    """1 for a completion that equals a column of the data, blanks at both ends aside, else 0.

    Args:
        answer: name of the column
    """

    bounds = (0.0, 1.0)

    def __init__(self, answer: str = "answer") -> None:
        self.answer = answer

    def needs(self) -> tuple[str, ...]:
        return (self.answer,)

    def __call__(self, prompts: Texts, completions: Texts, **columns: Column) -> Rewards:
        answers = column(columns, self.answer, "exact_match")
        return [float(text.strip() == str(answer).strip()) for text, answer in zip(completions, answers, strict=True)]


# A minus just behind a number, a name or a bracket subtracts; elsewhere it is a sign.
NUMBER = re.compile(r"(?:(?<![\w)\]%.])[-−])?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|(?<![\w.])\.\d+)(?:[eE][-+]?\d+)?")


@register("reward", "arithmetic")
class Arithmetic(Reward):
    """1 if the last number of a completion is the number in a column, else 0; thousands may have commas, as in GSM8K.

    ``12-8`` ends with 8, ``= -8`` and ``12 -8`` with −8, ``-.5`` with −0.5. None where the column holds no number, or
    one beyond the range of a float.

    Args:
        answer: name of the column
        tolerance: largest relative error
    """

    bounds = (0.0, 1.0)

    def __init__(self, answer: str = "answer", tolerance: NonNegative = 1e-6) -> None:
        self.answer, self.tolerance = answer, tolerance

    def needs(self) -> tuple[str, ...]:
        return (self.answer,)

    def __call__(self, prompts: Texts, completions: Texts, **columns: Column) -> Rewards:
        answers = column(columns, self.answer, "arithmetic")
        return [self._judge(_last(text), _last(str(a))) for text, a in zip(completions, answers, strict=True)]

    def _judge(self, number: float | None, answer: float | None) -> float | None:
        if answer is None:
            return None
        return float(number is not None and math.isclose(number, answer, rel_tol=self.tolerance, abs_tol=1e-12))


def _last(text: str) -> float | None:
    """The last number of a text; None without any, or for one beyond the range of a float."""
    numbers = NUMBER.findall(text)
    value = float(numbers[-1].replace(",", "").replace("−", "-")) if numbers else math.nan
    return value if math.isfinite(value) else None


@register("reward", "regex_format")
class RegexFormat(Reward):
    """1 for a completion that a regular expression matches as a whole, else 0.

    Args:
        pattern: in Python's grammar; ``.`` matches line ends too
        timeout_s: seconds for the completions of a rollout; one that backtracks without bound counts as failed
    """

    bounds = (0.0, 1.0)

    def __init__(self, pattern: str, timeout_s: Positive = 60.0) -> None:
        self.timeout_s = timeout_s
        try:
            self.pattern = re.compile(pattern, re.DOTALL)
        except re.error as error:
            raise BlockError("pattern", pattern, f"is no regular expression ({error})", "Correct it") from None

    def __call__(self, prompts: Texts, completions: Texts, **columns: Column) -> Rewards:
        return [float(self.pattern.fullmatch(text) is not None) for text in completions]


@register("reward", "length")
class Length(Reward):
    """A soft punishment of long completions, from 0 down to −1.

    Yu et al. 2025 (DAPO), arXiv 2503.14476, eq. 13: 0 up to longest − buffer tokens, then (longest − buffer − |o|) /
    buffer, −1 above ``longest``. The paper has 20,480 and 4,096.

    Args:
        longest: tokens of the longest completion that is not fully punished
        buffer: tokens over which the punishment grows
    """

    bounds = (-1.0, 0.0)

    def __init__(self, longest: Count, buffer: Count) -> None:
        if buffer > longest:
            raise BlockError("buffer", buffer, f"must not exceed longest ({longest})", "Lower it")
        self.longest, self.buffer = longest, buffer

    def __call__(self, prompts: Texts, completions: Texts, **columns: Column) -> Rewards:
        free = self.longest - self.buffer
        return [max(-1.0, min(0.0, (free - n) / self.buffer)) for n in column(columns, "n_tokens", "length")]


NAMES = ("task", "settings", "seed", "number")  # columns that name a problem


@register("reward", "reasoning_gym")
class ReasoningGymReward(Reward):
    """What the verifier of a problem of reasoning-gym gives a completion, 0 to 1, blanks at both ends aside.

    For problems of the corpus ``ReasoningGym`` (data/reasoning_gym.py), whose columns name them.
    """

    bounds = (0.0, 1.0)

    def __init__(self) -> None:
        require("alignment", "reasoning_gym", path="task.reward", value="reasoning_gym")

    def needs(self) -> tuple[str, ...]:
        return NAMES

    def __call__(self, prompts: Texts, completions: Texts, **columns: Column) -> Rewards:
        named = [column(columns, name, "reasoning_gym") for name in NAMES]
        return [_score(text.strip(), *which) for text, *which in zip(completions, *named, strict=True)]


def _score(text: str, task: str, settings: dict[str, Any], seed: int, number: int) -> float:
    drawn = _problems(task, json.dumps(settings, sort_keys=True), seed)
    return float(drawn.score_answer(text, drawn[number]))


@lru_cache(maxsize=64)
def _problems(task: str, settings: str, seed: int) -> Any:
    from reasoning_gym.factory import create_dataset

    return create_dataset(task, **json.loads(settings), seed=seed, size=2**31)  # drawn by number: the size is no matter


@register("reward", "weighted")
class Weighted(Reward):
    """The weighted sum of rewards, each of which is logged; DeepSeek-V2's eq. 35 (arXiv 2405.04434).

    A reward that is None is left out of the sum; it is None only where all are. A completion of which a part fails has
    no reward.

    Args:
        rewards: nodes of rewards
        weights: factor of each
    """

    def __init__(self, rewards: list[Reward], weights: list[Number]) -> None:
        if len(rewards) != len(weights) or not rewards:
            rule = f"there must be one for each of the {len(rewards)} rewards, and at least one"
            raise BlockError("weights", weights, rule, "Write as many weights as rewards")
        self.rewards, self.weights = rewards, weights
        self.timeout_s = sum(reward.timeout_s for reward in rewards)

    def __call__(self, prompts: Texts, completions: Texts, **columns: Column) -> Rewards:
        each = [reward(prompts, completions, **columns) for reward in self.rewards]
        return [self._sum(values) for values in zip(*each, strict=True)]

    def _sum(self, values: Sequence[float | None]) -> float | None:
        """The weighted sum of one completion's rewards that are not None; None without any."""
        terms = [weight * value for weight, value in zip(self.weights, values, strict=True) if value is not None]
        return sum(terms) if terms else None

    def needs(self) -> tuple[str, ...]:
        return tuple(name for reward in self.rewards for name in reward.needs())

    def parts(self) -> dict[str, tuple[float, Reward]]:
        parts: dict[str, tuple[float, Reward]] = {}
        for weight, reward in zip(self.weights, self.rewards, strict=True):
            for name, (inner, part) in reward.parts().items():
                parts[name if name not in parts else f"{name}_{len(parts)}"] = (weight * inner, part)
        return parts


@register("reward", "levelled")
class Levelled(Reward):
    """A control: each completion gets the mean reward of its batch, so no group has spread, and nothing is learned.

    The mean of a batch is unchanged, so on held-out prompts it is still that of ``reward``.

    Args:
        reward: that is averaged; its values of None are left out, and one that failed stays failed
    """

    together = True

    def __init__(self, reward: Reward) -> None:
        self.reward, self.timeout_s, self.bounds = reward, reward.timeout_s, reward.bounds

    def needs(self) -> tuple[str, ...]:
        return self.reward.needs()

    def __call__(self, prompts: Texts, completions: Texts, **columns: Column) -> Rewards:
        values = self.reward(prompts, completions, **columns)
        failed = [value is not None and math.isnan(value) for value in values]
        known = [value for value, fails in zip(values, failed, strict=True) if value is not None and not fails]
        mean = sum(known) / len(known) if known else None
        return [math.nan if fails else mean for fails in failed]


@register("reward", "shuffled")
class Shuffled(Reward):
    """A control: each completion gets the reward of another of its batch, so there is nothing to learn.

    The mean of a batch is unchanged, so on held-out prompts it is still that of ``reward``. The order is a function of
    the completions alone.

    Args:
        reward: that is given to others
    """

    together = True

    def __init__(self, reward: Reward) -> None:
        self.reward, self.timeout_s, self.bounds = reward, reward.timeout_s, reward.bounds

    def needs(self) -> tuple[str, ...]:
        return self.reward.needs()

    def __call__(self, prompts: Texts, completions: Texts, **columns: Column) -> Rewards:
        values = list(self.reward(prompts, completions, **columns))
        random.Random("\n".join((*prompts, *completions))).shuffle(values)
        return values
