"""What a forward pass knows of its tokens, beside their states: one value, given to every layer and its blocks."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from torch import Tensor

from blockwright.blocks.carry import Carry
from blockwright.blocks.kernels.documents import is_real

if TYPE_CHECKING:
    from blockwright.blocks.cache.base import Cache
    from blockwright.blocks.position.base import Position
    from blockwright.blocks.share import Share
    from blockwright.blocks.tails import Tails

Losses = dict[str, Tensor]
M = TypeVar("M")


class Pass(NamedTuple):
    """Data of the T tokens whose states x [B,T,D] a block receives: positions, documents, caches and more.

    A tuple, since sharding strategies look for tensors in tuples and dicts alone. A layer gives its blocks its own
    cache, ``carry`` and ``losses``; all else is the same for every layer. With a share, x, ``tokens`` and ``carry`` are
    of this rank's tokens, ``positions`` and ``segments`` of the whole sequences; a share gives its attention what is of
    the tokens it is given.

    Attributes:
        positions: [B|1,T] of each token in its document
        segments: [B,T] document ids of packed sequences; tokens of different documents never see each other, and −1
            is padding. None: each row is one document
        cache: of the tokens before these T, which are appended to it; None for none
        carry: what crosses depth, which blocks read and add to (blocks/carry.py); None: nothing does
        losses: to be filled in training with the attention's own losses: name → scalar, a mean over tokens, already
            weighted. None: nothing learns
        tokens: [B,T] ids, for gates that route by them
        experts: those of an earlier routing of this layer, to be weighed again (``Gating.forward``)
        share: where the tokens of a sequence are spread over ranks
        needed: number of last tokens that are asked for in the end, given to the last layer of a pass with caches: of
            those before them it need compute no more than what is remembered. None: all
        tails: the inputs before those of the layer, where there is a cache or a share; set by it (blocks/tails.py)
        made: what the layers of a pass with caches make alike, such as masks, by name (``once``); None: each its own
    """

    positions: Tensor
    segments: Tensor | None = None
    cache: Cache | None = None
    carry: Carry | None = None
    losses: Losses | None = None
    tokens: Tensor | None = None
    experts: Tensor | None = None
    share: Share | None = None
    needed: int | None = None
    tails: Tails | None = None
    made: dict[Hashable, Any] | None = None

    def of_last(self, n: int) -> Pass:
        """The data of the last n tokens alone, for rows that are single documents."""
        tokens = None if self.tokens is None else self.tokens[:, -n:]
        carry = None if self.carry is None else {name: t[:, -n:] for name, t in self.carry.items()}
        return self._replace(positions=self.positions[:, -n:], tokens=tokens, carry=carry, needed=None)

    def once(self, name: Hashable, make: Callable[[], M]) -> M:
        """What ``make`` returns, made by the first layer of the pass that asks for it under this name."""
        if self.made is None:
            return make()
        if name not in self.made:
            self.made[name] = make()
        found: M = self.made[name]
        return found

    @property
    def declared(self) -> int:
        """Tokens that the sequences are declared to have, for ``Position.rotate_in``."""
        return self.positions.shape[1] if self.cache is None else self.cache.declared or self.cache.room

    @property
    def real(self) -> Tensor | None:
        """[B,T]: which tokens of x are no padding; None: all."""
        if self.segments is None:
            return None
        return is_real(self.segments if self.share is None else self.share.take(self.segments))

    def rotated(self, position: Position, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Queries [B,T,N,R] and keys [B,T,K,R] of the tokens, rotated for the length that their sequences have."""
        if self.made is None or (alike := position.alike()) is None:
            return position.rotate_in(q, k, self.positions, self.declared)
        name = "angles", id(self.positions), alike
        return position.turned(q, k, self.once(name, lambda: position.angles(self.positions)))
