"""A stage that was killed ends as one that was not, bit for bit."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from blockwright_asap.gap import NONE
from blockwright_asap.ppo import PPO, ActorCritic
from blockwright_asap.ppo_delta import Replaying, new_net
from blockwright_asap.study import Settings, Study
from blockwright_asap.tracking import N_ACTOR, N_CRITIC, Tracking
from small_study import SMALL


def tracking_ppo(study: Study) -> PPO:
    net = ActorCritic(N_ACTOR, N_CRITIC, 4, seed=0)
    return PPO(Tracking(study.reference, [NONE] * 12, seed=3), net, 4, seed=3)


def delta_ppo(study: Study) -> PPO:
    return PPO(Replaying(study.real, 12, seed=4), new_net(0), 4, seed=4)


@pytest.mark.parametrize("make", [tracking_ppo, delta_ppo])
def test_ppo_continues_bit_for_bit(make: object, study: Study, tmp_path: Path) -> None:
    whole = make(study)  # type: ignore[operator]
    whole.train()
    stopped = make(study)  # type: ignore[operator]
    stopped.iterations, file = 2, tmp_path / "state.pt"
    stopped.train(file, every=1)
    on = make(study)  # type: ignore[operator]
    on.train(file)
    # The curriculum of the tracking runs over all iterations, so the first two must have had its length too.
    assert on.rewards[:2] == stopped.rewards
    if make is delta_ppo:
        assert on.rewards == whole.rewards
        for mine, theirs in zip(on.net.state_dict().values(), whole.net.state_dict().values(), strict=True):
            assert torch.equal(mine, theirs)


def policy_of(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "policy.pt", weights_only=True)["net"]


@pytest.mark.slow
@pytest.mark.parametrize("after", [4.0, 7.0, 10.0])
def test_killed_study_ends_as_one_that_was_not(after: float, tmp_path: Path) -> None:
    """Killed with 9 wherever it is: in the policy, in the rollouts, in identification."""
    settings = {**SMALL, "iterations": 60, "robots": 24}
    code = "import sys; from pathlib import Path; from blockwright_asap.study import *; limit_threads();" + (
        f"s = Study(Path(sys.argv[1]), Settings(**{settings!r})); s.real, s.held_out, s.simulator('sysid')"
    )
    undisturbed, killed = tmp_path / "a", tmp_path / "b"
    subprocess.run([sys.executable, "-c", code, str(undisturbed)], check=True)
    process = subprocess.Popen([sys.executable, "-c", code, str(killed)])
    time.sleep(after)
    process.send_signal(signal.SIGKILL)
    process.wait()
    subprocess.run([sys.executable, "-c", code, str(killed)], check=True)
    for name, value in policy_of(undisturbed).items():
        assert torch.equal(value, policy_of(killed)[name]), name
    for file in ("real.npz", "held_out.npz"):
        mine, theirs = np.load(undisturbed / file), np.load(killed / file)
        assert all(np.array_equal(mine[name], theirs[name]) for name in mine.files)
    assert (undisturbed / "sysid.json").read_text() == (killed / "sysid.json").read_text()


def test_folder_of_other_settings_is_refused(folder: Path) -> None:
    Study(folder, Settings(**SMALL))
    with pytest.raises(Exception, match="were made with 2"):
        Study(folder, Settings(**{**SMALL, "episodes": 3}))
