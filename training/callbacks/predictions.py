"""Output of ``blockwright train predict``: the likeliest next token after each token of the test text."""

from __future__ import annotations

import json
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import IO, Any

import lightning as L
import torch
from torch import Tensor

from blockwright.blocks.kernels.cross_entropy import IGNORED
from blockwright.registry.folder import replaced


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
