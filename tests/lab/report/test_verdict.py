"""Every kind of verdict, in figures and in words, from folders as sweeps leave them."""

import itertools
import json

import numpy as np
import pytest
import scipy.stats
from sweep_folder import noisy, planned

from blockwright.lab.report.findings import find
from blockwright.lab.report.reading import read
from blockwright.lab.report.verdict import Verdict, exit_code, verdict, verdicts
from blockwright.registry import ConfigError


def of(sweep, arm=1):
    findings = find(read(sweep))
    return verdict(findings.arms[arm], findings)


@pytest.fixture
def judged(tmp_path):
    """The verdict on the second arm of a planned sweep."""
    number = itertools.count()
    return lambda *given, **keys: of(planned(tmp_path / str(next(number)), *given, **keys))


def swinging(seeds, sd):
    """Two arms whose difference has mean 0 and this standard deviation, exactly."""
    step = sd * (1 - 1 / seeds) ** 0.5
    return {"mha": [2.0] * seeds, "gqa": [2.0 + step * (-1) ** seed for seed in range(seeds)]}


def test_interval_is_of_the_noise_of_the_sweep(judged):
    losses = {"a": [2.0, 2.1, 2.2], "b": [2.11, 2.2, 2.29], "c": [2.0, 2.11, 2.19]}
    found = judged(losses)
    a, b, c = (np.array(each) for each in losses.values())
    parts = np.array([np.var(a - (b + c) / 2, ddof=1), np.var(b - c, ddof=1) / 4])
    dof = parts.sum() ** 2 / (parts**2 / 2).sum()
    assert found.noise.dof == pytest.approx(dof)
    half = scipy.stats.t.ppf(0.975, dof) * (parts.sum() / 3) ** 0.5
    assert found.interval[1] - 0.1 == pytest.approx(half, rel=1e-6)
    losses = noisy({"mha": 0, "gqa": 0.01, "mla": 0, "moe": 0}, 4)
    once = judged(losses)
    twice = judged({**losses, "again": losses["mla"], "as mha": losses["mha"]})
    assert once.noise == twice.noise
    quiet = noisy({"mha": 0, "gqa": 0.02, "mla": 0}, 6, sd=0.002)
    loud = judged({**quiet, "moe": noisy({"moe": 0}, 6, sd=0.2)["moe"]})
    alone = judged({"mha": quiet["mha"], "gqa": quiet["gqa"]})
    assert loud.interval == pytest.approx(alone.interval) and loud.kind == "worse"


def test_the_same_within_a_margin_or_to_the_last_digit(judged):
    found = judged(noisy({"mha": 0, "gqa": 0.0005}, 12, sd=0.003), within=0.01)
    assert found.kind == "same" and "gqa and mha are the same within 0.010 nats per token (" in found.text
    assert "90 % interval −0.00" in found.text and not found.needs_seeds
    assert judged(noisy({"mha": 0, "gqa": 0.0005}, 12, sd=0.003)).kind == "undecided"
    losses = noisy({"mha": 0, "mla": 0.05}, 3)
    found = judged({"mha": losses["mha"], "gqa": losses["mha"], "mla": losses["mla"]})
    assert found.kind == "same" and found.text == "gqa and mha are the same to the last digit (3 seeds)."


def test_more_is_better_of_a_figure_that_says_so(tmp_path):
    planned(tmp_path, noisy({"mha": 0, "gqa": 0.04}, 5), direction="maximize")
    for file in tmp_path.glob("*/results.json"):
        results = json.loads(file.read_text())
        results["figures"]["val/loss"]["better"] = "more"
        file.write_text(json.dumps(results))
    assert of(tmp_path).kind == "better"


def test_undecided_says_what_it_takes_and_a_correction_that_decides(judged):
    found = judged(swinging(4, 0.015), definition={"see": 0.01})
    assert found.kind == "undecided" and found.needs_seeds is not None and found.minutes is not None
    assert 14 <= found.needs_seeds <= 17  # (2.8 · .015 / .01)² = 17.6, and 2 for Student's t, of which 4 are there
    assert found.minutes == pytest.approx(found.needs_seeds * 2 / 2 * 2)  # two arms, two at a time, two minutes each
    assert found.text.startswith("Undecided: gqa − mha is between −0.0")
    assert f"To see 0.010: about {found.needs_seeds} more seeds, {found.minutes:.0f} minutes." in found.text
    base = [2.0, 2.1, 2.2]
    many = {"mha": base, "a": [1.95, 2.06, 2.14], **{f"b{i}": [2.05, 2.0, 2.25] for i in range(8)}}
    losses = {name: [v + 0.001 * i * s for s, v in enumerate(of)] for i, (name, of) in enumerate(many.items())}
    found = judged(losses)
    assert found.kind == "undecided" and "alone p = 0.0" in found.text and "of 9 comparisons" in found.text


@pytest.mark.slow
def test_seeds_that_are_said_to_be_needed_are_enough(judged, tmp_path):
    asked = judged(swinging(4, 0.01 * 2**0.5), definition={"see": 0.02})
    assert asked.needs_seeds is not None
    seeds, times = 4 + asked.needs_seeds, 60
    seen = 0
    for i in range(times):
        folder = planned(tmp_path / f"sweep{i}", noisy({"mha": 0, "gqa": 0.02}, seeds, sd=0.01, seed=100 + i))
        seen += of(folder).kind == "worse"
    assert 0.65 < seen / times < 0.95


def test_bank_of_noise_decides_where_three_seeds_alone_do_not(judged):
    losses = {"mha": [2.0, 2.1, 2.2], "gqa": [2.02, 2.106, 2.221]}
    alone = judged(losses)
    bank = judged(losses, bank={"sd": 0.006, "dof": 20, "source": "balance", "seeds": [7]})
    loud = judged(losses, bank={"sd": 0.0005, "dof": 20, "source": "another shape", "seeds": [7]})
    assert alone.kind == "undecided" and bank.kind == "worse"
    assert loud.p == alone.p  # the guard: this sweep is noisier than its bank
    for seeds in ([], [2, 7]):  # of runs that may be among these
        same = judged(losses, bank={"sd": 0.006, "dof": 20, "seeds": seeds})
        assert same.p == alone.p


@pytest.mark.slow
def test_growing_sweep_stops_at_the_look_that_decides(judged):
    losses = noisy({"mha": 0, "gqa": 0.03}, 5, sd=0.004)
    found = judged(losses, looks=[4, 8, 12, 16], spend="pocock")
    assert found.kind == "worse" and found.seeds == 4  # the fifth is not looked at
    assert "Stopped at 4 of 16 seeds (Pocock)" in found.text


def test_looks_are_at_their_seeds_alone(judged):
    losses = noisy({"mha": 0, "gqa": 0.0}, 4, sd=0.004)
    for name in losses:
        losses[name] += [2.5 if name == "gqa" else 2.0] * 3
    found = judged(losses, looks=[4, 8])
    assert found.kind == "undecided" and found.seeds == 4
    first = judged(losses, looks=[8, 12])
    assert first.kind == "none" and first.why == "unfinished"
    found = judged(noisy({"mha": 0, "gqa": 0.0}, 4, sd=0.01), looks=[4, 8, 12, 40], within=0.01)
    assert found.kind == "undecided" and found.needs_seeds in (4, 8, 36)


def test_what_tuning_leaves_is_in_the_verdict(judged):
    losses = noisy({"mha": 0, "gqa": 0.01, "mla": 0.0}, 8)
    tried = {arm: [2.31, 2.06, 2.0, 2.09, 2.25] for arm in losses}
    untuned, tuned = judged(losses), judged(losses, tried)
    assert untuned.interval and tuned.interval and untuned.p and tuned.p and untuned.sees and tuned.sees
    assert tuned.difference == untuned.difference and tuned.p > untuned.p
    assert tuned.interval[0] < untuned.interval[0] and tuned.interval[1] > untuned.interval[1]
    assert tuned.sees > untuned.sees
    assert tuned.noise and untuned.noise and tuned.noise.left.variance > 0 == untuned.noise.left.variance
    losses = noisy({"mha": 0, "gqa": 0.0, "mla": 0.0}, 4)
    tried = {arm: [2.0, 2.5, 1.9, 2.5, 2.0] for arm in losses}
    found = judged(losses, tried, within=0.001)
    assert found.kind == "undecided" and found.needs_seeds is None


@pytest.mark.parametrize(
    ("effect", "loser", "kind"),
    [(0.1, "gqa", "worse"), (-0.1, "gqa", "none"), (0.0, "gqa", "none"), (-0.1, "mha", "better"), (0.1, "mha", "none")],
)
def test_side_that_lost_a_seed_is_not_flattered(effect, loser, kind, judged):
    losses = {**noisy({"mha": 0, "gqa": effect}, 5)}
    losses[loser][2] = "diverged"
    found = judged(losses)
    assert found.kind == kind and "1 diverged" in found.text
    assert found.why == ("lost_seeds" if kind == "none" else None)


def test_exit_code_is_of_the_least_certain_verdict(tmp_path):
    decided = Verdict("a", "b", "same", "")
    undecided, none = Verdict("a", "b", "undecided", ""), Verdict("a", "b", "none", "", "one_seed")
    assert [exit_code(each) for each in ([decided], [decided, undecided], [undecided, none, decided])] == [0, 3, 4]


@pytest.mark.parametrize(("effect", "kind"), [(0.04, "worse"), (-0.04, "better")])
def test_difference_is_said_with_all_that_it_rests_on(effect, kind, judged):
    found = judged(noisy({"mha": 0, "gqa": effect, "mla": 0}, 5))
    assert found.kind == kind and found.difference == pytest.approx(effect, abs=0.01) and found.seeds == 5
    assert found.interval[0] < found.difference < found.interval[1]
    half = (found.interval[1] - found.interval[0]) / 2
    assert f"gqa is {kind} than mha by {abs(found.difference):.4f} ± {half:.4f} nats per token" in found.text


GOOD, APART = [2.3, 2.1, 2.0, 2.1, 2.3], {"mha": 0, "gqa": 0.1}  # tries of a rate; effects
FEW = {"mha": [2.0, 2.1], "gqa": [2.0, 2.1]}
NONE = [  # losses, tries, keys of the plan → why there is no verdict, and part of what is said
    ({**noisy(APART, 4), "gqa": [2.1, 2.1, 2.1, None]}, None, {}, "unfinished", "3 of the 4 seeds"),
    ({"mha": [], "gqa": []}, {"mha": GOOD, "gqa": [2.3, 2.1, None, None, None]}, {}, "unfinished", "2 tries"),
    ({"mha": [0.5, 0.5], "gqa": [0.625, 0.625]}, None, {}, "no_noise", "differ by the same amount"),
    ({"mha": [0.7, 0.6, 0.5], "gqa": [0.8, 0.7, 0.6]}, None, {}, "no_noise", "differ by the same amount"),
    ({"mha": [1.0] * 3, "gqa": [1.0] * 3}, None, {"within": 0.01}, "no_noise", "have the same value"),
    ({"mha": [2.0], "gqa": [1.9]}, None, {"bank": {"sd": 0.001, "dof": 50}}, "one_seed", "one seed"),
    ({"mha": [2.0, 2.1], "gqa": ["failed"] * 2}, None, {}, "lost", "2 of 2 runs failed"),
    (noisy(APART, 4), {"mha": GOOD, "gqa": [5, 4, 3, 2.5, 2.4]}, {}, "untuned", "gqa is the largest tried"),
    (noisy(APART, 4), {"mha": [2.0, 2.1, 2.2, 2.3, 2.5], "gqa": GOOD}, {}, "untuned", "mha is the smallest tried"),
]


@pytest.mark.parametrize(("losses", "tried", "keys", "why", "told"), NONE)
def test_no_verdict_has_its_reason(losses, tried, keys, why, told, judged):
    found = judged(losses, tried, **keys)
    assert (found.kind, found.why) == ("none", why) and told in found.text


def test_comparison_without_noise_is_counted_in_the_correction_all_the_same(tmp_path):
    losses = {"mha": [1.0, 1.0, 1.0], "gqa": [0.9, 0.8, 0.95], "all": [1.0, 1.0, 1.0]}
    tested, untold = find(read(planned(tmp_path, losses))).arms[1:]
    assert untold.comparison.p is None
    assert tested.comparison.corrected == pytest.approx(2 * tested.comparison.p)


def test_tuned_arms_are_compared_by_fresh_seeds_and_a_diverged_try_is_no_edge(tmp_path):
    tried = {arm: [2.3, 2.1, 2.0, 2.1, "diverged"] for arm in ("mha", "gqa")}
    findings = find(read(planned(tmp_path, noisy(APART, 4), tried)))
    found = verdict(findings.arms[1], findings)
    assert found.kind == "worse" and "rates tuned alike" in found.text
    assert findings.arms[1].values.keys() == {0, 1, 2, 3}  # and not the seed of the tries
    (tuned,) = findings.arms[1].tuned
    assert tuned.used == 0.06 and len(tuned.tries) == 5


SOLVED = [
    ([0.01] * 2 + [3.0] * 8, [0.01] * 9 + [3.0], "better", "9 of 10 seeds of gqa solved it, 2 of 10 of mha (p = 0.00"),
    ([0.01] * 2 + [3.0] * 2, [0.01] * 4, "undecided", "4 of 4 seeds of gqa solved it, 2 of 4 of mha"),
    ([0.01] * 8, ["diverged"] * 7 + [0.01], "worse", "1 of 8 seeds of gqa solved it"),
]


@pytest.mark.parametrize(("mha", "gqa", "kind", "told"), SOLVED)
def test_tasks_are_compared_by_the_share_of_seeds_that_solved_them(mha, gqa, kind, told, judged):
    found = judged({"mha": mha, "gqa": gqa}, solved={"metric": "val/loss", "at": 0.5})
    assert found.kind == kind and told in found.text and found.interval is None
    shares = [sum(loss == 0.01 for loss in losses) / len(losses) for losses in (gqa, mha)]
    assert found.difference == pytest.approx(shares[0] - shares[1])


def test_plan_with_values_that_none_can_have_is_refused_and_a_search_has_no_verdicts(tmp_path):
    wrong = [{"looks": [8, 4]}, {"looks": [0]}, {"spend": "all"}, {"within": 0}, {"bank": {"sd": 1}}]
    for i, keys in enumerate([*wrong, {"solved": {"at": 1}}]):
        with pytest.raises(ConfigError):
            read(planned(tmp_path / str(i), FEW, **keys))
    assert verdicts(find(read(planned(tmp_path / "search", FEW, kind="search")))) == []
