"""The largest score of each head is that of pairs that see each other, whatever is computed at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from blockwright.blocks.kernels import largest_score
from blockwright.blocks.kernels.scoring import Scoring, Slopes

B, T, S, N, K, H = 2, 11, 17, 6, 2, 5
IDS = torch.tensor([[0] * 3 + [1] * 9 + [2] * 5, [0] * 15 + [1] * 2])
HIDING = torch.zeros(B, 1, T, S, dtype=torch.float64).masked_fill_(torch.arange(S) % 3 == 1, float("-inf"))
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "documents": {"segments": IDS},
    "window": {"window": 4},
    "a hiding bias": {"bias": HIDING},
    "all": {"segments": IDS, "window": 4, "bias": HIDING},
    "slopes, which hide nothing": {"bias": Slopes(torch.ones(N), torch.arange(T)[None], torch.arange(S)[None])},
}


def by_loop(q: Tensor, k: Tensor, scoring: Scoring) -> Tensor:
    found = torch.full((N,), float("-inf"), dtype=q.dtype)
    for b in range(B):
        for n in range(N):
            for t in range(T):
                here = S - T + t
                for s in range(here + 1):
                    hidden = scoring.window is not None and s <= here - scoring.window
                    hidden |= scoring.segments is not None and bool(scoring.segments[b, s] != scoring.segments[b, here])
                    hidden |= isinstance(scoring.bias, Tensor) and bool(scoring.bias[b, 0, t, s] == float("-inf"))
                    if not hidden:
                        found[n] = max(found[n], scoring.scale * (q[b, t, n] @ k[b, s, n * K // N]))
    return found


@pytest.mark.parametrize("held", [2**22, B * N * S * 3])
@pytest.mark.parametrize("case", CASES)
def test_largest_is_over_what_is_seen(case: str, held: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(largest_score, "HELD", held)
    draw = torch.Generator().manual_seed(0)
    q = torch.randn(B, T, N, H, dtype=torch.float64, generator=draw)
    k = torch.randn(B, S, K, H, dtype=torch.float64, generator=draw)
    scoring = Scoring(0.3, **CASES[case])
    torch.testing.assert_close(largest_score.largest_scores(q, k, scoring), by_loop(q, k, scoring), rtol=1e-12, atol=0)


def test_autocast_does_not_round_the_scores() -> None:
    q, k = torch.randn(1, 7, 2, 16), torch.randn(1, 7, 2, 16)
    right = largest_score.largest_scores(q, k, Scoring(1.0))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(largest_score.largest_scores(q, k, Scoring(1.0)), right)
