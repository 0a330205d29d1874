"""The four budgets that arms are matched in, measured on the meta device: right for blocks that nobody here has seen.

Left out: activations, time, and whatever a kernel saves (blocks/cost.py says how FLOPs are counted).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from blocks.compose import compose
from blocks.cost import cache_bytes, count_families, count_parameters, forward_flops_per_token
from blocks.decoder import Decoder

BUDGETS = ("params", "active_params", "flops", "cache_bytes")
WORDS = {
    "params": "parameters",
    "active_params": "active parameters",
    "flops": "training FLOPs a token",
    "cache_bytes": "cache bytes a token",
}


@dataclass(frozen=True)
class Figures:
    """What a model costs.

    Args:
        params: parameters, all of them
        active_params: those that one token passes, embedding and head included
        flops: of training, for one token of a sequence of the length that it was measured at
        cache_bytes: that one more token adds to the cache, fp32; None where an attention has no cache
    """

    params: int
    active_params: int
    flops: float
    cache_bytes: int | None


def measure(model: Mapping[str, Any] | Decoder, context: int) -> Figures:
    """All four figures.

    Args:
        model: the composition, as plain types, or its decoder on the meta device
        context: T, tokens of the sequence that FLOPs are counted for

    Raises:
        ConfigError: it cannot be built
    """
    decoder = model if isinstance(model, Decoder) else compose(model, device="meta")
    counted = count_parameters(decoder)
    return Figures(counted.total, counted.active, _flops(decoder, context), _cache(decoder))


def measure_one(model: Mapping[str, Any] | Decoder, budget: str, context: int) -> float | None:
    """One of them, for which a search asks often; arguments and refusals as of ``measure``."""
    decoder = model if isinstance(model, Decoder) else compose(model, device="meta")
    ways: dict[str, Callable[[], float | None]] = {
        "params": lambda: sum(count_families(decoder).values()),
        "active_params": lambda: count_parameters(decoder).active,
        "flops": lambda: _flops(decoder, context),
        "cache_bytes": lambda: _cache(decoder),
    }
    return ways[budget]()


def residuals(figures: Figures, goal: Mapping[str, float | None]) -> dict[str, float | None]:
    """How much larger each figure is than the goal's, as a fraction; None where there is nothing to compare."""
    found: dict[str, float | None] = {}
    for budget in BUDGETS:
        ours, theirs = getattr(figures, budget), goal.get(budget)
        found[budget] = None if ours is None or not theirs else ours / theirs - 1
    return found


def _flops(decoder: Decoder, context: int) -> float:
    return 3 * forward_flops_per_token(decoder, context)  # each product has two in the backward pass


def _cache(decoder: Decoder) -> int | None:
    try:
        one, two = (cache_bytes(decoder, length, torch.float32) for length in (1, 2))
    except NotImplementedError:  # a guest's attention need not have a cache
        return None
    return two - one
