"""What the tasks on pairs of answers share: the mean over pairs, and the figures of a validation."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from blockwright.plugins.alignment.data.preference_module import PreferenceDataModule
from blockwright.plugins.alignment.tasks.needed_data import data_of
from blockwright.registry import ConfigError
from blockwright.training.figure import EVERY, Figure, names_in
from blockwright.training.tasks.base import Batch, Task
from blockwright.training.tasks.means import Scored


class Pairwise(Task):
    """A task on pairs of a chosen and a rejected answer. A subclass defines ``compare``.

    The loss is the mean over all pairs of the optimizer step. Multi-token prediction is not trained.
    """

    figures: ClassVar[tuple[Figure, ...]] = (
        Figure("loss", "nats per pair", "less", EVERY),
        Figure("accuracy", "of pairs", "more", EVERY),
        Figure("margin", "of reward", "more", EVERY),
        Figure("chosen", "of reward", None, EVERY),  # of DPO both may fall, of a reward model both may be shifted
        Figure("rejected", "of reward", None, EVERY),
    )
    steady: ClassVar[bool] = False  # a batch is as long as its longest answer
    reads: ClassVar[tuple[str, ...]] = ("tokens", "targets", "segments", "positions", "sequence", "pair")

    @abstractmethod
    def compare(self, hidden: Tensor, batch: Batch, stage: str) -> tuple[Tensor, Tensor, Tensor]:
        """The loss of each pair, and the rewards of the chosen and of the rejected answers, [P] each.

        Args:
            hidden: of the batch's tokens [B,T,D]
            batch: of ``PreferenceDataModule``
            stage: ``train``, ``val`` or ``test``
        """

    def configure_model(self) -> None:
        super().configure_model()
        if any(p.requires_grad for p in self.model.mtp.parameters()):
            rule = "a task on pairs trains no multi-token prediction"
            frozen = list(self.configured.frozen)
            raise ConfigError("task.frozen", frozen, rule, "Freeze it: task.frozen=[mtp]; or model.mtp=null")

    def on_fit_start(self) -> None:
        _ = self.data  # refused before the first batch
        super().on_fit_start()

    @property
    def data(self) -> PreferenceDataModule:
        """The data module; another kind is refused."""
        rule = "this task compares answers, which the data does not give"
        return data_of(self, PreferenceDataModule, rule, "Use data=preferences, or experiment=preference_sort")

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        return {"total": torch.tensor(len(batch["pair"]), dtype=torch.int64)}

    def objective(self, batch: Batch, stage: str) -> Scored:
        hidden, routings = self.model.hidden(batch["tokens"], batch["positions"], batch["segments"])
        loss, chosen, rejected = self.compare(hidden, batch, stage)
        with torch.no_grad():
            each = {"accuracy": (chosen > rejected).float(), "margin": chosen - rejected}
            sums = {name: value.sum() for name, value in {**each, "chosen": chosen, "rejected": rejected}.items()}
        count = torch.tensor(len(loss), device=loss.device, dtype=torch.int64)
        if stage == "train":
            figures = {name: self.step.mean(value, "total") for name, value in sums.items()}
            return Scored(loss.sum(), count, figures=figures, routings=routings)
        for name, value in {**sums, "loss": loss.sum(), "pairs": count}.items():
            self._measured[name] = self._measured.get(name, 0) + value.detach().double()
        return Scored(loss.sum(), count, routings=routings)

    def _begin(self, stage: str) -> None:
        super()._begin(stage)
        self._measured: dict[str, Tensor] = {}

    def _conclude(self, stage: str) -> None:
        names = [name for name in names_in(stage, self.figures) if name in self._measured]
        *sums, pairs = self.ranks().sum(torch.stack([self._measured[name] for name in (*names, "pairs")]))
        for name, value in zip(names, sums, strict=True):
            self.log(f"{stage}/{name}", (value / pairs).float())
        self.log_dict(self.loads.figures(stage))


def of_sequences(values: Tensor, sequence: Tensor, number: int) -> Tensor:
    """Sums of values [n] over the sequences that they belong to, [number]; in a fixed order, unlike ``index_add``.

    Args:
        values: of scored tokens
        sequence: the number of the sequence of each [n]
        number: of sequences
    """
    own = sequence == torch.arange(number, device=sequence.device)[:, None]
    return (own * values).sum(1)
