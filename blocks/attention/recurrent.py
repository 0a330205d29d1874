from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from blockwright.blocks.attention.base import Attention
from blockwright.blocks.cache.state import State
from blockwright.blocks.convolution import CausalConv
from blockwright.blocks.forward_pass import Pass

Parts = Mapping[str, Tensor]


class Recurrent(Attention):
    """A mixer that remembers a state of fixed size: the shared base of ``gated_delta``, ``mamba2`` and others.

    A subclass has ``mix``, and ``memory`` for what is remembered beside the tails of its convolutions, which are the
    submodules named ``NAME_conv``.
    """

    def mix(self, x: Tensor, segments: Tensor | None, held: State | None) -> tuple[Tensor, Parts]:
        """x [B,T,D], zero where it is padding → [B,T,D], and what is remembered after it, by name.

        Args:
            held: what is remembered from before x; None for nothing
        """
        raise NotImplementedError

    def memory(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the fp32 states of one row."""
        return {}

    def forward(self, x: Tensor, given: Pass) -> Tensor:
        held = given.cache if isinstance(given.cache, State) else None
        if held is None:
            return self.mix(x, given.segments, None)[0]
        each = []
        for part in x.split(1, 1) if held.after is not None else (x,):  # the state after each token may be returned to
            y, parts = self.mix(held.without_padding(part), None, held)
            held.advance(part.shape[1], parts)
            each.append(y)
        return torch.cat(each, 1) if len(each) > 1 else each[0]

    def new_cache(
        self, batch: int, length: int, dtype: torch.dtype, device: torch.device, bits: int | None = None
    ) -> State:
        """As in the contract; ``bits`` are ignored: errors of a quantised state would add up over the tokens."""
        wide = dtype if dtype == torch.float64 else torch.float32  # torch promotes no float8
        parts: dict[str, Any] = {name: (shape, wide) for name, shape in self.memory().items()}
        for name, conv in self._convolutions().items():
            parts[name] = (conv.weight.shape[1] - 1, conv.weight.shape[0]), dtype
        return State(batch, length, parts, device)

    def convolved(self, name: str, x: Tensor, segments: Tensor | None, held: State | None) -> tuple[Tensor, Parts]:
        """silu(conv(W x)) of a projection [B,T,·], and the inputs that its convolution needs next, by name."""
        u = self.get_submodule(name)(x)
        y, tail = self._convolutions()[name](u, segments, None if held is None else held.held[name])
        return F.silu(y), {name: tail}

    def reset_parameters(self) -> None:
        for conv in self._convolutions().values():
            conv.reset_parameters()

    def _convolutions(self) -> dict[str, CausalConv]:
        return {n.removesuffix("_conv"): m for n, m in self.named_children() if isinstance(m, CausalConv)}
