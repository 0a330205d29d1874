"""Sums and means over the ranks that compute different tokens, which are not always all ranks."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from blockwright.blocks.over_ranks import OverRanks


class DataRanks:
    """The ranks that compute different tokens.

    Args:
        number: of these ranks
        index: of this one among them
        group: their process group; None for the world
        together: how many adjacent ones of them read the same windows (context parallelism)
    """

    def __init__(
        self, number: int = 1, index: int = 0, group: dist.ProcessGroup | None = None, together: int = 1
    ) -> None:
        self.number, self.index, self.group, self.together = number, index, group, together

    def sum(self, value: Tensor) -> Tensor:
        """Σ over the ranks, without a gradient."""
        if self.number == 1:
            return value
        total = value.detach().clone()
        dist.all_reduce(total, group=self.group)
        return total

    def mean(self, value: Tensor) -> Tensor:
        return self.sum(value) / self.number


def data_ranks(trainer: Any) -> DataRanks:
    """Those of a trainer whose processes have started."""
    meshes = getattr(trainer.strategy, "meshes", None)
    if meshes is not None:
        data = meshes.data
        return DataRanks(data.size(), data.get_local_rank(), data.get_group(), meshes.sizes.context)
    return DataRanks(trainer.world_size, trainer.global_rank)


def balance_over(module: nn.Module, batch: DataRanks, sequence: DataRanks) -> None:
    """Make losses that are means over tokens count those of all ranks.

    Args:
        batch: ranks with different tokens
        sequence: those of them with tokens of the same sequences
    """
    for block in module.modules():
        if isinstance(block, OverRanks):
            block.batch_ranks, block.sequence_ranks = batch, sequence
