"""Accuracy and pass@k of a model on prompts with a reward."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from blockwright.blocks.decoder import Decoder
from blockwright.blocks.initialise import stable_seed
from blockwright.lab.solving.problems import Problems
from blockwright.registry import ConfigError
from blockwright.training.data.prompts import Prompt
from blockwright.training.data.tokenizers.base import Tokenizer
from blockwright.training.objectives.rewards.judging import judge
from blockwright.training.rollouts.engine.base import Request
from blockwright.training.rollouts.engine.native import Native

Z = 1.959964  # of a 95 % interval


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
    reward, sampling, size = problems.judge(), problems.sampling(), max(1, rows // problems.samples)
    weights = [weight for weight, _ in reward.parts().values()]
    completions: list[dict[str, Any]] = []
    right: dict[bool, list[tuple[int, int]]] = {False: [], True: []}  # sampled → judged and right ones of each prompt
    failures = ended = 0
    for start in range(0, len(prompts), size):
        batch = prompts[start : start + size]
        for sampled, copies in ((False, 1), (True, problems.samples)):
            places = [(start + i, copy) for i in range(len(batch)) for copy in range(copies)]
            seeds = [stable_seed(seed, f"solve/{i}/{copy}") for i, copy in places]
            how = sampling if sampled else replace(sampling, temperature=0.0)
            request = Request([p.ids for p in batch], seeds, problems.max_new_tokens, how, ends)
            found = Native().sample(decoder, request)
            texts = [tokenizer.decode(each) for each in found.completions]
            asked = [prompts[i] for i, _ in places]
            names = set.intersection(*(set(p.columns) for p in asked))
            columns: dict[str, list[Any]] = {name: [p.columns[name] for p in asked] for name in sorted(names)}
            columns |= {"n_tokens": [len(c) for c in found.completions], "ended": found.ended}
            rewards, failed = judge(reward, [p.text for p in asked], texts, columns)
            failures += failed
            totals = [_total(weights, each) for each in zip(*rewards.values(), strict=True)]
            ended += sum(found.ended) if sampled else 0
            for prompt, text, total in zip(asked, texts, totals, strict=True):
                completions.append({"prompt": prompt.text, "completion": text, "reward": total, "sampled": sampled})
            for i in range(len(batch)):
                mine = [total for total in totals[i * copies : (i + 1) * copies] if total is not None]
                right[sampled].append((len(mine), sum(total >= problems.right for total in mine)))
        tell(f"{min(start + size, len(prompts))} of {len(prompts)} prompts answered")
    drawn = [each["reward"] for each in completions if each["sampled"]]
    judged = [reward for reward in drawn if reward is not None]
    return Solved(
        len(prompts),
        sum(each["reward"] is not None for each in completions) / len(completions),
        _share(right[False], 1),
        {k: _share(right[True], k) for k in problems.attempts},
        sum(judged) / len(judged),
        1 - ended / len(drawn),
        failures,
        completions,
    )


def _share(counts: Sequence[tuple[int, int]], k: int) -> Share:
    """pass@k over the prompts of which at least k completions have a reward, given (those, right ones) of each.

    Raises:
        ConfigError: there is none
    """
    each = [pass_at_k(n, right, k) for n, right in counts if n >= k]
    if not each:
        rule = f"no prompt has {k} completion{'s' * (k > 1)} with a reward: it failed, or has no opinion"
        raise ConfigError("task.reward", None, rule, "See the warnings above, and the columns that it reads")
    return wilson(sum(each) / len(each), len(each))


def _total(weights: Sequence[float], values: Sequence[float]) -> float | None:
    """The weighted sum of what the parts gave; None where none gave anything."""
    given = [w * v for w, v in zip(weights, values, strict=True) if not math.isnan(v)]
    return sum(given) if given else None


def pass_at_k(n: int, right: int, k: int) -> float:
    """Probability that one of k completions is right, without bias, given that ``right`` of n were.

    Chen et al. 2021, arXiv 2107.03374, eq. 1: 1 − C(n − c, k) / C(n, k). 1 − (1 − c/n)^k would be too low.
    """
    return 1 - math.comb(n - right, k) / math.comb(n, k)


def wilson(share: float, n: int) -> Share:
    """Wilson's 95 % interval of a share of n prompts, which is not empty even at 0 and 1.

    It is that of n draws of 0 or 1. Estimates of pass@k between 0 and 1 vary less, so theirs is as wide as need be, or
    wider. It holds for prompts drawn like these; draws of completions are part of it.
    """
    centre = (share + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * math.sqrt(share * (1 - share) / n + Z**2 / (4 * n**2))
    return Share(share, max(0.0, centre - half), min(1.0, centre + half))
