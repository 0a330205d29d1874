"""The tuning curve of an arm with its confidence bands: its loss after the best of k tries, k = 1, 2, …

Lourie, Cho and He 2023, arXiv 2311.09480, by their package opda, of the extra ``lab``. To look at how well an arm is
tuned, not to test with: at 15 tries an arm the bands of two arms that differ by .01 nats separate in 2 % of sweeps.
The bands hold for values drawn at random. Of a grid an octave apart they are a picture.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec

CONFIDENCE = 0.95  # that the whole curve is within the bands


@dataclass(frozen=True)
class Bands:
    """Median of the best loss of k tries, for k from 1 to their number.

    Args:
        point: estimate
        low, high: bands; ``high`` is infinite where so few tries show no bound
    """

    point: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]


def bands(losses: Sequence[float], least: float = 0.0) -> Bands | None:
    """The curve of these tries; None if opda is not installed, or for fewer than two tries.

    Args:
        losses: final ones; a loss that is not finite, of a run that diverged, is infinite
        least: the smallest loss that is possible
    """
    if len(losses) < 2 or find_spec("opda") is None:
        return None
    import numpy as np
    from opda.nonparametric import EmpiricalDistribution

    finite = [loss if math.isfinite(loss) else math.inf for loss in losses]
    tries = np.arange(1, len(losses) + 1)
    of_shares = EmpiricalDistribution.confidence_bands(
        finite, CONFIDENCE, a=least, generator=np.random.default_rng(0), method="ld_equal_tailed", n_jobs=1
    )
    below, middle, above = (tuple(map(float, each.quantile_tuning_curve(tries, minimize=True))) for each in of_shares)
    return Bands(middle, above, below)  # the lower band of the shares is the upper one of the losses
