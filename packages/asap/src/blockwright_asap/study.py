"""The stages of one seed, each computed once and kept in a folder: policy, real rollouts, identification.

A stage that was killed is continued or done again, and gives what it would have given, bit for bit.
"""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from blockwright import ConfigError
from blockwright_asap import labels
from blockwright_asap.motion import Reference
from blockwright_asap.ppo import PPO, ActorCritic
from blockwright_asap.replacing import replaced
from blockwright_asap.sysid import identify
from blockwright_asap.tracking import N_ACTOR, N_CRITIC, Rollouts, Tracking, roll_out
from blockwright_asap.world import GAPS, NONE, Gap, redrawn

EXPLORE = 0.2  # standard deviation of noise on the actions of the rollouts that are learnt from
SETTINGS, POLICY, REAL, REDRAWN = "settings.json", "policy.pt", "real.npz", "redrawn"


@dataclass(frozen=True)
class Settings:
    """What the stages of a folder depend on.

    Args:
        seed: of everything
        gap: none, parameters, structure, both; or ``redrawn``: another robot in each episode
        iterations: of PPO for the first policy
        robots: of PPO
        episodes: real rollouts of each motion to learn from
        held_out: real rollouts of each motion to measure on
    """

    seed: int = 0
    gap: str = "both"
    iterations: int = 120
    robots: int = 96
    episodes: int = 12
    held_out: int = 6

    def __post_init__(self) -> None:
        if self.gap not in (*GAPS, REDRAWN):
            known = ", ".join((*GAPS, REDRAWN))
            raise ConfigError("data.gap", self.gap, "there is no such gap", f"Write one of {known}")
        for name in ("iterations", "robots", "episodes", "held_out"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ConfigError(f"data.{name}", getattr(self, name), "must be an integer above 0", "Write another")


class Study:
    """The stages of one folder.

    Args:
        folder: of their files; made if it is not there
        settings: the folder's, if it has any

    Raises:
        ConfigError: the folder was made with other settings
    """

    def __init__(self, folder: Path, settings: Settings) -> None:
        self.folder, self.settings, self.reference = folder, settings, Reference()
        folder.mkdir(parents=True, exist_ok=True)
        file, plain = folder / SETTINGS, asdict(settings)
        if not file.exists():
            write_json(file, plain)
        theirs = json.loads(file.read_text())
        for name, value in plain.items():
            if theirs.get(name) != value:
                rule = f"the stages in {folder} were made with {theirs.get(name)!r}"
                raise ConfigError(f"data.{name}", value, rule, "Name another folder, or delete that one")

    def gaps(self, count: int, salt: int = 0) -> list[Gap]:
        """The real robots of so many episodes."""
        if self.settings.gap == REDRAWN:
            return redrawn(count, 1000 * self.settings.seed + salt)
        return [GAPS[self.settings.gap]] * count

    @property
    def delta_iterations(self) -> int:
        """Of PPO for the paper's delta action: five for six of the policy's."""
        return max(1, self.settings.iterations * 5 // 6)

    @cached_property
    def policy(self) -> ActorCritic:
        """The policy trained in the plain simulator."""
        settings = self.settings
        net = ActorCritic(N_ACTOR, N_CRITIC, 4, seed=settings.seed)
        environment = Tracking(self.reference, [NONE] * settings.robots, settings.seed)
        PPO(environment, net, settings.iterations, settings.seed).train(self.folder / POLICY)
        return net

    @cached_property
    def real(self) -> Rollouts:
        """Rollouts of the policy on the real robot, with some noise on its actions."""
        return self._rolled_out(REAL, self.settings.episodes, 10, EXPLORE)

    @cached_property
    def held_out(self) -> Rollouts:
        """The same without noise, to measure on."""
        return self._rolled_out("held_out.npz", self.settings.held_out, 500, 0.0)

    def simulator(self, base: str) -> Gap:
        """The simulator to correct: ``sim`` as it is, ``sysid`` identified, ``narrow`` within the paper's bounds."""
        if base == "sim":
            return NONE
        file = self.folder / f"{base}.json"
        if not file.exists():
            found, history = identify(self.real, self.settings.seed, narrow=base == "narrow")
            write_json(file, {"gap": found.to_json(), "error": history})
        return Gap.from_json(json.loads(file.read_text())["gap"])

    def labelled(self, base: str, corrects: str, held_out: bool) -> np.ndarray:
        """Labels [T,N,width] of all transitions: Δa, or what the simulator's state misses."""

        def make() -> dict[str, np.ndarray]:
            found, gap = self.held_out if held_out else self.real, self.simulator(base)
            if corrects == "state":
                return {"labels": labels.residuals(found, gap)}
            return {"labels": labels.of_rollouts(found, gap).delta}

        name = f"labels_{base}_{corrects}_{'held_out' if held_out else 'real'}.npz"
        return arrays(self.folder / name, make)["labels"]

    def take_policy(self, other: Study) -> None:
        """Take over the policy of a study with the same seed: the gap does not touch it."""
        file = self.folder / POLICY
        if not file.exists():
            with replaced(file) as partial:
                shutil.copy(other.folder / POLICY, partial)

    def again(self, policy: ActorCritic) -> Study:
        """A second round in a folder of its own: the rollouts of a tuned policy beside the first ones."""
        second = Study(self.folder / "again", replace(self.settings, episodes=2 * self.settings.episodes))
        second.policy = policy
        other, each = Study(self.folder / "again" / "own", self.settings), self.settings.episodes
        other.policy = policy
        arrays(second.folder / REAL, lambda: vars(self.real.with_others(other._rolled_out(REAL, each, 20, EXPLORE))))
        _ = second.held_out
        return second

    def _rolled_out(self, name: str, each: int, salt: int, explore: float) -> Rollouts:
        def make() -> dict[str, np.ndarray]:
            gaps = self.gaps(each * len(self.reference.names), salt)
            found = roll_out(Tracking(self.reference, gaps), self.policy, salt + self.settings.seed, explore)
            return vars(found)

        return Rollouts(**arrays(self.folder / name, make))


def arrays(file: Path, make: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The arrays of a file, made and written first if it is not there."""
    if not file.exists():
        with replaced(file) as partial:
            np.savez(partial, **make())
    with np.load(file, allow_pickle=False) as stored:
        return dict(stored)


@contextmanager
def alone(folder: Path, stage: str = "stages") -> Iterator[None]:
    """Wait until no other process makes this stage of a folder: jobs of a sweep share it."""
    with (folder / f".{stage}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def write_json(file: Path, content: Any) -> None:
    with replaced(file) as partial:
        partial.write_text(json.dumps(content, indent=1))


def limit_threads() -> None:
    """The networks are small: a second thread costs more than it brings."""
    torch.set_num_threads(1)
