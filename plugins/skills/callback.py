"""The callback that measures the skills that a run was trained on: ``callbacks=skills``."""

from __future__ import annotations

from pathlib import Path

import lightning as L

from blockwright.plugins.skills.measure import measure, write
from blockwright.plugins.skills.module import SkillsDataModule
from blockwright.plugins.skills.rows import ids_of
from blockwright.registry import ConfigError
from blockwright.registry.enforcing import enforced
from blockwright.registry.ranges import Count
from blockwright.training.figure import Figure
from blockwright.training.tasks.base import Task

GROUP = ("skills",)  # of its figures


@enforced("callbacks.skills")
class Skills(L.Callback):
    """Measures every skill of the data at every level, once, with the final figures.

    Logs ``skills/recall``, the share of right answers at the hardest difficulty of training, for each skill, and their
    mean as ``skills/mean``. Writes skills.json in the run's folder: all levels, with chance and bytes of state.

    Args:
        directory: where to write
        samples: rows of each skill and difficulty, the same for all runs
    """

    figures = (Figure("mean", "of answers", "more", GROUP), Figure("{skill}", "of answers", "more", GROUP))

    def __init__(self, directory: str, samples: Count = 128) -> None:
        self.directory, self.samples = Path(directory), samples

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse, before training, data without skills."""
        data = trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(data, SkillsDataModule):
            rule = f"measures the skills of data=skills, and the data here is {type(data).__name__}"
            raise ConfigError("callbacks", "skills", rule, "Leave it out, or write data=skills")

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        data = trainer.datamodule  # type: ignore[attr-defined]
        if trainer.state.fn != "validate" or not isinstance(data, SkillsDataModule):  # not during training
            return
        assert isinstance(pl_module, Task)
        with trainer.precision_plugin.val_step_context():
            found = [
                measure(pl_module.model, skill, place, ids_of(data.tokenizer), self.samples)
                for place, skill in enumerate(data.skills)
            ]
        for each in found:
            pl_module.log(f"skills/{each.skill}", each.at_trained.accuracy)
        pl_module.log("skills/mean", sum(each.at_trained.accuracy for each in found) / len(found))
        if trainer.is_global_zero:
            write(self.directory, found)
