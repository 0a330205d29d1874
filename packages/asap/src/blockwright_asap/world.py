"""Many robots at once in MuJoCo, each with its gap, and the one place where a correction enters the physics.

A gap is what makes the "real" robot differ from the simulated one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Protocol

import mujoco
import numpy as np
from mujoco import rollout

from blockwright_asap.robot import DEFAULT, NB, NQ, SCALE, SUBSTEPS, model

ONES, ZEROS = (1.0,) * 4, (0.0,) * 4


@dataclass(frozen=True)
class Gap:
    """Factors and offsets on the simulator's robot; the default is that robot itself.

    The first five are the parameters that identification may fit, as in the paper's SysID baseline. The rest cannot be
    said in them: a motor state that nobody measures, dry friction, weaker motors, slippery ground, a knee linkage whose
    effect depends on the posture, encoders set a little wrong.

    Args:
        mass: factor on the trunk's mass
        com_x, com_z: shift of the trunk's centre of mass, m
        kp, kd: factor on each joint's gains
        motor_lag: time constant of the motors, s
        friction_loss: dry friction of each joint, N m
        torque: factor on the torque limit
        friction: of the ground
        linkage: how much of a knee's error is lost, at most
        offset: of each encoder, rad
    """

    mass: float = 1.0
    com_x: float = 0.0
    com_z: float = 0.0
    kp: tuple[float, ...] = ONES
    kd: tuple[float, ...] = ONES
    motor_lag: float = 0.0
    friction_loss: float = 0.0
    torque: float = 1.0
    friction: float = 1.0
    linkage: float = 0.0
    offset: tuple[float, ...] = ZEROS

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Gap:
        plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list | tuple) else v for k, v in values.items()}
        return cls(**plain)


NONE = Gap()
PARAMETERS = Gap(1.2, -0.03, 0.02, (0.85, 0.8, 0.75, 0.85), (1.3, 1.2, 1.3, 1.2))
STRUCTURE = Gap(
    motor_lag=0.03, friction_loss=1.0, torque=0.8, friction=0.6, linkage=0.4, offset=(0.03, 0.06, -0.03, -0.05)
)
BOTH = replace(PARAMETERS, **{f.name: getattr(STRUCTURE, f.name) for f in fields(Gap)[5:]})
GAPS = {"none": NONE, "parameters": PARAMETERS, "structure": STRUCTURE, "both": BOTH}


def redrawn(count: int, seed: int) -> list[Gap]:
    """Robots that differ from each other and from the simulator in everything, to learn identification from.

    Args:
        count: robots
        seed: of the draws
    """
    rng = np.random.default_rng(seed)

    def one() -> Gap:
        def drawn(low: float, high: float) -> float:
            return float(rng.uniform(low, high))

        return Gap(
            mass=drawn(0.9, 1.3),
            com_x=drawn(-0.04, 0.04),
            com_z=drawn(-0.03, 0.03),
            kp=_each(rng.uniform(0.6, 1.1, 4)),
            kd=_each(rng.uniform(0.8, 1.5, 4)),
            motor_lag=drawn(0.01, 0.04),
            friction_loss=drawn(0, 1.5),
            torque=drawn(0.7, 1),
            friction=drawn(0.4, 1),
            linkage=drawn(0, 0.5),
            offset=_each(rng.uniform(-0.06, 0.06, 4)),
        )

    return [one() for _ in range(count)]


def randomised(count: int, seed: int) -> list[Gap]:
    """Robots of domain randomisation: identification's parameters within wide bounds, and the ground's friction."""
    rng = np.random.default_rng(seed)
    return [replace(identified(rng.uniform(-1, 1, 11)), friction=float(rng.uniform(0.4, 1.1))) for _ in range(count)]


def identified(numbers: Sequence[float] | np.ndarray, narrow: bool = False) -> Gap:
    """The gap that 11 numbers of a search, about 0 and 1 wide, stand for.

    Args:
        numbers: of mass, centre of mass (2), gains of each joint (4 + 4)
        narrow: within the paper's bounds: ±5 % of mass and gains, ±2 cm
    """
    n = np.asarray(numbers, float)
    if narrow:
        n = np.tanh(n)
        return Gap(1 + 0.05 * n[0], 0.02 * n[1], 0.02 * n[2], _each(1 + 0.05 * n[3:7]), _each(1 + 0.05 * n[7:]))
    kp, kd = np.clip(1 + 0.3 * n[3:7], 0.3, 2), np.clip(1 + 0.5 * n[7:], 0.2, 4)
    return Gap(float(max(0.3, 1 + 0.2 * n[0])), float(0.03 * n[1]), float(0.03 * n[2]), _each(kp), _each(kd))


def _each(values: np.ndarray) -> tuple[float, ...]:
    return tuple(float(v) for v in values)


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
