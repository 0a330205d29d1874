"""Verdicts on equal arms whose losses are of real trainings (benchmarks/same_arms.py): how often they are wrong."""

from __future__ import annotations

import random

import pytest
from pairwise import each

from benchmarks import same_arms


def test_bank_has_runs_enough_for_ablations_of_both_kinds() -> None:
    losses, rng = same_arms.bank(), random.Random(0)
    assert len(losses) >= 60 and all(1.5 < loss < 3 for loss in losses.values())
    for how, draw in same_arms.DRAWS.items():
        drawn = draw(losses, rng, 5)
        assert len(drawn) == len(set(drawn.values())) == 20, how


def test_arms_that_share_seeds_vary_less_than_others() -> None:
    """Or pairing would show nothing."""
    losses = same_arms.bank()
    own = [losses["half_split", order, order] for order in range(same_arms.PAIRED)]
    other = [losses["interleaved", order, order] for order in range(same_arms.PAIRED)]
    of_pairs = sum((a - b) ** 2 for a, b in zip(own, other, strict=True))
    apart = sum((a - b) ** 2 for a, b in zip(own, other[1:] + other[:1], strict=True))
    assert of_pairs < 0.9 * apart


@pytest.mark.slow
@pytest.mark.parametrize(("how", "seeds"), each([*same_arms.DRAWS], same_arms.SEEDS))
def test_equal_arms_are_rarely_called_different(how: str, seeds: int) -> None:
    # .05 and three standard errors; ``python -m benchmarks.same_arms`` draws 200 of each.
    assert same_arms.wrong(same_arms.bank(), how, seeds, number=60).value <= 0.135
