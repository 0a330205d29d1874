from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from blockwright.plugins.surgery.transplant.base import Transplanted
from blockwright.plugins.surgery.transplant.heads import PARTS, Heads
from blockwright.registry import register


@register("transplant", "mean_heads")
class MeanHeads(Heads):
    """Multi-head attention → fewer heads of keys and values (mha → gqa → mqa), each the mean of its group.

    Ainslie et al. 2023, arXiv 2305.13245, recover it with 5 % of the pre-training.
    """

    example: ClassVar[tuple[Mapping[str, Any], Mapping[str, Any]]] = ({}, {"attention": {"name": "mqa", "n_heads": 4}})

    def suits(self, there: int, here: int) -> bool:
        return here < there and there % here == 0

    def result(self, tensors: dict[str, Tensor]) -> Transplanted:
        return Transplanted(tensors, frozenset(tensors) - set(PARTS), exact=False, note="keys and values averaged")
