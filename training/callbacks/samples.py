"""What a model writes: samples of a task, what updates do to them, and the output of ``blockwright train predict``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import IO, Any

import lightning as L
import torch
from rich.table import Table
from torch import Tensor

from blockwright.blocks.kernels.cross_entropy import IGNORED
from blockwright.registry import printing
from blockwright.registry.enforcing import enforced
from blockwright.registry.folder import append_lines, replaced
from blockwright.registry.ranges import Whole
from blockwright.training.cadence import logs_now
from blockwright.training.callbacks.step_end import StepEnd
from blockwright.training.figure import TRAIN, Figure
from blockwright.training.tasks.base import Sample, Task

FILE = "completions.jsonl"


@enforced("callbacks.completions")
class Completions(StepEnd):
    """For tasks that sample: a table of completions of held-out prompts after each validation, on the terminal, in
    TensorBoard and, the first eight, in completions.jsonl (``Task.samples``).

    Logs ``train/rise_positive`` and ``train/rise_negative``, by how much an update raised the mean log-probability of a
    token of completions with a positive and with a negative advantage: one more forward pass at each logged step. Where
    both fall, the rate is too high.

    Args:
        directory: of the file
        rows: of the table, at most 8; 0 for none
    """

    figures = (
        Figure("rise_positive", "nats per token", None, TRAIN),
        Figure("rise_negative", "nats per token", None, TRAIN),
    )
    observes = "shows completions, and measures what an update did to them"

    def __init__(self, directory: str, rows: Whole = 4) -> None:
        self.file, self.rows = Path(directory) / FILE, rows

    def on_step_end(self, trainer: L.Trainer, pl_module: L.LightningModule, step: int) -> None:
        if isinstance(pl_module, Task) and logs_now(trainer):
            pl_module.log_dict({f"train/{name}": value for name, value in pl_module.rises().items()})

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        samples = pl_module.samples() if isinstance(pl_module, Task) else ()
        if not samples or not trainer.is_global_zero or trainer.sanity_checking:
            return
        self.file.parent.mkdir(parents=True, exist_ok=True)
        step = trainer.global_step
        rows = ({"step": step, "prompt": p, "completion": c, "reward": reward} for p, c, reward in samples)
        append_lines(self.file, "".join(json.dumps(row) + "\n" for row in rows))
        shown = samples[: self.rows]
        if not shown:
            return
        printing.show(completions_table(shown, f"sampled at step {trainer.global_step}"))
        for logger in trainer.loggers:
            writer: Any = getattr(logger, "experiment", None)
            if hasattr(writer, "add_text"):  # TensorBoard
                writer.add_text("completions", _markdown(shown), trainer.global_step)


def completions_table(samples: Sequence[Sample], title: str) -> Table:
    """Completions as a table; texts as Python writes them, so that no character of theirs acts on the terminal."""
    table = Table("prompt", "completion", "reward", title=title, title_justify="left")
    for prompt, completion, reward in samples:
        table.add_row(*(repr(text).replace("[", r"\[") for text in (prompt, completion)), _shown(reward))
    return table


def _shown(reward: float | None) -> str:
    return "none" if reward is None else f"{reward:.3g}"


def _markdown(samples: Sequence[Sample]) -> str:
    rows = [f"| `{prompt!r}` | `{completion!r}` | {_shown(reward)} |" for prompt, completion, reward in samples]
    return "\n".join(["| prompt | completion | reward |", "|---|---|---|", *rows])


class Predictions(L.Callback):
    """Writes a line of JSON per window, and prints how many predictions were right.

    A line has ``targets`` and ``predicted`` (ids of the same length) and ``text``, the predictions decoded. Further
    ranks write separate files: predictions.1.jsonl.

    Args:
        folder: of the run
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        self._file: IO[str] | None = None
        self._replacing = ExitStack()
        self._scored = self._right = 0

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        rank = f".{trainer.global_rank}" if trainer.global_rank else ""
        self.file = self.folder / f"predictions{rank}.jsonl"
        self._file = self._replacing.enter_context(self._replacing.enter_context(replaced(self.file)).open("w"))

    def on_predict_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, *args: Any
    ) -> None:
        assert self._file is not None
        tokenizer = trainer.datamodule.tokenizer  # type: ignore[attr-defined]
        for targets, predicted in zip(batch["targets"], outputs, strict=True):
            scored = targets != IGNORED
            if scored.any():
                line = {"targets": targets[scored].tolist(), "predicted": predicted[scored].tolist()}
                text = {} if tokenizer is None else {"text": tokenizer.decode(line["predicted"])}
                self._file.write(json.dumps({**line, **text}) + "\n")
            self._scored += int(scored.sum())
            self._right += int((targets == predicted)[scored].sum())

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._replacing.close()
        counts: Tensor = torch.tensor([self._scored, self._right], dtype=torch.float64, device=pl_module.device)
        scored, right = trainer.strategy.reduce(counts, reduce_op="sum").tolist()
        if trainer.is_global_zero:
            share = f"{100 * right / scored:.2f} % of {scored:,.0f}" if scored else "none, for there is no test text"
            print(f"{self.file}: next tokens predicted right: {share}")

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        with suppress(type(exception)):  # which leaves an older file as it is
            self._replacing.__exit__(type(exception), exception, exception.__traceback__)
