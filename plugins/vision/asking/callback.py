"""The callback that measures what a trained model says about pictures: ``callbacks=pictures``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import lightning as L
from rich.table import Table

from blockwright.blocks.decoder import Decoder
from blockwright.lab.report.svg import standalone
from blockwright.plugins.vision.asking.found import FILE, Accuracy, Found, Sample, accuracies, sample, sights
from blockwright.plugins.vision.asking.measure import Answer, Shown, ask
from blockwright.plugins.vision.data.picture_module import PictureDataModule
from blockwright.registry import ConfigError, printing
from blockwright.registry.enforcing import enforced
from blockwright.registry.folder import write_json, write_text
from blockwright.registry.ranges import Count, Whole
from blockwright.training.figure import Figure
from blockwright.training.tasks.base import Task

PATH = "callbacks.pictures"
GROUP = ("pictures",)  # of its figures


@enforced(PATH)
class Asking(L.Callback):
    """Asks a model about held-out pictures, once, with the final figures.

    Logs the mean of each figure of each kind of question, ``pictures/read_exact``, and of the same questions about
    pictures blanked and shuffled, ``pictures/blanked_read_exact``: what remains there is guessed. All figures with 95 %
    intervals, those of each group of pictures, and samples go to pictures.json and pictures.svg in the run's folder.

    Args:
        directory: where to write
        conversations: held-out conversations, the first of the validation split
        against: what else the same questions are asked about: ``blanked``, ``shuffled``
        samples: conversations shown in the report
        rows: conversations held together
    """

    figures = (
        Figure("blanked_{question}_{figure}", "of answers", None, GROUP),
        Figure("shuffled_{question}_{figure}", "of answers", None, GROUP),
        Figure("{question}_constant", "of answers", None, GROUP),  # of an answer that no picture changes
        Figure("{question}_{figure}", "of answers", "more", GROUP),
    )

    def __init__(
        self,
        directory: str,
        conversations: Count = 256,
        against: Sequence[Shown] = ("blanked", "shuffled"),
        samples: Whole = 12,
        rows: Count = 64,
    ) -> None:
        self.directory, self.conversations, self.samples, self.rows = Path(directory), conversations, samples, rows
        self.against: list[Shown] = list(dict.fromkeys(against))
        if unknown := [each for each in self.against if each not in ("blanked", "shuffled")]:
            raise ConfigError(f"{PATH}.against", unknown, "is not among blanked, shuffled", "Write [] for none")

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse before training what could not be measured after it."""
        if not isinstance(trainer.datamodule, PictureDataModule) or not isinstance(pl_module, Task):  # type: ignore[attr-defined]
            rule = "asks about pictures, and the data has none"
            raise ConfigError("callbacks", "pictures", rule, "Leave it out, or use data=images or data=pages")

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn != "validate":  # not during training
            return
        data: PictureDataModule = trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(pl_module, Task)
        shown: list[Shown] = ["whole", *self.against]
        with trainer.precision_plugin.val_step_context():
            answers = {each: self._ask(pl_module.model, data, each) for each in shown}
        found = Found(
            {each: accuracies(given) for each, given in answers.items()}, self._samples(answers["whole"], data)
        )
        for each, rows in found.accuracies.items():
            prefix = "" if each == "whole" else f"{each}_"
            for row in rows:
                if not row.group:
                    pl_module.log(f"pictures/{prefix}{row.kind}_{row.figure}", row.mean)
        if trainer.is_global_zero:
            self.directory.mkdir(parents=True, exist_ok=True)
            write_json(self.directory / FILE, found.to_json())
            write_text(self.directory / "pictures.svg", standalone(sights(found)))
            printing.show(table(found))

    def _ask(self, decoder: Decoder, data: PictureDataModule, shown: Shown) -> list[Answer]:
        asked = data.conversations("val", self.conversations)
        return list(ask(decoder, data.rendering, data.corpus, asked, shown, self.rows))

    def _samples(self, answers: Sequence[Answer], data: PictureDataModule) -> list[Sample]:
        asked = data.conversations("val", self.samples)
        made = [sample(answers, i, data.corpus.pictures(each)) for i, each in enumerate(asked)]
        return [each for each in made if each is not None]


def table(found: Found) -> Table:
    """A line for each figure, a column for each way of showing the pictures."""
    made = Table("question", "figure", "pictures", "answers", *found.accuracies, title="answers about pictures")
    made.title_justify = "left"
    rows = {shown: {(a.kind, a.figure, a.group): a for a in each} for shown, each in found.accuracies.items()}
    for kind, figure, group in rows["whole"]:
        cells = [_percent(known.get((kind, figure, group))) for known in rows.values()]
        made.add_row(kind, figure, group or "all", str(rows["whole"][kind, figure, group].n), *cells)
    return made


def _percent(accuracy: Accuracy | None) -> str:
    return "" if accuracy is None else f"{100 * accuracy.mean:.1f} ± {100 * accuracy.half:.1f} %"
