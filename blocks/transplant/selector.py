from __future__ import annotations

import copy
from typing import Any

from torch import nn

from blocks.attention.base import Attention
from blocks.cost import signature
from blocks.selector.base import Selector
from blocks.transplant.base import Setting, Transplant, Transplanted, shapes
from registry import register


@register("transplant", "selector")
class AnotherSelector(Transplant):
    """An attention → the same with another selector, or with one, or without: all else is copied.

    A selector of the same shapes is copied too, as from ``dense`` to sparse; another one stays as it was drawn. Exact
    where neither leaves out a key of the longest sequence.
    """

    def serves(self, old: nn.Module, new: nn.Module) -> bool:
        both = isinstance(old, Attention) and isinstance(new, Attention)
        chooses = any(isinstance(getattr(block, "selector", None), Selector) for block in (old, new))
        return both and chooses and signature(_without(old)) == signature(_without(new))

    def __call__(self, old: nn.Module, new: nn.Module, setting: Setting) -> Transplanted:
        here = shapes(new)
        tensors = {name: t for name, t in old.state_dict().items() if here.get(name) == tuple(t.shape)}
        selectors: list[Any] = [block.selector for block in (old, new) if block.selector is not None]
        exact = all(selector.takes_all(setting.max_positions) for selector in selectors)
        note = "no key is left out" if exact else "keys are left out"
        return Transplanted(tensors, frozenset(tensors), exact, note)


def _without(block: nn.Module) -> nn.Module:
    """The block without its selector; shares everything else."""
    bare = copy.copy(block)
    bare.__dict__.pop("selector", None)
    bare._modules = {name: module for name, module in block._modules.items() if name != "selector"}
    return bare
