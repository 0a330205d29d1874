"""The bank of noise: which entry counts as near, what an ablation adds to it, and what a plan makes of it."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from sweep_folder import noisy, planned

from blockwright.lab.ablation import bank, seed_counts
from blockwright.lab.ablation.bank import Entry, Shape
from blockwright.lab.ablation.definition import Definition
from blockwright.lab.ablation.ending import conclude, record
from blockwright.lab.ablation.scheme import Recipe
from blockwright.lab.ablation.seed_counts import Precision, affordable, last_level, quarters
from blockwright.lab.report.findings import find
from blockwright.lab.report.reading import read
from blockwright.lab.statistics.tuning import Aim
from blockwright.registry import ConfigError
from blockwright.training.result import Result

SHAPE = Shape("val/loss", 3e6, 192, 4, 614400, 2048, "Muon", 0.01, "WarmupCosine()", "32-true", "plays")
ENTRY = Entry(**asdict(SHAPE), sd=0.007, dof=6, seeds=(5000, 5001), name="attention", date="2026-11-25", source="a")
RECIPES = {name: Recipe((), values={"optimizer.lr": 0.01}) for name in ("mha", "gqa", "mqa", "mla")}


NEAR = [{}, {"params": 5.9e6}, {"tokens": 307200}, {"tokens_per_step": 1024}, {"lr": 0.02}]
FAR = [{"params": 6.1e6}, {"tokens": 1.3e6}, {"lr": 0.021}, {"lr": 0.004}, {"tokens": None}, {"d_model": 256}]
FAR += [{"metric": "test/loss"}, {"optimizer": "AdamW"}, {"n_layers": 2}, {"data": "another text"}, {"data": ""}]
FAR += [{"scheduler": "WarmupCosine(min_ratio=0)"}, {"precision": "bf16-mixed"}]


def test_noise_is_carried_over_within_a_factor_of_two():
    for changes, nearest in ((NEAR, ENTRY), (FAR, None)):
        assert not [each for each in changes if bank.nearest(replace(SHAPE, **each), [ENTRY]) is not nearest]


def test_nearest_entry_counts_and_the_rate_that_was_tuned_where_it_will_be():
    far, near = replace(ENTRY, params=5e6), replace(ENTRY, params=3.3e6)
    tuned = replace(ENTRY, lr=0.03, tuned=True)
    assert bank.nearest(SHAPE, [far, near, tuned]) is near
    assert bank.nearest(SHAPE, [far, near, tuned], tuned=2) is tuned
    assert bank.nearest(SHAPE, [replace(tuned, lr=0.05)], tuned=2) is None  # beyond the tries
    assert bank.nearest(SHAPE, [replace(near, lr=0.03)], tuned=2) is None  # of a rate that was not tuned


def test_shipped_bank_has_the_recorded_ablations():
    shipped = bank.read(bank.SHIPPED)
    of_text = [entry for entry in shipped if entry.metric == "val/loss"]
    assert len(of_text) > 3 and all(entry.data and entry.scheduler and entry.seeds for entry in shipped)
    assert all(0.005 < entry.sd < 0.03 for entry in of_text) and not any(entry.seconds for entry in shipped)
    results = Path(__file__).resolve().parents[3]
    assert all((results / entry.source / "plan.json").is_file() for entry in shipped)


def test_ablation_that_has_ended_adds_its_noise_once(tmp_path):
    folder = tmp_path / "ablation" / "attention" / "now"
    folder.mkdir(parents=True)
    planned(folder, noisy({"mha": 0, "gqa": 0.01, "mla": 0.02}, 20, sd=0.004))
    plan = json.loads((folder / "plan.json").read_text()) | {"shape": asdict(SHAPE), "workers": 2}
    (folder / "plan.json").write_text(json.dumps(plan))
    results = {i: Result("completed", wall_seconds=30.0) for i in range(3)}
    for _ in range(2):
        conclude(folder, plan, results)
    assert (folder / "report" / "index.html").is_file()
    (entry,) = bank.read(tmp_path)
    assert entry.sd == pytest.approx(0.004 * 2**0.5, rel=0.35) and 19 < entry.dof < 57
    assert (entry.seconds, entry.workers, entry.lr, entry.tuned, entry.seeds) == (30.0, 2, 0.01, False, (*range(20),))
    assert bank.seconds_a_job(replace(SHAPE, tokens=307200), [entry], 2) == 15.0
    assert bank.seconds_a_job(SHAPE, [entry], 1) is None
    assert bank.nearest(SHAPE, bank.known(tmp_path)) == entry


def test_ablation_elsewhere_adds_nothing(tmp_path):
    (folder := tmp_path / "a" / "b" / "c").mkdir(parents=True)
    planned(folder, noisy({"mha": 0, "gqa": 0.01, "mla": 0.02}, 20, sd=0.004))
    record(find(read(folder)), {"shape": asdict(SHAPE)}, {})
    assert not [*tmp_path.rglob(bank.FILE)]


def test_bank_that_cannot_be_written_costs_no_report(tmp_path):
    folder = tmp_path / "ablation" / "attention" / "now"
    folder.mkdir(parents=True)
    planned(folder, noisy({"mha": 0, "gqa": 0.01, "mla": 0.02}, 20, sd=0.004))
    (tmp_path / bank.FILE).mkdir()
    with pytest.raises(ConfigError, match="cannot be written"):
        conclude(folder, {"shape": asdict(SHAPE)}, {})
    assert (folder / "report" / "index.html").is_file()


def test_seeds_are_planned_by_what_they_see():
    assert Precision(0.007, 4).sees(3) == pytest.approx(0.0207, rel=0.02)
    assert Precision(0.007, 4, 20).sees(3) == pytest.approx(0.0139, rel=0.02)
    assert Precision(0.007, 4).sees(8) == pytest.approx(0.0089, rel=0.02)
    assert Precision(0.007, 4, 20).sees(8) == pytest.approx(0.0084, rel=0.02)
    assert Precision(0.007, 2).sees(17) == pytest.approx(0.0051, rel=0.02)
    plain, tuned, more = (Precision(0.0092, 4, tries=tries) for tries in (0, 1, 3))
    assert plain.sees(7) < more.sees(7) < tuned.sees(7) == pytest.approx(0.0141, rel=0.02)
    assert plain.sees(1000) < 0.002 < tuned.sees(1000)
    assert tuned.needed(0.01) > more.needed(0.01) > plain.needed(0.01)
    with pytest.raises(ValueError, match="more than"):
        tuned.needed(0.002)
    precision = Precision(0.007, 4)
    count = precision.needed(0.01)
    assert precision.sees(count) <= 0.01 < precision.sees(count - 1)
    assert quarters(16) == (4, 8, 12, 16) and quarters(5) == (2, 3, 4, 5) and quarters(2) == (2,)
    assert last_level((4, 8, 12, 16), "obrien_fleming") == pytest.approx(0.0374, rel=0.01)
    assert last_level((8,), "pocock") == 0.05


@pytest.mark.parametrize(("seconds", "seeds"), [(3600, 8), (440, 1), (400, 0), (-5, 0)])
def test_affordable_seeds(seconds, seeds):
    assert affordable(seconds, 209, 4, 2) == seeds


def make(entries, tuned_by=None, **keys):
    return seed_counts.make(Definition("x", baseline="mha", **keys), RECIPES, tuned_by, SHAPE, entries)


def test_difference_that_is_to_be_seen_becomes_seeds_where_its_noise_is_known():
    few, many = make([ENTRY], see=0.03), make([ENTRY], see=0.01)
    assert few.seeds == (0, 1) and many.seeds == tuple(range(7)) and many.seeds_planned == 7
    looked = make([ENTRY], see=0.01, until="verdict")
    assert looked.seeds is None and looked.looks == (2, 4, 6, 7) and looked.seeds_planned == 7
    with pytest.raises(ConfigError, match="not known") as unknown:
        make([], see=0.01)
    assert "pairs=3" in unknown.value.remedy and make([], see=0.01, pairs=3).seeds is None
    with pytest.raises(ConfigError, match="more than 1,000 seeds"):
        make([ENTRY], see=1e-9)
    with pytest.raises(ConfigError, match="more than 1,000 seeds"):
        make([ENTRY], see=3e-4)
    tune, plain = {"optimizer.lr": 5}, make([ENTRY], see=0.006).seeds_planned
    assert make([ENTRY], see=0.006, tune=tune).seeds_planned > plain
    assert (
        make([ENTRY], see=0.006, tune=tune).seeds_planned
        > make([ENTRY], see=0.006, tune=tune, tune_seeds=4).seeds_planned
    )
    assert make([ENTRY], Aim("val/other"), see=0.006, tune=tune).seeds_planned == plain
    with pytest.raises(ConfigError, match="more than 1,000 seeds") as caught:
        make([ENTRY], see=0.002, tune=tune)
    assert "1,000 seeds see" in caught.value.remedy and "tune_seeds=2" in caught.value.remedy


def test_noise_of_the_bank_is_that_of_runs_tuned_alike():
    tune = {"optimizer.lr": 5}
    tuned = replace(ENTRY, tuned=True)
    assert make([ENTRY], seeds=(0,)).bank.sd == 0.007 and make([tuned], seeds=(0,), tune=tune).bank.sd == 0.007
    assert make([ENTRY], seeds=(0,), tune=tune).bank is None and make([tuned], seeds=(0,)).bank is None
    assert make([], seeds=(0,)).bank is None
    loud = replace(ENTRY, params=5e7, sd=0.1)
    assert make([ENTRY, loud], seeds=(0,)).sd_of_run == pytest.approx(0.007 / 2**0.5)
    assert make([loud, replace(loud, sd=0.05)], seeds=(0,)).sd_of_run == pytest.approx(0.05 / 2**0.5)
    assert make([], seeds=(0,)).sd_of_run == 0
    other = replace(ENTRY, metric="val/other", sd=0.02)
    assert make([ENTRY, other], Aim("val/other"), seeds=(0,)).sd_of_run == pytest.approx(0.02 / 2**0.5)
    assert make([ENTRY], Aim("val/other"), seeds=(0,)).sd_of_run == 0


FRESH = [{"seeds": (0, 1, 2)}, {"seeds": (0, 1, 2, 3, 4)}, {"seeds": (2, 9)}, {"see": 0.01}, {"hours": 1.0}]


@pytest.mark.parametrize("asked", [*FRESH, {"until": "verdict", "looks": (4, 8)}], ids=str)
def test_verdicts_use_no_bank_of_a_seed_that_may_run_again(asked):
    own = replace(ENTRY, seeds=(0, 1, 2))
    assert make([own], **asked).bank is None
    assert make([replace(own, seeds=())], **asked).bank is None  # its seeds are unknown
    far = replace(own, seeds=(7000,), sd=0.008, params=4e6)
    assert make([own, far], **asked).bank.seeds == (7000,)  # the nearest of those that may count


def test_damaged_line_is_named(tmp_path):
    for line in ("{", "5", '{"sd": -1}', '{"metric": 3}', '{"metric": "a", "unknown": 1}', "[[[[" * 50):
        (tmp_path / bank.FILE).write_text(f"{json.dumps({'metric': 'm', 'sd': 1.0, 'dof': 2})}\n{line}\n")
        with pytest.raises(ConfigError) as caught:
            bank.read(tmp_path)
        assert caught.value.path == f"{tmp_path / bank.FILE}:2"
