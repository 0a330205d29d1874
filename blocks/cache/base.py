"""KV caches: named buffers of fixed length, exact or quantised, filled from the front.

``Cache`` keeps every token, ``Ring`` the last ones, ``State`` what a recurrent mixer makes of them. In a batch of rows
of unequal length the shorter are padded on the left, so that all rows grow together and kernels see one length;
``padding`` counts each row's padding tokens. Not supported: rows that join, pages shared between sequences.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from math import prod
from typing import ClassVar

import torch
from torch import Tensor

from blockwright.blocks.cache.stores import Exact, Quantised
from blockwright.blocks.kernels.quantise import Codes
from blockwright.registry import BlockError

Mark = tuple[int, dict[str, Tensor]]


class Cache:
    """A cache of every token, with separate buffers for each slot.

    Args:
        batch: rows
        length: capacity in tokens
        slots: name → shape of the values of one token
        dtype, device: of the buffers; quantised ones are read in that dtype
        bits: 8, 6 or 4 to quantise; None for exact values
        parts: name → widths of the parts of a slot that share no quantisation scale; default: its last dimension

    Class attributes:
        overwrites: whether new tokens replace what older ones left, so that ``mark`` has to copy it
        quantises: whether ``bits`` change what it holds
        fills: whether it has room for so many tokens, and no more

    Attributes:
        length: tokens stored so far
        spread: whether it is of one pass over sequences whose tokens are spread over ranks, as in training
        padding: [B] padding tokens at the start of each row; None for none. Shared by the caches of a batch, and not
            counted in ``nbytes``
        declared: tokens of the sequences that it is made for, where it holds fewer; None: its capacity
    """

    declared: int | None = None
    overwrites: ClassVar[bool] = False
    quantises: ClassVar[bool] = True
    fills: ClassVar[bool] = True

    def __init__(
        self,
        batch: int,
        length: int,
        slots: Mapping[str, tuple[int, ...]],
        dtype: torch.dtype,
        device: torch.device,
        *,
        bits: int | None = None,
        parts: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        self.room = length
        self.length = 0
        self.spread = False
        self.padding: Tensor | None = None
        self.stores: dict[str, Exact | Quantised] = {}
        for name, shape in slots.items():
            if bits is None:
                self.stores[name] = Exact(batch, length, shape, dtype, device)
                continue
            apart = (parts or {}).get(name) or shape[-1:] * prod(shape[:-1])
            self.stores[name] = Quantised(batch, length, shape, dtype, device, bits, apart)

    @property
    def buffers(self) -> dict[str, Tensor]:
        """Every tensor held, by name: ``k``, or of a quantised cache ``k.codes`` and ``k.scales``."""
        return {name + suffix: t for name, store in self.stores.items() for suffix, t in store.tensors().items()}

    @property
    def nbytes(self) -> int:
        """Bytes of memory held, filled or not."""
        return sum(b.nbytes for b in self.buffers.values())

    def append(self, *new: Tensor, multiple: int = 1) -> tuple[Tensor, ...]:
        """Store T more tokens.

        Args:
            new: [B,T,…] for each slot, in the order of ``slots``
            multiple: round the returned length up to a multiple, if there is room, so that compiled kernels see fewer
                lengths; the extra values after the stored tokens are finite and meaningless

        Returns:
            [B,length,…] for each slot: everything stored so far, the new tokens last

        Raises:
            BlockError: the cache is full
        """
        self.store(*new)
        return self.read(slice(0, min(self.room, -(-self.length // multiple) * multiple)))

    def store(self, *new: Tensor) -> None:
        """``append``, without reading what is stored: the whole of a quantised cache would be dequantised."""
        start, end = self.length, self.length + new[0].shape[1]
        if end > self.room:
            raise BlockError("length", end, f"the cache has room for {self.room} tokens", "Make a longer cache")
        self.length = end
        for store, values in zip(self.stores.values(), new, strict=True):
            store.write(slice(start, end), values)

    def gives_codes(self, n_new: int) -> bool:
        """Whether ``append_codes`` takes so many tokens: all slots are quantised, and stored in the usual way."""
        return not self.spread and self._stores_as(Cache)

    def _stores_as(self, usual: type[Cache]) -> bool:
        quantised = all(isinstance(store, Quantised) for store in self.stores.values())
        return quantised and all(getattr(type(self), n) is getattr(usual, n) for n in ("append", "store", "read"))

    def append_codes(self, *new: Tensor) -> tuple[Codes, ...]:
        """``append`` that returns what is stored as it is, for kernels that read codes, where it ``gives_codes``."""
        self.store(*new)
        return self._coded(slice(0, self.length))

    def _coded(self, tokens: slice) -> tuple[Codes, ...]:
        return tuple(store.coded(tokens) for store in self.stores.values() if isinstance(store, Quantised))

    def read(self, tokens: slice) -> tuple[Tensor, ...]:
        """[B,n,…] for each slot, of some tokens; views of exact values."""
        return tuple(store.read(tokens) for store in self.stores.values())

    def take(self, rows: Tensor) -> None:
        """Become the cache of other rows: those of these indices, which may occur several times."""
        for store in self.stores.values():
            store.take(rows)
        self.padding = None if self.padding is None else self.padding[rows]

    def take_over(self, smaller: Cache) -> None:
        """Hold what another cache of the same attention holds, which has less room and is not yet full."""
        held = smaller.buffers
        for name, values in self.buffers.items():
            values[:, : held[name].shape[1]] = held[name]
        self.length, self.padding = smaller.length, smaller.padding

    def mark(self) -> Mark:
        """What ``rewind`` needs to forget every later token, as speculative decoding does."""
        return self.length, {name: b.clone() for name, b in self.buffers.items()} if self.overwrites else {}

    def rewind(self, mark: Mark) -> None:
        """Return to the state at a ``mark``, which stays valid."""
        self.length, held = mark
        for name, values in held.items():
            self.buffers[name].copy_(values)

    def indices(self, device: torch.device) -> Tensor:
        """[S]: indices in their rows of the tokens that ``append`` returned last, padding included."""
        return torch.arange(self.length, device=device)

    def positions(self, device: torch.device) -> Tensor:
        """[B|1,S]: the position of each token that ``append`` returned last."""
        indices = self.indices(device)[None]
        return indices if self.padding is None else (indices - self.padding[:, None]).clamp(min=0)

    def alike(self) -> Hashable | None:
        """Equal for the caches of a batch that hold the same tokens at the same indices and hide the same padding; None
        for one that does so in its own way."""
        return (self.length,) if self._hides_as(Cache) else None

    def _hides_as(self, usual: type[Cache]) -> bool:
        return all(getattr(type(self), n) is getattr(usual, n) for n in ("indices", "padding_bias", "hide_padding"))

    def segments(self) -> Tensor | None:
        """[B,S]: the document of each token that ``append`` returned last; None: each row is one document."""
        return None

    def padding_bias(self, n_new: int) -> Tensor | None:
        """[B,1,T,S] to be added to the scores of the last ``n_new`` tokens: −∞ on padding. None if there is none.

        Padding sees padding, so that its softmax is over something; its result is not used.
        """
        if self.padding is None:
            return None
        keys = self.indices(self.padding.device)
        return self.hide_padding(torch.arange(self.length - n_new, self.length, device=keys.device), keys)

    def hide_padding(self, queries: Tensor, keys: Tensor) -> Tensor:
        """``padding_bias`` of some tokens on some others, given the indices in their rows, [T] and [S]."""
        assert self.padding is not None
        first = self.padding[:, None, None]
        hidden = (keys < first) & (queries[:, None] >= first)
        return torch.zeros_like(hidden, dtype=torch.float32).masked_fill_(hidden, float("-inf"))[:, None]
