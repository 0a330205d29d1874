"""Factors on the settings of one weight. It imports no torch, as optimizer recipes do not."""

from __future__ import annotations

from typing import NamedTuple


class Scale(NamedTuple):
    """Factors on the settings of one weight.

    init: on its initial values
    rate: on its learning rate; its decay, which is multiplied by the rate, has the inverse, so that lr·λ stays
    eps: on Adam's ε
    """

    init: float = 1.0
    rate: float = 1.0
    eps: float = 1.0

    def times(self, other: Scale) -> Scale:
        """Both factors together."""
        return Scale(*(ours * theirs for ours, theirs in zip(self, other, strict=True)))


ONE = Scale()


def multiplier(factor: float) -> Scale:
    """What multiplies a weight's output by a factor: its values and its steps are as much smaller.

    Steps of Adam and of Muon do not depend on the size of the gradient, so factors on values and steps are equal to a
    factor on the output, but for ε: the gradient is larger by the inverse.
    """
    return Scale(init=factor, rate=factor, eps=1 / factor)
