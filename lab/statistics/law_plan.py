"""What a planned ladder will see, before any of it is run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from blockwright.lab.statistics.law import SHAPE, Common, Form, Rung, arranged, estimated, known_of, predict, shares
from blockwright.lab.statistics.law_fit import Estimate, Fit, shown
from blockwright.lab.statistics.variance import Left


@dataclass(frozen=True)
class Usual:
    """A law and its noise as small models of text have them, to plan with.

    Args:
        floor: E, in nats
        of_size, of_data: the terms at 1e6 parameters and at 4e6 tokens, in nats
        exponent: α and β
        noise: standard deviation of a training, in nats
        pairing, trunk: shares of its variance that the arms of a seed, and the durations of a trunk, have in common
        tuning, tuning_dof: standard deviation of what tuning leaves in an arm at a size, in nats, and the degrees of
            freedom with which its tries say so; of ``blockwright ladder attention`` 0.0011 to 0.0046 nats, median 0.002
    """

    floor: float = 1.1
    of_size: float = 0.2
    of_data: float = 0.4
    exponent: float = 0.35
    noise: float = 0.007
    pairing: float = 0.5
    trunk: float = 0.2
    tuning: float = 0.002
    tuning_dof: int = 3

    @property
    def left(self) -> Left:
        """What tuning leaves."""
        return Left(self.tuning**2, self.tuning_dof)


def expected(rungs: Sequence[Rung], baseline: str, form: Form, usual: Usual, common: Sequence[Common] = ()) -> Estimate:
    """log s of two equal arms, 0, with the standard error that a planned ladder will have, by the delta method.

    At the best split, if the ladder spans it; else at the tokens per parameter of its largest rung.

    Args:
        rungs: planned; their losses do not matter
        baseline, form: as of ``fit``
        usual: the law that is assumed
        common: what tuning will leave; nothing if arms are not tuned
    """
    ladder = arranged(rungs, baseline, form)
    n, d = ladder.center[0] - math.log(1e6), ladder.center[1] - math.log(4e6)
    terms = [math.log(usual.of_size) - usual.exponent * n, math.log(usual.of_data) - usual.exponent * d]
    shape = [math.log(usual.floor), *terms, *[math.log(usual.exponent)] * 2]
    theta = np.concatenate([shape, np.zeros(ladder.number - SHAPE)])
    jacobian = predict(theta, ladder.n, ladder.d, ladder.size_gain, ladder.data_gain)[1]
    parts = np.array([1 - usual.pairing - usual.trunk, usual.pairing, usual.trunk])
    noise = estimated(shares(rungs), usual.noise**2 * parts, jacobian, known_of(rungs, common))
    return shown(Fit(ladder, theta, noise, noise.whitening @ jacobian, 0.0), ladder.arms[1])
