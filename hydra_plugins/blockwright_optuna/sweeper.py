"""``hydra/sweeper=optuna``: the settings of Hydra's own plug-in, and a search that can be gone on with.

Hydra imports this at every start, so the search itself is imported when there is one.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class ResumableOptunaSweeper(Sweeper):
    """See lab/sweep/search.py.

    Args:
        settings: those of Hydra's own plug-in for Optuna
    """

    def __init__(self, **settings: Any) -> None:
        from lab.sweep.search import Search

        self.search = Search(**settings)

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.search.setup(hydra_context=hydra_context, task_function=task_function, config=config)

    def sweep(self, arguments: list[str]) -> None:
        self.search.sweep(arguments)


def offer() -> None:
    """Take the place of Hydra's own plug-in under its name, where that is installed (the extra ``optuna``)."""
    if not find_spec("hydra_plugins.hydra_optuna_sweeper"):
        return
    Plugins.instance()  # they bring their options when Hydra first looks for them; this one is to come after
    from hydra_plugins.hydra_optuna_sweeper.config import OptunaSweeperConf

    target = f"{ResumableOptunaSweeper.__module__}.{ResumableOptunaSweeper.__qualname__}"
    node = OptunaSweeperConf(_target_=target)
    ConfigStore.instance().store("optuna", node, group="hydra/sweeper", provider="blockwright")
