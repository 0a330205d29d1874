"""What crosses depth beside the residual stream: tensors that blocks of one layer leave for those of later layers.

The first layer's values (value residual), the keys that an earlier layer chose. Each layer is given what the layer
below left, a dict of tensors by name, and leaves a new dict: nothing is kept outside of the arguments and results of
``Layer.forward``, so activation checkpointing, compilation and sharding see all of it. A block finds it in its
``Pass``::

    def mix(self, x, given):
        v = self.value(x)
        first = v if given.carry is None else given.carry.setdefault("values", v)

A block adds entries to the dict that it is given, or replaces them; it never changes a tensor in place. Without a dict
it computes what the first layer would. Every tensor is [B,T,…], of the tokens that pass through the layer: these may be
the new ones beside a cache, or one rank's share of a sequence. A block that tensor parallelism splits leaves its own
part of the heads. Multi-token prediction begins with nothing carried. One entry alone is of more tokens beside a cache:
the keys and values that a layer lends (blocks/attention/lending.py) are then of all that it sees.
"""

from __future__ import annotations

import torch
from torch import Tensor

Carry = dict[str, Tensor]


def split(carry: Carry, first: int) -> tuple[Carry, Carry]:
    """What is carried of the ``first`` tokens, and of those after them."""
    parts: tuple[Carry, Carry] = ({}, {})
    for name, tensor in carry.items():
        parts[0][name], parts[1][name] = tensor.tensor_split([first], 1)
    return parts


def joined(head: Carry, tail: Carry) -> Carry:
    """The reverse of ``split``."""
    return {name: torch.cat((tensor, tail[name]), 1) for name, tensor in head.items()}
