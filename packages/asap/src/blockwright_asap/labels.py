"""Labels for learning a correction by regression: what it should have been in each transition of the real robot."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from blockwright_asap.robot import NQ, NS, NU
from blockwright_asap.tracking import Rollouts
from blockwright_asap.world import NONE, Gap, simulators

# Weights of a state's errors: positions in m and rad, velocities in m/s and rad/s.
WEIGHTS = np.array([2, 2, 1] + [0.5] * NU + [0.3, 0.3, 0.15] + [0.03] * NU)
BOUND, RIDGE = 3.0, 2e-5  # of Δa; weight of ‖Δa‖²
WIDEST, NARROWEST = 0.25, 1e-3  # of finite differences, in units of an action
STEPS = 8  # of the search


@dataclass(frozen=True)
class Labels:
    """Δa [T,N,NU], and the mean weighted squared error of a step without and with it."""

    delta: np.ndarray
    before: float
    after: float


def delta_actions(
    states: np.ndarray, commands: np.ndarray, goals: np.ndarray, gap: Gap = NONE, steps: int = STEPS
) -> Labels:
    """Δa* = argmin ‖W (f_sim(s, a + Δa) − s')‖² + ridge ‖Δa‖², by Levenberg–Marquardt on finite differences.

    The paper finds Δa by PPO. A label for each transition makes it a regression, which any network can learn.

    A foot that touches the ground in some of the four physics steps makes the cost rough. So differences are half as
    wide as the last step was long, a quarter of that after a step of no use, and the actions changed for them are
    candidates too: where the slope misleads, the best of them is taken.

    Args:
        states: [T,N,2·NQ], from which the simulator starts
        commands: [T,N,NU] of the real robot
        goals: [T,N,2·NQ] that it reached
        gap: of the simulator to correct: the plain one or the identified one
        steps: of the search
    """
    shape = commands.shape
    transitions = _Transitions(states.reshape(-1, NS), commands.reshape(-1, NU), goals.reshape(-1, NS), gap)
    trial, width = np.zeros((transitions.n, NU)), np.full(transitions.n, WIDEST)
    best, error, slope, lowest = transitions.around(trial, width)
    first, damping = (transitions.plain**2).sum(1).mean(), np.zeros(transitions.n)
    for _ in range(steps):
        # Where Levenberg and Marquardt step to from Δa, within the bound
        eye, turned = np.eye(NU), slope.transpose(0, 2, 1)
        square = turned @ slope
        square = square + RIDGE * eye + damping[:, None, None] * eye * square
        pull = (turned @ error[..., None])[..., 0] - RIDGE * best
        trial = np.clip(best + np.linalg.solve(square, pull[..., None])[..., 0], -BOUND, BOUND)
        width = np.minimum(width, np.clip(np.abs(trial - best).max(1) / 2, NARROWEST, WIDEST))
        found = transitions.around(trial, width)
        better = found[-1] < lowest
        damping = np.where(better, damping / 10, 10 * np.maximum(damping, 0.01))
        width = np.where(better, WIDEST, np.maximum(width / 4, NARROWEST))
        best, error, slope, lowest = (
            np.where(better.reshape(-1, *[1] * (new.ndim - 1)), new, old)
            for new, old in zip(found, (best, error, slope, lowest), strict=True)
        )
    return Labels(best.reshape(shape), float(first), float((error**2).sum(1).mean()))


class _Transitions:
    """One control step of every transition, simulated after Δa and after each of its actions changed.

    Attributes:
        plain: weighted errors [n,2·NQ] of the last Δa asked for, as it was
    """

    def __init__(self, states: np.ndarray, commands: np.ndarray, goals: np.ndarray, gap: Gap) -> None:
        self.n, self.goals = len(states), goals
        self._states, self._commands = (np.repeat(each, 1 + NU, 0) for each in (states, commands))
        self._world = simulators(self.n * (1 + NU), gap)

    def around(self, delta: np.ndarray, width: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Δa [n,NU] → the best tried, its errors [n,2·NQ], the slope at Δa [n,2·NQ,NU], the best's cost [n]."""
        tried = np.repeat(delta[:, None], 1 + NU, 1)
        tried[:, 1:][:, range(NU), range(NU)] += width[:, None]
        self._world.place(slice(None), self._states[:, :NQ], self._states[:, NQ:])
        self._world.advance(self._commands + tried.reshape(-1, NU))
        error = (self.goals[:, None] - self._world.state().reshape(self.n, 1 + NU, NS)) * WEIGHTS
        cost = (error**2).sum(-1) + RIDGE * (tried**2).sum(-1)
        cost[np.abs(tried).max(-1) > BOUND] = np.inf
        slope = ((error[:, :1] - error[:, 1:]) / width[:, None, None]).transpose(0, 2, 1)
        self.plain = error[:, 0]
        chosen = (np.arange(self.n), cost.argmin(1))
        return tried[chosen], error[chosen], slope, cost[chosen]


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
