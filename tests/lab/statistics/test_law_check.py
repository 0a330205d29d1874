"""Which ladders a law may be read from: laws that are true, wrong in known ways, and not identifiable."""

import math

import numpy as np
import pytest
from ladders import QUADRUPLED, ladder, loss

from blockwright.lab.statistics.law_check import conclude, lack_of_fit, left_out, unidentified
from blockwright.lab.statistics.law_fit import fit

BOTH = (1.1**0.5, 1.1**0.5)


def concluded(**settings):
    return conclude(ladder(np.random.default_rng(0), **settings), "plain")


def rejected(number, seed, **settings):
    """Share of ladders whose law is rejected."""
    rng = np.random.default_rng(seed)
    found = (lack_of_fit(fit(ladder(rng, **settings), "plain")) for _ in range(number))
    return float(np.mean([p is not None and p < 0.01 for p in found]))


def missed(number, seed, **settings):
    """Share of ladders whose largest rung is off, and its root mean square error in nats."""
    rng = np.random.default_rng(seed)
    found = [left_out(fit(ladder(rng, **settings), "plain"), "plain") for _ in range(number)]
    off = [each for each in found if each is not None]
    assert len(off) == number
    rms = math.sqrt(np.mean([each.mean**2 for each in off]))
    return float(np.mean([each.excludes_zero for each in off])), rms


def test_a_true_law_is_read_whole():
    found = concluded(gains=((1, 1), BOTH))
    assert found.fit.ladder.form == "apart" and found.why_alike is None
    assert found.fit.condition < 300
    assert not found.is_wrong and not found.misses_largest and found.forecasts
    assert found.fit.loss("plain", 3.2e6, 6.4e7).mean == pytest.approx(loss(3.2e6, 6.4e7), abs=0.02)


@pytest.mark.slow
def test_a_wrong_law_gives_no_forecast():
    found = concluded(exponent=0.45)
    assert found.is_wrong and not found.forecasts


@pytest.mark.parametrize(
    ("settings", "why"),
    [({"ratios": (20,)}, "durations"), ({"sizes": [1e5, 2e5, 2.002e5], "ratios": (10, 20)}, "sizes")],
)
def test_what_cannot_be_identified_is_said(settings, why):
    found = concluded(**{"gains": ((1, 1), BOTH), **settings})
    assert found.why_alike == why
    assert found.fit.ladder.form == "alike" and not found.forecasts


def test_what_a_ladder_cannot_test_forecasts_nothing():
    rungs = ladder(np.random.default_rng(0))
    equal = [each for each in rungs if each.duration != "2"]
    same = [each.__class__(**{**vars(each), "tokens": (1e6, 2e6)[int(each.duration)]}) for each in equal]
    assert unidentified(same) == "tokens"
    assert unidentified(equal) is None
    rungs = [
        each.__class__(**{**vars(each), "loss": each.loss - 1.0999})
        for each in ladder(np.random.default_rng(1), noise=0.0)
    ]
    found = conclude(rungs, "plain")
    assert found.fit.is_at_bound and not found.forecasts
    found = concluded(seeds=1)
    assert found.lack_of_fit is None and found.left_out is None and not found.is_wrong


@pytest.mark.slow
def test_one_duration_still_gives_one_speed_up():
    rng, errors, hits = np.random.default_rng(3), [], []
    for _ in range(6):
        rungs = ladder(rng, ((1, 1), BOTH), ratios=(20,))
        found = conclude(rungs, "plain").fit.speed_up("changed")
        errors.append(found.mean - math.log(1.1))
        hits.append(abs(errors[-1]) <= found.half)
    assert np.mean(hits) >= 0.8 and np.std(errors) < 0.03
    assert fit(rungs, "plain", "apart").condition > 1e4


@pytest.mark.slow
def test_a_wide_ladder_falls_back_to_one_gain():
    found = concluded(gains=((1, 1), BOTH), sizes=[1e5, 1.06e5, 1.13e5], ratios=(10, 11), noise=0.02)
    assert found.why_alike in ("condition", "width")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "number", "least", "most"),
    [
        # Golden shares, and three standard errors of so many ladders.
        ({}, 40, 0.0, 0.127),  # .037 at nominal 1 %
        ({"exponent": 0.40}, 20, 0.66, 1.0),  # .88
        ({"above": 0.01}, 20, 0.0, 0.30),  # blind: .10 at 5 %
    ],
)
def test_how_often_a_law_is_rejected(settings, number, least, most):
    share = rejected(number, 5, **settings)
    assert least <= share <= most


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "least", "most", "rms"),
    [
        ({}, 0.0, 0.20, 0.0084),  # .076 of 500 at nominal 5 %, and three standard errors of 40
        ({"sizes": QUADRUPLED, "above": 0.03}, 0.11, 0.55, None),  # .33
    ],
)
def test_how_often_the_largest_rung_is_off(settings, least, most, rms):
    share, found = missed(40, 6, **settings)
    assert least <= share <= most
    assert rms is None or found == pytest.approx(rms, rel=3 / math.sqrt(2 * 40))


@pytest.mark.slow
@pytest.mark.parametrize(("noise", "rms"), [(0.003, 0.0035), (0.010, 0.0119)])
def test_the_error_of_a_forecast_four_times_beyond(noise, rms):
    rng, errors, hits = np.random.default_rng(7), [], []
    for _ in range(30):
        found = fit(ladder(rng, ((1, 1), BOTH), noise), "plain").loss("plain", 3.2e6, 6.4e7)
        errors.append(found.mean - loss(3.2e6, 6.4e7))
        hits.append(abs(errors[-1]) <= found.half)
    assert math.sqrt(np.mean(np.square(errors))) == pytest.approx(rms, rel=3 / math.sqrt(2 * 30))
    assert np.mean(hits) >= 0.83  # .95 less three standard errors
