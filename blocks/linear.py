"""The linear layer of every block."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor, nn

from blockwright.blocks.kernels.few_rows import linear

_maker: ContextVar[Callable[..., nn.Linear] | None] = ContextVar("maker", default=None)


@contextmanager
def linears(make: Callable[..., nn.Linear]) -> Iterator[None]:
    """Inside, every linear layer of a block that is built comes from ``make``: from a library of low-precision layers.

    Args:
        make: given the arguments of ``torch.nn.Linear``; what it returns has ``weight`` [out,in] and ``bias``, by which
            it is initialised, split, and saved. The loss and absorbed decoding (MLA) read the weight and call nothing
    """
    token = _maker.set(make)
    try:
        yield
    finally:
        _maker.reset(token)


class Linear(nn.Linear):
    """``torch.nn.Linear`` with faster decoding on some processors: see blocks/kernels/few_rows.py."""

    def __new__(cls, in_features: int = 0, out_features: int = 0, bias: bool = True) -> nn.Linear:  # type: ignore[misc]
        make = _maker.get()
        return super().__new__(cls) if make is None or not in_features else make(in_features, out_features, bias=bias)

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:  # where there is nothing to draw, and drawing it takes most of a model's assembly
            super().reset_parameters()

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)
