from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from blockwright.blocks.base import Block
from blockwright.blocks.ffn import Shortcut, SwiGLU
from blockwright.plugins.surgery.transplant.base import Setting, Transplant, Transplanted, shapes
from blockwright.plugins.surgery.transplant.upcycle import PROBES, is_plain
from blockwright.registry import register


@register("transplant", "late")
class Late(Transplant):
    """``swiglu`` → ``shortcut`` with the same network now, and another one layer later, whose output begins at zero.

    Exact where zero outputs make the late branch zero: not with experts that return their input.
    """

    handles: ClassVar[tuple[str, ...]] = ("name", "gate", "up", "down", "now", "later", "last")
    example: ClassVar[tuple[Mapping[str, Any], Mapping[str, Any]]] = (
        {},
        {
            "ffn": {
                "name": "shortcut",
                "now": {"name": "swiglu", "d_ff": 48},
                "later": {"name": "moe", "n_experts": 4},
            },
            "experts": {"name": "swiglu", "d_ff": 16},
            "gating": {"name": "softmax_topk", "top_k": 2},
        },
    )

    def serves(self, old: nn.Module, new: nn.Module) -> bool:
        kept = is_plain(old, SwiGLU) and is_plain(new, Shortcut) and is_plain(new.now, SwiGLU)
        return kept and shapes(new.now) == shapes(old)  # type: ignore[arg-type]

    def __call__(self, old: nn.Module, new: nn.Module, setting: Setting) -> Transplanted:
        assert isinstance(new, Shortcut) and isinstance(old, SwiGLU)
        copied = {f"now.{name}": tensor for name, tensor in old.state_dict().items()}
        zero = {} if new.later is None else {f"later.{name}": torch.zeros_like(t) for name, t in _outputs(new.later)}
        silent = new.later is None or _is_silent(new.later, zero, old.gate.in_features)
        note = "the late branch begins at zero" if silent else "the late branch has parts that no weight silences"
        return Transplanted({**copied, **zero}, frozenset(copied), exact=silent, note=note)


def _outputs(branch: nn.Module) -> list[tuple[str, Tensor]]:
    """The weights through which a branch adds to the residual stream, by name."""
    state = branch.state_dict()
    blocks = [(name, block) for name, block in branch.named_modules() if isinstance(block, Block)]
    names = [".".join(filter(None, (name, out))) for name, block in blocks for out in block.residual_outputs]
    return [(name, state[name]) for name in names]


@torch.no_grad()
def _is_silent(branch: nn.Module, zero: Mapping[str, Tensor], d_model: int) -> bool:
    """Whether a branch returns zeros with these weights in place of its own."""
    x = torch.randn(1, PROBES, d_model, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    weights = {name.removeprefix("later."): tensor for name, tensor in zero.items()}
    y, _ = torch.func.functional_call(branch, weights, (x,))
    return bool((y == 0).all())
