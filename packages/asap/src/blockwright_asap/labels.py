"""Labels for learning a correction by regression: what it should have been in each transition of the real robot."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from blockwright_asap.gap import NONE, Gap
from blockwright_asap.robot import NQ, NS, NU
from blockwright_asap.tracking import Rollouts
from blockwright_asap.world import simulators

# Weights of a state's errors: positions in m and rad, velocities in m/s and rad/s.
WEIGHTS = np.array([2, 2, 1] + [0.5] * NU + [0.3, 0.3, 0.15] + [0.03] * NU)
BOUND, RIDGE = 3.0, 2e-5  # of Δa; weight of ‖Δa‖²
TRY, NARROWEST = 0.25, 0.03  # widths of finite differences: halved each step


@dataclass(frozen=True)
class Labels:
    """Δa [T,N,NU], and the mean weighted squared error of a step without and with it."""

    delta: np.ndarray
    before: float
    after: float


def delta_actions(
    states: np.ndarray, commands: np.ndarray, goals: np.ndarray, gap: Gap = NONE, steps: int = 2
) -> Labels:
    """Δa* = argmin ‖W (f_sim(s, a + Δa) − s')‖² + ridge ‖Δa‖², by Levenberg–Marquardt on finite differences.

    The paper finds Δa by PPO. A label for each transition makes it a regression, which any network can learn.

    Args:
        states: [T,N,2·NQ], from which the simulator starts
        commands: [T,N,NU] of the real robot
        goals: [T,N,2·NQ] that it reached
        gap: of the simulator to correct: the plain one or the identified one
        steps: of the search
    """
    shape = commands.shape
    s, c, goal = states.reshape(-1, NS), commands.reshape(-1, NU), goals.reshape(-1, NS)
    tries = NU + 1
    world = simulators(len(c) * tries, gap)

    def ends(delta: np.ndarray, width: float) -> np.ndarray:
        """States [n,1+NU,2·NQ] after delta, and after delta with each action changed."""
        each = np.repeat(delta[:, None], tries, 1)
        each[:, 1:][:, range(NU), range(NU)] += width
        world.place(slice(None), np.repeat(s[:, :NQ], tries, 0), np.repeat(s[:, NQ:], tries, 0))
        world.advance(np.repeat(c, tries, 0) + each.reshape(-1, NU))
        return world.state().reshape(-1, tries, NS)

    eye = np.eye(NU)
    best, trial, damping = np.zeros_like(c), np.zeros_like(c), np.zeros(len(c))
    first = error = slope = None
    for step in range(steps + 1):
        width = max(TRY / 2**step, NARROWEST)
        reached = ends(trial, width)
        here = (goal - reached[:, 0]) * WEIGHTS
        there = ((reached[:, 1:] - reached[:, :1]) / width * WEIGHTS).transpose(0, 2, 1)
        if error is None or slope is None:
            first = (here**2).sum(1).mean()
            error, slope = here, there
        better = _cost(here, trial) < _cost(error, best)
        damping = np.where(better, damping / 10, 10 * np.maximum(damping, 0.01)) if step else damping
        best = np.where(better[:, None], trial, best)
        error, slope = np.where(better[:, None], here, error), np.where(better[:, None, None], there, slope)
        square = slope.transpose(0, 2, 1) @ slope
        square = square + RIDGE * eye + damping[:, None, None] * eye * square
        pull = (slope.transpose(0, 2, 1) @ error[..., None])[..., 0] - RIDGE * best
        trial = np.clip(best + np.linalg.solve(square, pull[..., None])[..., 0], -BOUND, BOUND)
    assert first is not None and error is not None
    return Labels(best.reshape(shape), float(first), float((error**2).sum(1).mean()))


def _cost(error: np.ndarray, delta: np.ndarray) -> np.ndarray:
    return (error**2).sum(1) + RIDGE * (delta**2).sum(1)


def of_rollouts(real: Rollouts, gap: Gap = NONE) -> Labels:
    """A label for each measured transition."""
    return delta_actions(real.states[:-1], real.commands, real.states[1:], gap)


def residuals(real: Rollouts, gap: Gap = NONE) -> np.ndarray:
    """s' − f_sim(s, a) [T,N,2·NQ]: labels of delta dynamics."""
    start = real.states[:-1].reshape(-1, NS)
    world = simulators(len(start), gap)
    world.place(slice(None), start[:, :NQ], start[:, NQ:])
    world.advance(real.commands.reshape(-1, NU))
    return real.states[1:] - world.state().reshape(real.states[1:].shape)
