"""What an attention appends to its cache: under context parallelism, what is sent."""

from __future__ import annotations

import torch
from torch import Tensor

from blockwright.blocks.attention.base import Attention
from blockwright.blocks.cache.base import Cache
from blockwright.blocks.forward_pass import Pass


class Appended(Cache):
    """Counts the numbers of a token that are appended, and returns what it is given."""

    def __init__(self) -> None:
        super().__init__(1, TOKENS, {}, torch.float32, torch.device("meta"))
        self.spread, self.times, self.numbers = True, 0, 0

    def append(self, *new: Tensor, multiple: int = 1) -> tuple[Tensor, ...]:
        self.times, self.length = self.times + 1, new[0].shape[1]
        self.numbers += sum(t[0, 0].numel() for t in new)
        return new


TOKENS = 4


def appended(attention: Attention, d_model: int) -> Appended:
    """What one pass appends, found with shapes only.

    Args:
        attention: on the meta device
    """
    memory, x = Appended(), torch.empty(1, TOKENS, d_model, device="meta", dtype=torch.float32)
    with torch.no_grad():
        attention(x, Pass(torch.arange(TOKENS, device="meta")[None], cache=memory))
    return memory
