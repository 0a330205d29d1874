"""Replay real commands in a simulator, from measured states, and measure how far it drifts from what was measured."""

from __future__ import annotations

import numpy as np

from blockwright_asap.measures import by_horizon, over_time
from blockwright_asap.robot import NQ, NU
from blockwright_asap.tracking import Rollouts
from blockwright_asap.world import NONE, Correction, Gap, World, simulators

N_FEATURES = NQ - 1 + NQ + NU
SECOND, WARM_UP, WINDOWS = 50, 32, 90  # control steps; those a correction with a memory has seen before; replays


def features(qpos: np.ndarray, qvel: np.ndarray, command: np.ndarray) -> np.ndarray:
    """What a correction sees [...,17]: everything but the horizontal position, which physics does not depend on."""
    return np.concatenate([qpos[..., 1:], qvel * 0.1, command * 0.25], -1)


def of_rollouts(found: Rollouts) -> np.ndarray:
    """Features of each transition [T,N,17]."""
    before = found.states[:-1]
    return features(before[..., :NQ], before[..., NQ:], found.commands)


def replay(
    world: World, states: np.ndarray, commands: np.ndarray, correction: Correction | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Commands [T,N,NU] from states[0] [N,2·NQ] → positions of bodies [T,N,NB,3] and states [T,N,2·NQ]."""
    world.place(slice(None), states[0, :, :NQ], states[0, :, NQ:])
    bodies, drifted = [], []
    for command in commands:
        world.advance(command, correction)
        bodies.append(world.bodies.copy())
        drifted.append(world.state())
    return np.stack(bodies), np.stack(drifted)


def open_loop(held_out: Rollouts, gap: Gap = NONE, correction: Correction | None = None) -> dict[str, object]:
    """Errors of replays of a second from 90 places of held-out real rollouts, by horizon and over time.

    A correction with a memory first sees the steps before each place as they were measured.
    """
    rng = np.random.default_rng(7)  # the same places for every method
    steps, robots = held_out.commands.shape[:2]
    t, i = rng.integers(WARM_UP, steps - SECOND + 1, WINDOWS), rng.integers(0, robots, WINDOWS)

    def cut(array: np.ndarray, start: int, end: int) -> np.ndarray:
        return np.stack([array[t + k, i] for k in range(start, end)])

    if correction is not None:
        before, commanded = cut(held_out.states, -WARM_UP, 0), cut(held_out.commands, -WARM_UP, 0)
        correction.show(features(before[..., :NQ], before[..., NQ:], commanded).swapaxes(0, 1))
    begin, commands = cut(held_out.states, 0, 1), cut(held_out.commands, 0, SECOND)
    got, _ = replay(simulators(WINDOWS, gap), begin, commands, correction)
    wanted = cut(held_out.bodies, 1, SECOND + 1)
    return {**by_horizon(got, wanted), "over_time": over_time(got, wanted)}
