"""Heads of keys and values of one number → of another: the shared base of ``repeat_heads`` and ``mean_heads``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from blockwright.blocks.attention.grouped import GroupedAttention
from blockwright.blocks.attention.scored import Scored
from blockwright.blocks.readout import Difference
from blockwright.plugins.surgery.transplant.base import (
    Setting,
    Transplant,
    Transplanted,
    computes_alike,
    shapes,
    unhandled,
)
from blockwright.registry import register

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


@register("transplant", "repeat_heads")
class RepeatHeads(Heads):
    """Grouped-query attention → more heads of keys and values (gqa → mha), each a copy. Exact."""

    example: ClassVar[tuple[Mapping[str, Any], Mapping[str, Any]]] = ({}, {"attention": {"name": "mha", "n_heads": 4}})

    def suits(self, there: int, here: int) -> bool:
        return here > there and here % there == 0

    def result(self, tensors: dict[str, Tensor]) -> Transplanted:
        return Transplanted(tensors, frozenset(tensors), exact=True, note="heads of keys and values repeated")


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


@register("transplant", "window")
class Window(Transplant):
    """Full attention → attention within a window, or the reverse: the weights are copied.

    Exact if no sequence is longer than either window. Beltagy et al. 2020 (Longformer), arXiv 2004.05150, do the
    reverse of it to extend a context.
    """

    handles: ClassVar[tuple[str, ...]] = ("window",)
    example: ClassVar[tuple[Mapping[str, Any], Mapping[str, Any]]] = (
        {},
        {"attention": {"name": "sliding_window", "n_heads": 4, "n_kv_heads": 2, "window": 64}},
    )

    def serves(self, old: nn.Module, new: nn.Module) -> bool:
        grouped = isinstance(old, GroupedAttention) and isinstance(new, GroupedAttention)
        return grouped and old.window != new.window and shapes(old) == shapes(new)

    def __call__(self, old: nn.Module, new: nn.Module, setting: Setting) -> Transplanted:
        assert isinstance(old, GroupedAttention) and isinstance(new, GroupedAttention)
        tensors = old.state_dict()
        windows = [attention.window for attention in (old, new) if attention.window is not None]
        exact = min(windows, default=setting.max_positions) >= setting.max_positions
        return Transplanted(tensors, frozenset(tensors), exact, f"exact up to {min(windows)} tokens")


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
