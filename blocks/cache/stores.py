"""Buffers of a cache's slots: exact, or as quantised codes."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from blockwright.blocks.kernels.quantise import BITS, Codes, code_bytes, dequantise, group_sizes, quantise
from blockwright.blocks.kernels.seam import compute
from blockwright.registry import BlockError

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
