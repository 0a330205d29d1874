"""The task of recalling: causal language modelling that also counts how many targets are the likeliest token."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from blockwright.blocks.kernels.cross_entropy import IGNORED
from blockwright.registry import register
from blockwright.registry.ranges import NonNegative
from blockwright.training.figure import Figure
from blockwright.training.metrics import Accuracy
from blockwright.training.tasks.base import Batch
from blockwright.training.tasks.causal_lm import CausalLM
from blockwright.training.tasks.setup import Setup


@register("task", "recall")
class Recall(CausalLM):
    """Trains as ``causal_lm`` does, and measures ``accuracy``: for data of which only what can be known is scored.

    A validation takes a second forward pass, whose logits the loss does not keep.

    Args:
        setup: the model and how it is trained
        z_loss: as of ``causal_lm``
    """

    figures: ClassVar[tuple[Figure, ...]] = (*CausalLM.figures, *Accuracy.figures)
    splits = False  # it compares whole windows

    def __init__(self, setup: Setup, z_loss: NonNegative = 0.0) -> None:
        super().__init__(setup, z_loss)
        self.right = nn.ModuleDict({stage: Accuracy() for stage in ("val", "test")})

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        super().validation_step(batch, batch_idx, dataloader_idx)
        self._count("val", batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        super().test_step(batch, batch_idx)
        self._count("test", batch)

    def _begin(self, stage: str) -> None:
        super()._begin(stage)
        self._accuracy(stage).reset()

    def _conclude(self, stage: str) -> None:
        super()._conclude(stage)
        self.log(f"{stage}/accuracy", self._accuracy(stage).compute().float())

    def _count(self, stage: str, batch: Batch) -> None:
        scored = batch["targets"] != IGNORED
        likeliest: Tensor = self.predict_step(batch, 0)
        self._accuracy(stage).update((likeliest == batch["targets"])[scored])

    def _accuracy(self, stage: str) -> Accuracy:
        metric = self.right[stage]
        assert isinstance(metric, Accuracy)
        return metric
