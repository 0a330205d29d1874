from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from blockwright.blocks.carry import Carry
from blockwright.blocks.drawn import Drawn
from blockwright.blocks.ffn.base import FFN
from blockwright.blocks.forward_pass import Pass
from blockwright.blocks.gating.base import Gating, Routing
from blockwright.registry import BlockError, register

LATE = "late"  # what layers leave in the carry, [B,T,D]


@register("ffn", "shortcut")
class Shortcut(FFN):
    """A feed-forward block whose second branch is added one layer later, past the attention between.

    Cai et al. 2024 (ScMoE), arXiv 2404.05019; LongCat-Flash, arXiv 2509.01322: y_l = now_l(x_l) + later_{l−1}(x_{l−1}).
    Experts as ``later`` may be exchanged over ranks while the next layer's attention computes. A layer of LongCat, two
    attentions, two dense networks and experts, is two of these layers: the first has ``later``, the second has not. In
    the last layer there is no later one, and ``later`` is added at once.

    What is late crosses depth in the carry. It is only added, so no gradient needs its value: recomputed alone, this
    block may add what it left itself. The dense branch of a layer with experts is counted with its shared experts.

    Args:
        now: added in this layer; null for none
        later: added in the next layer; null for none
    """

    crosses_depth: ClassVar[bool] = True
    default_children: ClassVar[Mapping[str, Any]] = {"now": {"name": "swiglu"}}
    conformance_settings: ClassVar[Mapping[str, Any]] = {
        "now": {"name": "swiglu", "d_ff": 16},
        "later": {"name": "swiglu", "d_ff": 24},
    }

    def __init__(self, n_layers: int, layer_idx: int, now: FFN | None = None, later: FFN | None = None) -> None:
        super().__init__()
        if now is not None and any(isinstance(block, Gating) for block in now.modules()):
            raise BlockError("now", type(now).__name__, "must be dense: a layer reports one routing", "Route in later")
        self.now, self.later = now, later
        self.last = layer_idx >= n_layers - 1
        self.leaves = later is not None and not self.last

    def drawn(self) -> Drawn:
        return Drawn(("its second branch joins the next layer",) if self.later is not None and not self.last else ())

    def forward(self, x: Tensor, given: Pass | None = None) -> tuple[Tensor, Routing | None]:
        carry: Carry | None = None if given is None else given.carry
        parts = [carry.pop(LATE)] if carry is not None and LATE in carry else []
        parts += [] if self.now is None else [self.now(x, given)[0]]
        routing: Routing | None = None
        if self.later is not None:
            late, routing = self.later(x, given)
            if self.last or carry is None:
                parts.append(late)
            else:
                carry[LATE] = late
        return sum(parts[1:], parts[0]) if parts else x.new_zeros(x.shape), routing
