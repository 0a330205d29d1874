"""The world and what is learnt in it: corrections, labels, windows and prompts."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mujoco
import numpy as np
import pytest
import torch
from blockwright_asap import labels, methods, replay, story
from blockwright_asap.data import RobotRollouts, Windows
from blockwright_asap.labels import BOUND
from blockwright_asap.learned import Learned, predict
from blockwright_asap.methods import AGAIN
from blockwright_asap.motion import Reference
from blockwright_asap.replay import N_FEATURES, features
from blockwright_asap.robot import NQ, NS, NU, SUBSTEPS
from blockwright_asap.study import Settings, Study
from blockwright_asap.task import Correct, train
from blockwright_asap.tracking import Tracking
from blockwright_asap.world import (
    BOTH,
    NONE,
    STRUCTURE,
    Correction,
    Gap,
    Sparing,
    World,
    identified,
    randomised,
    redrawn,
    simulators,
)
from mujoco import rollout
from scipy.optimize import minimize
from small_study import SMALL

from blockwright import ConfigError, compose, preset


class Constant:
    """A correction that is always the same."""

    def __init__(self, action: float = 0.0, state: float = 0.0) -> None:
        self.change = (action, state)
        self.asked: list[np.ndarray] = []

    def action(self, qpos: np.ndarray, qvel: np.ndarray, command: np.ndarray) -> np.ndarray:
        self.asked.append(command.copy())
        return np.full((len(qpos), NU), self.change[0])

    def state(self, qpos: np.ndarray, qvel: np.ndarray, command: np.ndarray) -> np.ndarray:
        return np.full((len(qpos), NS), self.change[1])

    forget = show = load_state_dict = lambda self, given: None
    state_dict = dict


def test_a_correction_of_zero_is_the_simulator_bit_for_bit(study: Study) -> None:
    real, n = study.real, study.real.commands.shape[1]
    plain, _ = replay.replay(simulators(n), real.states, real.commands)
    corrected, _ = replay.replay(simulators(n), real.states, real.commands, Constant())
    assert np.array_equal(plain, corrected)
    other, _ = replay.replay(simulators(n), real.states, real.commands, Constant(action=0.01))
    assert not np.array_equal(plain, other)


def test_the_real_that_replays_its_own_commands_is_the_real(study: Study) -> None:
    assert story.replay_itself(study, study.real) == 0


def test_a_correction_is_applied_alike_in_learning_and_in_tuning() -> None:
    """The released code trains the delta at a quarter of the strength that it is tuned with."""
    correction, reference = Constant(action=0.3), Reference()
    tracking = Tracking(reference, [NONE] * 3, seed=1, correction=correction)
    start, world = tracking.world.state(), simulators(3)
    tracking.act(np.full((3, NU), 0.1))
    (command,) = correction.asked
    got, states = replay.replay(world, start[None], command[None], Constant(action=0.3))
    assert np.array_equal(states[0], tracking.world.state()) and np.array_equal(got[0], tracking.world.bodies)


def test_spared_robots_stay_in_the_simulator_bit_for_bit() -> None:
    starts = Reference().qpos[:, 0]

    def stepped(correction: Correction | None) -> np.ndarray:
        world = simulators(3)
        world.place(slice(None), starts, np.zeros((3, NQ)))
        world.advance(np.full((3, NU), 0.1), correction)
        return world.state()

    plain, corrected = stepped(None), stepped(Constant(action=0.3, state=0.01))
    found = stepped(Sparing(Constant(action=0.3, state=0.01), 2))
    assert np.array_equal(found, np.concatenate([plain[:2], corrected[2:]]))
    assert (found[2] != plain[2]).all()


def test_labels_are_the_optimum(study: Study) -> None:
    """SciPy improves on none of 20 labels, and from Δ = 0 it does better in at most one and worse in more.

    A foot that touches the ground or does not makes two dips: each search may end in the other one.
    """
    real = study.real
    t, i = np.arange(0, 100, 10)[:, None], np.arange(2)[None]
    states, commands, goals = real.states[t, i], real.commands[t, i], real.states[t + 1, i]
    found = labels.delta_actions(states, commands, goals, steps=20)
    world = simulators(1)
    ours, improved, scipys = np.zeros((3, 20))
    for n, at in enumerate(np.ndindex(10, 2)):

        def cost(delta: np.ndarray, at: tuple[int, ...] = at) -> float:
            world.place(slice(None), states[at][None, :NQ], states[at][None, NQ:])
            world.advance((commands[at] + delta)[None])
            error = (goals[at] - world.state()[0]) * labels.WEIGHTS
            return float((error**2).sum() + labels.RIDGE * (delta**2).sum())

        def scipy(start: np.ndarray, cost: object = cost) -> float:
            bounds = [(-labels.BOUND, labels.BOUND)] * NU
            return minimize(cost, start, method="L-BFGS-B", bounds=bounds, options={"eps": 1e-4}).fun

        ours[n], improved[n], scipys[n] = cost(found.delta[at]), scipy(found.delta[at]), scipy(np.zeros(NU))
    assert (ours <= 1.02 * improved + 1e-6).all()
    better, worse = ours < 0.98 * scipys - 1e-6, ours > 1.02 * scipys + 1e-6
    assert worse.sum() <= 1 < better.sum() and ours.sum() < scipys.sum()
    assert ours.sum() <= 1.05 * np.minimum(improved, scipys).sum()
    assert found.after < 0.01 * found.before


def test_gaps_say_what_they_are() -> None:
    assert Gap.from_json(BOTH.to_json()) == BOTH
    assert identified(np.zeros(11)) == NONE == identified(np.zeros(11), narrow=True)
    narrow = identified(np.full(11, 9.0), narrow=True)
    assert narrow.mass <= 1.05 and narrow.com_x <= 0.02 and max(narrow.kp) <= 1.05
    assert len({*redrawn(4, 0)}) == 4 and redrawn(2, 3) == redrawn(2, 3)
    assert all(gap.motor_lag == 0 for gap in randomised(3, 0))
    assert STRUCTURE.mass == 1 and BOTH.mass != 1 and BOTH.motor_lag == STRUCTURE.motor_lag


@pytest.mark.parametrize("gap", [NONE, BOTH])
def test_many_robots_are_each_alone(gap: Gap) -> None:
    rng, reference = np.random.default_rng(0), Reference()
    commands, start = rng.normal(size=(5, 3, NU)), rng.normal(size=(3, NQ)) * 0.05 + reference.qpos[:, 0]

    def end(who: list[int]) -> np.ndarray:
        world = World([gap] * len(who))
        world.place(slice(None), start[who], np.zeros((len(who), NQ)))
        for command in commands:
            world.advance(command[who])
        return world.state()

    assert np.array_equal(end([0, 1, 2])[1:2], end([1]))


@pytest.mark.slow
@pytest.mark.parametrize("gap", [NONE, BOTH])
def test_the_world_costs_little_over_plain_stepping(gap: Gap) -> None:
    """At most 15 % over MuJoCo's own batched rollout of the same steps, in processor time."""
    n, world = 96, World([gap] * 96)
    world.place(slice(None), Reference().qpos[:1, 0].repeat(n, 0), np.zeros((n, NQ)))
    runner, data = rollout.Rollout(nthread=0), mujoco.MjData(world.models[0])
    state = np.concatenate([np.zeros((n, 1)), world.state(), world.motors], 1)
    control, command = np.zeros((n, SUBSTEPS, NU)), np.zeros((n, NU))

    def seconds(step: Callable[[], object]) -> float:
        start = time.process_time()
        for _ in range(50):
            step()
        return time.process_time() - start

    pairs = [
        (seconds(lambda: world.advance(command)), seconds(lambda: runner.rollout(world.models, [data], state, control)))
        for _ in range(15)
    ]
    assert np.median([ours / plain for ours, plain in pairs]) <= 1.15


STATISTICS = {"mean": torch.zeros(N_FEATURES), "std": torch.ones(N_FEATURES), "scale": torch.ones(NU)}
ROBOTS, STEPS = 3, 40


def windows(prompt: int, length: int) -> Windows:
    """Of rollouts whose features say robot and time, and whose labels say them again."""
    robot, t = torch.meshgrid(torch.arange(ROBOTS), torch.arange(STEPS), indexing="ij")
    x = (100 * robot + t)[..., None].float().expand(-1, -1, N_FEATURES)
    return Windows(x, x[..., :NU], STATISTICS, (prompt, length), 0, (16, 0, 1))


@pytest.mark.parametrize("prompt", [0, 6])
def test_a_window_has_its_own_labels_and_a_prompt_of_its_robot_from_before(prompt: int) -> None:
    data = windows(prompt, 5)
    for batch in (data[0], data[7], data[[0, 2]]):
        x, y = batch["features"][..., 0], batch["labels"][..., 0]
        assert x.shape[1] == prompt + 5 and torch.equal(x[:, prompt:], y)
        assert (x // 100 == x[:, :1] // 100).all()
        if prompt:
            assert (x[:, prompt - 1] < x[:, prompt]).all() and (x[:, 1:prompt].diff() == 1).all()
    assert torch.equal(data[3]["features"], windows(prompt, 5)[3]["features"])
    assert {*windows(6, 5)[[0]]["features"][:, 0, 0].tolist()} == {0.0}


def test_robots_of_a_validation_count_once_however_many_ranks_there_are() -> None:
    decoder = compose(preset("asap_delta")).eval()
    task = SimpleNamespace(model=decoder, counts=lambda batch: Correct.counts(None, batch))  # type: ignore[arg-type]

    def sums(ranks: int) -> tuple[float, int]:
        data = windows(6, 5)
        parts = []
        for data.rows in [(0, rank, ranks) for rank in range(ranks)]:
            scored = Correct.objective(task, data[[0, 1, 2]], "val")  # type: ignore[arg-type]
            parts.append((float(scored.total), int(scored.count)))
        return sum(total for total, _ in parts), sum(count for _, count in parts)

    with torch.no_grad():
        assert sums(5) == pytest.approx(sums(1), rel=1e-5)


@pytest.mark.parametrize(
    "attention", [None, {"name": "mha", "n_heads": 4}, {"name": "gated_delta", "n_heads": 4, "head_dim": 16}]
)
def test_a_prompt_in_the_caches_is_a_prompt_before_the_window(attention: dict[str, Any] | None) -> None:
    model = preset("asap_delta")
    model["attention"] = attention or model["attention"]
    torch.manual_seed(0)
    decoder = compose(model).eval()
    facts = {"corrects": "action", "history": 3, "prompt": 6}
    correction = Learned(decoder, STATISTICS, facts, np.full(NU, BOUND))
    rng = np.random.default_rng(0)
    measured = rng.normal(size=(2, 8, N_FEATURES))
    correction.show(measured)
    seen = torch.from_numpy(measured).float()
    for _ in range(5):  # each rewinds to the end of the prompt
        qpos, qvel, command = (rng.normal(size=(2, width)) for width in (NQ, NQ, NU))
        said = correction.action(qpos, qvel, command)
        seen = torch.cat([seen, torch.from_numpy(features(qpos, qvel, command)).float()[:, None]], 1)
        with torch.no_grad():
            whole, _ = predict(decoder, torch.cat([seen[:, 2:8], seen[:, -4:]], 1), NU)
        np.testing.assert_allclose(said, whole[:, -1].double().numpy(), atol=1e-5)


def test_a_robot_that_begins_an_episode_is_read_as_the_beginning_of_a_window() -> None:
    torch.manual_seed(0)
    decoder = compose(preset("asap_delta")).eval()
    correction = Learned(decoder, STATISTICS, {"corrects": "action", "history": 3, "prompt": 0}, np.full(NU, BOUND))
    rng, begins = np.random.default_rng(0), 4
    seen = torch.zeros(2, 0, N_FEATURES)
    for step in range(10):
        if step == begins:
            correction.forget(np.array([False, True]))
        state = [rng.normal(size=(2, width)) for width in (NQ, NQ, NU)]
        said = correction.action(*state)
        seen = torch.cat([seen, torch.from_numpy(features(*state)).float()[:, None]], 1)
        for robot, first in ((0, 0), (1, begins if step >= begins else 0)):
            with torch.no_grad():
                whole, _ = predict(decoder, seen[robot : robot + 1, max(first, step - 3) :], NU)
            np.testing.assert_allclose(said[robot], whole[0, -1].double().numpy(), atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "path"),
    [
        ({"prompt": 33}, "data.prompt"),
        ({"prompt": 32, "history": 68}, "data.history"),
        ({"prompt": 4, "drift": ["x"]}, "data.drift"),
    ],
)
def test_impossible_windows_are_refused(settings: dict[str, object], path: str) -> None:
    with pytest.raises(ConfigError) as error:
        RobotRollouts("nowhere", **settings)
    assert error.value.path == path


def test_labels_are_made_once(study: Study) -> None:
    first = study.labelled("sim", "action", held_out=True)
    file = study.folder / "labels_sim_action_held_out.npz"
    written = file.stat().st_mtime_ns
    assert np.array_equal(study.labelled("sim", "action", held_out=True), first)
    assert file.stat().st_mtime_ns == written and first.shape == study.held_out.commands.shape


def test_some_rollouts_of_each_motion_and_those_of_others(study: Study) -> None:
    real, held_out = study.real, study.held_out
    few = real.first(1)
    assert few.motion.tolist() == [0, 1, 2] and few.states.shape[:2] == (real.states.shape[0], 3)
    assert (few.commands[:, 1] == real.commands[:, SMALL["episodes"]]).all()
    both = real.with_others(held_out)
    assert both.motion.tolist() == [*real.motion, *held_out.motion]
    assert (both.bodies[:, -1] == held_out.bodies[:, -1]).all() and (both.states[:, 0] == real.states[:, 0]).all()


@pytest.mark.slow
def test_a_second_round_learns_from_the_rollouts_of_both(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short = partial(train, changes=("trainer.max_steps=20", "trainer.val_check_interval=20"))
    monkeypatch.setattr(methods, "train", short)
    whole = Study(folder, Settings(**SMALL))
    story.prepare(whole, [AGAIN])
    story.measure(whole, AGAIN, 2)
    second = Study(whole.folder / "again", Settings(**{**SMALL, "episodes": 2 * SMALL["episodes"]}))
    n = len(whole.real.motion)
    assert len(second.real.motion) == 2 * n and (second.real.states[:, :n] == whole.real.states).all()
    assert not np.array_equal(second.real.states[:, n:], whole.real.states)
    assert story.read(whole.folder, 2)["closed"][AGAIN]["all"]["g_mpjpe"] > 0
