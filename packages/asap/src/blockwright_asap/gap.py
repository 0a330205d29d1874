"""What makes the "real" robot differ from the simulated one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import numpy as np

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
