"""The pooled law on ladders whose truth is known: bias, spread, coverage, power."""

import math
from dataclasses import replace

import numpy as np
import pytest
from ladders import ARMS, DOUBLED, FLOOR, QUADRUPLED, ladder, loss

from blockwright.lab.statistics import law, law_check
from blockwright.lab.statistics.law_fit import LINES, best_split, fit, pinned_speed_up, spans_best_split, speed_up_along

FASTER = math.log(1.1)
BOTH = (1.1**0.5, 1.1**0.5)


def estimates(form, number, seed=0, baseline="plain", **settings):
    """Arm → log s in each of many ladders."""
    rng = np.random.default_rng(seed)
    found = {}
    for _ in range(number):
        fitted = fit(ladder(rng, **settings), baseline, form)
        for arm in fitted.ladder.arms[1:]:
            found.setdefault(arm, []).append(fitted.speed_up(arm))
    return found


def coverage(found, truth):
    return float(np.mean([abs(each.mean - truth) <= each.half for each in found]))


def test_a_law_is_exact_without_noise_and_has_no_interval_of_few_pairs():
    found = fit(ladder(np.random.default_rng(0), ((1, 1), (1.2, 0.9)), noise=0.0), "plain")
    assert found.floor == pytest.approx(FLOOR, abs=1e-5)
    assert found.exponents == pytest.approx((0.35, 0.35), abs=1e-4)
    assert [math.exp(each.mean) for each in found.apart("changed")] == pytest.approx([1.2, 0.9], abs=1e-4)
    assert found.loss("changed", 3e6, 6e7).mean == pytest.approx(loss(3.6e6, 5.4e7), abs=1e-5)
    few = fit(ladder(np.random.default_rng(5), ((1, 1), BOTH), sizes=DOUBLED[:3], seeds=1), "plain")
    assert few.speed_up("changed").dof == 0 and few.speed_up("changed").half == math.inf
    assert fit(ladder(np.random.default_rng(5), ((1, 1), BOTH), seeds=1), "plain").speed_up("changed").half < 0.2
    rungs = ladder(np.random.default_rng(4), ((1, 1), BOTH))
    ours, theirs = fit(rungs, "plain").speed_up("changed"), fit(rungs, "changed").speed_up("plain")
    assert ours.mean == pytest.approx(-theirs.mean, abs=1e-4)
    assert ours.half == pytest.approx(theirs.half, rel=1e-2)


def test_what_is_asked_of_a_law_inverts_nothing_again(monkeypatch):
    found = fit(ladder(np.random.default_rng(0)), "plain")
    found.loss("plain", 1e6, 2e7)
    for name in ("inv", "cholesky", "pinv"):
        monkeypatch.setattr(np.linalg, name, None)
    assert found.loss("changed", 3e6, 6e7).se > 0 and found.speed_up("changed").se > 0


def test_the_jacobian_is_the_derivative():
    own = law.arranged(ladder(np.random.default_rng(0), ((1, 1), BOTH)), "plain", "apart")
    theta = np.array([0.1, -1.2, -1.0, -1.1, -0.9, 0.05, 0.08])
    place = own.n, own.d, own.size_gain, own.data_gain
    step = 1e-6 * np.eye(len(theta))
    differences = [(law.predict(theta + h, *place)[0] - law.predict(theta - h, *place)[0]) / 2e-6 for h in step]
    np.testing.assert_allclose(law.predict(theta, *place)[1], np.column_stack(differences), atol=1e-8)


@pytest.mark.slow
def test_the_order_and_the_name_of_arms_change_nothing():
    rungs = ladder(np.random.default_rng(3), ((1, 1), BOTH, (1, 1.2)))
    found = fit(rungs, "plain")
    turned = fit(rungs[::-1], "plain")
    renamed = fit([replace(rung, arm=rung.arm.upper()) for rung in rungs], "PLAIN")
    for arm in ("changed", "third"):
        assert turned.speed_up(arm).mean == pytest.approx(found.speed_up(arm).mean, abs=1e-6)
        assert renamed.speed_up(arm.upper()).half == pytest.approx(found.speed_up(arm).half, abs=1e-6)


def test_what_a_planned_ladder_will_see():
    for settings, apart, alike in [
        ({}, 0.0185, 0.0106),
        ({"sizes": QUADRUPLED}, 0.0095, 0.0054),
        ({"ratios": (5, 20)}, 0.0165, None),
        ({"pairing": 0.8, "trunk": 0.1}, 0.0116, None),
        ({"pairing": 0.0}, 0.0267, None),
    ]:
        rungs, first = (ladder(np.random.default_rng(0), **each) for each in (settings, {}))
        cost, usual_cost = (math.fsum(r.parameters * r.tokens for r in each) for each in (rungs, first))
        usual = law_check.Usual(**{key: settings[key] for key in ("pairing", "trunk") if key in settings})
        for form, golden in (("apart", apart), ("alike", alike)):
            found = law_check.expected(rungs, "plain", form, usual)
            assert golden is None or found.se * math.sqrt(cost / usual_cost) == pytest.approx(golden, rel=0.015)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["apart", "alike"])
def test_degrees_of_freedom_are_planned_as_they_come(form):
    planned = law_check.expected(ladder(np.random.default_rng(0)), "plain", form, law_check.Usual()).dof
    seen = [fit(ladder(np.random.default_rng(seed)), "plain", form).speed_up("changed").dof for seed in range(5)]
    assert planned == pytest.approx(np.median(seen), rel=0.25)
    assert planned < 36, "of the pairs, not of the 72 rungs"


def test_at_the_best_split_the_speed_up_is_the_product_at_every_budget():
    found = fit(ladder(np.random.default_rng(0), ((1, 1), (1.3, 0.95)), noise=0.0), "plain")
    product = math.exp(found.speed_up("changed").mean)
    for flops in (1e12, 1e14, 1e17):
        parameters, tokens = best_split(found, flops)
        assert 6 * parameters * tokens == pytest.approx(flops)
        around = [found.loss("plain", parameters * f, tokens / f).mean for f in (0.8, 1.0, 1.25)]
        assert around[1] == min(around), "the best split"
        faster = found.loss("plain", *best_split(found, flops * product)).mean
        gains = [math.exp(each.mean) for each in found.apart("changed")]
        ours = found.loss("changed", *(x / g for x, g in zip(best_split(found, flops * product), gains, strict=True)))
        assert ours.mean == pytest.approx(faster, abs=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("line", ["data", "ratio", "size"])
def test_along_a_line_the_baseline_reaches_the_arm(line):
    found = fit(ladder(np.random.default_rng(6), ((1, 1), (1.05, 1.1))), "plain")
    at = speed_up_along(found, "changed", 4e5, 4e6, line)
    x, y = LINES[line]
    reached = found.loss("plain", 4e5 * at.mean**x, 4e6 * at.mean**y).mean
    assert reached == pytest.approx(found.loss("changed", 4e5, 4e6).mean, abs=1e-9)
    assert at.low < at.mean < at.high


def test_speed_ups_along_lines_are_told_where_there_is_one():
    found = fit(ladder(np.random.default_rng(0), ((1, 1), (4.0, 1.0)), noise=0.001), "plain")
    assert speed_up_along(found, "changed", 1e5, 1e9, "data").mean == math.inf
    rich, poor = (fit(ladder(np.random.default_rng(6), ratios=r, noise=0.002), "plain") for r in ((5, 10, 20), STARVED))
    assert spans_best_split(rich) and not spans_best_split(poor)


STARVED = (0.1, 0.2, 0.4)  # tokens per parameter; the best split is at about thirty


@pytest.mark.slow
def test_far_from_the_best_split_what_is_planned_is_what_its_largest_rung_shows():
    rungs = ladder(np.random.default_rng(6), ratios=STARVED)
    planned = law_check.expected(rungs, "plain", "apart", law_check.Usual())
    widths, products = [], []
    for seed in range(5):
        found = fit(ladder(np.random.default_rng(seed), ratios=STARVED), "plain")
        largest = max(rungs, key=lambda rung: (rung.parameters, rung.tokens))
        at = speed_up_along(found, "changed", largest.parameters, largest.tokens, "ratio")
        widths.append(math.log(at.high / at.low) / 2)
        products.append(found.speed_up("changed").half)
    assert planned.half == pytest.approx(np.median(widths), rel=0.25)
    assert np.median(products) > 1.5 * np.median(widths), "the product is an extrapolation"


# --- Marin's worked examples ------------------------------------------------------------------------------------------

MARIN = {"floor": 1.6, "exponent": 0.0941}  # issue 8096; experiments/grug/moe/agent.md


@pytest.mark.parametrize(  # issue 5596: baseline, variant, by loss alone, tokens/s of the variant, in wall-clock
    ("baseline", "variant", "by_loss", "throughput", "by_time"),
    [(3.8104, 3.7542, 1.31, 1.010, 1.33), (3.4339, 3.3988, 1.23, 1.025, 1.26), (3.1605, 3.1357, 1.19, 1.026, 1.22)],
)
def test_marins_published_speed_ups(baseline, variant, by_loss, throughput, by_time):
    faster = pinned_speed_up(baseline, variant, **MARIN)
    assert faster == pytest.approx(by_loss, abs=0.006)
    assert faster * throughput == pytest.approx(by_time, abs=0.006)


# --- the whole table --------------------------------------------------------------------------------------------------

LADDERS = 50
SIX = {"sizes": [1e5 * 2**i for i in range(6)], "seeds": 2}
TABLE = [  # form, settings, true log s; measured over 600 ladders: sd, half-width, power
    ("apart", {"gains": ((1, 1), BOTH)}, FASTER, 0.0193, 0.0382, 0.997),
    ("apart", {}, 0.0, 0.0191, 0.0378, 0.055),
    ("alike", {"gains": ((1, 1), BOTH), "noise": 0.010}, FASTER, 0.0149, 0.0324, 1.0),
    ("apart", {"gains": ((1, 1), BOTH), **SIX}, FASTER, 0.0219, 0.0446, 0.985),
]


@pytest.mark.slow
@pytest.mark.parametrize(("form", "settings", "truth", "sd", "half", "power"), TABLE)
def test_the_table(form, settings, truth, sd, half, power):
    found = estimates(form, LADDERS, seed=12, **settings)["changed"]
    errors, halves = np.array([each.mean - truth for each in found]), [each.half for each in found]
    excluded, root = np.mean([each.excludes_zero for each in found]), math.sqrt(LADDERS)
    print(
        f"{form} {settings}: bias {errors.mean():+.4f} sd {errors.std():.4f} coverage {coverage(found, truth):.3f}"
        f" half {np.median(halves):.4f} power {excluded:.3f}"
    )
    assert abs(errors.mean()) < max(0.0025, 3 * sd / root)
    assert errors.std() == pytest.approx(sd, rel=3 / math.sqrt(2 * LADDERS))
    assert np.median(halves) == pytest.approx(half, abs=4 * 1.25 * np.std(halves) / root)  # skewed
    assert coverage(found, truth) == pytest.approx(0.95, abs=3 * math.sqrt(0.95 * 0.05) / root)
    assert excluded == pytest.approx(power, abs=3 * math.sqrt(power * (1 - power)) / root + 0.01)


@pytest.mark.slow
def test_the_table_of_four_arms():
    truths = {"changed": 0.0, "third": FASTER, "fourth": FASTER}
    found = estimates("apart", 40, seed=11, gains=((1, 1), (1, 1), BOTH, (1, 1.1)))
    assert set(found) == set(ARMS[1:])
    for arm, truth in truths.items():
        assert abs(np.mean([each.mean - truth for each in found[arm]])) < 3 * 0.020 / math.sqrt(40)
        assert coverage(found[arm], truth) >= 0.85  # .95 less three standard errors
