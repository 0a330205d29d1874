"""Every kind of verdict, in figures and in words, from folders as sweeps leave them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
from sweep_folder import noisy, planned

from blockwright.lab.report.findings import find
from blockwright.lab.report.reading import read
from blockwright.lab.report.verdict import Verdict, exit_code, verdict, verdicts
from blockwright.registry import ConfigError


def of(sweep: Path, arm: int = 1) -> Verdict:
    findings = find(read(sweep))
    return verdict(findings.arms[arm], findings)


def swinging(seeds: int, sd: float) -> dict[str, list[float]]:
    """Two arms whose difference has mean 0 and this standard deviation, exactly."""
    step = sd * (1 - 1 / seeds) ** 0.5
    return {"mha": [2.0] * seeds, "gqa": [2.0 + step * (-1) ** seed for seed in range(seeds)]}


# --- decided ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("effect", "kind"), [(0.04, "worse"), (-0.04, "better")])
def test_difference_is_said_with_all_that_it_rests_on(effect: float, kind: str, tmp_path: Path) -> None:
    found = of(planned(tmp_path, noisy({"mha": 0, "gqa": effect, "mla": 0}, 5)))
    assert found.kind == kind and found.difference == pytest.approx(effect, abs=0.01) and found.seeds == 5
    assert found.interval is not None and found.interval[0] < found.difference < found.interval[1]
    half = (found.interval[1] - found.interval[0]) / 2
    assert found.text == (
        f"gqa is {kind} than mha by {abs(found.difference):.4f} ± {half:.4f} nats per token "
        f"(5 seeds, p < 0.001 of 2 comparisons; this sweep sees {found.sees:.3f} four times in five)."
    )


def test_interval_is_of_the_noise_of_the_baseline_and_of_the_others(tmp_path: Path) -> None:
    """By hand: the baseline against the mean of the others, and these about their means (Welch and Satterthwaite)."""
    losses = {"a": [2.0, 2.1, 2.2], "b": [2.11, 2.2, 2.29], "c": [2.0, 2.11, 2.19]}
    found = of(planned(tmp_path, losses))
    a, b, c = (np.array(each) for each in losses.values())
    parts = np.array([np.var(a - (b + c) / 2, ddof=1), np.var(b - c, ddof=1) / 4])
    dof = parts.sum() ** 2 / (parts**2 / 2).sum()
    assert found.interval is not None and found.noise is not None and found.noise.dof == pytest.approx(dof)
    half = scipy.stats.t.ppf(0.975, dof) * (parts.sum() / 3) ** 0.5
    assert found.interval[1] - 0.1 == pytest.approx(half, rel=1e-6)


def test_an_arm_that_runs_twice_tells_nothing_more(tmp_path: Path) -> None:
    losses = noisy({"mha": 0, "gqa": 0.01, "mla": 0, "moe": 0}, 4)
    once = of(planned(tmp_path / "a", losses))
    twice = of(planned(tmp_path / "b", {**losses, "again": losses["mla"], "as mha": losses["mha"]}))
    assert once.noise == twice.noise


def test_loud_arm_is_not_pooled_with_the_others(tmp_path: Path) -> None:
    quiet = noisy({"mha": 0, "gqa": 0.02, "mla": 0}, 6, sd=0.002)
    loud = of(planned(tmp_path / "a", {**quiet, "moe": noisy({"moe": 0}, 6, sd=0.2)["moe"]}))
    alone = of(planned(tmp_path / "b", {"mha": quiet["mha"], "gqa": quiet["gqa"]}))
    assert loud.interval == pytest.approx(alone.interval) and loud.kind == "worse"


def test_the_same_within_a_margin(tmp_path: Path) -> None:
    found = of(planned(tmp_path, noisy({"mha": 0, "gqa": 0.0005}, 12, sd=0.003), within=0.01))
    assert found.kind == "same" and "gqa and mha are the same within 0.010 nats per token (" in found.text
    assert "90 % interval −0.00" in found.text and not found.needs_seeds
    assert of(planned(tmp_path / "without", noisy({"mha": 0, "gqa": 0.0005}, 12, sd=0.003))).kind == "undecided"


def test_same_function_is_the_same_to_the_last_digit(tmp_path: Path) -> None:
    losses = noisy({"mha": 0, "mla": 0.05}, 3)
    found = of(planned(tmp_path, {"mha": losses["mha"], "gqa": losses["mha"], "mla": losses["mla"]}))
    assert found.kind == "same" and found.text == "gqa and mha are the same to the last digit (3 seeds)."


def test_more_is_better_of_a_figure_that_says_so(tmp_path: Path) -> None:
    planned(tmp_path, noisy({"mha": 0, "gqa": 0.04}, 5), direction="maximize")
    for file in tmp_path.glob("*/results.json"):
        results = json.loads(file.read_text())
        results["figures"]["val/loss"]["better"] = "more"
        file.write_text(json.dumps(results))
    assert of(tmp_path).kind == "better"


# --- undecided --------------------------------------------------------------------------------------------------------


def test_undecided_says_what_it_takes(tmp_path: Path) -> None:
    found = of(planned(tmp_path, swinging(4, 0.015), definition={"see": 0.01}))
    assert found.kind == "undecided" and found.needs_seeds is not None and found.minutes is not None
    assert 14 <= found.needs_seeds <= 17  # (2.8 · .015 / .01)² = 17.6, and 2 for Student's t, of which 4 are there
    assert found.minutes == pytest.approx(found.needs_seeds * 2 / 2 * 2)  # two arms, two at a time, two minutes each
    assert found.text.startswith("Undecided: gqa − mha is between −0.0")
    assert f"To see 0.010: about {found.needs_seeds} more seeds, {found.minutes:.0f} minutes." in found.text


@pytest.mark.slow
def test_seeds_that_are_said_to_be_needed_are_enough(tmp_path: Path) -> None:
    """With as many seeds, a sweep of that noise sees the difference four times in five."""
    asked = of(planned(tmp_path, swinging(4, 0.01 * 2**0.5), definition={"see": 0.02}))
    assert asked.needs_seeds is not None
    seeds, times = 4 + asked.needs_seeds, 60
    seen = 0
    for i in range(times):
        folder = planned(tmp_path / f"sweep{i}", noisy({"mha": 0, "gqa": 0.02}, seeds, sd=0.01, seed=100 + i))
        seen += of(folder).kind == "worse"
    assert 0.65 < seen / times < 0.95


def test_correction_is_named_where_it_is_what_decides(tmp_path: Path) -> None:
    base = [2.0, 2.1, 2.2]
    many = {"mha": base, "a": [1.95, 2.06, 2.14], **{f"b{i}": [2.05, 2.0, 2.25] for i in range(8)}}
    losses = {name: [v + 0.001 * i * s for s, v in enumerate(of)] for i, (name, of) in enumerate(many.items())}
    found = of(planned(tmp_path, losses))
    assert found.kind == "undecided" and "alone p = 0.0" in found.text and "of 9 comparisons" in found.text


def test_bank_of_noise_decides_where_three_seeds_alone_do_not(tmp_path: Path) -> None:
    losses = {"mha": [2.0, 2.1, 2.2], "gqa": [2.02, 2.106, 2.221]}
    alone = of(planned(tmp_path / "a", losses))
    bank = of(planned(tmp_path / "b", losses, bank={"sd": 0.006, "dof": 20, "source": "balance", "seeds": [7]}))
    loud = of(planned(tmp_path / "c", losses, bank={"sd": 0.0005, "dof": 20, "source": "another shape", "seeds": [7]}))
    assert alone.kind == "undecided" and bank.kind == "worse"
    assert loud.p == alone.p  # the guard: this sweep is noisier than its bank
    for seeds in ([], [2, 7]):  # of runs that may be among these
        same = of(planned(tmp_path / f"d{seeds}", losses, bank={"sd": 0.006, "dof": 20, "seeds": seeds}))
        assert same.p == alone.p


# --- looks ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_growing_sweep_stops_at_the_look_that_decides(tmp_path: Path) -> None:
    losses = noisy({"mha": 0, "gqa": 0.03}, 5, sd=0.004)
    found = of(planned(tmp_path, losses, looks=[4, 8, 12, 16], spend="pocock"))
    assert found.kind == "worse" and found.seeds == 4  # the fifth is not looked at
    assert "Stopped at 4 of 16 seeds (Pocock)" in found.text


def test_early_estimate_is_called_too_large(tmp_path: Path) -> None:
    found = of(
        planned(tmp_path, noisy({"mha": 0, "gqa": 0.006}, 8, sd=0.004, seed=5), looks=[4, 8, 12], spend="pocock")
    )
    assert found.kind == "worse" and "estimates at an early stop are too large by about 0." in found.text


def test_between_two_looks_nothing_is_looked_at(tmp_path: Path) -> None:
    losses = noisy({"mha": 0, "gqa": 0.0}, 4, sd=0.004)
    for name in losses:
        losses[name] += [2.5 if name == "gqa" else 2.0] * 3
    found = of(planned(tmp_path, losses, looks=[4, 8]))
    assert found.kind == "undecided" and found.seeds == 4
    first = of(planned(tmp_path / "first", losses, looks=[8, 12]))
    assert first.kind == "none" and first.why == "unfinished"


def test_undecided_look_needs_seeds_up_to_a_later_one(tmp_path: Path) -> None:
    found = of(planned(tmp_path, noisy({"mha": 0, "gqa": 0.0}, 4, sd=0.01), looks=[4, 8, 12, 40], within=0.01))
    assert found.kind == "undecided" and found.needs_seeds in (4, 8, 36)


def test_fixed_sweep_is_not_looked_at_before_its_last_seed(tmp_path: Path) -> None:
    losses: dict[str, list[Any]] = {**noisy({"mha": 0, "gqa": 0.1}, 4)}
    losses["gqa"][3] = None
    found = of(planned(tmp_path, losses))
    assert (found.kind, found.why) == ("none", "unfinished")
    assert found.text == "No verdict: 3 of the 4 seeds of gqa and mha have ended."


# --- none -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mine", "edge"), [([5, 4, 3, 2.5, 2.4], "largest"), ([2.0, 2.1, 2.2, 2.3, 2.5], "smallest")], ids=["high", "low"]
)
@pytest.mark.parametrize("whose", ["gqa", "mha"])
def test_arm_whose_best_rate_is_at_an_edge_is_not_judged(
    mine: list[float], edge: str, whose: str, tmp_path: Path
) -> None:
    tried = {name: mine if name == whose else [2.3, 2.1, 2.0, 2.1, 2.3] for name in ("mha", "gqa")}
    found = of(planned(tmp_path, noisy({"mha": 0, "gqa": 0.1}, 4), tried))
    assert (found.kind, found.why) == ("none", "untuned")
    assert found.text == f"No verdict: the best rate of {whose} is the {edge} tried."


def test_tuned_arms_are_said_to_be(tmp_path: Path) -> None:
    tried = {arm: [2.3, 2.1, 2.0, 2.1, 2.3] for arm in ("mha", "gqa")}
    findings = find(read(planned(tmp_path, noisy({"mha": 0, "gqa": 0.1}, 4), tried)))
    assert "rates tuned alike" in verdict(findings.arms[1], findings).text
    assert findings.arms[1].values.keys() == {0, 1, 2, 3}  # and not the seed of the tries
    (tuned,) = findings.arms[1].tuned
    assert tuned.used == 0.06 and len(tuned.tries) == 5


def test_what_tuning_leaves_is_in_interval_p_and_what_is_seen(tmp_path: Path) -> None:
    losses = noisy({"mha": 0, "gqa": 0.01, "mla": 0.0}, 8)
    tried = {arm: [2.31, 2.06, 2.0, 2.09, 2.25] for arm in losses}
    untuned, tuned = of(planned(tmp_path / "a", losses)), of(planned(tmp_path / "b", losses, tried))
    assert untuned.interval and tuned.interval and untuned.p and tuned.p and untuned.sees and tuned.sees
    assert tuned.difference == untuned.difference and tuned.p > untuned.p
    assert tuned.interval[0] < untuned.interval[0] and tuned.interval[1] > untuned.interval[1]
    assert tuned.sees > untuned.sees
    assert tuned.noise and untuned.noise and tuned.noise.left.variance > 0 == untuned.noise.left.variance


def test_an_arm_that_seeds_cannot_decide_needs_none(tmp_path: Path) -> None:
    losses = noisy({"mha": 0, "gqa": 0.0, "mla": 0.0}, 4)
    tried = {arm: [2.0, 2.5, 1.9, 2.5, 2.0] for arm in losses}
    found = of(planned(tmp_path, losses, tried, within=0.001))
    assert found.kind == "undecided" and found.needs_seeds is None


def test_diverged_try_is_no_edge(tmp_path: Path) -> None:
    tried: dict[str, list[Any]] = {arm: [2.3, 2.1, 2.0, 2.1, "diverged"] for arm in ("mha", "gqa")}
    assert of(planned(tmp_path, noisy({"mha": 0, "gqa": 0.1}, 4), tried)).kind == "worse"


def test_arm_in_tuning_has_no_verdict_yet(tmp_path: Path) -> None:
    tried: dict[str, list[Any]] = {"mha": [2.3, 2.1, 2.0, 2.1, 2.3], "gqa": [2.3, 2.1, None, None, None]}
    found = of(planned(tmp_path, {"mha": [], "gqa": []}, tried))
    assert found.why == "unfinished" and "gqa is still being tuned (2 tries have ended)" in found.text


def test_one_seed_is_no_verdict(tmp_path: Path) -> None:
    found = of(planned(tmp_path, {"mha": [2.0], "gqa": [1.9]}, bank={"sd": 0.001, "dof": 50}))
    assert found.why == "one_seed" and "one seed cannot say whether gqa differs from mha" in found.text


@pytest.mark.parametrize(
    ("effect", "loser", "kind"),
    [(0.1, "gqa", "worse"), (-0.1, "gqa", "none"), (0.0, "gqa", "none"), (-0.1, "mha", "better"), (0.1, "mha", "none")],
)
def test_side_that_lost_a_seed_is_not_flattered(effect: float, loser: str, kind: str, tmp_path: Path) -> None:
    losses: dict[str, list[Any]] = {**noisy({"mha": 0, "gqa": effect}, 5)}
    losses[loser][2] = "diverged"
    found = of(planned(tmp_path, losses))
    assert found.kind == kind and "1 diverged" in found.text
    assert found.why == ("lost_seeds" if kind == "none" else None)


def test_arm_that_is_lost_says_why(tmp_path: Path) -> None:
    found = of(planned(tmp_path, {"mha": [2.0, 2.1], "gqa": ["failed", "failed"]}))
    assert found.why == "lost" and found.text == "No verdict: gqa is lost: 2 of 2 runs failed: so it is."


# --- tasks that are solved or not -------------------------------------------------------------------------------------


def test_tasks_are_compared_by_the_share_of_seeds_that_solved_them(tmp_path: Path) -> None:
    losses = {"mha": [0.01] * 2 + [3.0] * 8, "gqa": [0.01] * 9 + [3.0]}
    found = of(planned(tmp_path, losses, solved={"metric": "val/loss", "at": 0.5}))
    assert found.kind == "better" and found.difference == pytest.approx(0.7) and found.interval is None
    assert found.text.startswith("gqa is better than mha: 9 of 10 seeds of gqa solved it, 2 of 10 of mha (p = 0.00")
    less = of(
        planned(
            tmp_path / "less",
            {"mha": losses["mha"][:4], "gqa": losses["gqa"][:4]},
            solved={"metric": "val/loss", "at": 0.5},
        )
    )
    assert less.kind == "undecided" and "4 of 4 seeds of gqa solved it, 2 of 4 of mha" in less.text


def test_seed_that_diverged_has_not_solved_its_task(tmp_path: Path) -> None:
    losses: dict[str, list[Any]] = {"mha": [0.01] * 8, "gqa": ["diverged"] * 7 + [0.01]}
    found = of(planned(tmp_path, losses, solved={"metric": "val/loss", "at": 0.5}))
    assert found.kind == "worse" and "1 of 8 seeds of gqa solved it" in found.text


# --- all together -----------------------------------------------------------------------------------------------------


def test_exit_code_is_of_the_least_certain_verdict(tmp_path: Path) -> None:
    decided = Verdict("a", "b", "same", "")
    undecided, none = Verdict("a", "b", "undecided", ""), Verdict("a", "b", "none", "", "one_seed")
    assert [exit_code(each) for each in ([decided], [decided, undecided], [undecided, none, decided])] == [0, 3, 4]


@pytest.mark.parametrize(
    "wrong",
    [{"looks": [8, 4]}, {"looks": [0]}, {"spend": "all"}, {"within": 0}, {"bank": {"sd": 1}}, {"solved": {"at": 1}}],
    ids=str,
)
def test_plan_with_values_that_none_can_have_is_refused(wrong: dict[str, Any], tmp_path: Path) -> None:
    planned(tmp_path, {"mha": [2.0, 2.1], "gqa": [2.0, 2.1]}, **wrong)
    with pytest.raises(ConfigError):
        read(tmp_path)


def test_search_has_no_verdicts(tmp_path: Path) -> None:
    planned(tmp_path, {"mha": [2.0, 2.1], "gqa": [2.0, 2.1]}, kind="search")
    assert verdicts(find(read(tmp_path))) == []


# --- against the truth ------------------------------------------------------------------------------------------------
