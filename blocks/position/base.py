"""The contract of ``position``: encode positions through one of three hooks that default to nothing.

Attention calls ``rotate`` and ``bias`` without knowing the block; the decoder calls ``embed``. Frequencies and slopes
are computed in fp32 from the block's parameters at each call: nothing is shared between instances, rounded by
``module.to(bfloat16)`` or lost when a model built on the meta device is materialised.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import ClassVar, Literal

from torch import Tensor

from blockwright.blocks.base import Block
from blockwright.blocks.drawn import Drawn
from blockwright.blocks.kernels.scoring import Slopes
from blockwright.registry import family


@family("position", context=("head_dim", "n_heads", "max_positions"))
class Position(Block):
    """A position block.

    Context: ``head_dim`` (width of the queries and keys passed to ``rotate``), ``n_heads`` (of the scores that ``bias``
    changes), ``max_positions`` (longest sequence of the model).

    Class attributes:
        place: ``attention`` if the block works on queries, keys or scores (one instance per attention), ``embedding``
            if it works on the embeddings (one instance per decoder; attentions then get ``none``)

    Attributes:
        softmax_scale: multiplies the attention's 1/√H (YaRN's temperature)
        limit: number of positions; None if unlimited
        boundary: length, in tokens, that ``rotate_in`` rotates longer sequences otherwise than; None if there is none
    """

    place: ClassVar[Literal["attention", "embedding"]] = "attention"
    counted_as: ClassVar[str | None] = "position"

    def __init__(self) -> None:
        super().__init__()
        self.softmax_scale = 1.0
        self.limit: int | None = None
        self.boundary: int | None = None

    def drawn(self) -> Drawn:
        return Drawn(acts="queries, keys", shows=("factor",))

    def embed(self, x: Tensor, positions: Tensor) -> Tensor:
        """Embeddings x [B,T,D] at positions [B|1,T] → [B,T,D]."""
        return x

    def rotate(self, q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Queries q [B,T,N,H] and keys k [B,T,K,H], both at positions [B|1,T], → the same shapes."""
        return q, k

    def rotate_in(self, q: Tensor, k: Tensor, positions: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """``rotate`` in sequences declared to have ``length`` tokens; for blocks that rotate short and long ones apart.

        Declared is the window without a cache and the cache's capacity with one, never what has been read so far: the
        keys of all chunks of a sequence must be rotated alike.
        """
        return self.rotate(q, k, positions)

    def alike(self) -> Hashable | None:
        """Equal for blocks whose ``angles`` are equal, so that the layers of a pass with caches compute them once; None
        for a block without ``angles``."""
        return None

    def angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """What ``rotate`` needs of positions [B|1,T], of a block that is ``alike`` others."""
        raise NotImplementedError

    def turned(self, q: Tensor, k: Tensor, angles: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """``rotate`` by these ``angles``."""
        raise NotImplementedError

    def bias(self, q_positions: Tensor, k_positions: Tensor) -> Tensor | Slopes | None:
        """Additive bias on the scores of queries at [B|1,T] and keys at [B|1,S]: [B|1,N,T,S], or None for none.

        One that falls linearly with distance is returned as ``Slopes``, from which FlexAttention computes each score's
        part where it is added: no tensor of T × S is made.
        """
        return None
