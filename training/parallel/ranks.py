"""Sums and means over the ranks that read different data, which are not always all ranks."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from blocks.balance.base import Balance


class DataRanks:
    """The ranks that read different data.

    Args:
        number: of these ranks
        index: of this one among them
        group: their process group; None for the world
    """

    def __init__(self, number: int = 1, index: int = 0, group: dist.ProcessGroup | None = None) -> None:
        self.number, self.index, self.group = number, index, group

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
        return DataRanks(meshes.sizes.data, dist.get_rank(meshes.data), meshes.data)
    return DataRanks(trainer.world_size, trainer.global_rank)


def balance_over(module: nn.Module, ranks: DataRanks) -> None:
    """Make balance losses that are defined over the whole batch count the tokens of all ranks."""
    for block in module.modules():
        if isinstance(block, Balance) and ranks.number > 1:
            block.mean_over_ranks = ranks.mean
