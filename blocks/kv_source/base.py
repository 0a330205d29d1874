"""The contract of ``kv_source``: where the keys and values that an attention reads come from, over depth."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from blockwright.blocks.base import Block
from blockwright.blocks.drawn import Drawn
from blockwright.registry import family

Slots = tuple[Tensor, ...]


@family("kv_source")
class KVSource(Block):
    """A child of attention. Without one, an attention makes its own keys and values, and no other layer reads them.

    Layers share where they have one window and remember tensors of the same shapes: a layer reads those that the
    nearest such layer below lends. A cache stores them once, in the layer that makes them.

    Class attributes:
        makes: whether the attention makes keys and values of its tokens. One that does not has no projections for
            them, and its cache holds nothing
        lends: whether layers above may read what ``forward`` returns
    """

    makes: ClassVar[bool] = True
    lends: ClassVar[bool] = False

    def __init__(self) -> None:
        super().__init__()

    def drawn(self) -> Drawn:
        return Drawn(acts="keys seen")

    def forward(self, own: Slots | None, below: Slots | None) -> Slots:
        """What the attention reads of S tokens, of its cache or of the pass; it changes no tensor in place.

        Args:
            own: [B,S,…] for each slot of a cache: keys and values, or latents. None where ``makes`` is false
            below: the same of the nearest layer below that lends them; None where there is none, which is refused for
                a block that does not make its own

        Returns:
            tensors of these shapes
        """
        raise NotImplementedError
