"""How far tokens travel to their experts: read off a gate's own choices for random tokens."""

from __future__ import annotations

import copy
import functools

import torch
from torch import Tensor

from blockwright.blocks.gating.base import Gating
from blockwright.blocks.initialise import initialise

TOKENS = 1024


@functools.lru_cache(maxsize=32)
def _choices(gate: Gating) -> Tensor:
    """Experts [T,k] of random tokens, by a copy of the gate with random weights; E stands for none."""
    drawn = copy.deepcopy(gate).to_empty(device="cpu").float()
    initialise(drawn, std=0.02, depth_scaled=False, n_layers=1, seed=0)
    generator = torch.Generator().manual_seed(0)
    width = next((p.shape[-1] for p in drawn.parameters() if p.ndim == 2), 8)
    x = torch.randn(1, TOKENS, width, generator=generator, dtype=torch.float32)
    with torch.no_grad():
        return drawn(x, torch.randint(256, (1, TOKENS), generator=generator)).experts


def count_visits(gate: Gating) -> float:
    """Experts that a token visits, on average."""
    return float((_choices(gate) < gate.n_experts).sum(1).float().mean())


def count_places(gate: Gating, places: int) -> float:
    """Places that a token's experts lie at, on average, with the experts in equal runs over so many places."""
    chosen = _choices(gate)
    place = (chosen * places // gate.n_experts).clamp(max=places)
    reached = torch.zeros(len(chosen), places + 1, dtype=torch.float32).scatter_(1, place, 1.0)
    return float(reached[:, :places].sum(1).mean())
