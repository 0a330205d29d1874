"""Many robots at once in MuJoCo, each with its gap, and the one place where a correction enters the physics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import mujoco
import numpy as np
from mujoco import rollout

from blockwright_asap.gap import NONE, Gap
from blockwright_asap.robot import DEFAULT, NB, NQ, SCALE, SUBSTEPS, model

Rows = Any  # an index of robots: a slice, a mask or numbers
KNEES = (1, 3)


class Correction(Protocol):
    """What is learnt from real rollouts."""

    def action(self, qpos: np.ndarray, qvel: np.ndarray, command: np.ndarray) -> np.ndarray:
        """Δa [N,NU], added to the command before the simulator."""

    def state(self, qpos: np.ndarray, qvel: np.ndarray, command: np.ndarray) -> np.ndarray:
        """Δs [N,2·NQ], added to the state after the simulator."""

    def forget(self, who: np.ndarray) -> None:
        """Robots [N] bool begin an episode: their history is over."""

    def show(self, measured: np.ndarray) -> None:
        """Features [N,T,17] of the steps of each real robot before the ones to come."""

    def state_dict(self) -> dict[str, np.ndarray]:
        """What it remembers of the robots, so that a training in it resumes bit for bit."""

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None: ...


class Sparing:
    """A correction of all robots but the first ones: a policy tuned in both cannot live on the correction's mistakes.

    Args:
        inner: the correction
        spared: robots that stay in the simulator as it is
    """

    def __init__(self, inner: Correction, spared: int) -> None:
        self.inner, self.spared = inner, spared

    def action(self, qpos: np.ndarray, qvel: np.ndarray, command: np.ndarray) -> np.ndarray:
        return self._kept(self.inner.action(qpos, qvel, command))

    def state(self, qpos: np.ndarray, qvel: np.ndarray, command: np.ndarray) -> np.ndarray:
        return self._kept(self.inner.state(qpos, qvel, command))

    def forget(self, who: np.ndarray) -> None:
        self.inner.forget(who)

    def show(self, measured: np.ndarray) -> None:
        self.inner.show(measured)

    def state_dict(self) -> dict[str, np.ndarray]:
        return self.inner.state_dict()

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        self.inner.load_state_dict(state)

    def _kept(self, change: np.ndarray) -> np.ndarray:
        return np.where(np.arange(len(change))[:, None] < self.spared, 0.0, change)


class World:
    """N robots.

    Args:
        gaps: one for each robot, all with or all without ``motor_lag``

    Attributes:
        qpos, qvel: [N,NQ]
        bodies: [N,NB,3], m
        motors: [N,NU] or [N,0], the motors' own state, which nobody measures
    """

    def __init__(self, gaps: Sequence[Gap]) -> None:
        self.n = len(gaps)
        self.use(gaps)
        self._data = mujoco.MjData(self.models[0])
        self._runner = rollout.Rollout(nthread=0)
        self.qpos, self.qvel = np.zeros((self.n, NQ)), np.zeros((self.n, NQ))
        self.motors = np.zeros((self.n, self.models[0].na))
        self.bodies = np.zeros((self.n, NB, 3))

    def use(self, gaps: Sequence[Gap]) -> None:
        """Give the robots other gaps; their states stay."""
        self.models = [model(gap) for gap in gaps]
        self._linkage = np.array([gap.linkage for gap in gaps])
        self._offset = np.array([gap.offset for gap in gaps])
        self._is_direct = not (self._linkage.any() or self._offset.any())

    def place(self, who: Rows, qpos: np.ndarray, qvel: np.ndarray) -> None:
        """Put robots into a state; their motors are taken to be at rest where the joints are."""
        self.qpos[who], self.qvel[who] = qpos, qvel
        if self.motors.shape[1]:
            self.motors[who] = qpos[..., 3:]

    def advance(self, command: np.ndarray, correction: Correction | None = None) -> None:
        """One control step of 20 ms. The joint targets are ``DEFAULT + SCALE · (command + Δa)``.

        Replays and policies both come through here, so that a correction is applied alike in learning and in tuning.

        Args:
            command: [N,NU], in units of an action
            correction: None for the simulator as it is
        """
        before = (self.qpos.copy(), self.qvel.copy(), command)
        total = command if correction is None else command + correction.action(*before)
        self._simulate(DEFAULT + SCALE * total)
        if correction is not None:
            change = correction.state(*before)
            self.qpos, self.qvel = self.qpos + change[:, :NQ], self.qvel + change[:, NQ:]

    def _simulate(self, target: np.ndarray) -> None:
        if not self._is_direct:
            target = target + self._offset
            for knee in KNEES:  # what arrives of a knee's error depends on its angle
                q = self.qpos[:, 3 + knee]
                target[:, knee] = q + (target[:, knee] - q) * (1 - self._linkage * np.sin(2 * (q - 1.3)))
        control = np.repeat(target[:, None], SUBSTEPS, 1)
        state = np.concatenate([np.zeros((self.n, 1)), self.qpos, self.qvel, self.motors], 1)
        states, sensors = self._runner.rollout(self.models, [self._data], state, control)
        last = states[:, -1]
        self.qpos, self.qvel = last[:, 1 : 1 + NQ].copy(), last[:, 1 + NQ : 1 + 2 * NQ].copy()
        self.motors = last[:, 1 + 2 * NQ :].copy()
        lost = ~np.isfinite(last).all(1) | (np.abs(self.qvel).max(1) > 100)
        if lost.any():
            self.qpos[lost], self.qvel[lost] = 0.3, 0
        self.bodies = sensors[:, -1].reshape(self.n, NB, 3)

    def state(self) -> np.ndarray:
        """[N,2·NQ]: positions and velocities."""
        return np.concatenate([self.qpos, self.qvel], 1)

    def state_dict(self) -> dict[str, np.ndarray]:
        return {name: getattr(self, name).copy() for name in ("qpos", "qvel", "motors", "bodies")}

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        for name, value in state.items():
            setattr(self, name, np.array(value))


def simulators(n: int, gap: Gap = NONE) -> World:
    """N robots alike."""
    return World([gap] * n)
