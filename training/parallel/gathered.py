"""Gather sharded weights once for many forward passes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.distributed.fsdp import FSDPModule


@contextmanager
def gathered(decoder: nn.Module) -> Iterator[None]:
    """Context in which FSDP2 keeps the weights that it gathers: generation would gather every layer for every token.

    Every rank then holds whole layers, but of experts its own. Does nothing to a decoder that is not sharded.
    """
    sharded = [m for m in decoder.modules() if isinstance(m, FSDPModule)]
    for module in sharded:
        module.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for module in sharded:
            module.set_reshard_after_forward(module is not decoder, recurse=False)  # the outermost is never reshared
            module.reshard()
