"""SiTU-GLU, a gated activation whose two halves saturate: for the dense networks and the experts that have it."""

from __future__ import annotations

from torch import Tensor


def situ_glu(gate: Tensor, up: Tensor, bound: float, linear_bound: float | None) -> Tensor:
    """β tanh(g/β) σ(g) ⊙ λ tanh(u/λ), of any shape. For small g and u it is silu(g) ⊙ u, and never beyond β λ.

    Args:
        gate, up: g and u
        bound: β
        linear_bound: λ; None leaves u as it is
    """
    up = up if linear_bound is None else linear_bound * (up / linear_bound).tanh()
    return bound * (gate / bound).tanh() * gate.sigmoid() * up
