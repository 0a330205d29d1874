"""Launchers and sweepers that serve runs of this project alone are refused in other applications, before any job."""

import pytest
from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from pairwise import each

from blockwright.registry import ConfigError

pytestmark = pytest.mark.xdist_group("hydra_suite")
OTHERS = {"BasicLauncher", "JoblibLauncher", "BasicSweeper", "LauncherForTesting", "SweeperForTesting"}
OURS = {
    "KubernetesLauncher": "hydra/launcher=kubernetes",
    "ResumableOptunaSweeper": "hydra/sweeper=optuna",
    "PlanSweeper": "hydra/sweeper=plan",
}
INSTALLED = {kind.__name__ for base in (Launcher, Sweeper) for kind in Plugins.instance().discover(base)}


def test_every_launcher_and_sweeper_is_of_hydra_or_refuses_other_applications():
    assert {*OTHERS, *OURS} >= INSTALLED


@pytest.mark.usefixtures("hydra_restore_singletons")
@pytest.mark.parametrize(
    ("choice", "given"),
    each([choice for name, choice in OURS.items() if name in INSTALLED], [["+a=1"], ["+a=1,2"], ["+a=interval(0,1)"]]),
)
def test_what_serves_our_runs_alone_is_refused_elsewhere(hydra_sweep_runner, choice, given, tmp_path):
    where = {"calling_file": None, "calling_module": "hydra.test_utils.a_module", "config_path": "configs"}
    ran = []
    sweep = hydra_sweep_runner(
        **where, config_name="compose.yaml", task_function=ran.append, overrides=[choice, *given], temp_dir=tmp_path
    )
    with pytest.raises(ConfigError, match="runs of this project alone") as found, sweep:
        pass
    assert found.value.remedy and not ran
