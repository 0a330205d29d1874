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
from blockwright_asap.gap import NONE
from blockwright_asap.methods import Tuning, tuning
from blockwright_asap.ppo import PPO, ActorCritic
from blockwright_asap.replay import open_loop, replay
from blockwright_asap.robot import DEFAULT, NQ, SCALE
from blockwright_asap.study import Settings, Study, write_json
from blockwright_asap.tracking import Act, Rollouts, Tracking, roll_out
from blockwright_asap.world import Correction, World

RESULT = "result.json"
DEPLOYED = 8  # rollouts of each motion
UNDO = 10  # iterations of the fixed point
Say = Callable[[str], None]


def run(folder: Path, settings: Settings, methods: Sequence[str], tune: int, say: Say) -> dict[str, Any]:
    """Every stage that is not in the folder yet, and the result of all.

    Args:
        folder: of the seed
        settings: of its stages
        methods: to tune by
        tune: iterations of PPO in tuning
        say: prints a line
    """
    study = Study(folder, settings)
    result = _read(folder / RESULT)

    def keep(part: str, name: str, make: Callable[[], Any]) -> Any:
        found = result.setdefault(part, {})
        if name not in found:
            found[name] = make()
            write_json(folder / RESULT, result)
        return found[name]

    say("policy")
    keep("closed", "vanilla in the simulator", lambda: deploy(study, study.policy, [NONE]))
    keep("closed", "vanilla", lambda: deploy(study, study.policy))
    keep("open", "floor", lambda: open_loop(study.held_out, study.gaps(1)[0]))
    for method in methods:
        say(method)
        found = tuning(method, study)
        if method not in ("real", "randomised", "action_noise"):
            keep("open", method, lambda found=found: open_loop(study.held_out, found.gaps[0], found.correction))
        if found.correction is not None:
            keep("size", method, lambda found=found: size_of(study, found))
        keep("closed", method, lambda found=found, m=method: deploy(study, tuned(study, m, found, tune)))
    if "delta" in methods:
        say("fixed point")
        correction = tuning("delta", study).correction
        keep("closed", "fixed point", lambda: deploy(study, study.policy, undo=correction))
    return result


def tuned(study: Study, method: str, where: Tuning, iterations: int) -> ActorCritic:
    """The policy after PPO in the corrected simulator; rewards are those of tracking."""
    net = copy.deepcopy(study.policy)
    with torch.no_grad():
        net.log_std.fill_(math.log(0.25))
    seed = study.settings.seed
    environment = Tracking(study.reference, where.gaps, 50 + seed, where.correction, where.noise, (0.5, 0.5))
    trainer = PPO(environment, net, iterations, seed, lr=5e-4, statistics=0)
    trainer.train(study.folder / f"tuned_{method}_{iterations}.pt")
    return net


def deploy(
    study: Study, net: ActorCritic, gaps: Sequence[Any] | None = None, undo: Correction | None = None
) -> dict[str, dict[str, float]]:
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


def _read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text()) if file.exists() else {}
