from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn

from blockwright.blocks.attention.delta_rule import GatedDelta, GatedDelta2
from blockwright.plugins.surgery.transplant.base import Setting, Transplant, Transplanted, shapes
from blockwright.registry import register

STRENGTH, GATES = "strength.weight", {"erase.weight": "head_dim", "write.weight": "v_head_dim"}
DELTA = {"name": "kda", "n_heads": 4, "head_dim": 8}


@register("transplant", "erase_and_write")
class EraseAndWrite(Transplant):
    """A delta rule of one strength → one that erases and writes by gates (gated_delta|kda → gated_delta_2).

    Both gates begin as the strength, b = w = β, the same for every channel, which is exact while β stays below 1: with
    ``negative_eigenvalues`` it reaches 2, and w does not.
    """

    handles: ClassVar[tuple[str, ...]] = ("name", "strength", "erase", "write")
    example: ClassVar[tuple[Mapping[str, Any], Mapping[str, Any]]] = (
        {"attention": DELTA},
        {"attention": {**DELTA, "name": "gated_delta_2"}},
    )

    def serves(self, old: nn.Module, new: nn.Module) -> bool:
        if not isinstance(old, GatedDelta) or not isinstance(new, GatedDelta2):
            return False
        before, after = shapes(old), shapes(new)
        return before.keys() - {STRENGTH} == after.keys() - GATES.keys() and all(
            after[name] == shape for name, shape in before.items() if name != STRENGTH
        )

    def __call__(self, old: nn.Module, new: nn.Module, setting: Setting) -> Transplanted:
        assert isinstance(old, GatedDelta) and isinstance(new, GatedDelta2)
        kept = {name: tensor for name, tensor in old.state_dict().items() if name != STRENGTH}
        widths = {name: getattr(new, width) for name, width in GATES.items()}
        gates = {name: old.strength.weight.repeat_interleave(width, 0) for name, width in widths.items()}
        exact = old.reach == 1.0
        note = "both gates begin as the strength" if exact else "the strength reaches 2, writing 1"
        return Transplanted({**kept, **gates}, frozenset({*kept, *gates}), exact=exact, note=note)
