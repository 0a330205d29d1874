"""Motion tracking: the policy's world, its observations and rewards, and rollouts of a policy in it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from blockwright_asap.motion import Reference
from blockwright_asap.robot import DEFAULT, FEET, NB, NQ, NU, SCALE, TOP
from blockwright_asap.world import Correction, Gap, World

Act = Callable[[np.ndarray], np.ndarray]
FREE = np.array([0, 0, 1] + [1] * NU)  # coordinates that an episode's start is drawn around
LIMIT = 6.0  # of an action
N_ACTOR, N_CRITIC = 30, 30 + 1 + 2 + 3 + 2 * NB


@dataclass(frozen=True)
class Rollouts:
    """What robots did: states [T+1,N,2·NQ], commands [T,N,NU], bodies [T+1,N,NB,3], the motion of each robot [N]."""

    states: np.ndarray
    commands: np.ndarray
    bodies: np.ndarray
    motion: np.ndarray

    def first(self, each: int) -> Rollouts:
        """Of each motion so many robots."""
        kept = np.concatenate([np.flatnonzero(self.motion == motion)[:each] for motion in np.unique(self.motion)])
        return Rollouts(self.states[:, kept], self.commands[:, kept], self.bodies[:, kept], self.motion[kept])

    def with_others(self, others: Rollouts) -> Rollouts:
        """Those of all robots of both."""
        arrays = (np.concatenate([vars(self)[name], vars(others)[name]], int(name != "motion")) for name in vars(self))
        return Rollouts(*arrays)


class Tracking:
    """Follow a reference by its phase; PPO's environment.

    The action is an offset of the reference's next joint angles, times ``SCALE``. The actor sees pitch, rates, joints,
    its last action, the phase, the motion and the way to the reference's next joints: no position and no height, as on
    hardware without odometry. The critic sees those too. Episodes start anywhere in a motion (reference-state
    initialisation); they end when a body is further off than a limit that tightens with ``progress``.

    Args:
        reference: the motions
        gaps: one for each robot
        seed: of starts
        correction: applied in every step
        noise: half the width of uniform noise on the command: the paper's baseline of that name
        limits: m, of the distance at which an episode ends, at the start and the end of the curriculum
    """

    def __init__(
        self,
        reference: Reference,
        gaps: Sequence[Gap],
        seed: int = 0,
        correction: Correction | None = None,
        noise: float = 0.0,
        limits: tuple[float, float] = (1.0, 0.35),
    ) -> None:
        self.reference, self.n, self.rng = reference, len(gaps), np.random.default_rng(seed)
        self.world, self.correction, self.noise, self.limits = World(gaps), correction, noise, limits
        self.progress = 0.0  # of the training, from 0 to 1
        self.motion, self.t = np.zeros(self.n, int), np.zeros(self.n, int)
        self.last, self.before = np.zeros((self.n, NU)), np.zeros((self.n, NU))
        self.command = np.zeros((self.n, NU))
        self.reset(np.ones(self.n, bool))

    def reset(
        self, who: np.ndarray, motion: np.ndarray | None = None, t: np.ndarray | None = None, wobble: float = 0.02
    ) -> None:
        """Start episodes, at random motions and times if none are given."""
        count = int(who.sum())
        if not count:
            return
        reference = self.reference
        self.motion[who] = self.rng.integers(0, len(reference.names), count) if motion is None else motion
        self.t[who] = self.rng.integers(0, reference.steps - 10, count) if t is None else t
        at = (self.motion[who], self.t[who])
        qpos = reference.qpos[at] + self.rng.normal(0, wobble, (count, NQ)) * FREE
        qvel = reference.qvel[at] + self.rng.normal(0, wobble * 5, (count, NQ)) * FREE
        self.world.place(who, qpos, qvel)
        self.world.bodies[who] = reference.bodies[at]
        self.last[who] = self.before[who] = 0
        if self.correction is not None:
            self.correction.forget(who)

    def observe(self, who: Any = slice(None)) -> tuple[np.ndarray, np.ndarray]:
        """What the actor [n,30] and the critic [n,50] see."""
        world, motion, steps, reference = self.world, self.motion[who], self.t[who], self.reference
        p, v, bodies = world.qpos[who], world.qvel[who], world.bodies[who]
        now, following = np.minimum(steps, reference.steps), np.minimum(steps + 1, reference.steps)
        c, s, phase = np.cos(p[:, 2]), np.sin(p[:, 2]), steps / reference.steps
        ahead, speed = v[:, 0] * c - v[:, 1] * s, v[:, 0] * s + v[:, 1] * c
        clock = np.stack([np.sin(2 * np.pi * phase), np.cos(2 * np.pi * phase), phase], 1)
        which = np.eye(len(reference.names))[motion]
        goal = reference.qpos[motion, following, 2:] - p[:, 2:]
        joints = (p[:, 3:] - DEFAULT, v[:, 3:] * 0.05, self.last[who])
        trunk = (p[:, 2:3], v[:, 2:3] * 0.25, ahead[:, None], speed[:, None])
        actor = np.concatenate([*trunk, *joints, clock, which, goal, reference.qvel[motion, following, :3]], 1)
        off = (reference.bodies[motion, now] - bodies)[:, :, [0, 2]].reshape(len(motion), -1)
        place = (reference.qpos[motion, now] - p)[:, :2], (reference.qvel[motion, now] - v)[:, :3]
        return actor, np.concatenate([actor, p[:, 1:2], *place, off], 1)

    def act(self, action: np.ndarray) -> None:
        """One control step of the physics."""
        base = self.reference.qpos[self.motion, np.minimum(self.t + 1, self.reference.steps), 3:]
        self.command = (base - DEFAULT) / SCALE + np.clip(action, -LIMIT, LIMIT)
        drawn = self.rng.uniform(-self.noise, self.noise, self.command.shape) if self.noise else 0.0
        self.world.advance(self.command + drawn, self.correction)
        self.before, self.last = self.last, np.clip(action, -LIMIT, LIMIT)
        self.t = self.t + 1

    def step(self, action: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, Any, np.ndarray]:
        """Act and be rewarded.

        Returns:
            rewards, whether episodes ended, whether by their time alone, what is observed next (of new episodes where
            they ended), and what the critic saw at the end, before new ones began
        """
        self.act(action)
        distance = np.linalg.norm(
            self.world.bodies - self.reference.bodies[self.motion, np.minimum(self.t, self.reference.steps)], axis=-1
        )
        high, low = self.limits
        limit = max(low, high - (high - low) * self.progress / 0.6)
        fell = (distance.max(1) > limit) | (np.abs(self.world.qpos[:, 2]) > 1.2)
        timeout = (self.t >= self.reference.steps) & ~fell
        reward, done = self._reward(distance**2) * 0.02 - 4.0 * fell, fell | timeout
        seen = self.observe()
        last_critic = seen[1].copy()
        if done.any():
            self.reset(done)
            for whole, fresh in zip(seen, self.observe(done), strict=True):
                whole[done] = fresh
        return reward, done, timeout, seen, last_critic

    def _reward(self, squared: np.ndarray) -> np.ndarray:
        """The paper's tracking rewards (table I), of squared distances of bodies [N,NB]."""
        world, at = self.world, (self.motion, self.t)
        rq, rv = self.reference.qpos[at], self.reference.qvel[at]

        def near(error: np.ndarray, width: float) -> np.ndarray:
            return np.exp(-error / width)

        bodies = near(squared.mean(1), 0.03)
        top, feet = near(squared[:, TOP].mean(1), 0.03), near(squared[:, FEET].mean(1), 0.03)
        pitch = near((rq[:, 2] - world.qpos[:, 2]) ** 2, 0.1) + near(((rv[:, 2] - world.qvel[:, 2]) / 3) ** 2, 1)
        speed = near(((rv[:, :2] - world.qvel[:, :2]) ** 2).sum(1), 1)
        joints = near(((rq[:, 3:] - world.qpos[:, 3:]) ** 2).sum(1), 1)
        rates = near(((rv[:, 3:] - world.qvel[:, 3:]) ** 2).mean(1), 10)
        jerk = 0.1 * ((self.last - self.before) ** 2).sum(1) * min(1, 0.2 + 1.6 * self.progress)
        return bodies + 1.6 * top + 2.1 * feet + 0.5 * (pitch + speed + rates) + 0.75 * joints - jerk

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on."""
        arrays = {name: getattr(self, name).copy() for name in ("motion", "t", "last", "before")}
        memory = {} if self.correction is None else self.correction.state_dict()
        return {"world": self.world.state_dict(), "rng": self.rng.bit_generator.state, "memory": memory, **arrays}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.correction is not None:
            self.correction.load_state_dict(state["memory"])
        self.world.load_state_dict(state["world"])
        self.rng.bit_generator.state = state["rng"]
        for name in ("motion", "t", "last", "before"):
            setattr(self, name, np.array(state[name]))


def roll_out(tracking: Tracking, act: Act, seed: int, explore: float = 0.0, wobble: float = 0.02) -> Rollouts:
    """Run every motion from its beginning to its end, whatever happens.

    Args:
        tracking: with as many robots for each motion, in the order of the motions
        act: observations of the actor → actions
        seed: of starts and exploration
        explore: standard deviation of noise on the actions
        wobble: standard deviation of the starts, rad
    """
    rng, reference = np.random.default_rng(seed), tracking.reference
    tracking.rng = np.random.default_rng(seed)
    motion = np.repeat(np.arange(len(reference.names)), tracking.n // len(reference.names))
    tracking.reset(np.ones(tracking.n, bool), motion, np.zeros(tracking.n, int), wobble)
    states, commands, bodies = [tracking.world.state()], [], [tracking.world.bodies.copy()]
    for _ in range(reference.steps):
        action = act(tracking.observe()[0])
        tracking.act(action + explore * rng.normal(size=action.shape) if explore else action)
        states.append(tracking.world.state())
        commands.append(tracking.command.copy())
        bodies.append(tracking.world.bodies.copy())
    return Rollouts(np.stack(states), np.stack(commands), np.stack(bodies), motion)
