"""A figure that a run logs: its name, its unit, and whether more or less of it is better.

Each is declared once, where it is made: by a task, a callback or a metric, in its attribute ``figures``. Sweeps,
searches, early stopping, the best checkpoint, ablations and reports take the direction from there.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

from blockwright.registry import ConfigError, RegistrationError, did_you_mean

Better = Literal["less", "more"]
MEASURED = ("val", "test")
TRAIN = ("train",)
EVERY = (*TRAIN, *MEASURED)
WORDS: dict[str, Better] = {"minimize": "less", "maximize": "more", "min": "less", "max": "more"}  # Optuna, Lightning
LONGEST_UNIT = 60  # letters of a unit that is read from a file


@dataclass(frozen=True)
class Figure:
    """A figure, logged as ``GROUP/name`` in each of its groups.

    Args:
        name: without the group; ``{word}`` stands for a number or a name in it: ``loss_{multiple}x``
        unit: such as ``nats per token``; empty where there is none
        better: ``less`` or ``more``; None where neither is, as of a count or a learning rate
        groups: what stands before the name: ``val`` and ``test`` unless said otherwise

    Raises:
        RegistrationError: ``better`` is something else
    """

    name: str
    unit: str
    better: Better | None
    groups: tuple[str, ...] = MEASURED

    def __post_init__(self) -> None:
        if self.better not in (None, *get_args(Better)):
            raise RegistrationError(f"better of the figure {self.name!r} is {self.better!r}, not less, more or None")

    @property
    def names(self) -> tuple[str, ...]:
        """As logged."""
        return tuple(f"{group}/{self.name}" for group in self.groups)

    def stands_for(self, logged: str) -> bool:
        """Whether it is the figure of a logged name."""
        return self._pattern.fullmatch(logged) is not None

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        return re.compile("|".join(re.sub(r"\\\{\w+\\\}", "[^/]+", re.escape(name)) for name in self.names))

    def to_plain(self) -> dict[str, str | None]:
        return {"unit": self.unit, "better": self.better}


OF_TEXT = (  # of a language model; here, so that reading them needs neither torch nor Lightning
    Figure("loss", "nats per token", "less", EVERY),
    Figure("perplexity", "", "less"),
    Figure("bits_per_byte", "bits per byte", "less", EVERY),
)


def declared(*sources: Any) -> tuple[Figure, ...]:
    """All figures that tasks and callbacks declare.

    Args:
        sources: classes or objects
    """
    found = [figure for source in sources for part in ("figures", "always") for figure in _listed(source, part)]
    return tuple(figure for figure in found if isinstance(figure, Figure))


def _listed(source: Any, attribute: str) -> Iterable[Any]:
    listed = getattr(source, attribute, ())
    return listed if isinstance(listed, tuple | list) else ()


def of_task(task: Any) -> tuple[Figure, ...]:
    """The figures of a task, a class or an object; a module that declares none is taken for a language model."""
    return declared(task) if hasattr(task, "figures") else OF_TEXT


def of_run(trainer: Any) -> tuple[Figure, ...]:
    """The figures of a trainer's task, callbacks and data."""
    data = getattr(trainer, "datamodule", None)
    return (*of_task(trainer.lightning_module), *declared(*trainer.callbacks, data))


def find(logged: str, figures: Iterable[Figure]) -> Figure | None:
    """The first of the figures that a logged name is one of; None if none is."""
    return next((figure for figure in figures if figure.stands_for(logged)), None)


def names_in(group: str, figures: Iterable[Figure]) -> tuple[str, ...]:
    """Names, without it, of the figures of a group."""
    return tuple(figure.name for figure in figures if group in figure.groups)


def by_name(logged: Iterable[str], figures: Iterable[Figure]) -> dict[str, Figure]:
    """Logged name → its figure. Undeclared ones are left out."""
    every = tuple(figures)
    return {name: figure for name in logged if (figure := find(name, every)) is not None}


def read_records(results: Mapping[str, Any]) -> dict[str, Figure]:
    """The figures that a run's results describe; what is no description is left out."""
    written = results.get("figures")
    return {
        name: Figure(name.partition("/")[2], of["unit"], of["better"], (name.partition("/")[0],))
        for name, of in (written.items() if isinstance(written, Mapping) else ())
        if isinstance(of, Mapping) and _is_unit(of.get("unit")) and of.get("better", 0) in (None, *get_args(Better))
    }


def _is_unit(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= LONGEST_UNIT and value.isprintable()


def better_of(path: str, name: str, figure: Figure | None, *asked: tuple[str, Any]) -> Better:
    """Which way a figure is better, that runs are compared, stopped or kept by.

    Args:
        path: the setting that names it
        name: as logged
        figure: its declaration; None if there is none
        asked: settings that may say the direction too, by path: ``minimize``, ``maximize``, ``min``, ``max`` or None

    Raises:
        ConfigError: neither is better, a setting contradicts the declaration, or nothing says the direction
    """
    said = [(where, value) for where, value in asked if value is not None]
    for where, value in said:
        if value not in tuple(WORDS):
            hint = did_you_mean(str(value), [*WORDS])
            raise ConfigError(where, value, "says which way a figure is better: minimize, maximize, min or max", hint)
    if figure is None:
        return _only_asked(path, name, asked, said)
    if figure.better is None:
        of = f" ({figure.unit})" if figure.unit else ""
        raise ConfigError(path, name, f"is neither better nor worse where it is more{of}", "Name a figure that is")
    for where, value in said:
        if WORDS[value] != figure.better:
            right = next(word for word, way in WORDS.items() if way == figure.better and word[3:4] == value[3:4])
            rule = f"contradicts {name}, of which {figure.better} is better"
            raise ConfigError(where, value, rule, f"Leave it out: it follows from the figure; or write {right}")
    return figure.better


def _only_asked(path: str, name: str, asked: Iterable[tuple[str, Any]], said: list[tuple[str, Any]]) -> Better:
    """The direction of a figure that nothing declares."""
    if not said:
        ways = [f"{where}={'max' if where.endswith('mode') else 'maximize'}" for where, _ in asked]
        rule = "is declared by no task and no callback of the run, so which way is better is not known"
        remedy = f"Correct the name, or declare it where it is logged: figures = (Figure({_short(name)!r}, …),)"
        raise ConfigError(path, name, rule, f"{remedy}{f'; or write {ways[0]}' if ways else ''}")
    found = {WORDS[value] for _, value in said}
    if len(found) > 1:
        (where, value), (other, against) = said[:2]
        raise ConfigError(where, value, f"contradicts {other}={against}", "Leave one of them out")
    return found.pop()


def _short(name: str) -> str:
    return name.partition("/")[2] or name


def mode_in(trainer: Any, path: str, monitor: str, asked: str | None) -> str:
    """Lightning's word for the direction in which a callback acts on a figure: ``min`` or ``max``.

    Args:
        trainer: with its task and callbacks
        path: of the callback
        monitor: the figure
        asked: the callback's own setting

    Raises:
        ConfigError: as of ``better_of``
    """
    figure = find(monitor, of_run(trainer))
    return "min" if better_of(f"{path}.monitor", monitor, figure, (f"{path}.mode", asked)) == "less" else "max"


def refuse_contradictions(trainer: Any) -> None:
    """Refuse a callback, as of Lightning's own, whose ``mode`` contradicts the figure that it monitors.

    Raises:
        ConfigError
    """
    figures = of_run(trainer)
    for callback in trainer.callbacks:
        monitor, mode = getattr(callback, "monitor", None), getattr(callback, "mode", None)
        if isinstance(monitor, str) and mode in tuple(WORDS) and (figure := find(monitor, figures)) is not None:
            better_of(f"{type(callback).__name__}.monitor", monitor, figure, (f"{type(callback).__name__}.mode", mode))
