"""The paper's measures in mm, mm a frame, mm a frame²: replays against the real, policies against the motion."""

from __future__ import annotations

from typing import Any

import numpy as np

from blockwright_asap.motion import Reference
from blockwright_asap.tracking import Rollouts

HORIZONS = {"0.25": 12, "0.5": 25, "1.0": 50}  # s → control steps
FALLEN = 0.08  # m: height of the trunk


def errors(got: np.ndarray, wanted: np.ndarray) -> dict[str, float]:
    """Means over time, robots and bodies.

    Args:
        got, wanted: positions of bodies [T,N,NB,3], m

    Returns:
        ``g_mpjpe``: global; ``mpjpe``: relative to the trunk; ``acc`` and ``vel`` of the bodies and of the trunk
    """
    off = got - wanted
    root = off - off[:, :, :1]
    return {
        "g_mpjpe": _mean(off),
        "mpjpe": _mean(root),
        "acc": _mean(np.diff(off, n=2, axis=0)),
        "vel": _mean(np.diff(off, axis=0)[:, :, 0]),
    }


def by_horizon(got: np.ndarray, wanted: np.ndarray) -> dict[str, dict[str, float]]:
    """Errors of replays of a second, over their first quarter, half and all of it."""
    return {name: errors(got[:steps], wanted[:steps]) for name, steps in HORIZONS.items()}


def over_time(got: np.ndarray, wanted: np.ndarray) -> list[float]:
    """Global error of each step, mm."""
    return (np.linalg.norm(got - wanted, axis=-1).mean((1, 2)) * 1e3).tolist()


def tracking(reference: Reference, found: Rollouts) -> dict[str, Any]:
    """Errors and success (%) of a policy, over all motions and for each, and ``over_time``.

    An episode succeeds if the mean distance of its bodies is never above 0.5 m and it has not fallen.
    """
    wanted = reference.bodies[found.motion].transpose(1, 0, 2, 3)
    distance = np.linalg.norm(found.bodies - wanted, axis=-1).mean(-1)
    well = (distance < 0.5).all(0) & (found.bodies[:, :, 0, 2] > FALLEN).all(0)
    groups = {"all": np.ones(len(well), bool)} | {name: found.motion == i for i, name in enumerate(reference.names)}
    by_motion = {
        name: {"success": 100 * float(well[who].mean()), **errors(found.bodies[:, who], wanted[:, who])}
        for name, who in groups.items()
    }
    return {**by_motion, "over_time": over_time(found.bodies, wanted)}


def _mean(difference: np.ndarray) -> float:
    return float(np.linalg.norm(difference, axis=-1).mean() * 1e3)
