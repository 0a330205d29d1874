"""Hydra's own tests of launchers, with each launcher and sweeper that is installed, in applications that are not ours.

What serves runs of this project alone is refused there, before any job, with one message.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.test_utils.launcher_common_tests import LauncherTestSuite
from hydra.version import setbase
from pairwise import each

from blockwright.registry import ConfigError

pytestmark = pytest.mark.xdist_group("hydra_suite")
GENERAL = {"BasicLauncher": "basic", "JoblibLauncher": "joblib", "BasicSweeper": "basic"}
OURS = {
    "KubernetesLauncher": "hydra/launcher=kubernetes",
    "ResumableOptunaSweeper": "hydra/sweeper=optuna",
    "PlanSweeper": "hydra/sweeper=plan",
}
INSTALLED = {kind.__name__ for base in (Launcher, Sweeper) for kind in Plugins.instance().discover(base)}
TESTERS = {"LauncherForTesting", "SweeperForTesting"}


@pytest.fixture(autouse=True)
def defaults_that_the_suite_presumes(hydra_restore_singletons: None) -> None:
    """Those of Hydra 1.1, in which a job runs in its own folder; a test before this one may have chosen others."""
    setbase("1.1")


@pytest.mark.slow
@pytest.mark.parametrize("launcher_name", ["joblib"])
@pytest.mark.parametrize("overrides", [[]])
class TestLauncher(LauncherTestSuite):
    """The suite proper."""


def test_every_launcher_and_sweeper_is_under_the_suite_or_refuses_other_applications() -> None:
    assert {*GENERAL, *OURS} >= INSTALLED - TESTERS


@pytest.mark.parametrize(
    ("choice", "given"),
    each([choice for name, choice in OURS.items() if name in INSTALLED], [["+a=1"], ["+a=1,2"], ["+a=interval(0,1)"]]),
)
def test_what_serves_our_runs_alone_is_refused_elsewhere(
    hydra_sweep_runner: Any, choice: str, given: list[str], tmp_path: Path
) -> None:
    where = {"calling_file": None, "calling_module": "hydra.test_utils.a_module", "config_path": "configs"}
    ran: list[Any] = []
    sweep = hydra_sweep_runner(
        **where,
        config_name="compose.yaml",
        task_function=ran.append,
        overrides=[choice, *given],
        temp_dir=tmp_path,
    )
    with pytest.raises(ConfigError, match="runs of this project alone") as found, sweep:
        pass
    assert found.value.remedy and not ran
