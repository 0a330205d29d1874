"""The callback that measures how far a trained model reads: ``callbacks=long_context``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import lightning as L

from blockwright.plugins.long_context.reading import results
from blockwright.plugins.long_context.reading.base import find, wording_of
from blockwright.plugins.long_context.reading.measure import DEPTHS, Grid, position_loss, read, window_loss
from blockwright.registry import ConfigError
from blockwright.registry.enforcing import enforced
from blockwright.registry.ranges import Count, Fraction, Whole
from blockwright.training.data.modules.text import CorpusDataModule
from blockwright.training.figure import Figure
from blockwright.training.tasks.base import Task

PATH = "callbacks.long_context"
GROUP = ("long_context",)  # of its figures


@enforced(PATH)
class LongContext(L.Callback):
    """Measures reading tests and the loss by position, once, with the final figures.

    Logs, for each suite and length, ``long_context/needle_512`` (mean over depths, teacher-forced);
    ``long_context/loss_to_512``, the loss in nats of plain validation text at positions 256 to 511 of windows of the
    longest length, the same tokens in every bin; ``long_context/slope``, nats for each doubling of the position beyond
    ``window``, where the longest prompts are four windows or more; and ``long_context/loss_window``, the loss in
    windows of ``window`` tokens. The grids are written to reading.json and, as heat maps, to reading-SUITE.svg in the
    run's folder.

    Args:
        directory: where to write
        suites: reading tests by name; another package may add its own
        lengths: tokens of the prompts; null for data.sequence_length
        window: positions that the model was trained on before an extension; null for data.sequence_length
        depths: where asked facts stand, from 0, the beginning, to 1, before the question
        samples: prompts at each length and depth
        generated: whether answers are generated too
        wording: symbols, or sentences for models that read text
        symbols: for the wording symbols, the first id and the one after the last
        stretches: places of the text where the loss by position is measured; null for no such measurement
        seed: of the prompts; not the run's, so that runs are measured on the same prompts
    """

    figures = (
        Figure("loss_window", "nats per token", "less", GROUP),
        Figure("loss_to_{position}", "nats per token", "less", GROUP),
        Figure("slope", "nats per doubling", "less", GROUP),
        Figure("{suite}_{length}", "of answers", "more", GROUP),
    )

    def __init__(
        self,
        directory: str,
        suites: Sequence[str] = ("needle",),
        lengths: Sequence[Count] | None = None,
        window: Count | None = None,
        depths: Sequence[Fraction] = DEPTHS,
        samples: Count = 32,
        generated: bool = False,
        wording: str = "symbols",
        symbols: Sequence[Whole] = (128, 256),
        stretches: Count | None = 4,
        seed: Whole = 0,
    ) -> None:
        self.directory = Path(directory)
        self.tests = find(list(suites), f"{PATH}.suites")
        self.lengths, self.window, self.stretches = lengths, window, stretches
        self.samples, self.generated, self.seed = samples, generated, seed
        self.wording, self.symbols = wording, list(symbols)
        self.depths = results.check_depths(depths, f"{PATH}.depths")

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse before training what could not be measured after it."""
        task, data = _of(trainer, pl_module)
        lengths = results.check_lengths(self._lengths(data), task.model_config["max_positions"], f"{PATH}.lengths")
        window, longest = self._window(data), max(lengths)
        if window > longest:
            rule = f"is longer than the longest prompt ({longest} tokens)"
            raise ConfigError(f"{PATH}.window", window, rule, "Name the length trained on before the extension")
        words = wording_of(self.wording, self.symbols, data.tokenizer, lambda key: f"{PATH}.{key}")
        text = data.tokens("val")
        results.try_prompts(self.tests, self._grid(lengths), text, words, f"{PATH}.lengths")

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn != "validate":  # not during training
            return
        task, data = _of(trainer, pl_module)
        decoder, text = task.model, data.tokens("val")
        grid = self._grid(self._lengths(data))
        words = wording_of(self.wording, self.symbols, data.tokenizer, lambda key: f"{PATH}.{key}")
        with trainer.precision_plugin.val_step_context():
            readings = [read(decoder, test, text, words, grid) for test in self.tests]
            window = self._window(data)
            loss = None
            if self.stretches is not None:
                loss = position_loss(decoder, text, max(grid.lengths), window, self.stretches)
                task.log("long_context/loss_window", window_loss(decoder, text, window))
        for reading in readings:
            for length in grid.lengths:
                task.log(f"long_context/{reading.test}_{length}", reading.mean(length))
        if loss is not None:
            for end, value in zip(loss.edges[1:], loss.losses, strict=True):
                task.log(f"long_context/loss_to_{end}", value)
            if loss.slope is not None:
                task.log("long_context/slope", loss.slope)
        if trainer.is_global_zero:
            results.write(self.directory, readings, loss)

    def _grid(self, lengths: Sequence[int]) -> Grid:
        return Grid(sorted(lengths), self.depths, self.samples, self.seed, self.generated)

    def _lengths(self, data: CorpusDataModule) -> Sequence[int]:
        return [data.sequence_length] if self.lengths is None else self.lengths

    def _window(self, data: CorpusDataModule) -> int:
        return data.sequence_length if self.window is None else self.window


def _of(trainer: L.Trainer, task: L.LightningModule) -> tuple[Task, CorpusDataModule]:
    data = trainer.datamodule  # type: ignore[attr-defined]
    if not isinstance(task, Task) or not isinstance(data, CorpusDataModule):
        rule = f"measures text, and the task here is {type(task).__name__}"
        raise ConfigError("callbacks", "long_context", rule, "Leave it out, or use task=causal_lm")
    return task, data
