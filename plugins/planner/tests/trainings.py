"""Trainings to be handed over."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from blockwright.plugins.planner.handover.training import Rates, Training
from blockwright.plugins.planner.layout import Job, Layout
from blockwright.training.optimizers.adamw import AdamW

LAYOUTS = [
    Layout(recompute="full"),
    Layout(tensor=2, pipeline=4, interleave=2, expert=4, recompute="selective"),
    Layout(pipeline=8, context=2, shard=True),
]
RATES = [Rates("cosine", 20, 0.1), Rates("WSD", 20, 0.0, 100, "minus_sqrt")]


def made(layout: Layout = LAYOUTS[1], rates: Rates = RATES[0], weights: bool = True, **changes: Any) -> Training:
    """A training on 64 GPUs."""
    given = {"folder": Path("/model"), "has_weights": weights, "n_layers": 27, "n_predicted": 1, "steps": 1000}
    given |= {"job": Job(64, 1024, 4096), "layout": layout, "optimizer": AdamW(lr=2e-4), "rates": rates}
    return Training(**{**given, "clip": 1.0, "seed": 3, **changes})
