from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn

from blockwright.blocks.attention.base import Attention
from blockwright.blocks.base import Remembering
from blockwright.plugins.surgery.settings import differences
from blockwright.plugins.surgery.transplant.base import Setting, Transplant, Transplanted, unhandled
from blockwright.registry import register


@register("transplant", "neutral")
class Neutral(Transplant):
    """An attention → the same with ``scores``, or with a position around its own, that begin without effect.

    Such are those that name values of theirs which have none: the identity of ``talking_heads``, ``dcmha`` without
    gates and written directions, ``banded`` with an empty bank. Their other parameters are drawn, so all learn.
    """

    handles: ClassVar[tuple[str, ...]] = ("scores", "position")
    example: ClassVar[tuple[Mapping[str, Any], Mapping[str, Any]]] = (
        {},
        {
            "attention": {"name": "gqa", "n_heads": 4, "n_kv_heads": 2, "scores": {"name": "dcmha", "width": 5}},
            "position": {"name": "banded", "rank": 3, "extent": 7, "inner": {"name": "rope"}},
        },
    )

    def serves(self, old: nn.Module, new: nn.Module) -> bool:
        if not isinstance(old, Attention) or not isinstance(new, Attention) or unhandled(self, old, new):
            return False
        added = _added(old, new)
        changed = {path.split(".")[0] for path in differences(old, new)}
        return bool(added) and changed == added.keys() and all(c.neutral() is not None for c in added.values())

    def __call__(self, old: nn.Module, new: nn.Module, setting: Setting) -> Transplanted:
        added = _added(old, new)
        around = "position" in added
        copied = {_moved(name) if around else name: tensor for name, tensor in old.state_dict().items()}
        begun = {f"{kind}.{n}": t for kind, child in added.items() for n, t in (child.neutral() or {}).items()}
        note = f"{' and '.join(added)} begin without effect"
        return Transplanted({**copied, **begun}, frozenset(copied), exact=True, note=note)


def _added(old: nn.Module, new: nn.Module) -> dict[str, Remembering]:
    """The children that the new attention alone has: scores, and a position around the old one's."""
    found: dict[str, Any] = {}
    scores, position = getattr(new, "scores", None), getattr(new, "position", None)
    if scores is not None and getattr(old, "scores", None) is None:
        found["scores"] = scores
    inner = getattr(position, "inner", None)
    if isinstance(inner, nn.Module) and not differences(old.get_submodule("position"), inner):
        found["position"] = position
    return {kind: child for kind, child in found.items() if isinstance(child, Remembering)}


def _moved(name: str) -> str:
    return name.replace("position.", "position.inner.", 1) if name.startswith("position.") else name
