"""Stop trials of a search early that do worse than others."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning as L

from blockwright.lab.sweep import plan as plans
from blockwright.lab.sweep.study import open_study
from blockwright.registry import ConfigError
from blockwright.training.result import Pruned


class Pruning(L.Callback):
    """Reports each validation of a trial to its study, and stops the trial if the pruner decides so.

    Trial N runs in folder N of its search. With several processes the first reports, and all stop. A validation belongs
    to its step, so trials are compared at equal steps.

    Args:
        directory: the run's folder
        pruner: of Optuna
        monitor: the figure, better in the search's direction
    """

    def __init__(self, directory: str, pruner: Any, monitor: str = "val/loss") -> None:
        self.directory, self.pruner, self.monitor = Path(directory), pruner, monitor
        self._trial: Any = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit" and trainer.is_global_zero and self._trial is None:
            self._trial = trial_of(self.directory, self.pruner)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        if self.monitor not in trainer.callback_metrics:
            known = ", ".join(sorted(k for k in trainer.callback_metrics if k.startswith("val/")))
            raise ConfigError("callbacks.pruning.monitor", self.monitor, "no validation measures it", f"Known: {known}")
        value, step = float(trainer.callback_metrics[self.monitor]), trainer.global_step
        if trainer.strategy.broadcast(self._is_pruned(value, step)):
            raise Pruned(step, self.monitor, value)

    def _is_pruned(self, value: float, step: int) -> bool:
        if self._trial is None or not math.isfinite(value):
            return False
        if step not in self._trial.study.trials[self._trial.number].intermediate_values:  # not yet reported
            self._trial.report(value, step)
        return self._trial.should_prune()


def trial_of(directory: Path, pruner: Any) -> Any:
    """The trial that runs in a folder.

    Raises:
        ConfigError: not a folder of a search
    """
    import optuna

    sweep = directory.resolve().parent
    plan = plans.read(sweep) if (sweep / plans.PLAN).exists() else {}
    if "study" not in plan or not directory.name.isdigit():
        remedy = "Write hparams_search=pruning, or leave it out"
        raise ConfigError(
            "callbacks.pruning", str(directory), "needs a trial of a search, and this run is not one", remedy
        )
    study = open_study(sweep, plan, checked=True, pruner=pruner, sampler=optuna.samplers.RandomSampler())
    number = int(directory.name)
    (found,) = (t for t in study.get_trials(deepcopy=False) if t.number == number)
    return optuna.trial.Trial(study, found._trial_id)
