"""KV caches: named buffers of fixed length, exact or quantised, filled from the front.

``Cache`` keeps every token, ``Ring`` the last ones, ``State`` what a recurrent mixer makes of them. In a batch of rows
of unequal length the shorter are padded on the left, so that all rows grow together and kernels see one length;
``padding`` counts each row's padding tokens, and is the only thing that differs by row. A row of n tokens therefore
joins a batch of length L where its tokens are copied to [L − n, L) (``put``): positions, scores and kernels need no
change. Not supported: pages shared between sequences.

What a row holds comes from its own tokens alone, hidden places included, for a hidden number still reaches what is
computed: 0 · NaN is NaN. So ``put`` and ``move`` write the whole row, and ``rewind`` leaves nothing of the tokens that
it takes back.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from math import prod
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from blockwright.blocks.kernels.coded_attention import BITS, Codes, code_bytes, dequantise, group_sizes, quantise
from blockwright.blocks.kernels.seam import compute
from blockwright.registry import BlockError

# --- buffers of a slot: exact, or as quantised codes ------------------------------------------------------------------


Where = slice | Tensor  # indices along the length


class Exact:
    """Unquantised values, [B,length,*shape].

    In memory a head's tokens lie side by side, [B,K,length,H], so that attention to them reads memory in order.
    """

    def __init__(self, batch: int, length: int, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
        lying = torch.zeros(batch, *shape[:-1], length, *shape[-1:], dtype=dtype, device=device)
        self.at = len(shape) or 1  # of the tokens, as they lie
        self.numbers = self.whole = lying.movedim(self.at, 1)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors held, by name suffix."""
        return {"": self.numbers}

    def use(self, rows: int) -> None:
        """Compute with the first rows of the allocation."""
        self.numbers = self.whole[:rows]

    def take(self, rows: Tensor) -> None:
        """Keep the rows of these indices, which may occur several times."""
        self.numbers = self.whole = self.numbers.movedim(1, self.at)[rows].movedim(self.at, 1)

    def write(self, where: Where, values: Tensor) -> None:
        """Store values [B,T,*shape] at T indices."""
        self.numbers[:, where] = self.rounded(values)

    def read(self, where: Where) -> Tensor:
        """Values [B,S,*shape] at S indices; a view for a slice."""
        return self.numbers[:, where]

    def rounded(self, values: Tensor) -> Tensor:
        """What ``read`` would return for values just written."""
        return values.to(self.numbers.dtype)

    def coded(self, values: Tensor) -> dict[str, Tensor]:
        """What ``tensors`` hold of values just written."""
        return {"": self.rounded(values)}


class Quantised:
    """Packed codes of 8, 6 or 4 bits and bf16 scales (see blocks/kernels/coded_attention.py).

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
        self.shape, self.dtype, self.bits, self.sizes = tuple(shape), dtype, bits, tuple(group_sizes(parts))
        held = code_bytes(prod(shape), bits)
        self.codes = torch.zeros(batch, length, held, dtype=torch.uint8, device=device)
        self.scales = torch.zeros(batch, length, len(self.sizes), dtype=torch.bfloat16, device=device)
        self.wholes = self.codes, self.scales

    def tensors(self) -> dict[str, Tensor]:
        """The tensors held, by name suffix."""
        return {".codes": self.codes, ".scales": self.scales}

    def use(self, rows: int) -> None:
        """As ``Exact.use``."""
        self.codes, self.scales = (whole[:rows] for whole in self.wholes)

    def take(self, rows: Tensor) -> None:
        """As ``Exact.take``."""
        self.codes, self.scales = self.wholes = self.codes[rows], self.scales[rows]

    def write(self, where: Where, values: Tensor) -> None:
        """Store values [B,T,*shape] at T indices."""
        if isinstance(where, slice):
            compute("coding", values.flatten(2), self.stored(where))
        else:
            self.codes[:, where], self.scales[:, where] = quantise(values.flatten(2), self.bits, self.sizes)

    def read(self, where: Where) -> Tensor:
        """Values [B,S,*shape] at S indices; only these are dequantised."""
        return self._numbers(self.codes[:, where], self.scales[:, where])

    def stored(self, where: Where) -> Codes:
        """What ``read`` dequantises: views for a slice."""
        n_heads, width = prod(self.shape[:-1]), self.shape[-1]
        return Codes(self.codes[:, where], self.scales[:, where], self.bits, self.sizes, n_heads, width)

    def rounded(self, values: Tensor) -> Tensor:
        """What ``read`` would return for values just written."""
        return self._numbers(*quantise(values.flatten(2), self.bits, self.sizes))

    def coded(self, values: Tensor) -> dict[str, Tensor]:
        """As ``Exact.coded``."""
        return dict(zip(self.tensors(), quantise(values.flatten(2), self.bits, self.sizes), strict=True))

    def _numbers(self, codes: Tensor, scales: Tensor) -> Tensor:
        return dequantise(codes, scales, self.bits, self.sizes, self.dtype).unflatten(2, self.shape)


class Mark(NamedTuple):
    """What a cache needs to return to the state it has.

    length: tokens stored
    ahead: tokens that follow at most; None: any number, none of which is to be kept
    held: what these may overwrite, by name
    after: what each of them leaves, by name, in a cache that overwrites
    parts: marks of the caches that a cache consists of
    """

    length: int
    ahead: int | None
    held: dict[str, Tensor]
    after: list[dict[str, Tensor]]
    parts: tuple[Mark, ...] = ()


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
        declared: tokens of the sequences that it is made for, or [B] of each, where it holds others; None: its capacity
    """

    declared: int | Tensor | None = None
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
            if bits is None or not prod(shape):  # of no width: nothing to quantise
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
        """Bytes of memory held, filled or not, of all rows, in use or not."""
        return sum(b.untyped_storage().nbytes() for b in self.buffers.values())

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
        return tuple(store.stored(tokens) for store in self.stores.values() if isinstance(store, Quantised))

    def read(self, tokens: slice) -> tuple[Tensor, ...]:
        """[B,n,…] for each slot, of some tokens; views of exact values."""
        return tuple(store.read(tokens) for store in self.stores.values())

    def take(self, rows: Tensor) -> None:
        """Become the cache of other rows: those of these indices, which may occur several times."""
        for store in self.stores.values():
            store.take(rows)
        self.padding = None if self.padding is None else self.padding[rows]
        self.declared = self.declared[rows] if isinstance(self.declared, Tensor) else self.declared

    def take_over(self, smaller: Cache) -> None:
        """Hold what another cache of the same attention holds, which has less room and is not yet full."""
        held = smaller.buffers
        for name, values in self.buffers.items():
            values[:, : held[name].shape[1]] = held[name]
        self.length, self.padding = smaller.length, smaller.padding

    def use(self, rows: int) -> None:
        """Compute with the first ``rows`` rows only. The others keep their memory, and hold nothing."""
        for store in self.stores.values():
            store.use(rows)

    def put(self, row: int, other: Cache, source: int = 0) -> None:
        """Make a row that of another cache of the same attention, made with the same room: its tokens become the last
        ones before ``length``, in the numbers or codes that they have.

        ``padding`` is the caller's: that of the row becomes ``length`` minus its own tokens. All other places of
        the row become 0.

        Args:
            row: index of the row, in use
            other: the cache to copy from
            source: index of the row in it

        Raises:
            BlockError: the cache is of another class, or the row longer than this cache
        """
        n = other.length - (0 if other.padding is None else int(other.padding[source]))
        if type(other) is not type(self):
            rule = f"a row of {type(self).__name__} is copied from a cache of the same class"
            raise BlockError("cache", type(other).__name__, rule, "Make it by the same new_cache, of the same length")
        if n > self.length:
            rule = f"is longer than the {self.length} tokens of the rows that it joins"
            raise BlockError("length", n, rule, f"Shift them by {n - self.length} first")
        for held in self.buffers.values():
            held[row].zero_()
        self._put(row, other, source, n)

    def _put(self, row: int, other: Cache, source: int, n: int) -> None:
        own = slice(other.length - n, other.length)
        for held, theirs in zip(self.buffers.values(), other.buffers.values(), strict=True):
            held[row, self.length - n : self.length] = theirs[source, own]

    def move(self, source: int, target: int) -> None:
        """Copy a row onto another of the same cache."""
        for held in self.buffers.values():
            held[target] = held[source]

    def shift(self, by: int) -> None:
        """Put ``by`` tokens of padding before every row; negative: drop so many, which every row has.

        ``padding`` is the caller's: it becomes ``by`` more.

        Raises:
            BlockError: there is no room for them, or rows have fewer tokens
        """
        if self.length + by < 0 or (self.fills and self.length + by > self.room):
            rule = f"rows of {self.length} tokens, with room for {self.room}, cannot be shifted so far"
            raise BlockError("by", by, rule, "Make a longer cache, or shift by less")
        self._shift(by)
        self.length += by

    def _shift(self, by: int) -> None:
        first = max(0, -by)
        for held in self.buffers.values():
            held[:, first + by : self.length + by] = held[:, first : self.length].clone()

    def mark(self, ahead: int | None = None) -> Mark:
        """What ``rewind`` needs to forget later tokens, as speculative decoding does.

        Args:
            ahead: tokens that follow at most before ``rewind``, which may keep the first of them; a cache that
                overwrites then copies no more than they replace. None: any number, none of which is kept
        """
        return Mark(self.length, ahead, {}, [])

    def rewind(self, mark: Mark, keep: int | Tensor = 0) -> None:
        """Return to the state at a ``mark``, and the first ``keep`` of the tokens since.

        The mark stays valid, until rows are moved: by ``put``, ``move``, ``shift``, or by a ``keep`` of each row.

        Args:
            mark: what ``mark`` returned
            keep: tokens to keep; [B] for each row, on any device. A row that keeps fewer than others then moves to the
                right by the difference: ``padding``, which is the caller's, becomes as much more

        Raises:
            BlockError: more tokens are to be kept than the mark was made for, or have followed
        """
        kept = keep.tolist() if isinstance(keep, Tensor) else [keep]
        most, since = max(kept), self.length - mark.length
        known = len(mark.after) if self.overwrites else since
        if most > known or (self.overwrites and mark.ahead is not None and since > mark.ahead):
            rule = f"{known} of the {since} tokens since the mark, which expects {mark.ahead}, can be kept"
            raise BlockError("keep", most, rule, "Mark with the number of tokens ahead")
        self._restore(mark, kept)
        self.length = mark.length + most
        for by in {most - n for n in kept} - {0}:
            self._delay([row for row, n in enumerate(kept) if most - n == by], by)

    def _restore(self, mark: Mark, kept: Sequence[int]) -> None:
        """Restore what the tokens after the first ``kept`` of each row have overwritten; one number is for all rows."""
        for held in self.buffers.values():
            held[:, mark.length + max(kept) : self.length] = 0

    def _delay(self, rows: list[int], by: int) -> None:
        """Move the tokens of rows to the right, within ``length``: their last ``by`` are no longer theirs."""
        for held in self.buffers.values():
            held[rows, by : self.length] = held[rows, : self.length - by]

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
