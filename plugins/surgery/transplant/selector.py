from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn

from blockwright.blocks.attention.base import Attention
from blockwright.blocks.selector.base import Selector
from blockwright.plugins.surgery.transplant.base import Setting, Transplant, Transplanted, shapes, unhandled
from blockwright.registry import register


@register("transplant", "selector")
class AnotherSelector(Transplant):
    """An attention → the same with another selector, or with one, or without: all else is copied.

    A selector of the same shapes is copied too, as from ``dense`` to sparse; another one stays as it was drawn. Exact
    where neither leaves out a key of the longest sequence.
    """

    handles: ClassVar[tuple[str, ...]] = ("selector",)
    example: ClassVar[tuple[Mapping[str, Any], Mapping[str, Any]]] = (
        {},
        {
            "attention": {
                "name": "gqa",
                "n_heads": 4,
                "n_kv_heads": 2,
                "selector": {"name": "dsa", "n_heads": 2, "head_dim": 8, "top_k": 5, "dense": True},
            }
        },
    )

    def serves(self, old: nn.Module, new: nn.Module) -> bool:
        both = isinstance(old, Attention) and isinstance(new, Attention)
        chooses = any(isinstance(getattr(block, "selector", None), Selector) for block in (old, new))
        return both and chooses and _around(old) == _around(new) and not unhandled(self, old, new)

    def __call__(self, old: nn.Module, new: nn.Module, setting: Setting) -> Transplanted:
        here = shapes(new)
        tensors = {name: t for name, t in old.state_dict().items() if here.get(name) == tuple(t.shape)}
        selectors: list[Any] = [block.selector for block in (old, new) if block.selector is not None]
        exact = all(selector.takes_all(setting.max_positions) for selector in selectors)
        note = "no key is left out" if exact else "keys are left out"
        return Transplanted(tensors, frozenset(tensors), exact, note)


def _around(block: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of all but the selector."""
    return {name: shape for name, shape in shapes(block).items() if not name.startswith("selector.")}
