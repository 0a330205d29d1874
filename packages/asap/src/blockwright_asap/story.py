"""All of ASAP for one seed: train, roll out in the real, learn, replay, tune, deploy, measure."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from blockwright_asap import labels, measures
from blockwright_asap.methods import ACTIONS, AGAIN, FIXED_POINT, METHODS, REPLAYED, Tuning, tuning
from blockwright_asap.ppo import PPO, ActorCritic
from blockwright_asap.replay import open_loop, replay
from blockwright_asap.robot import DEFAULT, NQ, SCALE
from blockwright_asap.study import Study, alone, write_json
from blockwright_asap.tracking import Act, Rollouts, Tracking, roll_out
from blockwright_asap.world import NONE, Correction, Sparing, World

RESULTS = "results"
DEPLOYED = 8  # rollouts of each motion
UNDO = 10  # iterations of the fixed point
IDENTIFIED = {
    "sysid_narrow": "narrow",
    "sysid": "sysid",
    "sysid_delta": "sysid",
    "sysid_delta_all": "sysid",
    AGAIN: "sysid",
}  # method → its simulator
Parts = dict[str, dict[str, Any]]  # open, closed or size → row → figures


def prepare(study: Study, methods: Sequence[str]) -> None:
    """The stages that methods share: policy, rollouts, identification; and the figures of no method."""
    with alone(study.folder):
        _ = study.real
        for base in dict.fromkeys(IDENTIFIED[name] for name in methods if name in IDENTIFIED):
            study.simulator(base)
        keep(study, "untuned", lambda: _untuned(study))


def measure(study: Study, method: str, tune: int) -> None:
    """Tune by a method, deploy, and keep the figures; nothing if they are there.

    Args:
        study: prepared
        method: of methods.py, or ``fixed_point``: no tuning, but the delta action undone at run time; or
            ``sysid_delta_again``: what the policy tuned by ``sysid_delta`` does in the real is collected, learnt from
            beside what was collected first, and the policy is tuned again
        tune: iterations of PPO
    """
    if method == FIXED_POINT:
        keep(study, method, lambda: {"closed": {method: deploy(study, study.policy, undo=_delta(study))}})
    elif method == AGAIN:
        keep(study, f"{method}_{tune}", lambda: {"closed": {method: deploy(study, _again(study, tune))}})
    else:
        keep(study, f"{method}_{tune}", lambda: _figures(study, method, tune))


def _untuned(study: Study) -> Parts:
    deployed = {"vanilla in the simulator": deploy(study, study.policy, [NONE]), "vanilla": deploy(study, study.policy)}
    return {"open": {"floor": open_loop(study.held_out, study.gaps(1)[0])}, "closed": deployed}


def _figures(study: Study, method: str, tune: int) -> Parts:
    found, parts = tuning(method, study), Parts()
    if method in REPLAYED:
        parts["open"] = {method: open_loop(study.held_out, found.gaps[0], found.correction)}
    if method in ACTIONS:
        parts["size"] = {method: size_of(study, found)}
    parts["closed"] = {method: deploy(study, tuned(study, method, found, tune))}
    return parts


def _again(study: Study, tune: int) -> ActorCritic:
    first = "sysid_delta"
    with alone(study.folder, f"tuned_{first}"):
        net = tuned(study, first, tuning(first, study), tune)
    second = study.again(net)
    return tuned(second, first, tuning(first, second), tune)


def _delta(study: Study) -> Correction:
    correction = tuning("delta", study).correction
    assert correction is not None
    return correction


def keep(study: Study, name: str, make: Callable[[], Parts]) -> None:
    """A file of figures for each method, so that several can be computed at once."""
    file = study.folder / RESULTS / f"{name}.json"
    if not file.exists():
        parts = make()
        file.parent.mkdir(exist_ok=True)
        write_json(file, parts)


def read(folder: Path, tune: int) -> Parts:
    """All figures of a seed's folder that were kept for so many iterations of tuning, or need none."""
    merged: Parts = {"open": {}, "closed": {}, "size": {}}
    for name in ("untuned", FIXED_POINT, *(f"{method}_{tune}" for method in (*METHODS, AGAIN))):
        file = folder / RESULTS / f"{name}.json"
        for part, rows in (json.loads(file.read_text()) if file.exists() else {}).items():
            merged[part].update(rows)
    return merged


def tuned(study: Study, method: str, where: Tuning, iterations: int) -> ActorCritic:
    """The policy after PPO in the corrected simulator; rewards are those of tracking."""
    net = copy.deepcopy(study.policy)
    with torch.no_grad():
        net.log_std.fill_(math.log(0.25))
    seed = study.settings.seed
    correction = Sparing(where.correction, where.spared) if where.correction and where.spared else where.correction
    environment = Tracking(study.reference, where.gaps, 50 + seed, correction, where.noise, (0.5, 0.5))
    trainer = PPO(environment, net, iterations, seed, lr=5e-4, statistics=0)
    trainer.train(study.folder / f"tuned_{method}_{iterations}.pt")
    return net


def deploy(
    study: Study, net: ActorCritic, gaps: Sequence[Any] | None = None, undo: Correction | None = None
) -> dict[str, Any]:
    """Errors of a policy on the real robot, without any correction of the simulator.

    Args:
        net: the policy
        gaps: one gap, of another robot
        undo: a delta action to invert at run time, with no training: a ← a₀ − Δ(s, a), repeated
    """
    count = DEPLOYED * len(study.reference.names)
    robots = list(gaps) * count if gaps else study.gaps(count, 1000)
    tracking = Tracking(study.reference, robots)
    act: Act = net if undo is None else Inverted(net, undo, tracking)
    return measures.tracking(study.reference, roll_out(tracking, act, 1000 + study.settings.seed))


class Inverted:
    """A policy whose actions undo a delta action by fixed-point iteration."""

    def __init__(self, net: ActorCritic, delta: Correction, tracking: Tracking) -> None:
        self.net, self.delta, self.tracking = net, delta, tracking

    def __call__(self, observed: np.ndarray) -> np.ndarray:
        tracking, reference = self.tracking, self.tracking.reference
        following = np.minimum(tracking.t + 1, reference.steps)
        base = (reference.qpos[tracking.motion, following, 3:] - DEFAULT) / SCALE
        wanted = base + self.net(observed)
        command = wanted
        for _ in range(UNDO):
            self.delta.forget(np.ones(tracking.n, bool))
            command = wanted - self.delta.action(tracking.world.qpos, tracking.world.qvel, command)
        return command - base


def size_of(study: Study, found: Tuning) -> dict[str, Any]:
    """Mean |Δa| by joint along the held-out real rollouts, and what labels explain."""
    real, correction = study.held_out, found.correction
    assert correction is not None
    correction.forget(np.ones(real.commands.shape[1], bool))
    said = [
        np.abs(correction.action(state[:, :NQ], state[:, NQ:], command)).mean(0)
        for state, command in zip(real.states[:-1], real.commands, strict=True)
    ]
    fitted = labels.of_rollouts(real, found.gaps[0])
    return {"joints": np.mean(said, 0).tolist(), "cost": [fitted.before, fitted.after]}


def replay_itself(study: Study, real: Rollouts) -> float:
    """Largest error, m, of the real physics that replays its own commands, motors included: 0."""
    world = World(study.gaps(real.commands.shape[1], 10))
    got, _ = replay(world, real.states, real.commands)
    return float(np.abs(got - real.bodies[1:]).max())
