"""``hydra/sweeper=plan``: the jobs of a plan, which may grow, on any launcher.

Hydra imports this module at every start, so the sweeper proper is imported only when used.
"""

from __future__ import annotations

from collections.abc import Sequence

from hydra.core.config_store import ConfigStore
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class PlanSweeper(Sweeper):
    """See lab/sweep/launcher.py.

    Args:
        jobs: numbers of the jobs to run if unfinished, and no others; None: all, and those that follow

    Raises:
        ConfigError: in ``setup``: it is another application
    """

    def __init__(self, jobs: Sequence[int] | None = None) -> None:
        self.jobs = jobs

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        from blockwright.lab.sweep.application import check_application
        from blockwright.lab.sweep.launcher import Rounds

        check_application(config, "hydra/sweeper", "plan", "another sweeper")
        self.rounds = Rounds(config, hydra_context, task_function)

    def sweep(self, arguments: list[str]) -> None:
        self.rounds.run(self.jobs)


TARGET = "hydra_plugins.blockwright_plan.sweeper.PlanSweeper"
ConfigStore.instance().store("plan", {"_target_": TARGET, "jobs": None}, group="hydra/sweeper", provider="blockwright")
