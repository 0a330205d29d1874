"""Another package may make the linear layers of all blocks; nothing else changes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from blockwright.blocks.compose import compose
from blockwright.blocks.linear import Linear, linears


class Counted(nn.Linear):
    """What a library of low-precision layers might give."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.calls = 0

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return super().forward(input)


@pytest.mark.parametrize("attention", [{"name": "gqa", "bias": True}, "mla"], ids=["gqa", "mla"])
def test_layers_of_another_make_start_alike_and_are_used(tiny: Callable[..., Any], attention: Any) -> None:
    model = tiny(True, attention=attention)
    with linears(Counted):
        theirs = compose(model, seed=3)
    ours = compose(model, seed=3)
    made = [m for m in theirs.modules() if isinstance(m, Counted)]
    assert len(made) == sum(isinstance(m, Linear) for m in ours.modules()) > 5
    assert not any(isinstance(m, Linear) for m in theirs.modules())
    for (name, one), (other_name, other) in zip(theirs.state_dict().items(), ours.state_dict().items(), strict=True):
        assert name == other_name and torch.equal(one, other)
    tokens = torch.arange(12)[None] % 61
    torch.testing.assert_close(theirs(tokens), ours(tokens))
    assert {name for name, m in theirs.named_modules() if isinstance(m, Counted) and not m.calls} <= {"head"}
    with linears(Counted):  # a copy is what it was
        assert sum(isinstance(m, Linear) for m in copy.deepcopy(ours).modules()) == len(made)
