"""Tuning a knob of equal arms: how often their verdict is a false difference, on curves whose best value is known."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.interpolate import CubicSpline

from blockwright.lab.statistics import tuning
from blockwright.lab.statistics.power import chance
from blockwright.lab.statistics.tuning import Try, bands, fit, further, next_tries
from blockwright.lab.statistics.variance import Noise

SD = 0.007  # nats, of a paired difference
OF_RUN = SD / math.sqrt(2)
RUNS = 15  # an arm: tries, then fresh seeds
ROUNDS = 4


def lopsided(curvature):
    """As measured: AdamW, width 64, 70 steps, five rates an octave apart; scaled to a curvature at its least."""
    at, losses = np.arange(-2, 3.0), np.array([2.8874, 2.5881, 2.4606, 2.4869, 2.7894])
    measured = CubicSpline(at, losses, bc_type="natural")
    inside = np.linspace(-2, 2, 4001)
    best = inside[measured(inside).argmin()]
    octaves = np.linspace(-9, 9, 7201)
    x = octaves + best
    height = measured(np.clip(x, -2, 2)) - measured(best)
    height += np.where(x < -2, measured(-2, 1) * (x + 2) + 0.05 * (x + 2) ** 2, 0)
    height += np.where(x > 2, measured(2, 1) * (x - 2) + 0.2 * (x - 2) ** 2, 0)
    height *= curvature / (float(measured(best, 2)) / 2)
    return lambda octave: float(np.interp(octave, octaves, height))


def parabola(curvature):
    return lambda octave: curvature * octave**2


def mirrored(curvature):
    loss = lopsided(curvature)
    return lambda octave: loss(-octave)


class Arm:
    """Tries of one seed around 1, five an octave apart; the best value is 2 ** ``best``."""

    def __init__(self, loss, best, rng):
        self.loss, self.best, self.rng, self.tries = loss, best, rng, list[Try]()
        self.add([2.0**octave for octave in range(-2, 3)])

    def add(self, values):
        self.tries += [Try(value, self.excess(value) + OF_RUN * self.rng.standard_normal()) for value in values]

    def excess(self, value):
        return self.loss(math.log2(value) - self.best)


def tuned(loss, other, count, within=1.0):
    """Pairs of arms after the rounds of ``next_tries``; best values anywhere within ± ``within`` octaves."""
    rng, pairs = np.random.default_rng(0), []
    for _ in range(count):
        arms = tuple(Arm(each, rng.uniform(-within, within), rng) for each in (loss, other))
        for _ in range(ROUNDS):
            if not any(next_tries(arm.tries, OF_RUN) for arm in arms):
                break
            for arm in arms:
                arm.add(further(arm.tries))
        pairs.append((arms[0], arms[1]))
    return pairs


def at_vertices(ours, theirs):
    return ours.excess(fit(ours.tries).vertex) - theirs.excess(fit(theirs.tries).vertex)


def at_best_tries(ours, theirs):
    values = [min(arm.tries, key=lambda each: each.loss).value for arm in (ours, theirs)]
    return ours.excess(values[0]) - theirs.excess(values[1])


def false_positives(pairs, difference=at_vertices, fresh=None):
    """Share of pairs of equal arms that a paired t-test of fresh seeds at their values calls different.

    The chance of each pair is exact, given the difference that its tuning leaves; only tunings are drawn.
    """
    chances = [chance(difference(*pair), SD, fresh or max(RUNS - len(pair[0].tries), 4)) for pair in pairs]
    return math.fsum(chances) / len(chances)


@pytest.mark.slow
@pytest.mark.parametrize("curvature", [0.03, 0.08])
def test_tuned_arms_that_are_equal_are_rarely_called_different(curvature):
    pairs = tuned(lopsided(curvature), lopsided(curvature), 400)
    assert 0.05 <= false_positives(pairs) <= 0.06
    assert false_positives(pairs, at_best_tries) > 0.07  # even of zoomed tries
    assert all(len(ours.tries) == len(theirs.tries) for ours, theirs in pairs)


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "curvature", "most"), [(parabola, 0.05, 0.068), (mirrored, 0.03, 0.061)])
def test_false_positives_of_arms_whose_curves_differ_in_shape(shape, curvature, most):
    assert 0.05 <= false_positives(tuned(lopsided(curvature), shape(curvature), 300), fresh=8) <= most


@pytest.mark.slow
@pytest.mark.parametrize("curvature", [0.03, 0.08])
def test_best_values_far_from_the_first_tries(curvature):
    pairs = tuned(lopsided(curvature), lopsided(curvature), 300, within=3.0)
    assert 0.05 <= false_positives(pairs) <= 0.062
    assert not any(fit(arm.tries).edge for pair in pairs for arm in pair)


@pytest.mark.slow
@pytest.mark.parametrize("curvature", [0.03, 0.08])
def test_regret_is_about_what_the_vertex_costs(curvature):
    arms = [arm for pair in tuned(lopsided(curvature), lopsided(curvature), 150) for arm in pair]
    true = np.mean([arm.excess(fit(arm.tries).vertex) for arm in arms])
    assert 0.7 < np.mean([fit(arm.tries).regret for arm in arms]) / true < 3.5


def called_different(pairs, fresh, effect=0.0):
    """Share that is called different if what tuning leaves is in the standard error; the noise is as estimated."""
    rng, seen = np.random.default_rng(3), []
    for pair in pairs:
        fits, mean = [fit(arm.tries) for arm in pair], effect + at_vertices(*pair)
        estimates = SD * np.sqrt(rng.chisquare(fresh - 1, 20) / (fresh - 1))
        for drawn, sd in zip(rng.normal(mean, SD / math.sqrt(fresh), 20).tolist(), estimates.tolist(), strict=True):
            left = fits[0].left(sd / math.sqrt(2)) + fits[1].left(sd / math.sqrt(2))
            seen.append(Noise(sd, fresh - 1, "paired", left).p(drawn, fresh) < 0.05)
    return float(np.mean(seen))


@pytest.mark.slow
@pytest.mark.parametrize(("curvature", "power"), [(0.015, 0.80), (0.03, 0.89), (0.08, 0.93)])
def test_what_tuning_leaves_is_in_the_verdict(curvature, power):
    pairs = tuned(lopsided(curvature), lopsided(curvature), 100)
    for fresh in (3, 8, 16):
        assert 0.03 <= called_different(pairs, fresh) <= 0.062, f"{fresh} seeds"
    assert called_different(pairs, 16, effect=0.007) > power  # .95 if the best values were known


@pytest.mark.slow
def test_many_seeds_without_what_tuning_leaves_would_cry_wolf():
    pairs = tuned(lopsided(0.015), lopsided(0.015), 100)
    assert false_positives(pairs, fresh=16) > 0.065
    assert called_different(pairs, 16) <= 0.06


@pytest.mark.slow
@pytest.mark.parametrize("curvature", [0.015, 0.08])
def test_variance_that_is_left_is_about_that_of_the_excess(curvature):
    arms = [arm for pair in tuned(lopsided(curvature), lopsided(curvature), 150) for arm in pair]
    left = np.mean([fit(arm.tries).left(OF_RUN).variance for arm in arms])
    assert 0.8 < left / np.var([arm.excess(fit(arm.tries).vertex) for arm in arms]) < 4.5


def test_a_parabola_is_left_what_noise_shakes_of_its_vertex(monkeypatch):
    monkeypatch.setattr(tuning, "STEEP", 0.0)
    fitted = fit(tries_of(parabola(0.05), *range(-2, 3)))
    assert fitted.left(0.01).variance == pytest.approx(2 * (0.05 * 0.01**2 / (10 * 0.1**2)) ** 2)
    assert fitted.left(0.01).dof == 2 and fitted.left(0.0).variance == 0


def test_what_is_left_and_lost_is_at_most_what_the_tries_differ_by():
    assert fit(tries_of(parabola(0.001), *range(-2, 3))).left(10.0).variance == pytest.approx(0.004**2 / 12)
    flat = [Try(2.0**x, loss) for x, loss in enumerate((2.0, 2.003, 1.999, 2.004, 2.0))]
    assert fit(flat).left(0.001).variance <= 0.005**2 / 12
    assert fit([Try(1.0, 2.0), Try(2.0, 2.1)]).left(0.01).variance == 0  # not known
    flat = [Try(2.0**x, loss) for x, loss in enumerate((2.0, 2.003, 1.999, 2.004, 2.0))]
    fitted = fit(flat)
    assert 1 <= fitted.vertex <= 16 and fitted.regret <= 0.005 and not next_tries(flat, 0.01)
    assert fit([Try(0.01, 2.0)]).edge == "low" and next_tries([Try(0.01, 2.0)], 0.1) == [0.0025, 0.005]


def tries_of(loss, *octaves):
    return [Try(2.0**octave, loss(octave)) for octave in octaves]


def test_several_seeds_are_averaged_and_shake_a_vertex_less():
    runs = [
        (value, loss + off) for off in (-0.01, 0.01) for value, loss in ((2.0, 2.1), (1.0, 2.0), (4.0, 2.2), (8.0, 2.5))
    ]
    tries = tuning.averaged(runs)
    assert [(each.value, each.seeds) for each in tries] == [(1.0, 2), (2.0, 2), (4.0, 2), (8.0, 2)]
    assert [each.loss for each in tries] == pytest.approx([2.0, 2.1, 2.2, 2.5])
    assert tuning.averaged([(1.0, 2.0), (1.0, math.inf)])[0].diverged
    alone = tries_of(parabola(0.05), *range(-2, 3))
    of_four = fit([Try(each.value, each.loss, 4) for each in alone])
    assert of_four.shake == pytest.approx(fit(alone).shake / 4)
    assert not next_tries(alone, 0.02) and next_tries(alone, 0.016)
    assert next_tries([Try(each.value, each.loss, 4) for each in alone], 0.02)  # half the noise


def test_vertex_of_a_parabola_and_of_a_cubic_is_exact():
    fitted = fit([Try(0.01 * 2.0**x, 2.3 + 0.05 * (x - 0.3) ** 2) for x in range(-2, 3)])
    assert fitted.vertex == pytest.approx(0.01 * 2**0.3) and fitted.curvature == pytest.approx(0.05)
    assert fitted.regret == pytest.approx(0, abs=1e-12) and fitted.edge is None

    def loss(x):
        return 0.05 * (x - 0.2) ** 2 + 0.01 * (x - 0.2) ** 3

    fitted = fit(tries_of(loss, -1.5, -1, -0.5, 0, 0.5, 1, 1.5))
    assert math.log2(fitted.vertex) == pytest.approx(0.2) and fitted.curvature == pytest.approx(0.05)


def test_a_try_weighs_the_less_the_higher_it_is_above_the_best():
    octaves, losses = np.arange(-3, 4.0), np.array([2.0, 0.5, 0.12, 0.0, 0.03, 0.3, 0.9])
    weights = 1 / np.hypot(1, tuning.STEEP * losses / sorted(losses)[: tuning.BEST][-1])
    cubic = np.poly1d(np.polyfit(octaves, losses, 3, w=weights))
    fitted = fit([Try(2.0**x, y) for x, y in zip(octaves.tolist(), losses.tolist(), strict=True)])
    assert math.log2(fitted.vertex) == pytest.approx(min(cubic.deriv().roots, key=cubic).item())


@pytest.mark.parametrize(("best", "edge", "further_octaves"), [(-2, "low", (-4, -3)), (2, "high", (3, 4))])
def test_tries_go_beyond_the_edge(best, edge, further_octaves):
    tries = tries_of(lambda x: 0.1 * abs(x - best), *range(-2, 3))
    assert fit(tries).edge == edge
    assert next_tries(tries, 1.0) == pytest.approx([2.0**x for x in further_octaves])


def test_zoom_is_half_way_where_it_costs_more_than_noise_and_ends():
    tries = [Try(value, 10 * math.log2(value / 0.03) ** 2) for value in (0.01, 0.03, 0.1)]
    assert next_tries(tries, OF_RUN) == pytest.approx([math.sqrt(0.01 * 0.03), math.sqrt(0.03 * 0.1)])
    tries = tries_of(parabola(0.04), *range(-2, 3))  # half an octave costs .01
    assert not next_tries(tries, 0.01 / 0.74) and next_tries(tries, 0.01 / 0.76)
    assert len(further(tries)) == 2  # for the round of another arm
    tries, rounds = tries_of(lopsided(10.0), *range(-2, 3)), 0
    while values := next_tries(tries, 0.0):
        tries, rounds = [*tries, *(Try(value, lopsided(10.0)(math.log2(value))) for value in values)], rounds + 1
    assert rounds == 2


def test_tries_that_diverged_are_worse_than_all_others():
    tries = [*tries_of(parabola(0.001), -2, -1, 0), Try(2.0, math.nan), Try(4.0, math.inf)]
    fitted = fit(tries)
    assert fitted.edge is None and 2**-1 < fitted.vertex <= 1  # not towards the cliff
    assert next_tries(tries, 1.0) == pytest.approx([2**-0.5, 2**0.5])  # where the cliff is
    close = [*tries, Try(2**-0.5, 0.0005), Try(2**0.5, math.nan), Try(2**-0.25, 0.0002), Try(2**0.25, 0.0002)]
    assert not next_tries(close, 1.0)
    tries = [Try(value, math.nan) for value in (0.02, 0.01, 0.04)]
    fitted = fit(tries)
    assert (fitted.vertex, fitted.edge) == (0.01, "low") and fitted.regret == math.inf
    assert next_tries(tries, 0.01) == [0.0025, 0.005]


DEBERTA = json.loads((Path(__file__).parent / "deberta_mnli.json").read_text())


def errors(model):
    return [1 - accuracy for accuracy in DEBERTA[model]["accuracies"]]


@pytest.mark.slow
@pytest.mark.parametrize("model", ["deberta", "deberta_v3"])
def test_bands_hold_the_true_curve(model):
    curve, truth = bands(errors(model)), [1 - best for best in DEBERTA[model]["median_of_best"]]
    assert curve is not None and len(curve.point) == 24
    for low, point, high, true in zip(curve.low, curve.point, curve.high, truth, strict=True):
        assert low <= true <= high and low <= point <= high
    assert list(curve.high) == sorted(curve.high, reverse=True)  # more tries are never worse


@pytest.mark.slow
def test_bands_are_opdas():

    from opda.nonparametric import EmpiricalDistribution

    curve, values = bands(errors("deberta")), errors("deberta")
    with pytest.warns(RuntimeWarning, match="Duplicates"):
        below, middle, above = EmpiricalDistribution.confidence_bands(
            values, 0.95, a=0.0, generator=np.random.default_rng(0), method="ld_equal_tailed"
        )
    for ours, theirs in ((curve.high, below), (curve.point, middle), (curve.low, above)):
        assert ours == pytest.approx(theirs.quantile_tuning_curve(range(1, 25), minimize=True), rel=1e-9)


def test_diverged_tries_are_the_worst():
    curve = bands([2.0, math.nan, 2.1, math.inf, 2.05])
    assert curve is not None and curve.point[-1] == 2.0 and curve.high[0] == math.inf
    assert bands([2.0]) is None


def test_without_opda_there_are_no_bands(monkeypatch):
    monkeypatch.setitem(sys.modules, "opda", None)
    assert bands([2.0, 2.1, 2.2]) is None
