"""The report of a ladder: verdicts, page, JSON, forecast, for laws that are true, wrong, or cannot be identified."""

import csv
import json
import math
from dataclasses import replace

import ladder_folder
import pytest

from blockwright.lab.ladder import verdict as of_ladder
from blockwright.lab.ladder.__main__ import main
from blockwright.lab.ladder.design import Cell, Tuned
from blockwright.lab.ladder.findings import find
from blockwright.lab.ladder.verdict import document, verdict, verdicts
from blockwright.lab.report.terminal import report_command as report
from blockwright.lab.statistics.law_fit import speed_up_along
from blockwright.lab.statistics.tuning import Fit, Try
from blockwright.registry import ConfigError

GAINS = {"mha": (1.0, 1.0), "mla": (1.05, 1.1), "same": (1.0, 1.0)}


@pytest.fixture(scope="module")
def ladder(tmp_path_factory):
    return ladder_folder.write(tmp_path_factory.mktemp("ladder") / "1", GAINS)


@pytest.fixture(scope="module")
def findings(ladder):
    return find(ladder)


def test_a_gain_and_none_are_told_apart(findings):
    faster, same = verdicts(findings)
    assert (faster.arm, faster.kind, same.kind) == ("mla", "better", "undecided")
    assert faster.speed_up is not None and faster.speed_up.low < 1.155 < faster.speed_up.high
    assert not faster.if_alike and faster.at == "best split"
    assert "best split" in faster.text and "can be seen" in same.text


@pytest.mark.slow
def test_far_from_the_best_split_arms_are_judged_beside_the_largest_rung(tmp_path):
    folder = ladder_folder.write(tmp_path / "1", {"mha": (1, 1), "mla": (0.5, 1)}, ratios=(0.1, 0.2, 0.4))
    found = verdict("mla", find(folder))
    assert found.kind == "worse" and found.at == "tokens per parameter" and found.speed_up is not None
    assert found.speed_up.low > 0.5 and "outside of the ladder" in found.text


def test_flops_and_throughput_change_what_a_gain_is_worth(findings):
    sizes = dict(findings.outline.sizes)
    largest = sizes[findings.largest]
    dear = replace(largest.arms["mla"], flops=2 * largest.arms["mla"].flops)
    sizes[findings.largest] = replace(largest, arms={**largest.arms, "mla": dear})
    found = replace(findings, outline=replace(findings.outline, sizes=sizes), speeds={"mha": 1000.0, "mla": 1500.0})
    ours = verdict("mla", found)
    assert ours.speed_up and ours.at_equal_flops and ours.by_clock
    assert ours.at_equal_flops.s == pytest.approx(ours.speed_up.s / 2)
    assert ours.by_clock.s == pytest.approx(ours.speed_up.s * 1.5)
    assert ours.kind == "worse", "it is judged at equal FLOPs"


@pytest.mark.slow
def test_of_equal_losses_the_gain_is_that_of_the_costs_whatever_the_parameters(tmp_path):
    flops, truth = 0.5, 2.0
    own = ladder_folder.outline({"base": (1, 1), "half": (1, 1)})
    sizes = {
        name: replace(of, arms={**of.arms, "half": Cell(("arm=half",), base.parameters / 2, base.flops * flops)})
        for name, of in own.sizes.items()
        for base in [of.arms["base"]]
    }
    found = find(ladder_folder.write_of(tmp_path / "1", replace(own, sizes=sizes), {"half": (2, 1)}))
    ours = verdict("half", replace(found, speeds={"base": 1000.0, "half": 1000.0 / flops}))
    assert ours.at_equal_flops and ours.by_clock
    for speed in (ours.at_equal_flops, ours.by_clock):
        assert speed.low < truth < speed.high and speed.s == pytest.approx(truth, rel=0.06)
    assert ours.kind == "better"


@pytest.mark.slow
def test_verdicts_are_corrected_for_all_arms(findings, monkeypatch):
    alone = {"mla": 0.02, "same": 0.03}
    speed = of_ladder.Speed(1.1, 1.01, 1.2)
    monkeypatch.setattr(of_ladder, "judged", lambda arm, *_: of_ladder.Judged(speed, "best split", alone[arm]))
    both = verdicts(findings)
    assert [each.p for each in both] == pytest.approx([0.04, 0.04]) and {each.kind for each in both} == {"better"}
    alone["mla"] = 0.026
    assert {(each.kind, each.p) for each in verdicts(findings)} == {("undecided", 0.052)}


@pytest.mark.slow
def test_a_p_and_an_interval_say_the_same(findings, tmp_path):
    far = find(ladder_folder.write(tmp_path / "1", {"mha": (1, 1), "mla": (0.7, 1)}, ratios=(0.1, 0.2, 0.4)))
    for found, place in ((findings, "best split"), (far, "tokens per parameter")):
        of = of_ladder.judged("mla", found, found.law)
        log_s, largest = found.law.fit.speed_up("mla"), found.largest_rung
        along = speed_up_along(found.law.fit, "mla", largest.parameters, largest.tokens, "ratio")
        assert of.at == place and 0 < of.p < 1
        for end in (of.speed.low, of.speed.high):
            p = log_s.p(math.log(end)) if place == "best split" else along.p(end)
            assert p == pytest.approx(0.05, abs=0.002)


@pytest.mark.slow
def test_the_files(ladder, capsys):
    assert main([str(ladder), "--at", "4e6,8e7"]) == 0
    out = capsys.readouterr().out
    assert "mla needs" in out and "4M parameters, 80M tokens: mha 1." in out
    folder = ladder / "report"
    document = json.loads((folder / "verdict.json").read_text())
    assert document["law"]["form"] == "apart" and not document["law"]["is_wrong"]
    assert {each["arm"]: each["kind"] for each in document["verdicts"]} == {"mla": "better", "same": "undecided"}
    rows = list(csv.DictReader((folder / "runs.csv").open()))
    assert len(rows) == 3 * 4 * 3 * 3 and set(rows[0]) >= {"arm", "size", "duration", "seed", "loss"}
    page, text = (folder / "index.html").read_text(), (folder / "report.md").read_text()
    for chart in ("speed-ups", "loss-over-size", "loss-over-data", "residuals"):
        assert (folder / f"{chart}.svg").exists() and f"{chart}.svg" in text and f'id="{chart}-t"' in page
    assert "http" not in page.replace("http://www.w3.org", "")


@pytest.mark.slow
def test_a_law_that_does_not_fit_has_no_speed_up_and_splits_no_flops(tmp_path):
    ladder = ladder_folder.write(tmp_path / "1", GAINS, exponent=0.45)
    wrong = verdict("mla", find(ladder))
    assert (wrong.kind, wrong.why, wrong.speed_up) == ("none", "law", None)
    with pytest.raises(ConfigError, match="No forecast") as refused:
        main([str(ladder), "--at=1e15"])
    assert refused.value.path == "--at" and not (ladder / "report").exists()


@pytest.mark.slow
def test_a_size_beyond_any_is_forecast_without_a_fault(ladder):
    for at in ("1e308", "1e-300", "1e308,1e308", "1e-300,1e-300"):
        assert main([str(ladder), f"--at={at}"]) == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "why", "remedy"),
    [({"ratios": (20,)}, "durations", "quarter of the tokens"), ({"sizes": 2}, "sizes", "third size")],
)
def test_what_a_ladder_cannot_identify(tmp_path, shape, why, remedy):
    found = find(ladder_folder.write(tmp_path / "1", GAINS, **shape))
    assert found.law is not None and found.law.why_alike == why
    ours = verdict("mla", found)
    assert ours.if_alike and remedy in ours.text and "no forecast" in ours.text


def test_what_cannot_be_judged_has_no_verdict(tmp_path, findings):
    found = find(ladder_folder.write(tmp_path / "1", GAINS, sizes=2, seeds=1, ratios=(5, 10)))
    assert found.law is None
    assert {each.why for each in verdicts(found)} == {"few"}
    (first, _) = document(found)["verdicts"]
    assert first["difference"]["mean"] != 0 and first["difference"]["p"] is None, "of one seed each"
    tuned = Tuned((Try(0.01, 2.0), Try(0.02, 1.9), Try(0.04, 1.8)), Fit(0.04, 0.1, 0.0, "high"))
    outline = replace(findings.outline, tune="optimizer.lr", tuned_sizes=("d0",))
    good = replace(tuned, fit=Fit(0.02, 0.1, 0.0, None))
    found = replace(findings, outline=outline, tuned={("d0", "mha"): good, ("d0", "mla"): tuned, ("d0", "same"): good})
    untuned, fine = verdicts(found)
    assert (untuned.kind, untuned.why) == ("none", "untuned") and "largest tried" in untuned.text
    assert fine.kind == "undecided"


def test_a_damaged_plan_and_a_wrong_size_or_folder_are_one_message(ladder, tmp_path):
    plan = json.loads((ladder / "plan.json").read_text())
    own, (first, *others) = plan["ladder"], plan["jobs"]
    arms = {name: arm for name, arm in own["sizes"]["d0"]["arms"].items() if name != "mla"}
    few = {**own["sizes"], "d0": {**own["sizes"]["d0"], "arms": arms}}
    jobs = [{"size": "elsewhere"}, {"tokens": "many"}, {"tokens": None}]
    damages = [{"ladder": None}, {"ladder": {**own, "decay": 2}}, {"ladder": {**own, "sizes": few}}]
    for damage in (*damages, *({"jobs": [{**first, **wrong}, *others]} for wrong in jobs)):
        (tmp_path / "plan.json").write_text(json.dumps({**plan, **damage}))
        with pytest.raises(ConfigError):
            find(tmp_path)
    with pytest.raises(ConfigError) as refused:
        main([str(ladder), "--at=0,1e9"])
    assert refused.value.path == "--at" and "1e9" in refused.value.remedy
    with pytest.raises(ConfigError) as refused:
        report([str(ladder)])
    assert f"blockwright ladder {ladder}" in refused.value.remedy


@pytest.mark.slow
def test_a_lost_training(tmp_path):
    found = find(ladder_folder.write(tmp_path / "1", GAINS, lost=4))
    assert len(found.lost) == 1 and len(found.rungs) == 3 * 4 * 3 * 3 - 1 and found.law
