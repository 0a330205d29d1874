from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from blockwright.blocks.ffn.base import FFN
from blockwright.blocks.forward_pass import Pass
from blockwright.blocks.gating.base import Gating, Routing
from blockwright.blocks.norm.base import Norm
from blockwright.registry import BlockError, register


@register("ffn", "side_by_side")
class SideBySide(FFN):
    """A dense feed-forward block and another, such as experts, each between norms of its own.

    Gemma 4 26B-A4B (Google 2026): y = norm₂(dense(norm₁(x))) + norm₃(sparse(x)), where x is the residual stream itself:
    the residual block's ``ffn_norm`` is ``none``, and the experts and their router bring norms (``moe``'s
    ``expert_norm``, ``gating=normed_softmax``). Shared experts of ``moe`` have no norms of their own.

    Args:
        dense: reads all tokens and routes none; ``geglu`` if none is named
        sparse: beside it; ``moe`` if none is named
        dense_norm: of what ``dense`` reads
        dense_out_norm: of what it returns
        sparse_out_norm: of what ``sparse`` returns
    """

    default_children: ClassVar[Mapping[str, Any]] = {"dense": {"name": "geglu"}, "sparse": {"name": "moe"}}
    conformance_settings: ClassVar[Mapping[str, Any]] = {
        "dense": {"name": "geglu", "d_ff": 16},
        "sparse": {"name": "moe", "expert_norm": {"name": "rmsnorm"}},
    }

    def __init__(self, dense: FFN, sparse: FFN, dense_norm: Norm, dense_out_norm: Norm, sparse_out_norm: Norm) -> None:
        super().__init__()
        if any(isinstance(block, Gating) for block in dense.modules()):
            raise BlockError(
                "dense", type(dense).__name__, "routes, and a layer reports one routing", "Route in sparse"
            )
        self.dense, self.sparse = dense, sparse
        self.dense_norm, self.dense_out_norm, self.sparse_out_norm = dense_norm, dense_out_norm, sparse_out_norm

    @classmethod
    def child_context(cls, child: str, known: Mapping[str, Any]) -> Mapping[str, Any]:
        return {"dim": known["d_model"]} if child.endswith("norm") else {}

    def forward(self, x: Tensor, given: Pass | None = None) -> tuple[Tensor, Routing | None]:
        y, _ = self.dense(self.dense_norm(x), given)
        z, routing = self.sparse(x, given)
        return self.dense_out_norm(y) + self.sparse_out_norm(z), routing
