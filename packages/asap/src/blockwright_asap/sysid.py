"""Identification: fit the simulator's parameters to real rollouts by CMA-ES with a diagonal covariance.

The paper's baseline searches three values of each parameter within ±5 % and ±2 cm; ``narrow`` keeps to these bounds.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from blockwright_asap.replay import replay
from blockwright_asap.tracking import Rollouts
from blockwright_asap.world import Gap, World, identified

DIMENSIONS = 11
CANDIDATES, LENGTH, WINDOWS = 12, 25, 24  # of a generation; control steps of a replay (0.5 s); replays of a candidate


def identify(real: Rollouts, seed: int, generations: int = 25, narrow: bool = False) -> tuple[Gap, list[float]]:
    """The gap whose simulator replays the real best, and the best error of each generation in m.

    All candidates of a generation are one batch of replays. The figure is the mean distance of bodies, plus a small
    penalty on leaving the simulator's own parameters.

    Args:
        real: rollouts
        seed: of the search and of the replayed windows
        generations: of the search
        narrow: within the paper's bounds
    """
    rng = np.random.default_rng(seed)
    states, commands, bodies = _windows(real, rng)
    world = World([Gap()] * (CANDIDATES * WINDOWS))

    def cost(numbers: np.ndarray) -> np.ndarray:
        world.use([gap for each in numbers for gap in [identified(each, narrow)] * WINDOWS])
        got, _ = replay(world, np.tile(states, (1, CANDIDATES, 1)), np.tile(commands, (1, CANDIDATES, 1)))
        off = np.linalg.norm(got - np.tile(bodies, (1, CANDIDATES, 1, 1)), axis=-1).mean((0, 2))
        return off.reshape(CANDIDATES, WINDOWS).mean(1) + 1e-4 * (numbers**2).sum(1)

    best, history = _search(cost, rng, generations)
    return identified(best, narrow), history


def _search(
    cost: Callable[[np.ndarray], np.ndarray], rng: np.random.Generator, generations: int
) -> tuple[np.ndarray, list[float]]:
    """CMA-ES (Hansen) with cumulative step-size adaptation and the diagonal alone of the covariance."""
    d, half = DIMENSIONS, CANDIDATES // 2
    mean, sigma, variance = np.zeros(d), 0.5, np.ones(d)
    weights = np.log(CANDIDATES / 2 + 0.5) - np.log(np.arange(1, half + 1))
    weights /= weights.sum()
    mass = 1 / (weights**2).sum()
    path, rate = np.zeros(d), (mass + 2) / (d + mass + 5)
    best, lowest, history = mean, np.inf, []
    for _ in range(generations):
        z = rng.normal(size=(CANDIDATES, d))
        tried = mean + sigma * np.sqrt(variance) * z
        costs = cost(tried)
        order = np.argsort(costs)
        if costs[order[0]] < lowest:
            lowest, best = costs[order[0]], tried[order[0]].copy()
        top = z[order[:half]]
        step = weights @ top
        mean = mean + sigma * np.sqrt(variance) * step
        path = (1 - rate) * path + np.sqrt(rate * (2 - rate) * mass) * step
        sigma *= np.exp(rate * (np.linalg.norm(path) / np.sqrt(d) - 1))
        variance = 0.85 * variance + 0.15 * (weights @ top**2) * variance
        history.append(float(lowest))
    return best, history


def _windows(real: Rollouts, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    steps, robots = real.commands.shape[:2]
    t, i = rng.integers(0, steps - LENGTH + 1, WINDOWS), rng.integers(0, robots, WINDOWS)
    states = real.states[t, i][None]
    commands = np.stack([real.commands[t + k, i] for k in range(LENGTH)])
    return states, commands, np.stack([real.bodies[t + k + 1, i] for k in range(LENGTH)])
