"""What is recorded is what was asked, what differs between two records, and what of it alters what weights mean."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

import lightning as L
import pytest

from blockwright.registry import ConfigError
from blockwright.training.checkpoints.record import (
    LEFT_OUT,
    SAME_RUN,
    Change,
    Past,
    changes,
    from_cli,
    is_same_run,
    listed,
    record,
    table,
)
from blockwright.training.configuration.composing import compose_config
from blockwright.training.configuration.run import Run
from blockwright.training.entry.cli import to_cli
from blockwright.training.entry.parse import parse_settings

Plain = dict[str, Any]


class Averages(L.Callback):
    """A callback of another package, which changes weights."""

    def __init__(self, decay: float = 0.9) -> None:
        self.decay = decay


class Looks(Averages):
    """A callback of another package, which says that it does not."""

    observes = "prints"


@pytest.fixture(scope="module")
def composed(small: list[str]) -> Run:
    return parse_settings(compose_config([*small, "callbacks=[default,early_stopping]"], output_dir="run"))


@pytest.fixture
def given(composed: Run) -> Plain:
    return copy.deepcopy(dict(composed))


def of(plain: Plain) -> Past:
    return Past(record(plain), True, 0, None)


def node(plain: Plain, path: str) -> Any:
    for key in path.split("."):
        plain = plain[int(key)] if isinstance(plain, list) else plain[key]
    return plain


def nodes(value: Any, path: str = "") -> Iterator[str]:
    """The path of every mapping in a configuration that is recorded."""
    if any(fnmatchcase(path, pattern) for pattern in LEFT_OUT):
        return
    if isinstance(value, Mapping):
        yield path
        for key, inner in value.items():
            yield from nodes(inner, f"{path}.{key}" if path else key)


def test_unknown_setting_is_recorded_wherever_it_stands(given: Plain) -> None:
    """And a change of it makes another run."""
    silent = ("callbacks.checkpoint", "callbacks.interruption", "callbacks.report", "callbacks.progress")
    silent += ("callbacks.throughput", "callbacks.completions")
    planted = 0
    for path in [path for path in nodes(given) if path != "callbacks" and not path.startswith(silent)]:
        changed = copy.deepcopy(given)
        (node(changed, path) if path else changed)["unknown_setting"] = 1
        past, ours = of(given), record(changed)
        if path == "task" or not path.startswith("task."):  # what stands there stands at the root too
            assert [c.path for c in changes(past, ours)] and not is_same_run(past, ours), path
            planted += 1
    assert planted > 20
    for path in ("", "trainer", "data", "data.corpus", "task", "optimizer", "callbacks.guard", "model.attention"):
        assert path in list(nodes(given)), path


def test_callback_that_may_change_a_number_makes_another_run(given: Plain) -> None:
    for name in ("guard", "experts", "early_stopping", "machine"):
        without = copy.deepcopy(given)
        del without["callbacks"][name]
        assert not is_same_run(of(given), record(without)) and not is_same_run(of(without), record(given)), name
        assert record({**given, "callbacks": {**given["callbacks"], name: None}}) == record(without)


def test_callback_of_another_package_changes_numbers_unless_it_says_that_it_only_observes(given: Plain) -> None:
    for target, same in ((f"{__name__}.Averages", False), (f"{__name__}.Looks", True)):
        more = {**given, "callbacks": {**given["callbacks"], "x": {"_target_": target, "decay": 0.5}}}
        assert is_same_run(of(given), record(more)) is same
    twice = {f"x{i}": {"_target_": f"{__name__}.Averages", "decay": decay} for i, decay in enumerate((0.1, 0.2))}
    assert len(record({**given, "callbacks": twice})["callbacks"]) == 2
    weights = {"_target_": "lightning.pytorch.callbacks.StochasticWeightAveraging", "swa_lrs": 0.1}
    assert not is_same_run(of(given), record({**given, "callbacks": {**given["callbacks"], "swa": weights}}))
    rates = {"_target_": "lightning.pytorch.callbacks.LearningRateMonitor"}
    assert is_same_run(of(given), record({**given, "callbacks": {**given["callbacks"], "rates": rates}}))


def test_folder_of_the_run_itself_is_no_change(given: Plain) -> None:
    def at(folder: str) -> Plain:
        callback = {"_target_": f"{__name__}.Averages", "decay": f"{folder}/decay.txt"}
        return {**given, "paths": {**given["paths"], "output_dir": folder}, "callbacks": {"x": callback}}

    assert record(at("/runs/first")) == record(at("/runs/second"))
    assert "${run_dir}/decay.txt" in record(at("/runs/first"))["callbacks"]["Averages"].values()


SAME = {
    "logger": {"csv": {}},
    "paths.output_dir": "elsewhere",
    "paths.log_dir": "elsewhere",
    "data.num_workers": 3,
    "data.cache_dir": "elsewhere",
    "task.kernels.attention": "reference",
    "trainer.devices": 8,
    "trainer.strategy": "ddp",
    "trainer.accelerator": "gpu",
    "callbacks.checkpoint.dirpath": "elsewhere",
    "callbacks.report.directory": "elsewhere",
    "callbacks.completions.directory": "elsewhere",
    "trainer.plugins.0.asynchronous": True,
    "ckpt_path": "x.ckpt",
    "auto_resume": True,
    "trainer.max_steps": 99,
    "trainer.log_every_n_steps": 2,
}


def test_change_of_what_changes_no_number_is_the_same_run(given: Plain) -> None:
    past = of(given)
    for path, value in SAME.items():
        changed = copy.deepcopy(given)
        parent, _, key = path.rpartition(".")
        (node(changed, parent) if parent else changed)[key] = value
        assert is_same_run(past, record(changed)), path
        assert bool(changes(past, record(changed))) == (path in SAME_RUN), path


def test_task_and_data_record_what_they_do_not_take_from_the_root(given: Plain) -> None:
    assert not {"model", "optimizer", "seed"} & set(record(given)["task"]) and "seed" not in record(given)["data"]
    for part in ("task", "data"):
        other = copy.deepcopy(given)
        other[part]["seed"] = 7
        assert [c.path for c in changes(of(given), record(other))] == [f"{part}.seed"]


def test_both_command_lines_record_the_same(given: Plain) -> None:
    clip = "blockwright.training.callbacks.step_end.QKClip"
    given["callbacks"]["qk_clip"] = {"_target_": clip, "threshold": 3.0, "alpha": 0.5}
    cli = to_cli(Run.of(given, {}))
    cli["trainer"] |= {"overfit_batches": 0.0, "max_time": None, "sync_batchnorm": False}  # it writes out defaults
    ours = record(from_cli(cli))
    assert not changes(of(given), ours) and not changes(Past(ours, True, 0, None), record(given))
    cli["trainer"]["precision"] = None
    assert not changes(of(given), record(from_cli(cli)))
    cli["trainer"]["callbacks"][-1]["init_args"]["threshold"] = 4.0
    assert [c.path for c in changes(of(given), record(from_cli(cli)))] == ["callbacks.QKClip.threshold"]


def test_record_does_not_change_the_configuration_and_a_class_that_is_not_there_is_refused(given: Plain) -> None:
    before = copy.deepcopy(given)
    record(given)
    assert given == before
    with pytest.raises(ConfigError, match="cannot be imported"):
        record({**given, "callbacks": {"x": {"_target_": "nowhere.Nothing"}}})


def differing(there: dict[str, Any], here: dict[str, Any], complete: bool = True) -> list[Change]:
    return changes(Past(there, complete, 4, None), here)


ALTERS = ("position", "position.theta", "gating.top_k", "gating.scaling", "residual", "logit_softcap")

DO_NOT = ("max_positions", "init.std", "mtp.loss_weight", "gating.balance", "gating.balance.alpha", "gating.bias_step")


def test_what_the_output_depends_on_alters_the_weights() -> None:
    for path in ALTERS:
        assert Change(f"model.{path}", 1, 2).alters_weights, path
    for path in (*(f"model.{path}" for path in DO_NOT), "model.ffn.dropping", "optimizer.lr", "seed"):
        assert not Change(path, 1, 2).alters_weights, path


def test_another_block_is_one_change_and_a_parameter_of_the_same_is_its_own() -> None:
    rope = {"name": "rope", "theta": 1.0, "fraction": 1.0}

    def said(position: dict[str, Any]) -> list[str]:
        return [str(change) for change in differing({"model": {"position": rope}}, {"model": {"position": position}})]

    assert said({"name": "alibi"}) == ["model.position was rope, is alibi"]
    assert said({**rope, "theta": 2.0}) == ["model.position.theta was 1.0, is 2.0"]
    # Nothing written in two ways is no change.
    assert not differing({"model": {"layout": None, "overrides": []}}, {"model": {"layout": {}, "overrides": None}})


def test_child_that_is_null_differs_from_one_that_is_not_written() -> None:
    null, absent = {"model": {"attention": {"qk_norm": None}}}, {"model": {"attention": {}}}
    assert [str(c) for c in differing(null, absent)] == ["model.attention.qk_norm was null, is not set"]
    assert not differing(null, absent, complete=False)  # an older version wrote out what was not set


def test_longer_run_is_the_same_run() -> None:
    there = {"seed": 0, "trainer": {"max_steps": 3}}
    assert is_same_run(Past(there, True, 3, None), {"seed": 0, "trainer": {"max_steps": 9}})
    assert not is_same_run(Past(there, True, 3, None), {"seed": 1, "trainer": {"max_steps": 3}})


def test_table_and_sentence_show_both_values() -> None:
    long = [Change("model.tie_embeddings", True, None), Change("a", "x" * 99, []), Change("b", 1, 2)]
    found = [Change("seed", 0, 5), *long]
    lines = table(found).splitlines()
    assert lines[1].split() == ["seed", "0", "5"] and lines[2].split() == ["model.tie_embeddings", "true", "null"]
    assert len(lines[3]) < 90
    assert listed(found[:1]) == "seed was 0, is 5" and listed(found).endswith("and 1 more")


def test_default_that_one_command_line_writes_out_is_no_change() -> None:
    cosine = {"_target_": "blockwright.training.schedulers.WarmupCosine", "warmup": 5}
    assert not differing({"scheduler": {**cosine, "min_ratio": 0.1}}, {"scheduler": cosine})
    (change,) = differing({"scheduler": cosine}, {"scheduler": {**cosine, "min_ratio": 0.5}})
    assert str(change) == "scheduler.min_ratio was not set, is 0.5"
