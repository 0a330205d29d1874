"""Determine before a run which figures it will log, so that none is missing after hours of training."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf

from registry import ConfigError
from training.configuration.instantiate import find_target

STAGES = ("val", "test")
FIGURES = tuple(f"{stage}/{figure}" for stage in STAGES for figure in ("bits_per_byte", "loss", "perplexity"))
PLAIN = ("training.tasks.causal_lm.CausalLM", None)  # measures these, which is known without importing Lightning
KEEPERS = ("Keeper", "ModelCheckpoint")  # without their figure they keep no best checkpoint, and training continues


def check(plain: Mapping[str, Any], compared: bool = False) -> None:
    """Refuse misspelt figures, and required ones that will not be measured.

    Callbacks may log other figures, so unknown names are refused only if they are near a known one.

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


def check_composed(config: DictConfig) -> None:
    """``check`` for the first run of a sweep, before it is resolved.

    Args:
        config: as composed; interpolations are not checked

    Raises:
        ConfigError: at the figure
    """
    parts = ("optimized_metric", "callbacks", "test", "data", "trainer", "task")
    plain: Any = OmegaConf.to_container(config, resolve=False)
    check({part: plain[part] for part in parts}, compared=True)


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
    task = str(plain["task"]["_target_"]).rpartition(".")[2]
    return f"the task {task}, which measures {', '.join(each for each in measured if each.startswith(stage))}"


def _measured(plain: Mapping[str, Any]) -> tuple[str, ...]:
    """What validations and tests of the task log."""
    target = plain["task"].get("_target_")
    if target in PLAIN:
        return FIGURES
    figures = getattr(find_target(target, "task"), "figures", None)
    return FIGURES if figures is None else tuple(f"{stage}/{figure}" for stage in STAGES for figure in figures)


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
    for stage in STAGES:
        for path, holder in (("data.corpus", plain["data"].get("corpus")), ("trainer", plain["trainer"])):
            key = f"{stage}_fraction" if path == "data.corpus" else f"limit_{stage}_batches"
            value = (holder or {}).get(key)
            if isinstance(value, int | float) and not isinstance(value, bool) and value == 0:
                missing.setdefault(stage, f"{path}.{key}={value:g}")
    return missing
