"""Show what a task samples, and what its updates do to that."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
from rich.table import Table

from blockwright.registry import printing
from blockwright.registry.enforcing import enforced
from blockwright.registry.folder import append_lines
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
