"""Windows, prompts, and a learnt correction that reads them."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from blockwright_asap import methods, story
from blockwright_asap.data import RobotRollouts, Windows
from blockwright_asap.labels import BOUND
from blockwright_asap.learned import Learned, predict
from blockwright_asap.methods import AGAIN
from blockwright_asap.replay import N_FEATURES, features
from blockwright_asap.robot import NQ, NU
from blockwright_asap.study import Settings, Study
from blockwright_asap.task import Correct
from blockwright_asap.training import train
from small_study import SMALL

from blockwright import ConfigError, compose, preset

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
