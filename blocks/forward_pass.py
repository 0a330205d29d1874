"""What a forward pass knows of its tokens, beside their states: one value, given to every layer and its blocks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from blockwright.blocks.base import Block
from blockwright.blocks.depthwise import Stretch
from blockwright.blocks.kernels.scoring import is_real

if TYPE_CHECKING:
    from blockwright.blocks.cache.base import Cache
    from blockwright.blocks.position.base import Position


class Tails(ABC):
    """The inputs before those of a pass: of a cache, or of the ranks that hold the tokens before this rank's."""

    @abstractmethod
    def before(self, place: str, u: Tensor, past: int) -> Sequence[Stretch]:
        """The inputs of a block, each stretch behind the ``past`` inputs before it.

        Args:
            place: name of the block in its layer; it asks once in a pass
            u: [B,T,W], which are remembered
            past: number of inputs before a token that it sees

        Returns:
            stretches of [B,past+t,W], whose t add up to T, in the order of u
        """


# What crosses depth beside the residual stream: tensors that blocks of one layer leave for those of later layers, as
# the first layer's values, or the keys that an earlier layer chose. Each layer is given what the layer below left,
# and leaves a new dict: nothing is kept outside of the arguments and results of ``Layer.forward``, so activation
# checkpointing, compilation and sharding see all of it. A block finds it in its ``Pass``:
#
#     first = v if given.carry is None else given.carry.setdefault("values", v)
#
# A block adds entries to the dict that it is given, or replaces them; it never changes a tensor in place. Without a
# dict it computes what the first layer would. Every tensor is [B,T,…], of the tokens that pass through the layer:
# these may be the new ones beside a cache, or one rank's share of a sequence. A block that tensor parallelism splits
# leaves its own part of the heads. Multi-token prediction begins with nothing carried. Keys and values that a layer
# lends alone are others: beside a cache they are of all that it sees (blocks/attention/remembered.py), and some are of
# windows of tokens (blocks/compressor/csa2.py), which no ranks that share sequences compute.
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


class Share(ABC):
    """One rank's tokens of the sequences of a batch, under context parallelism; the other tokens are on other ranks.

    Everything but attention, memory and convolutions works on single tokens, and so on this rank's alone. See
    training/parallel/context.py.
    """

    @abstractmethod
    def take(self, whole: Tensor) -> Tensor:
        """[B|1,T',…] of whole sequences → [B|1,t,…] of this rank's tokens, in their order.

        Args:
            whole: of all T tokens, or of the first T' of them, as depths of multi-token prediction have
        """

    @abstractmethod
    def tails(self, segments: Tensor | None) -> Tails:
        """What other ranks have before this rank's tokens, for one layer of a pass.

        Args:
            segments: [B,T'] of the whole sequences
        """

    @abstractmethod
    def attend(self, attention: Block, x: Tensor, given: Pass) -> Tensor:
        """Attention of this rank's tokens on those of all ranks.

        Args:
            x: [B,t,D] of this rank's tokens
            given: its ``losses`` are filled with the attention's, of which the mean over ranks is that over all tokens

        Returns:
            [B,t,D]
        """

    @abstractmethod
    def recall(self, memory: Block, x: Tensor, given: Pass) -> Tensor:
        """What a memory adds to this rank's tokens, which may depend on tokens of other ranks.

        Args:
            x: of this rank's tokens, [B,t,D] or [B,t,M,D]

        Returns:
            the shape of x
        """


Losses = dict[str, Tensor]
M = TypeVar("M")


class Pass(NamedTuple):
    """Data of the T tokens whose states x [B,T,D] a block receives: positions, documents, caches and more.

    A tuple, since sharding strategies look for tensors in tuples and dicts alone. A layer gives its blocks its own
    cache, ``carry`` and ``losses``; all else is the same for every layer. With a share, x, ``tokens``, ``embedded``
    and ``carry`` are of this rank's tokens, ``positions`` and ``segments`` of the whole sequences; a share gives its
    attention and its memory what is of the tokens they are given.

    Attributes:
        positions: [B|1,T] of each token in its document
        segments: [B,T] document ids of packed sequences; tokens of different documents never see each other, and −1
            is padding. None: each row is one document
        cache: of the tokens before these T, which are appended to it; None for none
        carry: what crosses depth, which blocks read and add to (``Carry``); None: nothing does
        losses: to be filled in training with the attention's own losses: name → scalar, a mean over tokens, already
            weighted. None: nothing learns
        tokens: [B,T] ids, for gates and memories that read them
        embedded: [B,T,D], the input of the first layer
        experts: those of an earlier routing of this layer, to be weighed again (``Gating.forward``)
        share: where the tokens of a sequence are spread over ranks
        needed: number of last tokens that are asked for in the end, given to the last layer of a pass with caches: of
            those before them it need compute no more than what is remembered. None: all
        tails: the inputs before those of the layer, where there is a cache or a share; set by it
        made: what the layers of a pass with caches make alike, such as masks, by name (``once``); None: each its own
    """

    positions: Tensor
    segments: Tensor | None = None
    cache: Cache | None = None
    carry: Carry | None = None
    losses: Losses | None = None
    tokens: Tensor | None = None
    embedded: Tensor | None = None
    experts: Tensor | None = None
    share: Share | None = None
    needed: int | None = None
    tails: Tails | None = None
    made: dict[Hashable, Any] | None = None

    def of_last(self, n: int) -> Pass:
        """The data of the last n tokens alone, for rows that are single documents."""
        tokens, embedded = (None if t is None else t[:, -n:] for t in (self.tokens, self.embedded))
        carry = None if self.carry is None else {name: t[:, -n:] for name, t in self.carry.items()}
        own = self._replace(positions=self.positions[:, -n:], tokens=tokens, embedded=embedded)
        return own._replace(carry=carry, needed=None)

    def at(self, places: Tensor) -> Pass:
        """The data of the tokens at places [B,k] of their rows, for blocks that work on single tokens."""

        def of(rows: Tensor | None) -> Tensor | None:
            return None if rows is None else rows.expand(len(places), -1).gather(1, places)

        experts = self.experts
        if experts is not None:
            k = experts.shape[1]
            experts = experts.view(len(places), -1, k).gather(1, places[..., None].expand(-1, -1, k)).flatten(0, 1)
        positions = self.positions.expand(len(places), -1).gather(1, places)
        segments, tokens = of(self.segments), of(self.tokens)
        return self._replace(positions=positions, segments=segments, tokens=tokens, experts=experts, carry=None)

    def once(self, name: Hashable, make: Callable[[], M]) -> M:
        """What ``make`` returns, made by the first layer of the pass that asks for it under this name."""
        if self.made is None:
            return make()
        if name not in self.made:
            self.made[name] = make()
        found: M = self.made[name]
        return found

    @property
    def declared(self) -> int | Tensor:
        """Tokens that the sequences are declared to have, or [B] each, for ``Position.rotate_in``."""
        if self.cache is None:
            return self.positions.shape[1]
        return self.cache.room if self.cache.declared is None else self.cache.declared

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
