"""``hydra/sweeper=optuna``: a search by Optuna that can be resumed.

Hydra imports this module at every start, so the search and Optuna are imported only when used.
"""

from __future__ import annotations

from typing import Any

from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from hydra_plugins.blockwright_optuna._options import store


class ResumableOptunaSweeper(Sweeper):
    """See lab/sweep/search.py.

    Args:
        settings: those of ``hydra_plugins.blockwright_optuna._options.OptunaSweeper``

    Raises:
        ConfigError: Optuna is not installed; in ``setup``: it is another application
    """

    def __init__(self, **settings: Any) -> None:
        from hydra.utils import instantiate

        from blockwright.registry import ConfigError

        try:
            from blockwright.lab.sweep.search import Search
        except ModuleNotFoundError as error:
            if error.name != "optuna":
                raise
            remedy = "pip install 'blockwright[optuna]', or leave it out for a grid"
            raise ConfigError("hydra/sweeper", "optuna", "needs Optuna, which is not installed", remedy) from None
        self.search = Search(**{**settings, "sampler": instantiate(settings["sampler"])})

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        from blockwright.lab.sweep.application import check_application

        check_application(config, "hydra/sweeper", "optuna", "another sweeper")
        self.search.setup(hydra_context=hydra_context, task_function=task_function, config=config)

    def sweep(self, arguments: list[str]) -> None:
        self.search.sweep(arguments)


store()
