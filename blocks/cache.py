"""What an attention remembers between tokens: named buffers of fixed length, exact or quantised, filled from the front.

``Cache`` keeps every token, ``Ring`` the last of them. In a batch of rows of unequal length the shorter are padded in
front, so that all rows grow together and every kernel sees one length; ``padding`` says how many tokens of each row
stand for nothing. Left out: rows that come and go, pages shared between sequences.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

import torch
from torch import Tensor

from blocks.kernels.quantise import BITS, code_bytes, dequantise, group_sizes, quantise
from registry import BlockError

Where = slice | Tensor  # places along the length


class Exact:
    """Numbers as they are, [B,length,*shape]."""

    def __init__(self, batch: int, length: int, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
        self.numbers = torch.zeros(batch, length, *shape, dtype=dtype, device=device)

    def tensors(self) -> dict[str, Tensor]:
        """What is held, by the suffix of its name."""
        return {"": self.numbers}

    def write(self, where: Where, values: Tensor) -> None:
        """Keep values [B,T,*shape] at T places."""
        self.numbers[:, where] = self.rounded(values)

    def read(self, where: Where) -> Tensor:
        """[B,S,*shape] of S places; a view if they are a slice."""
        return self.numbers[:, where]

    def rounded(self, values: Tensor) -> Tensor:
        """What reading would give of values just written."""
        return values.to(self.numbers.dtype)


class Quantised:
    """Codes of 8, 6 or 4 bits, packed, and bf16 scales (see blocks/kernels/quantise.py).

    Args:
        shape: of what is kept for one token
        dtype: in which it is read
        bits: a number
        parts: widths across which no scale is shared; they add up to the shape's numbers
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
            rule = "a quantised cache has 8, 6 or 4 bits a number"
            raise BlockError("bits", bits, rule, "Choose one, or leave it out for an exact cache")
        self.shape, self.dtype, self.bits, self.sizes = tuple(shape), dtype, bits, group_sizes(parts)
        held = code_bytes(prod(shape), bits)
        self.codes = torch.zeros(batch, length, held, dtype=torch.uint8, device=device)
        self.scales = torch.zeros(batch, length, len(self.sizes), dtype=torch.bfloat16, device=device)

    def tensors(self) -> dict[str, Tensor]:
        """What is held, by the suffix of its name."""
        return {".codes": self.codes, ".scales": self.scales}

    def write(self, where: Where, values: Tensor) -> None:
        """Keep values [B,T,*shape] at T places."""
        self.codes[:, where], self.scales[:, where] = quantise(values.flatten(2), self.bits, self.sizes)

    def read(self, where: Where) -> Tensor:
        """[B,S,*shape] of S places; nothing else is dequantised."""
        return self._numbers(self.codes[:, where], self.scales[:, where])

    def rounded(self, values: Tensor) -> Tensor:
        """What reading would give of values just written."""
        return self._numbers(*quantise(values.flatten(2), self.bits, self.sizes))

    def _numbers(self, codes: Tensor, scales: Tensor) -> Tensor:
        return dequantise(codes, scales, self.bits, self.sizes, self.dtype).unflatten(2, self.shape)


class Cache:
    """Every token, in buffers of its own for each thing remembered.

    Args:
        batch: rows
        length: tokens there is room for
        slots: name → shape of what is kept for one token
        dtype, device: of the buffers; quantised ones are read in that dtype
        bits: 8, 6 or 4 to quantise; None keeps numbers as they are
        parts: name → widths of a slot across which no quantisation scale is shared; its last dimension, unless said

    Attributes:
        length: tokens stored so far
        padding: [B] tokens in front of each row that stand for nothing; None for none. Shared by the caches of a batch,
            and no part of ``nbytes``
    """

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
        """Bytes of memory held, whatever part of it is filled."""
        return sum(b.nbytes for b in self.buffers.values())

    def append(self, *new: Tensor, multiple: int = 1) -> tuple[Tensor, ...]:
        """Store T more tokens.

        Args:
            new: [B,T,…] for each slot, in the order of ``slots``
            multiple: what the length of the answer is rounded up to where there is room; what lies behind the stored
                tokens is finite and means nothing. Kernels compiled for each new length meet fewer of them

        Returns:
            [B,length,…] for each slot: everything stored so far, the new tokens last

        Raises:
            BlockError: there is no room for them
        """
        start, end = self.length, self.length + new[0].shape[1]
        if end > self.room:
            raise BlockError("length", end, f"the cache has room for {self.room} tokens", "Make a longer cache")
        self.length = end
        for store, values in zip(self.stores.values(), new, strict=True):
            store.write(slice(start, end), values)
        seen = slice(0, min(self.room, -(-end // multiple) * multiple))
        return tuple(store.read(seen) for store in self.stores.values())

    def indices(self, device: torch.device) -> Tensor:
        """[S]: where in their rows the tokens stand that ``append`` returned last, padding counted."""
        return torch.arange(self.length, device=device)

    def positions(self, device: torch.device) -> Tensor:
        """[B|1,S]: the position of each token that ``append`` returned last."""
        indices = self.indices(device)[None]
        return indices if self.padding is None else (indices - self.padding[:, None]).clamp(min=0)

    def padding_bias(self, n_new: int) -> Tensor | None:
        """[B,1,T,S] to be added to the scores of the last ``n_new`` tokens: −∞ on padding. None if there is none.

        Padding itself sees padding, lest its softmax be of nothing; nobody sees what comes of it.
        """
        if self.padding is None:
            return None
        keys, first = self.indices(self.padding.device), self.padding[:, None, None]
        queries = torch.arange(self.length - n_new, self.length, device=keys.device)[:, None]
        hidden = (keys < first) & (queries >= first)
        return torch.zeros(hidden.shape, device=keys.device).masked_fill_(hidden, float("-inf"))[:, None]


class Ring(Cache):
    """The last ``length`` tokens only, for a window of that many: a new token takes the place of the oldest.

    It never fills up. One new token is answered with the buffers as they lie, in no order of time: attention does not
    mind, and ``indices`` says which is which. Several are answered in order, each with the window before it.
    """

    _answered: int | None = 0  # tokens of the last answer, in order of time; None: the buffers as they lay

    def append(self, *new: Tensor, multiple: int = 1) -> tuple[Tensor, ...]:
        """Store T more tokens.

        Args:
            new: [B,T,…] for each slot, in the order of ``slots``
            multiple: taken for the contract's sake; a ring's answers soon have one length

        Returns:
            [B,S,…] for each slot: T = 1, the tokens held, the new one among them; else the new tokens and, before
            them, what the first of them sees, S ≤ T + length − 1
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

    def indices(self, device: torch.device) -> Tensor:
        if self._answered is not None:
            return torch.arange(self.length - self._answered, self.length, device=device)
        last = self.length - 1
        slots = torch.arange(min(self.length, self.room), device=device)
        return last - (last - slots) % self.room
