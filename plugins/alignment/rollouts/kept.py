"""The rollouts of the current optimizer step, and the completions of each that an update is made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from blockwright.blocks.initialise import stable_seed
from blockwright.plugins.alignment.rollouts.record import Rollout, dealt_again
from blockwright.training.parallel.ranks import DataRanks


class KeptRollouts:
    """Rollouts by number. Each is cut into equal parts, one for each update, after a shuffle.

    Args:
        seed: of the run

    Attributes:
        whole: number → rollout
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.whole: dict[int, Rollout] = {}
        self._dealt: dict[int, list[list[int]]] = {}  # completions of the updates of a rollout that was resumed

    def forget(self, oldest: int) -> None:
        """Drop the rollouts up to a number."""
        self.whole = {number: rollout for number, rollout in self.whole.items() if number > oldest}

    def slices(self, size: int, number: int, updates: int, rank: int) -> list[list[int]]:
        """The completions of each update of a rollout.

        Args:
            size: completions of this rank
            number: of the rollout
            updates: that it is used for
            rank: of this process among those that read different data
        """
        if number in self._dealt:
            return self._dealt[number]
        generator = torch.Generator().manual_seed(stable_seed(self.seed, f"slices/{number}/{rank}"))
        order, part = torch.randperm(size, generator=generator).tolist(), size // updates
        return [order[start : start + part] for start in range(0, size, part)]

    def stored(self, updates: int, ranks: DataRanks) -> list[Any]:
        """What a checkpoint keeps, of all ranks in their order: nothing if every rollout has one update.

        Returns:
            for each rank: number → the fields of its rollout, and its slices
        """
        if updates == 1:
            return []
        own = {
            number: {**vars(rollout), "slices": self.slices(len(rollout), number, updates, ranks.index)}
            for number, rollout in self.whole.items()
        }
        if ranks.number == 1:
            return [own]
        every: list[Any] = [None] * ranks.number
        torch.distributed.all_gather_object(every, own, group=ranks.group)
        return every

    def restore(self, stored: Sequence[Any], ranks: DataRanks) -> None:
        """Take the rollouts of a checkpoint, dealt again if there are now more or fewer ranks."""
        for number in stored[0] if stored else ():
            fields = [dict(own[number]) for own in stored]
            dealt = [own.pop("slices") for own in fields]
            parts = [Rollout(**own) for own in fields]
            shares = [*zip(parts, dealt, strict=True)]
            if len(parts) != ranks.number:
                shares = dealt_again(parts, dealt, ranks.number)
            self.whole[int(number)], self._dealt[int(number)] = shares[ranks.index]
