"""Keys and values that pass from layer to layer, each of which weakens or strengthens them."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from blockwright import KVSource, register


@register("kv_source", "relayed")
class Relayed(KVSource):
    """Reads those of the layer below times a learned factor, and lends the product on: t ← w t_below.

    Args:
        factor: w at first
    """

    makes: ClassVar[bool] = False
    lends: ClassVar[bool] = True
    conformance_model: ClassVar[dict] = {"overrides": [{"layers": 0, "attention": {"kv_source": "lent"}}]}

    def __init__(self, factor: float = 0.9) -> None:
        super().__init__()
        self.factor, self.weight = factor, nn.Parameter(torch.empty(1))

    def reset_parameters(self) -> None:
        self.weight.fill_(self.factor)

    def forward(self, own: None, below: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(t * self.weight.to(t.dtype) for t in below)

    def parallel_plan(self) -> dict[str, str]:
        return {"weight": "replicate"}
