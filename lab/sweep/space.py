"""Hydra's sweep syntax → Optuna's distributions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep, Transformer
from hydra.errors import HydraException
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import Trial

from registry import ConfigError

Space = dict[str, BaseDistribution]


def read_space(overrides: Sequence[str], loader: ConfigLoader | None = None) -> tuple[Space, dict[str, str]]:
    """Split overrides into a search space and fixed ones.

    Args:
        overrides: in Hydra's grammar; the last one of a key counts
        loader: lists the options of a group for ``glob(…)``

    Returns:
        key → distribution, and key → value of the overrides that are not sweeps, whose keys are not searched

    Raises:
        ConfigError: a sweep other than choice, range or interval
    """
    space: Space = {}
    fixed: dict[str, str] = {}
    for override in OverridesParser.create(loader).parse_overrides(list(overrides)):
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
        ConfigError: any other sweep
    """
    sweep: Any = override.value()
    if override.is_interval_sweep() and isinstance(sweep, IntervalSweep):
        whole = isinstance(sweep.start, int) and isinstance(sweep.end, int)
        kind: Any = IntDistribution if whole else FloatDistribution
        return kind(sweep.start, sweep.end, log="log" in sweep.tags)
    if override.is_range_sweep() and isinstance(sweep, RangeSweep) and not sweep.shuffle:
        return _steps(sweep)
    try:
        values: Any = override.sweep_iterator(transformer=Transformer.encode)
        return CategoricalDistribution(tuple(values))
    except (HydraException, ValueError) as error:  # a glob without matches or without a group
        remedy = "Write choice(a, b), interval(0, 1), range(1, 9) or tag(log, interval(1e-4, 1e-2))"
        raise ConfigError(
            "hydra.sweeper.params", override.input_line, f"is not a search space ({error})", remedy
        ) from None


def _steps(sweep: RangeSweep) -> IntDistribution | FloatDistribution:
    assert sweep.start is not None and sweep.stop is not None
    intervals = math.ceil(round((sweep.stop - sweep.start) / sweep.step, 9)) - 1  # from the first value to the last
    last = sweep.start + intervals * sweep.step
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
