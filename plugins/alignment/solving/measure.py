"""Accuracy and pass@k of a model on prompts with a reward."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from blockwright.blocks.decoder import Decoder
from blockwright.blocks.initialise import stable_seed
from blockwright.lab.statistics.intervals import wilson
from blockwright.plugins.alignment.data.prompt_module import Prompt
from blockwright.plugins.alignment.rewards.judging import judge_rollout
from blockwright.plugins.alignment.rewards.rewards import Reward
from blockwright.plugins.alignment.rollouts.engine.native import Native, Request
from blockwright.plugins.alignment.rollouts.record import Rollout
from blockwright.plugins.alignment.solving.problems import Problems
from blockwright.registry import ConfigError
from blockwright.training.data.tokenizers.tokenizer import Tokenizer


@dataclass(frozen=True)
class Share:
    """A share of prompts with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Solved:
    """What was measured.

    Args:
        prompts: number of prompts
        judged: share of completions that have a reward
        greedy: share of prompts whose likeliest completion is right, of those whose likeliest has a reward
        passed: k → pass@k, of the prompts with at least k sampled completions that have a reward
        reward: mean reward of the sampled completions that have one
        truncated: share of sampled completions that did not end
        failures: completions that lack a reward, or a part of it, because it failed
        completions: prompt, completion, reward or None, and whether it was sampled
    """

    prompts: int
    judged: float
    greedy: Share
    passed: dict[int, Share]
    reward: float
    truncated: float
    failures: int
    completions: list[dict[str, Any]]


@dataclass(frozen=True)
class Answer:
    """A completion of a prompt.

    Args:
        prompt: its number
        completion: its text
        reward: None where no part of the reward has judged it
        sampled: False for the likeliest completion
        ended: False if it was cut off
    """

    prompt: int
    completion: str
    reward: float | None
    sampled: bool
    ended: bool

    def to_plain(self) -> dict[str, Any]:
        """As written to a file, beside the text of its prompt."""
        return {"completion": self.completion, "reward": self.reward, "sampled": self.sampled}


def solve(
    decoder: Decoder,
    tokenizer: Tokenizer,
    problems: Problems,
    prompts: Sequence[Prompt],
    ends: frozenset[int],
    seed: int = 0,
    rows: int = 64,
    tell: Callable[[str], None] = lambda line: None,
) -> Solved:
    """Answer prompts, and judge the answers.

    Args:
        decoder: in evaluation mode
        tokenizer: of the prompts and completions
        problems: the task
        prompts: to answer
        ends: tokens that end a completion
        seed: of the draws; those of a completion depend on seed, prompt and its number alone
        rows: decoded together
        tell: is given a line after each batch

    Raises:
        ConfigError: the reward has judged no likeliest completion, or never as many of a prompt as a pass@k needs
    """
    reward, size = problems.judge(), max(1, rows // problems.samples)
    sampled, greedy = problems.sampling(), replace(problems.sampling(), temperature=0.0)
    answers: list[Answer] = []
    failures = 0
    for start in range(0, len(prompts), size):
        batch = range(start, min(start + size, len(prompts)))
        for how, copies in ((greedy, 1), (sampled, problems.samples)):
            places = [i for i in batch for _ in range(copies)]
            seeds = [stable_seed(seed, f"solve/{i}/{copy}") for i in batch for copy in range(copies)]
            request = Request([prompts[i].ids for i in places], seeds, problems.max_new_tokens, how, ends)
            rollout = Native().sample(decoder, request)
            rewards, failed = judge_rollout(reward, tokenizer, [prompts[i] for i in places], rollout)
            answers += _answers(reward, tokenizer, places, rollout, rewards, how is sampled)
            failures += sum(failed)
        tell(f"{batch.stop} of {len(prompts)} prompts answered")
    return _solved(problems, prompts, answers, failures)


def _answers(
    reward: Reward,
    tokenizer: Tokenizer,
    places: Sequence[int],
    rollout: Rollout,
    rewards: Mapping[str, Sequence[float]],
    sampled: bool,
) -> list[Answer]:
    weights = [weight for weight, _ in reward.parts().values()]
    totals = [_total(weights, each) for each in zip(*rewards.values(), strict=True)]
    texts = map(tokenizer.decode, rollout.completions)
    columns = zip(places, texts, totals, rollout.ended, strict=True)
    return [Answer(prompt, text, total, sampled, ended) for prompt, text, total, ended in columns]


def _solved(problems: Problems, prompts: Sequence[Prompt], answers: Sequence[Answer], failures: int) -> Solved:
    drawn = [answer for answer in answers if answer.sampled]
    rewards = [answer.reward for answer in drawn if answer.reward is not None]
    kept = ({"prompt": prompts[a.prompt].text, **a.to_plain()} for a in answers)
    return Solved(
        len(prompts),
        sum(answer.reward is not None for answer in answers) / len(answers),
        _share(_counts([answer for answer in answers if not answer.sampled], problems.right), 1),
        {k: _share(_counts(drawn, problems.right), k) for k in problems.attempts},
        sum(rewards) / len(rewards),
        1 - sum(answer.ended for answer in drawn) / len(drawn),
        failures,
        list(kept),
    )


def _counts(answers: Sequence[Answer], right: float) -> list[tuple[int, int]]:
    """Of each prompt: the completions with a reward, and the right ones among them."""
    rewards: dict[int, list[float]] = {}
    for answer in answers:
        rewards.setdefault(answer.prompt, []).extend([] if answer.reward is None else [answer.reward])
    return [(len(each), sum(reward >= right for reward in each)) for each in rewards.values()]


def _share(counts: Sequence[tuple[int, int]], k: int) -> Share:
    """pass@k over the prompts of which at least k completions have a reward, and Wilson's interval.

    The interval holds for prompts drawn like these; draws of completions are part of it.

    Raises:
        ConfigError: there is no such prompt
    """
    each = [pass_at_k(n, right, k) for n, right in counts if n >= k]
    if not each:
        rule = f"no prompt has {k} completion{'s' * (k > 1)} with a reward: it failed, or has no opinion"
        raise ConfigError("task.reward", None, rule, "See the warnings above, and the columns that it reads")
    value = sum(each) / len(each)
    centre, half = wilson(value, len(each))
    return Share(value, max(0.0, centre - half), min(1.0, centre + half))


def _total(weights: Sequence[float], values: Sequence[float]) -> float | None:
    """The weighted sum of what the parts gave; None where none gave anything."""
    given = [w * v for w, v in zip(weights, values, strict=True) if not math.isnan(v)]
    return sum(given) if given else None


def pass_at_k(n: int, right: int, k: int) -> float:
    """Probability that one of k completions is right, without bias, given that ``right`` of n were.

    Chen et al. 2021, arXiv 2107.03374, eq. 1: 1 − C(n − c, k) / C(n, k). 1 − (1 − c/n)^k would be too low.
    """
    return 1 - math.comb(n - right, k) / math.comb(n, k)
