"""Trainings that write down their batches, and may be killed."""

from __future__ import annotations

import contextlib
from pathlib import Path

import lightning as L
import torch
from torch import nn

from tests.training.parallel.quiet import quiet_trainer


class KilledError(Exception):
    pass


class Recorder(L.LightningModule):
    """A model of one number that writes down the batches it is trained on, and the number of its epoch."""

    def __init__(self, dies_at: int | None = None) -> None:
        super().__init__()
        self.number, self.dies_at = nn.Parameter(torch.zeros(1)), dies_at
        self.seen: list[tuple[int, ...]] = []
        self.epochs: list[int] = []

    def training_step(self, batch, batch_idx):
        if len(self.seen) == self.dies_at:
            raise KilledError
        self.seen.append(tuple(batch["tokens"].flatten().tolist()))
        self.epochs.append(self.current_epoch)
        return self.number.sum()

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(data, folder: Path, callbacks=(), ckpt_path=None, dies_at=None, **trainer) -> Recorder:
    model = Recorder(dies_at)
    settings = {"max_steps": 40, "max_epochs": -1, "limit_val_batches": 0, **trainer}
    saving = {"enable_checkpointing": bool(callbacks), "callbacks": list(callbacks)}
    trainer = quiet_trainer(default_root_dir=folder, **saving, **settings)
    with contextlib.suppress(KilledError):
        trainer.fit(model, datamodule=data, ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
    return model
