"""The ways to tune a policy for the real robot: where it is tuned, and what corrects the simulator there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from blockwright_asap.learned import read
from blockwright_asap.ppo import PPO
from blockwright_asap.ppo_delta import HORIZON, DeltaPolicy, Replaying, new_net
from blockwright_asap.study import Study
from blockwright_asap.task import train
from blockwright_asap.world import NONE, Correction, Gap, randomised


@dataclass(frozen=True)
class Tuning:
    """Where a policy is tuned.

    Args:
        gaps: of the simulated robots
        correction: of the simulator
        noise: on the commands
        spared: robots that are tuned without the correction
    """

    gaps: list[Gap]
    correction: Correction | None = None
    noise: float = 0.0
    spared: int = 0


def tuning(method: str, study: Study) -> Tuning:
    """Where ``method`` tunes; what it learns from real rollouts first is learnt, or read from the study's folder."""
    return METHODS[method](study)


def _simulator(base: str) -> Callable[[Study], Tuning]:
    return lambda study: Tuning([study.simulator(base)] * study.settings.robots)


def _delta(base: str, corrects: str = "action", rounds: int = 0, spared: float = 0.0) -> Callable[[Study], Tuning]:
    """The simulator, corrected by what ``experiment=asap_delta`` trains, with ``rounds`` of many-step labels.

    ``spared`` is the share of robots without the correction.
    """

    def learn(study: Study) -> Tuning:
        done = [train(study, base, corrects)]
        for _ in range(rounds):
            done.append(train(study, base, corrects, drift=done))
        robots = study.settings.robots
        return Tuning([study.simulator(base)] * robots, read(done[-1]), spared=int(spared * robots))

    return learn


def _paper(
    name: str = "delta_ppo", norm_weight: float = 0.1, horizon: int = HORIZON, each: int | None = None
) -> Callable[[Study], Tuning]:
    """The paper's delta action: PPO against the measured trajectories, ``each`` of a motion or all."""

    def learn(study: Study) -> Tuning:
        net, settings = new_net(study.settings.seed), study.settings
        real = study.real if each is None else study.real.first(each)
        environment = Replaying(real, settings.robots, settings.seed, norm_weight, horizon)
        trainer = PPO(environment, net, study.delta_iterations, settings.seed, least_std=0.05)
        trainer.train(study.folder / f"{name}.pt")
        return Tuning([NONE] * settings.robots, DeltaPolicy(net))

    return learn


def _randomised(study: Study) -> Tuning:
    return Tuning(randomised(study.settings.robots, study.settings.seed))


def _noise(study: Study) -> Tuning:
    return Tuning([NONE] * study.settings.robots, noise=0.5)


def _real(study: Study) -> Tuning:
    return Tuning(study.gaps(study.settings.robots))


# The paper's ablations (figures 10 to 12) of its delta action: weight of the action norm, horizon, data
ABLATIONS: Mapping[str, dict[str, Any]] = {
    "delta_ppo_norm_0": {"norm_weight": 0.0},
    "delta_ppo_norm_1": {"norm_weight": 1.0},
    "delta_ppo_quarter": {"horizon": HORIZON // 4},
    "delta_ppo_half": {"horizon": HORIZON // 2},
    "delta_ppo_three_halves": {"horizon": HORIZON * 3 // 2},
    "delta_ppo_1_episode": {"each": 1},
    "delta_ppo_3_episodes": {"each": 3},
}
METHODS: Mapping[str, Callable[[Study], Tuning]] = {
    "simulator": _simulator("sim"),
    "action_noise": _noise,
    "randomised": _randomised,
    "sysid_narrow": _simulator("narrow"),
    "sysid": _simulator("sysid"),
    "delta_dynamics": _delta("sim", "state"),
    "delta_ppo": _paper(),
    **{name: _paper(name, **changed) for name, changed in ABLATIONS.items()},
    "delta": _delta("sim"),
    "delta_many_steps": _delta("sim", rounds=2),
    # Chosen on seeds 10 to 13, which the study does not use: many-step labels took a third off the open-loop error at
    # 1 s on two seeds of three, and the policy tuned with and without the correction was the better one in the real on
    # all four. The code of the paper names such a mixture too.
    "sysid_delta": _delta("sysid", rounds=1, spared=0.5),
    "sysid_delta_all": _delta("sysid", rounds=1),
    "real": _real,
}
FIXED_POINT = "fixed_point"  # tunes nothing
AGAIN = "sysid_delta_again"  # a second round, with rollouts of the policy that the first one tuned
REPLAYED = [name for name in METHODS if name not in ("action_noise", "randomised", "real", "sysid_delta_all")]
ACTIONS = ("delta_ppo", *ABLATIONS, "delta", "delta_many_steps", "sysid_delta")  # correct by Δa
MEANING = {
    "simulator": "the plain simulator (control)",
    "action_noise": "the plain simulator, noise on actions",
    "randomised": "randomised simulators",
    "sysid_narrow": "identified within the paper's bounds",
    "sysid": "identified with wide bounds (CMA-ES)",
    "delta_dynamics": "plain + delta dynamics",
    "delta_ppo": "plain + delta action by PPO (the paper's)",
    "delta_ppo_norm_0": "delta action by PPO, no weight on its norm",
    "delta_ppo_norm_1": "delta action by PPO, ten times the weight on its norm",
    "delta_ppo_quarter": "delta action by PPO, episodes of 0.25 s",
    "delta_ppo_half": "delta action by PPO, episodes of 0.5 s",
    "delta_ppo_three_halves": "delta action by PPO, episodes of 1.5 s",
    "delta_ppo_1_episode": "delta action by PPO, one rollout of each motion",
    "delta_ppo_3_episodes": "delta action by PPO, three rollouts of each motion",
    "delta": "plain + delta action by regression",
    "delta_many_steps": "plain + delta action by regression, many steps",
    "sysid_delta": "identified + delta action by regression, in half of the robots",
    "sysid_delta_all": "identified + delta action by regression, in all robots",
    AGAIN: "identified + delta action, collected and tuned once more",
    "real": "the real robot itself (bound)",
    FIXED_POINT: "not tuned: delta action undone at run time",
}
