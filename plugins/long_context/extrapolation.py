"""Loss on windows longer than those of training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor

from blockwright.blocks.compose import check, compose
from blockwright.blocks.decoder import Decoder
from blockwright.blocks.kernels.cross_entropy import IGNORED
from blockwright.registry import ConfigError
from blockwright.registry.enforcing import enforced
from blockwright.registry.ranges import Count
from blockwright.training.data.modules.text import CorpusDataModule, TextDataModule
from blockwright.training.figure import Figure
from blockwright.training.metrics import TokenLoss
from blockwright.training.parallel.local import is_distributed
from blockwright.training.tasks.base import Task


@enforced("callbacks.extrapolation")
class Extrapolation(L.Callback):
    """Logs ``extrapolation/loss_4x``: the loss on the whole val split in windows four times as long.

    Measured once, with the final figures. Each token is scored once, the first ones of a window too, so 1× equals
    val/loss.

    Args:
        multiples: of data.sequence_length
        position: a position block to measure the trained weights with, such as YaRN after training with RoPE; null for
            the model's own. val/loss always uses the model's own
    """

    figures = (Figure("loss_{multiple}x", "nats per token", "less", ("extrapolation",)),)

    def __init__(self, multiples: Sequence[Count] = (4,), position: Mapping[str, Any] | None = None) -> None:
        if not multiples:
            rule = "must list at least one multiple of the trained length"
            raise ConfigError("callbacks.extrapolation.multiples", list(multiples), rule, "Write [2,4]")
        self.multiples = tuple(multiples)
        self.position = None if position is None else dict(position)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse before training what could not be measured after it."""
        task, data = _of(trainer, pl_module)
        longest, room = max(self.multiples) * data.sequence_length, task.model_config["max_positions"]
        if longest > room:
            rule = f"makes windows of {longest} tokens, but the model has positions for {room}"
            remedy = f"Raise model.max_positions to {longest}, or lower it"
            raise ConfigError("callbacks.extrapolation.multiples", max(self.multiples), rule, remedy)
        if self.position is not None:
            check({**task.model_config, "position": self.position})

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn != "validate":  # not during training
            return
        task, data = _of(trainer, pl_module)
        decoder = self._decoder(task)
        for multiple in self.multiples:
            with trainer.precision_plugin.val_step_context():
                loss = _loss(task, decoder, data, multiple * data.sequence_length)
            task.log(f"extrapolation/loss_{multiple}x", loss)

    def _decoder(self, task: Task) -> Decoder:
        trained = task.decoder
        assert trained is not None
        if self.position is None:
            return trained
        if is_distributed(trained):
            rule = "needs a copy of the model, but no rank has all its weights"
            remedy = "Train on one device, or with ddp"
            raise ConfigError("callbacks.extrapolation.position", self.position, rule, remedy)
        other = compose({**trained.config, "position": self.position}, device=task.device)
        other.load_state_dict(trained.state_dict())  # trained positions are in both or in neither
        return other.to(trained.embedding.weight.dtype).choose_kernels(task.configured.kernels).eval()


def _of(trainer: L.Trainer, task: L.LightningModule) -> tuple[Task, TextDataModule]:
    data = trainer.datamodule  # type: ignore[attr-defined]
    if not isinstance(task, Task) or not isinstance(data, CorpusDataModule):
        rule = f"measures text, and the task here is {type(task).__name__}"
        raise ConfigError("callbacks", "extrapolation", rule, "Leave it out, or use task=causal_lm")
    if not isinstance(data, TextDataModule):
        rule = "measures longer windows of a text, and conversations are never longer than a row"
        raise ConfigError("callbacks", "extrapolation", rule, "Leave it out, or use data=text")
    return task, data


def _loss(task: Task, decoder: Decoder, data: TextDataModule, length: int) -> Tensor:
    """Mean loss per token over the val split in windows of ``length``, on all ranks."""
    metric = TokenLoss().to(task.device)
    with torch.no_grad():
        loader: Iterable[Any] = data.val_windows(length)
        for batch in loader:
            given: dict[str, Tensor] = {name: tensor.to(task.device) for name, tensor in batch.items()}
            share = task.share(given)
            targets = given["targets"] if share is None else share.take(given["targets"])
            hidden = decoder.hidden(given["tokens"], given.get("positions"), given.get("segments"), share=share)[0]
            metric.update(decoder.nll(hidden, targets), (targets != IGNORED).sum(), given["n_bytes"].sum())
    return metric.compute()["loss"].float()
