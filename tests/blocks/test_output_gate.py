"""Gates on what an attention found."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from blockwright.blocks.forward_pass import Pass

WEIGHTS: dict[str, tuple[int, Callable[[Tensor], Tensor]]] = {  # rows, and the gate of its logits
    "elementwise": (48, lambda u: 1 / (1 + (-u).exp())),
    "per_head": (4, lambda u: 1 / (1 + (-u).exp())),
    "silu": (48, lambda u: u / (1 + (-u).exp())),
    "softplus": (4, lambda u: (1 + u.exp()).log()),
}


@pytest.mark.parametrize("attention", ["mha", "gqa", "mqa", "sliding_window"])
@pytest.mark.parametrize("name", ["elementwise", "per_head"])
def test_open_gate_leaves_the_attention_as_it_was(make_block: Callable[..., Any], attention: str, name: str) -> None:
    plain = make_block("attention", attention)
    gated = make_block("attention", {"name": attention, "output_gate": name})
    missing = gated.load_state_dict(plain.state_dict(), strict=False).missing_keys
    assert missing == ["output_gate.project.weight"]
    gated.output_gate.project.weight.data.zero_()
    x, positions = torch.randn(2, 7, 48, dtype=torch.float64), torch.arange(7)[None]
    torch.testing.assert_close(2 * gated(x, Pass(positions)), plain(x, Pass(positions)), rtol=0, atol=1e-12)
