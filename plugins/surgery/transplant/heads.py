"""Heads of keys and values of one number → of another: the shared base of ``repeat_heads`` and ``mean_heads``."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from blockwright.blocks.attention.grouped import GroupedAttention
from blockwright.plugins.surgery.transplant.base import Setting, Transplant, Transplanted, shapes

PARTS = ("key.weight", "value.weight", "key.bias", "value.bias")


class Heads(Transplant):
    """Keys and values of another number of heads; everything else is copied."""

    handles: ClassVar[tuple[str, ...]] = ("n_kv_heads",)

    def suits(self, there: int, here: int) -> bool:
        """Whether so many heads can become so many."""
        raise NotImplementedError

    def result(self, tensors: dict[str, Tensor]) -> Transplanted:
        """The tensors, and what became of them."""
        raise NotImplementedError

    def serves(self, old: nn.Module, new: nn.Module) -> bool:
        if not (isinstance(old, GroupedAttention) and isinstance(new, GroupedAttention)):
            return False
        there, here = shapes(old), shapes(new)
        rest = [{n: s for n, s in block.items() if n not in PARTS} for block in (there, here)]
        same = old.head_dim == new.head_dim and there.keys() == here.keys() and rest[0] == rest[1]
        return same and self.suits(old.n_kv_heads, new.n_kv_heads)

    def __call__(self, old: nn.Module, new: nn.Module, setting: Setting) -> Transplanted:
        assert isinstance(old, GroupedAttention) and isinstance(new, GroupedAttention)
        tensors = dict(old.state_dict())
        for name in PARTS:
            if name in tensors:
                tensors[name] = regrouped(tensors[name].unflatten(0, (old.n_kv_heads, -1)), new.n_kv_heads).flatten(
                    0, 1
                )
        return self.result(tensors)


def regrouped(heads: Tensor, number: int) -> Tensor:
    """Heads [K,…] → [number,…]: each repeated, or neighbours averaged."""
    if number % len(heads) == 0:
        return heads.repeat_interleave(number // len(heads), 0)
    return heads.unflatten(0, (number, -1)).mean(1)
