"""The excess of an estimate at which a growing sweep has stopped early."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

from blockwright.lab.statistics.looks import Spend, nominal

NODES = 1201  # of the density of the sum
WIDTH = 8.0  # standard deviations of the last look, on either side


def overestimate(seeds: Sequence[int], spend: Spend, effect: float) -> float:
    """Mean of estimate − truth, in σ, among sweeps that find a difference before their last look.

    The density of the sum of n values of mean ``effect`` and variance 1, among sweeps that no look has stopped, is
    integrated from look to look; a sweep stops where |sum| > z √n, at the estimate sum / n. A sweep that stops early
    has been lucky, so the mean is above 0; the smaller the true difference, the more.

    Args:
        seeds: of the looks
        spend: spending function
        effect: true difference, in σ; the estimate stands in for it
    """
    return _overestimate(tuple(seeds), spend, round(abs(effect), 3))


@lru_cache
def _overestimate(seeds: tuple[int, ...], spend: Spend, effect: float) -> float:
    import numpy as np
    from scipy.stats import norm

    limit = WIDTH * math.sqrt(seeds[-1])
    nodes = np.linspace(-limit, effect * seeds[-1] + limit, NODES)
    step = nodes[1] - nodes[0]
    going, before, stopped, excess = None, 0, 0.0, 0.0
    for n, p in zip(seeds[:-1], nominal(seeds, spend)[:-1], strict=True):
        mean, sd = effect * (n - before), math.sqrt(n - before)
        if going is None:
            density = norm.pdf(nodes, mean, sd)
        else:
            density = norm.pdf(nodes[:, None] - nodes[None, :], mean, sd) @ going * step
        beyond = np.abs(nodes) > float(norm.isf(p / 2)) * math.sqrt(n)
        stopped += float(density[beyond].sum()) * step
        excess += float((density * (np.abs(nodes) / n - effect))[beyond].sum()) * step
        going, before = np.where(beyond, 0.0, density), n
    return excess / stopped if stopped > 0 else 0.0
