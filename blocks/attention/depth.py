from __future__ import annotations

import torch
from torch import Tensor

from blockwright.blocks.attention.grouped import GQA
from blockwright.blocks.attention.remembered import Held
from blockwright.blocks.forward_pass import Carry, Pass
from blockwright.registry import BlockError, register

NAMES = ("depth_keys", "depth_values")  # of the layers so far, in ``carry``, [B,T,L,K,H] each


@register("attention", "depth", fixes={"kv_source": None})
class DepthAttention(GQA):
    """Depth-attention: ``gqa`` whose values are those of all layers so far at the same token, as its query chooses.

    Zeng et al. 2026, arXiv 2606.05014: v_l ← Σ_{j ≤ l} softmax_j(q_l·k_j/√H) v_j at each token, then attention over
    the tokens. No parameters are added, and the cache holds mixed values: it is that of ``gqa``.

    Written from the paper's abstract, which leaves open what follows: v_j are the values of layer j before they are
    mixed, the softmax is scaled as that over tokens, and query heads that share a head of values ask by their mean.

    Raises:
        BlockError: a layer below has heads of another number or width
    """

    def attend(self, x: Tensor, given: Pass, q: Tensor, held: Held, latent: Tensor | None = None) -> Tensor:
        k, v = held["k"], held["v"]
        assert isinstance(k, Tensor) and isinstance(v, Tensor)
        return super().attend(x, given, q, {"k": k, "v": self.over_depth(q, k, v, given.carry)}, latent)

    def over_depth(self, q: Tensor, k: Tensor, v: Tensor, carry: Carry | None) -> Tensor:
        """Values [B,T,K,H] of the layers so far, mixed; this one's keys and values are left to those above."""
        keys, values = (_joined(carry, name, own) for name, own in zip(NAMES, (k, v), strict=True))
        asking = q.unflatten(2, (k.shape[2], -1)).mean(3)
        scores = torch.einsum("btkh,btlkh->btkl", asking, keys) * self.scale
        weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(v.dtype)
        return torch.einsum("btkl,btlkh->btkh", weights, values)


def _joined(carry: Carry | None, name: str, own: Tensor) -> Tensor:
    """What the layers below left, with this layer's behind."""
    below = None if carry is None else carry.get(name)
    if below is not None and below.shape[3:] != own.shape[2:]:
        rule = f"mixes values of {tuple(own.shape[2:])} with {tuple(below.shape[3:])} of a layer below"
        raise BlockError("attention", "depth", rule, "Give all its layers as many KV heads, of one width")
    joined = own[:, :, None] if below is None else torch.cat((below, own[:, :, None]), 2)
    if carry is not None:
        carry[name] = joined
    return joined
