"""Tuning a knob of equal arms: how often their verdict is a false difference, on curves whose best value is known."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from scipy.interpolate import CubicSpline

from blockwright.lab.statistics import tuning
from blockwright.lab.statistics.power import chance
from blockwright.lab.statistics.tuning import Try, fit, further, next_tries
from blockwright.lab.statistics.variance import Noise

SD = 0.007  # nats, of a paired difference
OF_RUN = SD / math.sqrt(2)
RUNS = 15  # an arm: tries, then fresh seeds
ROUNDS = 4

Loss = Callable[[float], float]  # octaves from the best value → nats above the best loss


def lopsided(curvature: float) -> Loss:
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


def parabola(curvature: float) -> Loss:
    return lambda octave: curvature * octave**2


def mirrored(curvature: float) -> Loss:
    loss = lopsided(curvature)
    return lambda octave: loss(-octave)


class Arm:
    """Tries of one seed around 1, five an octave apart; the best value is 2 ** ``best``."""

    def __init__(self, loss: Loss, best: float, rng: np.random.Generator) -> None:
        self.loss, self.best, self.rng, self.tries = loss, best, rng, list[Try]()
        self.add([2.0**octave for octave in range(-2, 3)])

    def add(self, values: Sequence[float]) -> None:
        self.tries += [Try(value, self.excess(value) + OF_RUN * self.rng.standard_normal()) for value in values]

    def excess(self, value: float) -> float:
        return self.loss(math.log2(value) - self.best)


def tuned(loss: Loss, other: Loss, count: int, within: float = 1.0) -> list[tuple[Arm, Arm]]:
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


def at_vertices(ours: Arm, theirs: Arm) -> float:
    return ours.excess(fit(ours.tries).vertex) - theirs.excess(fit(theirs.tries).vertex)


def at_best_tries(ours: Arm, theirs: Arm) -> float:
    values = [min(arm.tries, key=lambda each: each.loss).value for arm in (ours, theirs)]
    return ours.excess(values[0]) - theirs.excess(values[1])


def false_positives(
    pairs: Sequence[tuple[Arm, Arm]],
    difference: Callable[[Arm, Arm], float] = at_vertices,
    fresh: int | None = None,
) -> float:
    """Share of pairs of equal arms that a paired t-test of fresh seeds at their values calls different.

    The chance of each pair is exact, given the difference that its tuning leaves; only tunings are drawn.
    """
    chances = [chance(difference(*pair), SD, fresh or max(RUNS - len(pair[0].tries), 4)) for pair in pairs]
    return math.fsum(chances) / len(chances)


@pytest.mark.slow
@pytest.mark.parametrize("curvature", [0.03, 0.08])
def test_tuned_arms_that_are_equal_are_rarely_called_different(curvature: float) -> None:
    pairs = tuned(lopsided(curvature), lopsided(curvature), 400)
    assert 0.05 <= false_positives(pairs) <= 0.06
    assert false_positives(pairs, at_best_tries) > 0.07  # even of zoomed tries
    assert all(len(ours.tries) == len(theirs.tries) for ours, theirs in pairs)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("curvature", "eight", "sixteen"),
    [(0.01, 0.060, 0.068), (0.05, 0.060, 0.073), (0.2, 0.057, 0.064)],
)
def test_false_positives_of_tuned_arms(curvature: float, eight: float, sixteen: float) -> None:
    pairs = tuned(lopsided(curvature), lopsided(curvature), 400)
    assert 0.05 <= false_positives(pairs) <= 0.062
    assert 0.05 <= false_positives(pairs, fresh=8) <= eight
    assert 0.05 <= false_positives(pairs, fresh=16) <= sixteen


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "curvature", "most"),
    [(parabola, 0.05, 0.068), (mirrored, 0.03, 0.061)],
)
def test_false_positives_of_arms_whose_curves_differ_in_shape(
    shape: Callable[[float], Loss], curvature: float, most: float
) -> None:
    assert 0.05 <= false_positives(tuned(lopsided(curvature), shape(curvature), 300), fresh=8) <= most


@pytest.mark.slow
@pytest.mark.parametrize("curvature", [0.03, 0.08])
def test_best_values_far_from_the_first_tries(curvature: float) -> None:
    pairs = tuned(lopsided(curvature), lopsided(curvature), 300, within=3.0)
    assert 0.05 <= false_positives(pairs) <= 0.062
    assert not any(fit(arm.tries).edge for pair in pairs for arm in pair)


@pytest.mark.slow
@pytest.mark.parametrize(("curvature", "wolf"), [(0.03, 0.20), (0.08, 0.45)])
def test_best_of_the_listed_values_would_cry_wolf(
    curvature: float, wolf: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "COARSE", math.inf)
    assert false_positives(tuned(lopsided(curvature), lopsided(curvature), 300), at_best_tries) > wolf


@pytest.mark.slow
def test_a_parabola_without_weights_and_a_zoom_would_cry_wolf(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "COARSE", math.inf)
    assert false_positives(tuned(lopsided(0.08), lopsided(0.08), 300)) > 0.075
    monkeypatch.setattr(tuning, "STEEP", 0.0)
    assert false_positives(tuned(lopsided(0.08), lopsided(0.08), 300)) > 0.10


@pytest.mark.slow
@pytest.mark.parametrize("curvature", [0.03, 0.08])
def test_regret_is_about_what_the_vertex_costs(curvature: float) -> None:
    arms = [arm for pair in tuned(lopsided(curvature), lopsided(curvature), 150) for arm in pair]
    true = np.mean([arm.excess(fit(arm.tries).vertex) for arm in arms])
    assert 0.7 < np.mean([fit(arm.tries).regret for arm in arms]) / true < 3.5


def called_different(pairs: Sequence[tuple[Arm, Arm]], fresh: int, effect: float = 0.0) -> float:
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
def test_what_tuning_leaves_is_in_the_verdict(curvature: float, power: float) -> None:
    pairs = tuned(lopsided(curvature), lopsided(curvature), 100)
    for fresh in (3, 8, 16):
        assert 0.03 <= called_different(pairs, fresh) <= 0.062, f"{fresh} seeds"
    assert called_different(pairs, 16, effect=0.007) > power  # .95 if the best values were known


@pytest.mark.slow
def test_many_seeds_without_what_tuning_leaves_would_cry_wolf() -> None:
    pairs = tuned(lopsided(0.015), lopsided(0.015), 100)
    assert false_positives(pairs, fresh=16) > 0.065
    assert called_different(pairs, 16) <= 0.06


@pytest.mark.slow
@pytest.mark.parametrize("curvature", [0.015, 0.08])
def test_variance_that_is_left_is_about_that_of_the_excess(curvature: float) -> None:
    arms = [arm for pair in tuned(lopsided(curvature), lopsided(curvature), 150) for arm in pair]
    left = np.mean([fit(arm.tries).left(OF_RUN).variance for arm in arms])
    assert 0.8 < left / np.var([arm.excess(fit(arm.tries).vertex) for arm in arms]) < 4.5


def test_a_parabola_is_left_what_noise_shakes_of_its_vertex(monkeypatch: pytest.MonkeyPatch) -> None:
    """c x̂² of a normal x̂ with Var(x̂) = σ² / (Σ x² (2 c)²) where tries count alike: twice the square of its mean."""
    monkeypatch.setattr(tuning, "STEEP", 0.0)
    fitted = fit(tries_of(parabola(0.05), *range(-2, 3)))
    assert fitted.left(0.01).variance == pytest.approx(2 * (0.05 * 0.01**2 / (10 * 0.1**2)) ** 2)
    assert fitted.left(0.01).dof == 2 and fitted.left(0.0).variance == 0


def test_what_is_left_is_at_most_what_the_tries_differ_by() -> None:
    assert fit(tries_of(parabola(0.001), *range(-2, 3))).left(10.0).variance == pytest.approx(0.004**2 / 12)
    flat = [Try(2.0**x, loss) for x, loss in enumerate((2.0, 2.003, 1.999, 2.004, 2.0))]
    assert fit(flat).left(0.001).variance <= 0.005**2 / 12
    assert fit([Try(1.0, 2.0), Try(2.0, 2.1)]).left(0.01).variance == 0  # not known


def tries_of(loss: Loss, *octaves: float) -> list[Try]:
    return [Try(2.0**octave, loss(octave)) for octave in octaves]


def test_several_seeds_are_averaged_and_shake_a_vertex_less() -> None:
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


def test_vertex_of_a_parabola_is_exact() -> None:
    fitted = fit([Try(0.01 * 2.0**x, 2.3 + 0.05 * (x - 0.3) ** 2) for x in range(-2, 3)])
    assert fitted.vertex == pytest.approx(0.01 * 2**0.3) and fitted.curvature == pytest.approx(0.05)
    assert fitted.regret == pytest.approx(0, abs=1e-12) and fitted.edge is None


def test_a_try_weighs_the_less_the_higher_it_is_above_the_best() -> None:
    octaves, losses = np.arange(-3, 4.0), np.array([2.0, 0.5, 0.12, 0.0, 0.03, 0.3, 0.9])
    weights = 1 / np.hypot(1, tuning.STEEP * losses / sorted(losses)[: tuning.BEST][-1])
    cubic = np.poly1d(np.polyfit(octaves, losses, 3, w=weights))
    fitted = fit([Try(2.0**x, y) for x, y in zip(octaves.tolist(), losses.tolist(), strict=True)])
    assert math.log2(fitted.vertex) == pytest.approx(min(cubic.deriv().roots, key=cubic).item())


def test_vertex_of_a_cubic_is_exact() -> None:
    def loss(x: float) -> float:
        return 0.05 * (x - 0.2) ** 2 + 0.01 * (x - 0.2) ** 3

    fitted = fit(tries_of(loss, -1.5, -1, -0.5, 0, 0.5, 1, 1.5))
    assert math.log2(fitted.vertex) == pytest.approx(0.2) and fitted.curvature == pytest.approx(0.05)


@pytest.mark.parametrize(("best", "edge", "further_octaves"), [(-2, "low", (-4, -3)), (2, "high", (3, 4))])
def test_tries_go_beyond_the_edge(best: int, edge: str, further_octaves: tuple[int, int]) -> None:
    tries = tries_of(lambda x: 0.1 * abs(x - best), *range(-2, 3))
    assert fit(tries).edge == edge
    assert next_tries(tries, 1.0) == pytest.approx([2.0**x for x in further_octaves])


def test_zoom_is_half_way_to_the_values_beside_the_best() -> None:
    tries = [Try(value, 10 * math.log2(value / 0.03) ** 2) for value in (0.01, 0.03, 0.1)]
    assert next_tries(tries, OF_RUN) == pytest.approx([math.sqrt(0.01 * 0.03), math.sqrt(0.03 * 0.1)])


def test_zoom_is_where_half_a_spacing_costs_more_than_noise() -> None:
    tries = tries_of(parabola(0.04), *range(-2, 3))  # half an octave costs .01
    assert not next_tries(tries, 0.01 / 0.74) and next_tries(tries, 0.01 / 0.76)
    assert len(further(tries)) == 2  # for the round of another arm


def test_zoom_ends_at_a_quarter_of_an_octave_even_without_noise() -> None:
    tries, rounds = tries_of(lopsided(10.0), *range(-2, 3)), 0
    while values := next_tries(tries, 0.0):
        tries, rounds = [*tries, *(Try(value, lopsided(10.0)(math.log2(value))) for value in values)], rounds + 1
    assert rounds == 2


def test_diverged_tries_are_worse_than_all_others() -> None:
    tries = [*tries_of(parabola(0.001), -2, -1, 0), Try(2.0, math.nan), Try(4.0, math.inf)]
    fitted = fit(tries)
    assert fitted.edge is None and 2**-1 < fitted.vertex <= 1  # not towards the cliff
    assert next_tries(tries, 1.0) == pytest.approx([2**-0.5, 2**0.5])  # where the cliff is
    close = [*tries, Try(2**-0.5, 0.0005), Try(2**0.5, math.nan), Try(2**-0.25, 0.0002), Try(2**0.25, 0.0002)]
    assert not next_tries(close, 1.0)


def test_arm_that_always_diverged_is_tried_lower() -> None:
    tries = [Try(value, math.nan) for value in (0.02, 0.01, 0.04)]
    fitted = fit(tries)
    assert (fitted.vertex, fitted.edge) == (0.01, "low") and fitted.regret == math.inf
    assert next_tries(tries, 0.01) == [0.0025, 0.005]


def test_curve_that_is_not_convex_costs_at_most_its_spread() -> None:
    flat = [Try(2.0**x, loss) for x, loss in enumerate((2.0, 2.003, 1.999, 2.004, 2.0))]
    fitted = fit(flat)
    assert 1 <= fitted.vertex <= 16 and fitted.regret <= 0.005 and not next_tries(flat, 0.01)


def test_one_try_is_at_an_edge() -> None:
    assert fit([Try(0.01, 2.0)]).edge == "low" and next_tries([Try(0.01, 2.0)], 0.1) == [0.0025, 0.005]
