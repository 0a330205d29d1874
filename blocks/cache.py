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

from blockwright.blocks.kernels.quantise import BITS, code_bytes, dequantise, group_sizes, quantise
from blockwright.registry import BlockError

Mark = tuple[int, dict[str, Tensor]]
Where = slice | Tensor  # indices along the length


class Exact:
    """Unquantised values, [B,length,*shape].

    In memory a head's tokens lie side by side, [B,K,length,H], so that attention to them reads memory in order.
    """

    def __init__(self, batch: int, length: int, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
        lying = torch.zeros(batch, *shape[:-1], length, *shape[-1:], dtype=dtype, device=device)
        self.at = len(shape) or 1  # of the tokens, as they lie
        self.numbers = lying.movedim(self.at, 1)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors held, by name suffix."""
        return {"": self.numbers}

    def take(self, rows: Tensor) -> None:
        """Keep the rows of these indices, which may occur several times."""
        self.numbers = self.numbers.movedim(1, self.at)[rows].movedim(self.at, 1)

    def write(self, where: Where, values: Tensor) -> None:
        """Store values [B,T,*shape] at T indices."""
        self.numbers[:, where] = self.rounded(values)

    def read(self, where: Where) -> Tensor:
        """Values [B,S,*shape] at S indices; a view for a slice."""
        return self.numbers[:, where]

    def rounded(self, values: Tensor) -> Tensor:
        """What ``read`` would return for values just written."""
        return values.to(self.numbers.dtype)


class Quantised:
    """Packed codes of 8, 6 or 4 bits and bf16 scales (see blocks/kernels/quantise.py).

    Args:
        shape: of the values of one token
        dtype: dtype of what ``read`` returns
        bits: per number
        parts: widths of the parts that share no scale; they sum to the numbers in shape
    """

    def __init__(
        self,
        batch: int,
        length: int,
        shape: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
        bits: int,
        parts: Sequence[int],
    ) -> None:
        if bits not in BITS:
            rule = "a quantised cache has 8, 6 or 4 bits per number"
            raise BlockError("bits", bits, rule, "Choose one, or leave it out for an exact cache")
        self.shape, self.dtype, self.bits, self.sizes = tuple(shape), dtype, bits, group_sizes(parts)
        held = code_bytes(prod(shape), bits)
        self.codes = torch.zeros(batch, length, held, dtype=torch.uint8, device=device)
        self.scales = torch.zeros(batch, length, len(self.sizes), dtype=torch.bfloat16, device=device)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors held, by name suffix."""
        return {".codes": self.codes, ".scales": self.scales}

    def take(self, rows: Tensor) -> None:
        """As ``Exact.take``."""
        self.codes, self.scales = self.codes[rows], self.scales[rows]

    def write(self, where: Where, values: Tensor) -> None:
        """Store values [B,T,*shape] at T indices."""
        self.codes[:, where], self.scales[:, where] = quantise(values.flatten(2), self.bits, self.sizes)

    def read(self, where: Where) -> Tensor:
        """Values [B,S,*shape] at S indices; only these are dequantised."""
        return self._numbers(self.codes[:, where], self.scales[:, where])

    def rounded(self, values: Tensor) -> Tensor:
        """What ``read`` would return for values just written."""
        return self._numbers(*quantise(values.flatten(2), self.bits, self.sizes))

    def _numbers(self, codes: Tensor, scales: Tensor) -> Tensor:
        return dequantise(codes, scales, self.bits, self.sizes, self.dtype).unflatten(2, self.shape)


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


class Ring(Cache):
    """A cache of the last ``length`` tokens, for a window of that many: a new token overwrites the oldest.

    It never fills up. For one new token ``append`` returns the buffers as stored, not in time order, which does not
    matter to attention; ``indices`` gives the order. Several tokens are returned in order, with the window before them.
    """

    overwrites = True
    fills = False
    _answered: int | None = 0  # number of tokens last returned, in time order; None: buffers as stored

    def append(self, *new: Tensor, multiple: int = 1) -> tuple[Tensor, ...]:
        """Store T more tokens.

        Args:
            new: [B,T,…] for each slot, in the order of ``slots``
            multiple: ignored; a ring's lengths soon repeat

        Returns:
            [B,S,…] for each slot: for T = 1 the tokens held, including the new one; else the new tokens, preceded by
            those the first of them sees, S ≤ T + length − 1
        """
        n_new = new[0].shape[1]
        start, self.length = self.length, self.length + n_new
        if n_new == 1:
            self._answered = None
            slot = start % self.room
            for store, values in zip(self.stores.values(), new, strict=True):
                store.write(slice(slot, slot + 1), values)
            return tuple(store.read(slice(0, min(self.length, self.room))) for store in self.stores.values())
        n_before = min(start, self.room - 1)  # what the first of the new tokens sees
        self._answered = n_before + n_new
        before = torch.arange(start - n_before, start, device=new[0].device) % self.room
        kept = torch.arange(max(start, self.length - self.room), self.length, device=new[0].device) % self.room
        seen = []
        for store, values in zip(self.stores.values(), new, strict=True):
            seen.append(torch.cat((store.read(before), store.rounded(values)), 1))
            store.write(kept, values[:, -len(kept) :])
        return tuple(seen)

    def alike(self) -> Hashable | None:
        return (self.length, self.room, self._answered) if self._hides_as(Ring) else None

    def indices(self, device: torch.device) -> Tensor:
        if self._answered is not None:
            return torch.arange(self.length - self._answered, self.length, device=device)
        last = self.length - 1
        slots = torch.arange(min(self.length, self.room), device=device)
        return last - (last - slots) % self.room


class State(Cache):
    """The memory of a recurrent mixer: tensors of fixed size, whatever the number of tokens.

    It never fills up, and is never quantised: its errors would add up over the tokens.

    Args:
        batch: rows
        length: ignored
        parts: name → shape for one row and dtype
        device: of the tensors, which start as zeros
    """

    overwrites = True
    quantises = False
    fills = False

    def __init__(
        self, batch: int, length: int, parts: Mapping[str, tuple[Sequence[int], torch.dtype]], device: torch.device
    ) -> None:
        super().__init__(batch, length, {}, torch.float32, device)
        self.held = {
            name: torch.zeros(batch, *shape, dtype=dtype, device=device) for name, (shape, dtype) in parts.items()
        }

    @property
    def buffers(self) -> dict[str, Tensor]:
        return self.held

    def take(self, rows: Tensor) -> None:
        super().take(rows)
        self.held = {name: values[rows] for name, values in self.held.items()}

    def without_padding(self, x: Tensor) -> Tensor:
        """The next T tokens x [B,T,…] with zeros in place of padding."""
        if self.padding is None:
            return x
        tokens = torch.arange(self.length, self.length + x.shape[1], device=x.device) >= self.padding[:, None]
        return x * tokens.view(*tokens.shape, *[1] * (x.ndim - 2)).to(x.dtype)

    def advance(self, n_new: int, parts: Mapping[str, Tensor]) -> None:
        """Replace the parts by those after ``n_new`` more tokens."""
        self.length += n_new
        for name, values in parts.items():
            self.held[name].copy_(values)
