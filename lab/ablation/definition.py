"""The definition of an ablation: arms, baseline, budget, seeds and tokens, read from conf/ablation.

A plug-in offers a package folder of definitions through the entry-point group ``blockwright.ablations``.

A definition is data. Its overrides use Hydra's grammar, as in blockwright train.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from annotated_types import Ge, Le
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from blockwright.lab.match.sizing import Match, MatchKeys
from blockwright.registry import ConfigError, did_you_mean, plugins
from blockwright.registry.limits import read_text
from blockwright.registry.ranges import Count, Positive, Seed
from blockwright.registry.reading import Remedy, typed
from blockwright.registry.reading import read as read_settings
from blockwright.training.configuration.conf import CONF

FOLDER, ENTRY_POINTS = CONF / "ablation", "blockwright.ablations"
MAX_ARMS, MAX_SEEDS = 1000, 1000
MATCH = tuple(each.name for each in fields(MatchKeys))  # keys of a budget, which a command line may change
# YAML reads 1 as a number and off as false.
Name = Annotated[str | int | float | bool | None, Remedy("Write the name of an arm")]
Overrides = Annotated[
    tuple[str, ...] | str | None,
    Remedy("Write [model/attention=gqa, optimizer.lr=0.01], as for blockwright train; quote what holds braces"),
]
Tokens = Annotated[float, Ge(1), Remedy("Write e.g. tokens=2e6")]


@dataclass(frozen=True)
class ArmKeys(MatchKeys):
    """An arm in a file; a list of overrides alone is an arm too. ``like`` names arms whose overrides come first."""

    overrides: Overrides = None
    target: Annotated[Positive, Remedy("Write a number, next to budget: {match: params, by: d_ff}")] | None = None
    like: tuple[Name, ...] | Name = None
    init_from: Name = None
    against: Name = None
    compared: bool = True


@dataclass(frozen=True)
class File:
    """The keys of a definition's file; ``Definition`` describes the others.

    Args:
        grid: key → values: every combination is an arm
        leave_one_out: name → overrides: an arm with all, and one without each
        staircase: name → overrides: an arm with none, and one more change in each of the next
        seeds: their number, or a list
    """

    about: str = ""
    base: Overrides = None
    baseline: Name = None
    arms: dict[str, ArmKeys] = field(default_factory=dict)
    grid: dict[str, Annotated[list[Any], Remedy("Write model/attention: [mha, gqa]")]] = field(default_factory=dict)
    leave_one_out: dict[str, Overrides] = field(default_factory=dict)
    staircase: dict[str, Overrides] = field(default_factory=dict)
    budget: MatchKeys | None = None
    seeds: Annotated[int, Ge(1), Le(MAX_SEEDS), Remedy("Write seeds=3 or seeds=[1234]")] | tuple[Seed, ...] = 1
    tokens: Tokens | None = None
    lr: Annotated[Positive | tuple[Positive, ...] | None, Remedy("Write lr=[0.005,0.01]")] = None
    metric: str = "val/loss"
    direction: Literal["minimize", "maximize"] | None = None
    workers: Count = 1
    also: Overrides = None


KEYS = tuple(each.name for each in fields(File))


@dataclass(frozen=True)
class ArmSpec:
    """An arm as written in the definition.

    Args:
        overrides: define it, on top of ``base``
        match: how it is matched, if not as the ablation's other arms
        target: its budget, if not the baseline's
        init_from: arm whose run of the same seed and learning rate its weights start from; None for random ones
        against: arm that it is compared with, if not the baseline
        compared: whether it has the metric; false for one that others only start from
    """

    overrides: tuple[str, ...]
    match: Match | None = None
    target: float | None = None
    init_from: str | None = None
    against: str | None = None
    compared: bool = True


@dataclass(frozen=True)
class Definition:
    """An ablation.

    Args:
        name: of the definition's file
        about: the claim it tests, in one line
        base: overrides common to all arms
        baseline: the arm that the others are compared with and matched to
        arms: name → arm, in order
        budget: what arms are matched in; None: nothing
        seeds: one job per seed, arm and learning rate
        tokens: training tokens per job; None: by trainer.max_steps
        lr: peak learning rates to try for every arm; None: the composed one
        metric: the compared figure
        direction: ``minimize`` or ``maximize``, of a figure that no arm's task or callback declares; None: it follows
        workers: parallel jobs
        also: further figures in the report's table, with their intervals but without comparisons
    """

    name: str
    about: str
    base: tuple[str, ...]
    baseline: str
    arms: dict[str, ArmSpec]
    budget: Match | None
    seeds: tuple[int, ...]
    tokens: int | None
    lr: tuple[float, ...] | None
    metric: str
    direction: str | None
    workers: int
    also: tuple[str, ...] = ()


def names() -> list[str]:
    """Names of the ablations in conf/ablation and of plug-ins."""
    return sorted(known())


def about(name: str) -> str:
    """The claim that an ablation tests, in one line."""
    return str(_written(name).get("about", ""))


def read(name: str, changes: Mapping[str, str] | None = None) -> Definition:
    """Read an ablation by name, or from a YAML file.

    Args:
        name: of a file in conf/ablation or of a plug-in, or a path
        changes: keys of the definition from the command line, which override the file's

    Raises:
        ConfigError: it does not exist, or is invalid
    """
    file = read_settings(File, _changed(_written(name), changes or {}))
    arms, usual = _arms(file)
    baseline = usual if file.baseline is None else str(file.baseline)
    compared = {name: arm for name, arm in arms.items() if arm.compared}
    if baseline not in compared:
        remedy = did_you_mean(baseline, compared) if baseline else f"Name one: {', '.join(compared)}"
        rule = "must be the name of an arm that is compared"
        raise ConfigError("baseline", baseline, rule, remedy)
    return Definition(
        name=Path(name).stem,
        about=file.about,
        base=_listed(file.base),
        baseline=baseline,
        arms=arms,
        budget=(file.budget or MatchKeys()).complete("budget."),
        seeds=tuple(range(file.seeds)) if isinstance(file.seeds, int) else _distinct("seeds", file.seeds),
        tokens=None if file.tokens is None else int(file.tokens),
        lr=None if file.lr is None else _distinct("lr", _listed(file.lr)),
        metric=file.metric,
        direction=file.direction,
        workers=file.workers,
        also=_listed(file.also),
    )


def _changed(written: Mapping[str, Any], changes: Mapping[str, str]) -> dict[str, Any]:
    """The keys of a file, with changes from the command line, and with arms that are mappings."""
    changed = typed(File, {f"budget.{key}" if key in MATCH else key: text for key, text in changes.items()})
    arms, budget = written.get("arms"), written.get("budget")
    if isinstance(arms, Mapping):
        arms = {name: arm if isinstance(arm, Mapping) else {"overrides": arm} for name, arm in arms.items()}
        changed["arms"] = arms
    if isinstance(budget, Mapping) and "budget" in changed:
        changed["budget"] = {**budget, **changed["budget"]}
    return {**written, **changed}


def _listed(value: Any) -> tuple[Any, ...]:
    """A list, one value alone, or none."""
    return () if value is None else value if isinstance(value, tuple) else (value,)


def _distinct(key: str, values: Sequence[Any]) -> tuple[Any, ...]:
    if not values or len(set(map(str, values))) < len(values):
        raise ConfigError(key, list(values), "must list at least one value, each once", f"Write {key}=[…]")
    return tuple(values)


# --- the file ---------------------------------------------------------------------------------------------------------


def known() -> dict[str, list[Path]]:
    """Name of a definition → the files of this name, here and in other packages."""
    files: dict[str, list[Path]] = {}
    for folder in (FOLDER, *plugins.folders(ENTRY_POINTS)):
        for file in folder.glob("*.yaml"):
            files.setdefault(file.stem, []).append(file)
    return files


def _written(name: str) -> dict[str, Any]:
    if name.endswith((".yaml", ".yml")):
        file = Path(name)
    else:
        found = known().get(name, [FOLDER / f"{name}.yaml"])
        if len(found) > 1:
            files = " and ".join(map(str, found))
            raise ConfigError("NAME", name, f"several ablations have this name: {files}", "Name one by its path")
        file = found[0]
    if not file.is_file():
        rule = "there is no such file" if file == Path(name) else "there is no such ablation"
        raise ConfigError("NAME", name, rule, did_you_mean(name, names(), "Name a YAML file"))
    try:
        text = read_text(file, "NAME")
        if not isinstance(plain := yaml.safe_load(text) or {}, dict):
            raise ConfigError(str(file), plain, "must be a mapping", f"Its keys are: {', '.join(KEYS)}")
        written = OmegaConf.to_container(OmegaConf.create(text), resolve=False)
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), str(getattr(error, "problem", error))
        where = f"{file}:{mark.line + 1}" if mark else str(file)
        twice = "two arms cannot have one name" if "duplicate" in problem else "fix that line"
        raise ConfigError(
            where, "…", f"is not YAML ({problem})", f"Quote what holds braces or colons; {twice}"
        ) from None
    except OmegaConfBaseException as error:
        raise ConfigError(str(file), "…", str(error).splitlines()[0], "Correct the file") from None
    assert isinstance(written, dict)
    return {str(key): value for key, value in written.items()}


# --- arms -------------------------------------------------------------------------------------------------------------


def _arms(file: File) -> tuple[dict[str, ArmSpec], str | None]:
    """All arms, and the baseline unless another is named."""
    generated = [_grid(file.grid), _leave_one_out(file.leave_one_out), _staircase(file.staircase)]
    arms = _explicit(file)
    for name, overrides in itertools.chain.from_iterable(source.items() for source in generated):
        if name in arms:
            raise ConfigError("arms", name, "two arms have this name", "Rename one")
        arms[name] = ArmSpec(overrides)
    if len(arms) < 2:
        rule = f"has {len(arms)} arms, but a comparison needs two"
        raise ConfigError("arms", ", ".join(arms), rule, "Write arms: {mha: [model/attention=mha], …}")
    if len(arms) > MAX_ARMS:
        raise ConfigError("arms", len(arms), f"must be at most {MAX_ARMS}", "Remove values from the grid")
    return arms, next((next(iter(source)) for source in generated if source), None)


def _explicit(file: File) -> dict[str, ArmSpec]:
    arms: dict[str, ArmSpec] = {}
    usual = file.budget or MatchKeys()
    for name, keys in file.arms.items():
        own = MatchKeys(keys.match, keys.by, keys.tol)
        match = None if own == MatchKeys() else own.over(usual).complete(f"arms.{name}.")
        if keys.target is not None and not (match or file.budget):
            rule, remedy = "is the budget of this arm, and nothing is matched", "Write it next to budget: {match, by}"
            raise ConfigError(f"arms.{name}.target", keys.target, rule, remedy)
        likes = [_other_arm(f"arms.{name}.like", like, arms) for like in _listed(keys.like)]
        inherited = itertools.chain.from_iterable(arms[like].overrides for like in likes if like is not None)
        start = _other_arm(f"arms.{name}.init_from", keys.init_from, arms)
        against = _other_arm(f"arms.{name}.against", keys.against, arms)
        overrides = (*inherited, *_listed(keys.overrides))
        arms[name] = ArmSpec(overrides, match, keys.target, start, against, keys.compared)
    return arms


def _other_arm(path: str, name: Name, above: Mapping[str, ArmSpec]) -> str | None:
    """The name of an arm written before this one, so that no two wait for each other."""
    if name is None:
        return None
    if str(name) not in above:
        raise ConfigError(path, name, "must name an arm that is written above it", did_you_mean(str(name), above))
    return str(name)


def _grid(groups: Mapping[str, Sequence[Any]]) -> dict[str, tuple[str, ...]]:
    """Every combination of values: ``{model/attention: [mha, gqa], model/norm: [rmsnorm, layernorm]}`` makes four."""
    if not groups:
        return {}
    choices = [[(key, _in_hydra(value)) for value in _distinct(f"grid.{key}", vs)] for key, vs in groups.items()]
    combinations = itertools.product(*choices)
    return {"+".join(v for _, v in chosen): tuple(f"{k}={v}" for k, v in chosen) for chosen in combinations}


def _in_hydra(value: Any) -> str:
    """A YAML value in Hydra's override grammar."""
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{_in_hydra(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_in_hydra, value)) + "]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _leave_one_out(recipe: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """All changes of a recipe at once, the baseline; and for each change, all others."""
    if not recipe:
        return {}
    arms = {"everything": _together(recipe)}
    for left_out in recipe:
        arms[f"without {left_out}"] = _together({name: value for name, value in recipe.items() if name != left_out})
    return arms


def _staircase(recipe: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """No changes, the baseline; then the changes cumulatively, one after another."""
    if not recipe:
        return {}
    arms: dict[str, tuple[str, ...]] = {"start": ()}
    so_far: tuple[str, ...] = ()
    for name, value in recipe.items():
        arms[f"+ {name}"] = so_far = (*so_far, *_listed(value))
    return arms


def _together(recipe: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(itertools.chain.from_iterable(map(_listed, recipe.values())))
