"""Determine before a run which figures it will log, and which way each is better."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf

from blockwright import registry
from blockwright.registry import ConfigError
from blockwright.training.configuration import parts
from blockwright.training.configuration.instantiate import find_target
from blockwright.training.configuration.run import OLDER
from blockwright.training.figure import MEASURED, OF_TEXT, Better, Figure, better_of, declared, find, names_in, of_task

FIGURES = tuple(f"{stage}/{name}" for stage in MEASURED for name in names_in(stage, OF_TEXT))
DIRECTIONS: dict[Better, str] = {"less": "minimize", "more": "maximize"}  # of plans, and of Optuna
KEEPERS = ("Keeper", "ModelCheckpoint")  # without their figure they keep no best checkpoint, and training continues


def check(plain: Mapping[str, Any], compared: bool = False) -> None:
    """Refuse misspelt figures, required ones that will not be measured, and directions that contradict a figure.

    Callbacks may log figures that they do not declare, so unknown names are refused only if they are near a known one,
    or if something acts on them without a direction.

    Args:
        plain: a composed configuration
        compared: whether runs are compared by ``optimized_metric``, as in a sweep

    Raises:
        ConfigError: at the figure
    """
    for path, figure in _asked(plain).items():
        refuse_misspelt(path, figure, (*FIGURES, *_measured(plain)))
        if path in _needed(plain, compared):
            refuse_unmeasured(path, figure, plain)
    if plain["direction"] is not None:
        direction(plain)
    for name, node in (plain["callbacks"] or {}).items():
        if isinstance(node, Mapping) and isinstance(node.get("monitor"), str):
            _check_mode(f"callbacks.{name}", node, plain)


def check_composed(config: DictConfig, *asked: tuple[str, Any]) -> str:
    """``check`` for the first run of a sweep, before it is resolved.

    Args:
        config: as composed; interpolations are not checked
        asked: as of ``direction``

    Returns:
        the direction of the sweep

    Raises:
        ConfigError: at the figure, or at a direction that contradicts it
    """
    plain = _unresolved(config)
    check(plain, compared=True)
    return direction(plain, *asked)


def _unresolved(config: DictConfig) -> dict[str, Any]:
    plain: Any = OmegaConf.to_container(config, resolve=False)
    parts = ("optimized_metric", "direction", "callbacks", "test", "data", "trainer", "task")
    return {part: plain.get(part, OLDER.get(part)) for part in parts}


def refuse_other_direction(path: str, name: str, config: DictConfig, direction: str) -> None:
    """Refuse a figure by which trials of a search are ended early, unless it is better in the search's direction.

    Args:
        path: the setting that names it
        name: of the figure
        config: as composed, of a trial
        direction: of the search

    Raises:
        ConfigError: at ``path``
    """
    if name == config.optimized_metric:
        return
    figure = declaration(name, _unresolved(config))
    better = None if figure is None else figure.better
    if better is None or DIRECTIONS[better] != direction:
        known = "of no known direction" if better is None else f"better when it is {better}"
        rule = f"is {known}, and the search is to {direction} {config.optimized_metric}"
        raise ConfigError(path, name, rule, "Leave it out, or name a figure that is better in that direction")


def direction(
    plain: Mapping[str, Any], *asked: tuple[str, Any], path: str = "optimized_metric", name: str | None = None
) -> str:
    """``minimize`` or ``maximize``, as follows from a figure.

    Args:
        plain: a composed configuration
        asked: settings that may say the direction too, by path; without any, that at the root of the configuration
        path: the setting that names the figure
        name: of the figure; None for ``optimized_metric``

    Raises:
        ConfigError: as of ``better_of``
    """
    figure = str(plain["optimized_metric"] if name is None else name)
    said = asked if name is not None else (("direction", plain["direction"]), *asked)
    return DIRECTIONS[better_of(path, figure, declaration(figure, plain), *said)]


def declaration(name: str, plain: Mapping[str, Any]) -> Figure | None:
    """The declaration of a figure by the run's task, callbacks or data; None if there is none."""
    nodes = {f"callbacks.{key}": node for key, node in (plain["callbacks"] or {}).items() if isinstance(node, Mapping)}
    classes = [find_target(node["_target_"], path) for path, node in nodes.items() if "_target_" in node]
    return find(name, (*of_task(parts.class_of("task", plain)), *declared(*classes, *_data_class(plain))))


def _data_class(plain: Mapping[str, Any]) -> list[type]:
    """The class of the run's data, whose settings may not be resolved yet; empty if there is none of its name."""
    name = plain["data"].get("name") if isinstance(plain.get("data"), Mapping) else None
    return [registry.lookup("data", name).cls] if name in registry.names("data") else []


def _check_mode(path: str, node: Mapping[str, Any], plain: Mapping[str, Any]) -> None:
    """Refuse a callback whose ``mode`` contradicts its figure, or that acts on one of unknown direction."""
    monitor = node["monitor"]
    if "${" in monitor or _reason(monitor, plain):
        return
    if "mode" in node:
        better_of(f"{path}.monitor", monitor, declaration(monitor, plain), (f"{path}.mode", node["mode"]))
        return
    usual = inspect.signature(find_target(node.get("_target_"), path)).parameters.get("mode")
    if usual is None:  # it does not act on a direction
        return
    figure = declaration(monitor, plain)
    better = better_of(f"{path}.monitor", monitor, figure, (f"{path}.mode", None))
    if usual.default not in (None, right := {"less": "min", "more": "max"}[better]):
        rule = f"is the default of {node['_target_']}, and contradicts {monitor}, of which {better} is better"
        raise ConfigError(f"{path}.mode", usual.default, rule, f"Write +{path}.mode={right}")


def refuse_misspelt(path: str, figure: Any, known: Sequence[str] = FIGURES) -> None:
    """Refuse a figure that is near a known one, but none.

    Args:
        path: the setting that names it
        figure: its name
        known: names of figures

    Raises:
        ConfigError: at ``path``
    """
    near = difflib.get_close_matches(str(figure), known, n=1, cutoff=0.85)
    if near and figure not in known:
        raise ConfigError(path, figure, "no such value is logged", f"Did you mean {near[0]!r}?")


def refuse_unmeasured(path: str, figure: Any, plain: Mapping[str, Any]) -> None:
    """Refuse a figure that this run will not measure.

    Args:
        path: the setting that names it
        figure: its name
        plain: a composed configuration

    Raises:
        ConfigError: at ``path``
    """
    if reason := _reason(str(figure), plain):
        rule = f"will not be measured, because of {reason}"
        raise ConfigError(path, figure, rule, "Change that, or name a figure that is measured")


def left_out(plain: Mapping[str, Any]) -> str | None:
    """One line on the requested figures that this run will not measure; None if it measures all."""
    parts = [
        f"{path}={figure} ({reason})"
        for path, figure in _asked(plain).items()
        if (reason := _reason(str(figure), plain))
    ]
    return f"note: not measured in this run: {', '.join(parts)}" if parts else None


def _reason(figure: str, plain: Mapping[str, Any]) -> str | None:
    """Why a figure will not be measured; None if it will be, or if a callback may log it."""
    stage, measured = figure.partition("/")[0], _measured(plain)
    if figure in measured:
        return _unmeasured(plain).get(stage)
    if figure not in FIGURES:
        return None
    of_stage = ", ".join(each for each in measured if each.startswith(stage))
    return f"task={plain['task']['name']}, which measures {of_stage}"


def _measured(plain: Mapping[str, Any]) -> tuple[str, ...]:
    """What validations and tests of the task log."""
    figures = of_task(parts.class_of("task", plain))
    return tuple(f"{stage}/{name}" for stage in MEASURED for name in names_in(stage, figures))


def _asked(plain: Mapping[str, Any]) -> dict[str, Any]:
    """Path → figure, for every setting that names one."""
    asked = {"optimized_metric": plain["optimized_metric"]}
    for name, callback in (plain["callbacks"] or {}).items():
        if isinstance(callback, Mapping) and "monitor" in callback:
            asked[f"callbacks.{name}.monitor"] = callback["monitor"]
    return asked


def _needed(plain: Mapping[str, Any], compared: bool) -> set[str]:
    """Paths of the required figures: those of a comparison, or of a callback that acts on it."""
    callbacks = (plain["callbacks"] or {}).items()
    acting = {
        f"callbacks.{name}.monitor"
        for name, callback in callbacks
        if isinstance(callback, Mapping) and not str(callback.get("_target_")).endswith(KEEPERS)
    }
    return acting | ({"optimized_metric"} if compared else set())


def _unmeasured(plain: Mapping[str, Any]) -> dict[str, str]:
    """Stage → the setting that disables its measurements."""
    missing = {} if plain["test"] else {"test": "test=false"}
    for stage in MEASURED:
        for path, holder in (("data.corpus", plain["data"].get("corpus")), ("trainer", plain["trainer"])):
            key = f"{stage}_fraction" if path == "data.corpus" else f"limit_{stage}_batches"
            value = (holder or {}).get(key)
            if isinstance(value, int | float) and not isinstance(value, bool) and value == 0:
                missing.setdefault(stage, f"{path}.{key}={value:g}")
    return missing
