"""The shared base of residual blocks that do more around another one."""

from __future__ import annotations

from torch import Tensor

from blockwright.blocks.forward_pass import Losses, Pass
from blockwright.blocks.residual.base import Mixer, Residual


class Around(Residual):
    """A residual block around another, whose streams, losses and hooks it passes on.

    Args:
        residual: the other one
    """

    def __init__(self, residual: Residual) -> None:
        super().__init__()
        self.residual, self.streams = residual, residual.streams
        self.adds_branches, self.skips = residual.adds_branches, residual.skips

    def open(self, x: Tensor) -> Tensor:
        return self.residual.open(x)

    def leave(self, x: Tensor) -> Tensor:
        return self.residual.leave(x)

    def close(self, x: Tensor) -> Tensor:
        return self.residual.close(x)

    def losses(self, x: Tensor, real: Tensor | None) -> Losses:
        return self.residual.losses(x, real)

    def mixers(self, attention: Mixer, ffn: Mixer, given: Pass) -> tuple[Mixer, Mixer]:
        return self.residual.mixers(attention, ffn, given)

    def forward(self, x: Tensor, attention: Mixer, ffn: Mixer) -> Tensor:
        return self.residual(x, attention, ffn)
