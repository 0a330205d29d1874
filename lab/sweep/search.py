"""A resumable search by Optuna: each trial is in the study's storage before it runs, and reported to it once.

Trial N is job N, in folder N. A resumed search first ends the trials that had begun: one with results on disk is
reported, one that was running runs again with the same parameters from its own checkpoint. Samples are a function of
the sampler's seed, the number of the trial and the results so far, so the search equals an uninterrupted one.

How this differs from Hydra's plug-in for Optuna, whose settings these are: that one has one random generator for the
whole search, which a second process would restart; it numbers jobs itself; it does not handle pruned trials.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep, Transformer
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn
from hydra.errors import HydraException
from hydra.types import HydraContext, TaskFunction
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, Trial, TrialState

from blockwright.lab.sweep import plan as plans
from blockwright.lab.sweep.study import open_study
from blockwright.registry import ConfigError, did_you_mean
from blockwright.registry.command import quoted
from blockwright.registry.errors import require
from blockwright.registry.folder import write_text
from blockwright.training.checkpoints.find import newest
from blockwright.training.configuration import figures
from blockwright.training.configuration.instantiate import check_target
from blockwright.training.result import Result, record_failure

# --- Hydra's sweep syntax → Optuna's distributions --------------------------------------------------------------------


Space = dict[str, BaseDistribution]


def read_space(overrides: Sequence[str], loader: ConfigLoader | None = None) -> tuple[Space, dict[str, str]]:
    """Split overrides into a search space and fixed ones.

    Args:
        overrides: in Hydra's grammar; the last one of a key counts
        loader: lists the options of a group for ``glob(…)``

    Returns:
        key → distribution, and key → value of the overrides that are not sweeps, whose keys are not searched

    Raises:
        ConfigError: what cannot be read, or a sweep other than choice, range or interval
    """
    space: Space = {}
    fixed: dict[str, str] = {}
    parser = OverridesParser.create(loader)
    for text in overrides:
        try:
            override = parser.parse_override(text)
        except HydraException as error:
            why = [line for line in str(error).splitlines() if line and not line.startswith("See http")]
            raise _refused(text, why[-1]) from None
        key = override.get_key_element()
        if override.is_sweep_override():
            space[key] = distribution(override)
        else:
            fixed[key] = override.get_value_element_as_str()
    return {key: each for key, each in space.items() if key not in fixed}, fixed


def distribution(override: Override) -> BaseDistribution:
    """``choice(a, b)``, ``a,b``, ``range(0, 10, 2)``, ``interval(0, 1)``, and ``tag(log, interval(…))`` of them.

    A range excludes its end, as in Hydra's own sweeps; an interval includes both.

    Raises:
        ConfigError: any other sweep, an empty or infinite one, or a tag without effect
    """
    try:
        return _distribution(override)
    except (HydraException, ValueError) as error:  # among others a glob without matches
        raise _refused(str(override.input_line), str(error)) from None
    except ZeroDivisionError:
        raise _refused(str(override.input_line), "its step is 0") from None


def _refused(written: str, why: str) -> ConfigError:
    remedy = "Write choice(a, b), interval(0, 1), range(1, 9) or tag(log, interval(1e-4, 1e-2))"
    return ConfigError("hydra.sweeper.params", written, f"is not a search space ({why.rstrip('.')})", remedy)


def _distribution(override: Override) -> BaseDistribution:
    sweep: Any = override.value()
    interval = override.is_interval_sweep() and isinstance(sweep, IntervalSweep)
    if odd := set(getattr(sweep, "tags", ())) - ({"log"} if interval else set()):
        known = "is not a tag; there is log" if interval else "is a tag without effect here; log is of an interval"
        raise ValueError(f"{min(odd)} {known}")
    if interval:
        if not (math.isfinite(sweep.start) and math.isfinite(sweep.end)):
            raise ValueError("an interval has two finite ends")
        whole = isinstance(sweep.start, int) and isinstance(sweep.end, int)
        kind: Any = IntDistribution if whole else FloatDistribution
        return kind(sweep.start, sweep.end, log="log" in sweep.tags)
    if getattr(sweep, "shuffle", False):  # by this process alone: resumed, the search would have another space
        raise ValueError("a search has no order to shuffle")
    if override.is_range_sweep() and isinstance(sweep, RangeSweep):
        return _steps(sweep)
    return CategoricalDistribution(tuple(override.sweep_iterator(transformer=Transformer.encode)))  # type: ignore[arg-type]


def _steps(sweep: RangeSweep) -> IntDistribution | FloatDistribution:
    assert sweep.start is not None and sweep.stop is not None
    intervals = math.ceil(round((sweep.stop - sweep.start) / sweep.step, 9)) - 1  # from the first value to the last
    if intervals < 0:
        raise ValueError("the range is empty; it excludes its end")
    last = round(sweep.start + intervals * sweep.step, 12)  # 0.9 and not 0.8999…, which is no multiple of the step
    whole = all(isinstance(value, int) for value in (sweep.start, sweep.stop, sweep.step))
    kind: Any = IntDistribution if whole else FloatDistribution
    return kind(sweep.start, last, step=sweep.step)


def choices(each: BaseDistribution) -> list[Any]:
    """All values, for a search of every combination.

    Raises:
        ConfigError: there are infinitely many
    """
    if isinstance(each, CategoricalDistribution):
        return list(each.choices)
    if isinstance(each, IntDistribution | FloatDistribution) and each.step is not None and not each.log:
        return [each.low + i * each.step for i in range(round((each.high - each.low) / each.step) + 1)]
    rule = "has no list of values, but sampler=grid tries every one"
    raise ConfigError("hydra.sweeper.params", str(each), rule, "Write choice(…) or range(…), or another sampler")


def ends(each: BaseDistribution) -> list[Any]:
    """All choices, or the ends of an interval."""
    return list(each.choices) if isinstance(each, CategoricalDistribution) else [each.low, each.high]  # type: ignore[attr-defined]


def suggest(trial: Trial, key: str, each: BaseDistribution) -> Any:
    """Draw one parameter; a trial that already has it keeps it."""
    if isinstance(each, CategoricalDistribution):
        return trial.suggest_categorical(key, each.choices)
    draw: Any = trial.suggest_int if isinstance(each, IntDistribution) else trial.suggest_float
    return draw(key, each.low, each.high, step=each.step, log=each.log)  # type: ignore[attr-defined]


log = logging.getLogger(__name__)
OWNER = "blockwright_sweep"  # attribute of a trial: its folder, since searches may share a study
CHECKED = ("trainer", "callbacks", "logger")
NEEDS = {"CmaEsSampler": ("optuna", "cmaes"), "QMCSampler": ("lab", "scipy")}  # sampler → extra, package


class Search:
    """A search; the arguments are described in hydra_plugins/blockwright_optuna/_options.py."""

    def __init__(
        self,
        sampler: Any,
        direction: Any = None,
        storage: str | None = None,
        study_name: str | None = None,
        n_trials: int = 20,
        n_jobs: int = 1,
        params: Mapping[str, str] | None = None,
    ) -> None:
        self.sampler, self.direction, self.params = sampler, direction, params or {}
        self.storage, self.study_name = storage, study_name  # of the study, recorded in the sweep's plan
        self.n_trials, self.n_jobs = n_trials, n_jobs
        self.launcher: Any = None
        self.hydra_context: HydraContext | None = None

    def setup(self, *, config: DictConfig, hydra_context: HydraContext, task_function: TaskFunction) -> None:
        self.config, self.hydra_context = config, hydra_context
        self.launcher = Plugins.instance().instantiate_launcher(
            config=config, hydra_context=hydra_context, task_function=task_function
        )
        self.folder = Path(config.hydra.sweep.dir).absolute()
        for key, what in (("n_trials", "trials, and a search needs one"), ("n_jobs", "trials at a time")):
            if (value := getattr(self, key)) < 1:
                remedy = f"Write hydra.sweeper.{key}=1 or more"
                raise ConfigError(f"hydra.sweeper.{key}", value, f"counts {what}", remedy)
        check_packages(self.sampler)
        self.resumed = plans.is_resumed(self.folder)

    def sweep(self, arguments: list[str]) -> None:
        """Search.

        Args:
            arguments: overrides, searched and fixed ones

        Raises:
            ConfigError: the search space is empty, or cannot be composed
        """
        given = [*(f"{key}={value}" for key, value in self.params.items()), *arguments]
        space, fixed = read_space(given, self.hydra_context.config_loader if self.hydra_context else None)
        if not space:
            remedy = "Write optimizer.lr='tag(log, interval(1e-3, 1e-2))', say, or hparams_search=optuna"
            raise ConfigError("hydra.sweeper.params", {}, "leaves nothing to search", remedy)
        found = {} if self.resumed else {"direction": check_space(self._composed, space, fixed, self.direction)}
        if self._is_grid():
            self._grid = {name: choices(each) for name, each in space.items()}
            self.n_trials = min(self.n_trials, math.prod(map(len, self._grid.values())))
        self.plan = {**plans.read(self.folder), **found, "n_trials": self.n_trials}
        plans.write(self.folder, self.plan)
        open_study(self.folder, self.plan)
        for trials in self._batches():
            self._run([(trial.number, self._overrides(trial, space, fixed)) for trial in trials])
        self._conclude()

    def _composed(self, overrides: list[str]) -> DictConfig:
        assert self.hydra_context is not None
        return self.hydra_context.config_loader.load_sweep_config(self.config, overrides)

    def _is_grid(self) -> bool:
        return isinstance(self.sampler, functools.partial) and self.sampler.func is optuna.samplers.GridSampler

    def _sampler(self, number: int) -> Any:
        """The sampler of one trial, which draws as in an uninterrupted search."""
        if self._is_grid():
            return self.sampler(self._grid)
        node = self.config.hydra.sweeper.sampler
        seed = node.get("seed")
        own = {} if seed is None else {"seed": int(np.random.SeedSequence([seed, number]).generate_state(1)[0])}
        return instantiate(node, **own)

    def _open(self, number: int | None = None) -> optuna.Study:
        """Reopen the study: an open one does not see what trials report.

        Args:
            number: of the trial to sample for; None: the next
        """
        study = open_study(self.folder, self.plan, checked=True)
        study.sampler = self._sampler(len(study.get_trials(deepcopy=False)) if number is None else number)
        return study

    def _batches(self) -> Iterator[Iterator[Trial]]:
        """Batches of trials to run together: those that had begun, in the same batches, then new ones."""
        begun = [t.number for t in self._own() if t.state == TrialState.RUNNING]
        left = [number for number in begun if not self._tell_from_disk(number)]
        for i in range(0, len(left), self.n_jobs):
            yield map(self._begun, left[i : i + self.n_jobs])
        while (more := self.n_trials - len(self._own())) > 0:
            yield (self._new() for _ in range(min(more, self.n_jobs)))

    def _own(self) -> list[FrozenTrial]:
        """The trials of this search that have begun."""
        trials = [t for t in self._open().get_trials(deepcopy=False) if t.state != TrialState.WAITING]
        shared = self.plan["study"]["storage"] is not None
        return [t for t in trials if not shared or t.user_attrs.get(OWNER) == str(self.folder)]

    def _begun(self, number: int) -> Trial:
        study = self._open(number)
        return Trial(study, next(t._trial_id for t in study.get_trials(deepcopy=False) if t.number == number))

    def _new(self) -> Trial:
        trial = self._open().ask()
        trial.set_user_attr(OWNER, str(self.folder))
        return trial

    def _overrides(self, trial: Trial, space: Space, fixed: Mapping[str, str]) -> list[str]:
        """The overrides of a trial, whose parameters are in the storage before it runs."""
        drawn = {key: suggest(trial, key, each) for key, each in space.items()}
        for key, value in fixed.items():
            trial.set_user_attr(key, value)
        folder = self.folder / str(trial.number)
        found = newest(folder) if self.resumed and folder.is_dir() else None
        own_checkpoint = [f"ckpt_path={quoted(found)}"] if found else []
        return [*(f"{key}={value}" for key, value in {**drawn, **fixed}.items()), *own_checkpoint]

    def _tell_from_disk(self, number: int) -> bool:
        """Report a trial that had ended when the search was killed; returns whether it had."""
        result = Result.read(self.folder / str(number))
        if not result.ended:
            return False
        self._tell(number, result.metrics.get(self.plan["metric"]) if result.status == "completed" else None)
        return True

    def _run(self, jobs: list[tuple[int, list[str]]]) -> None:
        for group in consecutive(jobs):
            returns = self.launcher.launch([given for _, given in group], initial_job_idx=group[0][0])
            for (number, _), returned in zip(group, returns, strict=True):
                self._tell(number, self._value(number, returned))

    def _value(self, number: int, returned: JobReturn) -> float | None:
        try:
            return float(returned.return_value)
        except Exception as error:  # an error outside the run; its own failures are values
            record_failure(self.folder / str(number), f"{type(error).__name__}: {error}")
            return None

    def _tell(self, number: int, value: float | None) -> None:
        """Report a trial's value once; None or NaN is the worst value, a pruned trial its last one."""
        result = Result.read(self.folder / str(number))
        worst = -math.inf if self.plan["direction"] == "maximize" else math.inf
        outcome: dict[str, Any] = {"values": worst if value is None or math.isnan(value) else value}
        if result.status == "pruned":
            outcome = {"state": TrialState.PRUNED}
        try:
            self._open(number).tell(number, **outcome)
        except RuntimeError as error:  # a grid's sampler has no more; the trial has been reported
            if "Study.stop" not in str(error):
                raise

    def _conclude(self) -> None:
        ended = [(t.value, t) for t in self._own() if t.state == TrialState.COMPLETE and t.value is not None]
        if not ended:
            log.warning("no trial was completed")
            return
        value, best = (max if self.plan["direction"] == "maximize" else min)(ended, key=lambda pair: pair[0])
        found = {"name": "optuna", "best_params": best.params, "best_value": value, "best_job": best.number}
        write_text(self.folder / "optimization_results.yaml", OmegaConf.to_yaml(OmegaConf.create(found)))
        log.info(f"best: {value} of job {best.number} with {best.params}")


def check_packages(sampler: Any) -> None:
    """Refuse a sampler without the package that it imports after the first trials.

    Raises:
        ConfigError: with the extra to install
    """
    name = type(sampler).__name__
    if name in NEEDS:
        extra, package = NEEDS[name]
        require(extra, package, path="hydra/sweeper/sampler", value=name)


def consecutive(jobs: Sequence[tuple[int, list[str]]]) -> Iterator[list[tuple[int, list[str]]]]:
    """Jobs with consecutive numbers, as a launcher numbers those it gets together."""
    group: list[tuple[int, list[str]]] = []
    for job in jobs:
        if group and job[0] != group[-1][0] + 1:
            yield group
            group = []
        group.append(job)
    if group:
        yield group


def check_space(composed: Any, space: Space, fixed: Mapping[str, Any], direction: Any = None) -> str:
    """Compose every choice of a search once, so that a typo is found before the first trial.

    Combinations of values are not checked: a trial with an invalid one is a failed row of the table.

    Args:
        composed: composes a configuration from overrides
        space: the search space
        fixed: the fixed overrides
        direction: of the sweeper's settings

    Returns:
        the direction of the search

    Raises:
        ConfigError, or what Hydra raises: an unknown key or option, a value of another type, an unknown pruner
    """
    tried = {name: ends(distribution) for name, distribution in space.items()}
    first = {**{name: values[0] for name, values in tried.items()}, **fixed}
    config = composed([f"{name}={value}" for name, value in first.items()])
    found = figures.check_composed(config, ("hydra.sweeper.direction", direction))
    _check_pruners(config, found)
    for part in CHECKED:
        check_target(
            OmegaConf.to_container(config.get(part) or OmegaConf.create({}), resolve=False), part, skip=SKIPPED
        )
    for name, values in tried.items():
        for value in values[1:]:
            composed([f"{key}={v}" for key, v in {**first, name: value}.items()])
    return found


SKIPPED = ("dry_run", "world", "compile")  # keys of trainer defined by this project


def _check_pruners(config: DictConfig, direction: str) -> None:
    """Refuse an unknown pruner, and one by a figure that is better in the other direction than the search's."""
    known = [name for name in dir(optuna.pruners) if name.endswith("Pruner")]
    for name in config.get("callbacks") or {}:
        path = f"callbacks.{name}.pruner._target_"
        module, _, pruner = str(OmegaConf.select(config, path)).rpartition(".")
        if module == "optuna.pruners" and pruner not in known:
            raise ConfigError(path, f"{module}.{pruner}", "Optuna has no such pruner", did_you_mean(pruner, known))
        if module and (monitor := OmegaConf.select(config, f"callbacks.{name}.monitor")) is not None:
            figures.refuse_other_direction(f"callbacks.{name}.monitor", monitor, config, direction)
