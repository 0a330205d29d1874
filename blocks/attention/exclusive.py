from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from blockwright.blocks.attention.beside import Beside
from blockwright.blocks.attention.gqa import GQA
from blockwright.blocks.attention.remembered import Held
from blockwright.blocks.forward_pass import Pass
from blockwright.registry import register


@register("attention", "exclusive", fixes={"kv_source": None})
class Exclusive(GQA):
    """Exclusive self-attention: ``gqa`` without what a token's output says of the token itself.

    XSA, arXiv 2603.09078: y_t ← y_t − (y_t·v̂_t) v̂_t with v̂ = v / ‖v‖, head by head. The cache is that of ``gqa``.
    """

    def attend(
        self, x: Tensor, given: Pass, q: Tensor, held: Held, latent: Tensor | None = None, beside: Beside | None = None
    ) -> Tensor:
        y, v = super().attend(x, given, q, held, latent, beside), held["v"]
        assert isinstance(v, Tensor)
        own = F.normalize(v, dim=-1).repeat_interleave(q.shape[2] // v.shape[2], 2)
        return y - (y * own).sum(-1, keepdim=True) * own
