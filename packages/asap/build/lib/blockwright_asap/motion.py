"""Three reference motions of two seconds: a bow, two hops, a leap of 0.4 m. Kinematic, and not quite feasible."""

from __future__ import annotations

from functools import cached_property

import mujoco
import numpy as np

from blockwright_asap.robot import BODIES, DT, HALF, LINK, NB, NQ, STANDING, model

STEPS = 100
Curve = np.ndarray


class Reference:
    """The motions over time.

    Attributes:
        names: of the M motions
        qpos, qvel: [M,T+1,NQ]
        bodies: [M,T+1,NB,3], m
    """

    def __init__(self, steps: int = STEPS) -> None:
        found = motions(steps)
        self.names, self.steps = list(found), steps
        self.qpos = np.stack([found[name] for name in self.names])
        self.qvel = np.gradient(self.qpos, DT, axis=1)

    @cached_property
    def bodies(self) -> np.ndarray:
        still, data = model(), mujoco.MjData(model())
        places = np.zeros((*self.qpos.shape[:2], NB, 3))
        for at in np.ndindex(*self.qpos.shape[:2]):
            data.qpos[:] = self.qpos[at]
            mujoco.mj_forward(still, data)
            places[at] = data.sensordata.reshape(len(BODIES), 3)
        return places


def motions(steps: int = STEPS) -> dict[str, np.ndarray]:
    """Name → qpos [T+1,NQ]."""
    t = np.arange(steps + 1) * DT
    zero = np.zeros(steps + 1)
    bow = 0.35 * (_ramp(t, 0.15, 0.45) - 2 * _ramp(t, 0.6, 1.0) + 2 * _ramp(t, 1.1, 1.4) - _ramp(t, 1.5, 1.8))
    first, second = _hop(t, 0.40, 0.10, 1.2), _hop(t, 1.15, 0.10, 1.2)
    early = t < 0.95
    height = np.where(early, np.where(t > 0.8, np.minimum(first[0], second[0]), first[0]), second[0])
    lifted = np.where(early, first[1], second[1])
    z, up, leaves, lands = _hop(t, 0.55, 0.11, 1.4)
    forward = 0.40 * _ramp(t, leaves, lands)
    return {
        "bow": _pose(zero, STANDING - 0.04 - 0.03 * np.abs(bow) / 0.35, -bow, zero, zero),
        "hops": _pose(zero, height, zero, zero, lifted),
        "leap": _pose(0.40 * _ramp(t, leaves - 0.12, lands + 0.06), z, zero, forward, up),
    }


def _ramp(t: Curve, start: float, end: float) -> Curve:
    """From 0 to 1 with no velocity and no acceleration at both ends."""
    s = np.clip((t - start) / (end - start), 0, 1)
    return s * s * s * (10 - 15 * s + 6 * s * s)


def _hop(t: Curve, start: float, crouch: float, speed: float, g: float = 9.81) -> tuple[Curve, Curve, float, float]:
    """Height of the trunk over a crouch, a push, a flight and a landing; how far up the feet go; leaving, landing."""
    push_time = 0.12
    leaves, flight = start + push_time, 2 * speed / g
    lands = leaves + flight
    s = np.clip((t - start) / push_time, 0, 1)
    z = STANDING - crouch * _ramp(t, start - 0.3, start - 0.02)
    up = STANDING - crouch + (3 * crouch - speed * push_time) * s**2 + (speed * push_time - 2 * crouch) * s**3
    z = np.where((t >= start) & (t < leaves), up, z)
    flying = (t >= leaves) & (t < lands)
    z = np.where(flying, STANDING + speed * (t - leaves) - 0.5 * g * (t - leaves) ** 2, z)
    give = _ramp(t, lands - 0.04, lands + 0.1) - _ramp(t, lands + 0.1, lands + 0.35)
    z = np.where(t >= lands, STANDING - 0.08 * give, z)
    tucked = 0.03 * np.sin(np.pi * np.clip((t - leaves) / flight, 0, 1))
    return z, np.where(flying, z - STANDING + tucked, 0), leaves, lands


def _pose(x: Curve, z: Curve, pitch: Curve, foot_x: Curve, foot_z: Curve) -> np.ndarray:
    """Inverse kinematics: the trunk at (x, z, pitch), each foot below its hip at rest, moved by (foot_x, foot_z)."""
    q = np.zeros((len(x), NQ))
    q[:, 0], q[:, 1], q[:, 2] = x, z, pitch
    for leg, side in enumerate((HALF, -HALF)):
        hip_x, hip_z = x + side * np.cos(pitch), z + side * np.sin(pitch)
        dx, dz = side + foot_x - hip_x, hip_z - (foot_z + 0.025)
        reach = np.clip(np.hypot(dx, dz), 0.12, 2 * LINK - 1e-3)
        knee = np.pi - np.arccos(np.clip(1 - reach**2 / (2 * LINK**2), -1, 1))
        q[:, 3 + 2 * leg], q[:, 4 + 2 * leg] = np.arctan2(dx, dz) - knee / 2 - pitch, knee
    return q
