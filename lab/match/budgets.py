"""The four budgets for matching arms, measured on the meta device: correct for unknown plug-in blocks too.

Left out: activations, time, and savings of kernels (blocks/cost.py describes how FLOPs are counted).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from blockwright.blocks.compose import compose
from blockwright.blocks.cost import cache_bytes_per_token, count_families, count_parameters, training_flops_per_token
from blockwright.blocks.decoder import Decoder

Budget = Literal["params", "active_params", "flops", "cache_bytes"]
BUDGETS: tuple[Budget, ...] = get_args(Budget)
WORDS = {
    "params": "parameters",
    "active_params": "active parameters",
    "flops": "training FLOPs per token",
    "cache_bytes": "cache bytes per token",
}


@dataclass(frozen=True)
class Figures:
    """Cost of a model.

    Args:
        params: all parameters
        active_params: those that one token uses, embedding and head included
        flops: of training, per token of a sequence of the measured length
        cache_bytes: of a sequence of the measured length, per token, fp32; None if an attention has no cache
    """

    params: int
    active_params: int
    flops: float
    cache_bytes: float | None


def measure(model: Mapping[str, Any] | Decoder, context: int) -> Figures:
    """Measure all four figures.

    Args:
        model: the composition, as plain types, or its decoder on the meta device
        context: T, sequence length for FLOPs and caches

    Raises:
        ConfigError: it cannot be built
    """
    decoder = model if isinstance(model, Decoder) else compose(model, device="meta")
    counted = count_parameters(decoder)
    return Figures(counted.total, counted.active, _flops(decoder, context), _cache(decoder, context))


def measure_one(model: Mapping[str, Any] | Decoder, budget: str, context: int) -> float | None:
    """Measure one figure, for a search; arguments and errors as in ``measure``."""
    decoder = model if isinstance(model, Decoder) else compose(model, device="meta")
    ways: dict[str, Callable[[], float | None]] = {
        "params": lambda: sum(count_families(decoder).values()),
        "active_params": lambda: count_parameters(decoder).active,
        "flops": lambda: _flops(decoder, context),
        "cache_bytes": lambda: _cache(decoder, context),
    }
    return ways[budget]()


def residuals(figures: Figures, goal: Mapping[str, float | None]) -> dict[str, float | None]:
    """Relative excess of each figure over the goal's; None if there is nothing to compare."""
    found: dict[str, float | None] = {}
    for budget in BUDGETS:
        ours, theirs = getattr(figures, budget), goal.get(budget)
        found[budget] = None if ours is None or not theirs else ours / theirs - 1
    return found


def _flops(decoder: Decoder, context: int) -> float:
    return training_flops_per_token(decoder, context)


def _cache(decoder: Decoder, context: int) -> float | None:
    try:
        return cache_bytes_per_token(decoder, context, torch.float32)
    except NotImplementedError:  # a plug-in's attention may have no cache
        return None
