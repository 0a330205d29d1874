"""A stage that was killed ends as one that was not, bit for bit."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from blockwright_asap.learned import Learned
from blockwright_asap.ppo import PPO, ActorCritic
from blockwright_asap.ppo_delta import Replaying, new_net
from blockwright_asap.replay import N_FEATURES
from blockwright_asap.robot import NU
from blockwright_asap.study import Settings, Study
from blockwright_asap.tracking import N_ACTOR, N_CRITIC, Tracking
from blockwright_asap.world import NONE
from small_study import SMALL

from blockwright import compose, preset


def tracking_ppo(study: Study) -> PPO:
    net = ActorCritic(N_ACTOR, N_CRITIC, 4, seed=0)
    return PPO(Tracking(study.reference, [NONE] * 12, seed=3), net, 4, seed=3)


def corrected_ppo(study: Study) -> PPO:
    """In a simulator corrected by what remembers the last steps of each robot."""
    torch.manual_seed(0)
    decoder = compose(preset("asap_delta"))
    statistics = {"mean": torch.zeros(N_FEATURES), "std": torch.ones(N_FEATURES), "scale": torch.ones(NU)}
    correction = Learned(decoder, statistics, {"corrects": "action", "history": 5, "prompt": 0}, np.full(NU, 3.0))
    environment = Tracking(study.reference, [NONE] * 12, 3, correction, limits=(0.5, 0.5))
    return PPO(environment, ActorCritic(N_ACTOR, N_CRITIC, 4, seed=0), 4, seed=3)


def delta_ppo(study: Study) -> PPO:
    return PPO(Replaying(study.real, 12, seed=4), new_net(0), 4, seed=4)


@pytest.mark.parametrize("make", [tracking_ppo, corrected_ppo, delta_ppo])
def test_ppo_continues_bit_for_bit(make: Callable[[Study], PPO], study: Study, tmp_path: Path) -> None:
    whole, stopped, on, file = make(study), make(study), make(study), tmp_path / "state.pt"
    whole.train()
    for _ in range(2):
        stopped.iterate()
    torch.save(stopped.state_dict(), file)
    on.train(file)
    assert on.rewards == whole.rewards
    for mine, theirs in zip(on.net.state_dict().values(), whole.net.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs)


# In order: what appears in the middle of a stage, when the study is killed; a .pt before the stage's end.
STAGES = (
    "policy.pt",
    "real.npz",  # identification, behind the first rollouts
    "sysid.json",  # rollouts to measure on
    "labels_sysid_action_real.npz",
    "delta_sysid_action_*/checkpoints/last.ckpt",
    "delta_sysid_action_round1_*/checkpoints/last.ckpt",  # the correction of many steps
    "tuned_sysid_delta_40.pt",
    "results/sysid_delta_40.json",
    "delta_ppo.pt",
    "tuned_delta_ppo_40.pt",
)
STUDY = """
import sys
from functools import partial
from pathlib import Path
from blockwright_asap import methods, story
from blockwright_asap.study import Settings, Study, limit_threads
from blockwright_asap.task import train

limit_threads()
methods.train = partial(train, changes=("trainer.max_steps=40", "trainer.val_check_interval=20"))
study = Study(Path(sys.argv[1]), Settings(iterations=40, robots=12, episodes=2, held_out=1))
story.prepare(study, ["sysid_delta", "delta_ppo"])
for method in ("sysid_delta", "delta_ppo"):
    story.measure(study, method, 40)
"""


def killed_at(folder: Path, pattern: str) -> None:
    """Start the study, and kill it with all its children as soon as a file appears."""
    process = subprocess.Popen([sys.executable, "-c", STUDY, str(folder)], start_new_session=True)
    while not any(folder.glob(pattern)):
        assert process.poll() is None, f"ended before there was a {pattern}"
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def contents(folder: Path) -> dict[str, Any]:
    """Everything that stages left, by file."""
    found: dict[str, Any] = {}
    for file in sorted(folder.rglob("*")):
        name = re.sub(r"\.\d+\.partial.*|/20\d\d-.*", "", file.relative_to(folder).as_posix())
        if file.suffix == ".pt":
            found[name] = torch.load(file, weights_only=True)["net"]
        elif file.suffix == ".npz" and not file.name.startswith("."):
            found[name] = {key: torch.from_numpy(value) for key, value in np.load(file).items()}
        elif file.name == "last.ckpt":
            found[name] = torch.load(file, weights_only=True)["state_dict"]
        elif file.suffix == ".json" and file.parent.name in (folder.name, "results"):
            found[name] = {"text": torch.frombuffer(bytearray(file.read_bytes()), dtype=torch.uint8)}
    return found


@pytest.mark.slow
def test_study_killed_in_each_stage_ends_as_one_that_was_not(tmp_path: Path) -> None:
    undisturbed, killed = tmp_path / "a", tmp_path / "b"
    subprocess.run([sys.executable, "-c", STUDY, str(undisturbed)], check=True)
    for pattern in STAGES:
        killed_at(killed, pattern)
        if pattern.endswith(".pt"):  # in the middle, not at the end
            assert torch.load(killed / pattern, weights_only=True)["plain"]["done"] == 20
    subprocess.run([sys.executable, "-c", STUDY, str(killed)], check=True)
    wanted, got = contents(undisturbed), contents(killed)
    assert wanted.keys() == got.keys() and len(wanted) >= 15
    for file, values in wanted.items():
        assert values.keys() == got[file].keys()
        for name, value in values.items():
            assert torch.equal(value, got[file][name]), f"{file}: {name}"


def test_folder_of_other_settings_is_refused(folder: Path) -> None:
    Study(folder, Settings(**SMALL))
    with pytest.raises(Exception, match="were made with 2"):
        Study(folder, Settings(**{**SMALL, "episodes": 3}))
