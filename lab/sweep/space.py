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

from blockwright.registry import ConfigError

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
