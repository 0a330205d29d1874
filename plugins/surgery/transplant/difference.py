from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from blockwright.blocks.attention.grouped import GroupedAttention
from blockwright.blocks.readout import Difference
from blockwright.plugins.surgery.transplant.base import Setting, Transplant, Transplanted, shapes, unhandled
from blockwright.registry import register

QUERY = ("query.weight", "query.bias")
OWN = (*QUERY, "output.weight", "readout.share.weight")


@register("transplant", "difference")
class ToDifference(Transplant):
    """An attention of N heads → one of 2N heads with ``readout: difference``: y − σ(0) y is half of y.

    Each query head becomes two alike, λ begins at 1/2, and the output projection is doubled: exact.
    """

    handles: ClassVar[tuple[str, ...]] = ("readout",)
    example: ClassVar[tuple[Mapping[str, Any], Mapping[str, Any]]] = (
        {},
        {"attention": {"name": "gqa", "n_heads": 8, "n_kv_heads": 2, "head_dim": 8, "readout": {"name": "difference"}}},
    )

    def serves(self, old: nn.Module, new: nn.Module) -> bool:
        if not isinstance(old, GroupedAttention) or not isinstance(new, GroupedAttention) or old.readout is not None:
            return False
        doubled = new.query.out_features == 2 * old.query.out_features and new.head_dim == old.head_dim
        rest = ({n: s for n, s in shapes(block).items() if n not in OWN} for block in (old, new))
        alike = next(rest) == next(rest)
        return isinstance(new.readout, Difference) and doubled and alike and not unhandled(self, old, new)

    def __call__(self, old: nn.Module, new: nn.Module, setting: Setting) -> Transplanted:
        assert isinstance(old, GroupedAttention) and isinstance(new, GroupedAttention)
        tensors = dict(old.state_dict())
        for name in QUERY:
            if name in tensors:
                heads = tensors[name].unflatten(0, (-1, old.head_dim))
                tensors[name] = heads.repeat_interleave(2, 0).flatten(0, 1)
        tensors["output.weight"] = 2 * tensors["output.weight"]
        copied = frozenset(tensors) - {"output.weight"}
        tensors["readout.share.weight"] = torch.zeros_like(new.state_dict()["readout.share.weight"])
        return Transplanted(tensors, copied, exact=True, note="two heads alike, of which half is subtracted")
