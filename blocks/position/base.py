"""The contract of ``position``: encode positions through one of three hooks that default to nothing.

Attention calls ``rotate`` and ``bias`` without knowing the block; the decoder calls ``embed``. A bias may depend on its
query, and on what was noted of each key (blocks/base.py). Frequencies and slopes are computed in fp32 from the
block's parameters at each call: nothing is shared between instances, rounded by ``module.to(bfloat16)`` or lost when a
model built on the meta device is materialised.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from typing import ClassVar, Literal

from torch import Tensor, nn

from blockwright.blocks.base import Drawn, Keys, Queries, Remembering
from blockwright.blocks.kernels.scoring import Bias
from blockwright.registry import family, register


@family("position", context=("d_model", "head_dim", "n_heads", "max_positions"))
class Position(Remembering):
    """A position block.

    Context: ``d_model`` (width of ``Queries.x``), ``head_dim`` (width of the queries and keys passed to ``rotate``),
    ``n_heads`` (of the scores that ``bias`` changes), ``max_positions`` (longest sequence of the model).

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

    def rotate_in(self, q: Tensor, k: Tensor, positions: Tensor, length: int | Tensor) -> tuple[Tensor, Tensor]:
        """``rotate`` in sequences declared to have ``length`` tokens, or [B] each; for blocks that rotate short and
        long ones apart.

        Declared is the window without a cache, and with one what may be read at most, never what has been read so far:
        the keys of all chunks of a sequence must be rotated alike.
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

    def bias(self, queries: Queries, keys: Keys) -> Bias:
        """Additive bias on the scores of T queries and S keys: [B|1,N|1,T,S], or None for none.

        One that is computed from much less than T × S numbers is returned as a ``Formula``, as ``Slopes`` and ``Band``
        are: FlexAttention computes each score's part where it is added, and a CPU those of a block of queries. Of a
        long prompt some queries and some keys at a time are asked for, where there are no ``slots``.
        """
        return None


# --- the shared base of positions that change what another one does ---


class Around(Position):
    """A position around another, whose hooks it passes on.

    Args:
        inner: the other one; None for none
    """

    def __init__(self, inner: Position | None) -> None:
        super().__init__()
        self.inner = inner
        if inner is not None:
            self.softmax_scale, self.limit, self.boundary = inner.softmax_scale, inner.limit, inner.boundary

    def rotate(self, q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        return (q, k) if self.inner is None else self.inner.rotate(q, k, positions)

    def rotate_in(self, q: Tensor, k: Tensor, positions: Tensor, length: int | Tensor) -> tuple[Tensor, Tensor]:
        return (q, k) if self.inner is None else self.inner.rotate_in(q, k, positions, length)

    def bias(self, queries: Queries, keys: Keys) -> Bias:
        return None if self.inner is None else self.inner.bias(queries, keys)

    def slots(self) -> dict[str, tuple[int, ...]]:
        return {} if self.inner is None else self.inner.slots()

    def remember(self, x: Tensor, positions: Tensor, declared: int | Tensor) -> tuple[Tensor, ...]:
        return () if self.inner is None else self.inner.remember(x, positions, declared)


# --- sequences of one batch that a model rotates alike ---


def boundaries(model: nn.Module) -> list[int]:
    """The lengths at which positions of a model change how a sequence is rotated, ascending."""
    found = (module.boundary for module in model.modules() if isinstance(module, Position))
    return sorted({boundary for boundary in found if boundary is not None})


def alike(model: nn.Module, lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Batches of rows, the longest first, each with rows on one side of every boundary.

    Padding makes the rows of a batch as long as its longest, which is the length that is declared: a short row beside a
    long one would be rotated otherwise than by itself.

    Args:
        lengths: of each row, in tokens
        size: most rows of a batch
    """
    ends = boundaries(model)
    batch: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        beside = batch and any(lengths[row] <= end < lengths[batch[0]] for end in ends)
        if len(batch) == size or beside:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


@register("position", "none")
class NoPosition(Position):
    """No position signal: order is visible only through the causal mask.

    Kazemnejad et al. 2023 (NoPE), arXiv 2305.19466.
    """
