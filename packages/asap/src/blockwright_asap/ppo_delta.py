"""The paper's way to a delta action: PPO in a world that starts at measured states and rewards staying at them."""

from __future__ import annotations

from typing import Any

import numpy as np

from blockwright_asap.labels import BOUND
from blockwright_asap.ppo import ActorCritic
from blockwright_asap.replay import N_FEATURES, features
from blockwright_asap.robot import FEET, NQ, NS, NU, TOP
from blockwright_asap.tracking import Rollouts
from blockwright_asap.world import NONE, simulators

HORIZON, LEFT = 50, 12  # control steps of an episode; at least so many are left at its start
N_CRITIC = N_FEATURES + NS


class Replaying:
    """Environment of PPO: act by a_real + Δa, be rewarded as in tracking, against the measured trajectory (table II).

    Args:
        real: rollouts
        n: robots
        seed: of starts
        norm_weight: of exp ‖Δa‖ − 1
        horizon: control steps of an episode
    """

    def __init__(
        self, real: Rollouts, n: int = 96, seed: int = 0, norm_weight: float = 0.1, horizon: int = HORIZON
    ) -> None:
        self.real, self.n, self.norm_weight, self.horizon = real, n, norm_weight, horizon
        self.rng, self.world, self.progress = np.random.default_rng(seed), simulators(n, NONE), 0.0
        self.robot, self.t, self.age = np.zeros(n, int), np.zeros(n, int), np.zeros(n, int)
        self.last = np.zeros((n, NU))
        self._reset(np.ones(n, bool))

    def observe(self) -> tuple[np.ndarray, np.ndarray]:
        """The state and the real command; the critic sees the way to the next measured state too."""
        steps, world = len(self.real.commands), self.world
        command = self.real.commands[np.minimum(self.t, steps - 1), self.robot]
        seen = features(world.qpos, world.qvel, command)
        goal = self.real.states[np.minimum(self.t + 1, steps), self.robot]
        return seen, np.concatenate([seen, goal - world.state()], 1)

    def step(self, action: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, Any, np.ndarray]:
        action = np.clip(action, -BOUND, BOUND)
        self.world.advance(self.real.commands[self.t, self.robot] + action)
        self.t, self.age = self.t + 1, self.age + 1
        size = np.exp(np.minimum(np.linalg.norm(action, axis=1), 5)) - 1
        effort = self.norm_weight * size + 0.01 * ((action - self.last) ** 2).sum(1)
        reward = (self._near() - effort) * 0.02
        self.last = action
        done = (self.age >= self.horizon) | (self.t >= len(self.real.commands))
        seen = self.observe()
        last_critic = seen[1].copy()
        if done.any():
            self._reset(done)
            seen = self.observe()
        return reward, done, done, seen, last_critic

    def _near(self) -> np.ndarray:
        world, at = self.world, (self.t, self.robot)
        squared = ((world.bodies - self.real.bodies[at]) ** 2).sum(-1)
        off = self.real.states[at] - world.state()
        bodies = sum(np.exp(-d.mean(1) / 0.01) for d in (squared, squared[:, TOP], squared[:, FEET]))
        pitch = np.exp(-(off[:, 2] ** 2) / 0.05) + np.exp(-((off[:, NQ + 2] / 3) ** 2) / 0.3)
        speed = np.exp(-(off[:, NQ : NQ + 2] ** 2).sum(1) / 0.3)
        joints = np.exp(-(off[:, 3:NQ] ** 2).sum(1) / 0.1) + np.exp(-(off[:, NQ + 3 :] ** 2).mean(1) / 4)
        return bodies + 0.5 * (pitch + speed + joints)

    def _reset(self, who: np.ndarray) -> None:
        count, (steps, robots) = int(who.sum()), self.real.commands.shape[:2]
        self.robot[who] = self.rng.integers(0, robots, count)
        self.t[who] = self.rng.integers(0, steps - LEFT, count)
        at = (self.t[who], self.robot[who])
        self.world.place(who, self.real.states[at][:, :NQ], self.real.states[at][:, NQ:])
        self.world.bodies[who] = self.real.bodies[at]
        self.last[who], self.age[who] = 0, 0

    def state_dict(self) -> dict[str, Any]:
        arrays = {name: getattr(self, name).copy() for name in ("robot", "t", "age", "last")}
        return {"world": self.world.state_dict(), "rng": self.rng.bit_generator.state, **arrays}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.world.load_state_dict(state["world"])
        self.rng.bit_generator.state = state["rng"]
        for name in ("robot", "t", "age", "last"):
            setattr(self, name, np.array(state[name]))


class DeltaPolicy:
    """A trained actor as a correction; it has no memory."""

    def __init__(self, net: ActorCritic) -> None:
        self.net = net

    def action(self, qpos: np.ndarray, qvel: np.ndarray, command: np.ndarray) -> np.ndarray:
        return np.clip(self.net(features(qpos, qvel, command)), -BOUND, BOUND)

    def state(self, qpos: np.ndarray, qvel: np.ndarray, command: np.ndarray) -> np.ndarray:
        return np.zeros((len(qpos), NS))

    def forget(self, who: np.ndarray) -> None:
        pass

    def show(self, measured: np.ndarray) -> None:
        pass

    def state_dict(self) -> dict[str, np.ndarray]:
        return {}

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        pass


def new_net(seed: int) -> ActorCritic:
    return ActorCritic(N_FEATURES, N_CRITIC, NU, std=0.3, seed=seed)
