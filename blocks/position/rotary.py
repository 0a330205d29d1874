"""The shared base of position blocks that rotate queries and keys."""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor, nn

from blockwright.blocks.kernels.elementwise import Angles, angles, turn
from blockwright.blocks.position.base import Position

OF_MODULES = frozenset(vars(nn.Module()))  # attributes that are no settings


class Rotary(Position):
    """Rotates pairs of dimensions by position · frequency: the base of ``rope``, ``yarn`` and others.

    A subclass has ``frequencies``, and sets ``interleaved`` and, where rotated dimensions are scaled, ``amplitude``.
    """

    interleaved: bool
    amplitude: float = 1.0

    def frequencies(self, device: torch.device) -> Tensor:
        """Radians per position for each pair, [R/2] fp32."""
        raise NotImplementedError

    def rotate(self, q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        return self.turned(q, k, self.angles(positions))

    def alike(self) -> Hashable | None:
        """Class and settings, where these are plain values and all there is, and it rotates as this class does."""
        if type(self).rotate is not Rotary.rotate or type(self).rotate_in is not Position.rotate_in:
            return None
        own = {name: value for name, value in vars(self).items() if name not in OF_MODULES and name != "kernels"}
        plain = all(value is None or isinstance(value, (int, float, str)) for value in own.values())
        return None if self._parameters or self._buffers or self._modules or not plain else (type(self), *own.values())

    def angles(self, positions: Tensor) -> Angles:
        return angles(positions, self.frequencies(positions.device), self.amplitude)

    def turned(self, q: Tensor, k: Tensor, angles: Angles) -> tuple[Tensor, Tensor]:
        return turn(q, k, angles, self.interleaved, self.kernels.rotate)
