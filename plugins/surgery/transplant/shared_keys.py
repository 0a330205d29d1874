from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn

from blockwright.blocks.attention.scored import Scored
from blockwright.plugins.surgery.settings import computes_alike
from blockwright.plugins.surgery.transplant.base import Setting, Transplant, Transplanted, shapes
from blockwright.registry import register


@register("transplant", "shared_keys")
class SharedKeys(Transplant):
    """An attention → the same with another ``kv_source``: one that lends its keys and values, or borrows others'.

    Queries and outputs are copied; the keys and values of a borrower are left out. Lending changes nothing. Borrowing
    does: keys of adjacent layers are alike only in models that were trained to share them. Brandon et al. 2024, arXiv
    2405.12981, train from the start; a converted model is to be trained further.
    """

    handles: ClassVar[tuple[str, ...]] = ("kv_source", "key", "value", "values", "kv_down", "kv_norm", "qk_norm.k_norm")
    example: ClassVar[tuple[Mapping[str, Any], Mapping[str, Any]]] = ({}, {"kv_source": {"name": "lent"}})

    def serves(self, old: nn.Module, new: nn.Module) -> bool:
        if not isinstance(old, Scored) or not isinstance(new, Scored) or not computes_alike(type(old), type(new)):
            return False
        there, here = shapes(old), shapes(new)
        changes = type(old.kv_source) is not type(new.kv_source)
        return changes and old.borrows() is None and all(there.get(name) == shape for name, shape in here.items())

    def __call__(self, old: nn.Module, new: nn.Module, setting: Setting) -> Transplanted:
        assert isinstance(old, Scored) and isinstance(new, Scored)
        tensors = {name: tensor for name, tensor in old.state_dict().items() if name in shapes(new)}
        if new.borrows() is None:
            return Transplanted(tensors, frozenset(tensors), exact=True, note="keys and values are its own")
        left = len(shapes(old)) - len(tensors)
        note = f"keys and values of a layer below; {left} tensors left out"
        return Transplanted(tensors, frozenset(tensors), exact=False, note=note)
