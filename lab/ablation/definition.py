"""The definition of an ablation: arms, baseline, budget, seeds and tokens, read from conf/ablation.

A plug-in offers a package folder of definitions through the entry-point group ``blockwright.ablations``.

A definition is data. Its overrides use Hydra's grammar, as in blockwright train.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from blockwright.lab.match.request import number, whole
from blockwright.lab.match.sizing import TOL, Match
from blockwright.registry import ConfigError, did_you_mean, plugins
from blockwright.registry.limits import read_text
from blockwright.registry.ranges import Seed
from blockwright.training.configuration.conf import CONF
from blockwright.training.configuration.values import check_value

FOLDER, ENTRY_POINTS = CONF / "ablation", "blockwright.ablations"
GENERATORS = ("grid", "leave_one_out", "staircase")
KEYS = ("about", "base", "baseline", "arms", *GENERATORS, "budget", "seeds", "tokens", "lr", "metric", "direction")
KNOWN = (*KEYS, "workers", "also")
OF_BUDGET = ("match", "by", "tol")
OF_ARM = ("overrides", *OF_BUDGET, "target", "like", "init_from", "against", "compared")
DIRECTIONS = ("minimize", "maximize")
MAX_ARMS, MAX_SEEDS = 1000, 1000


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


def read(name: str, changes: Mapping[str, Any] | None = None) -> Definition:
    """Read an ablation by name, or from a YAML file.

    Args:
        name: of a file in conf/ablation or of a plug-in, or a path
        changes: keys of the definition from the command line, which override the file's

    Raises:
        ConfigError: it does not exist, or is invalid
    """
    written = {**_written(name), **(changes or {})}
    budget = dict(_mapping("budget", written.get("budget") or {}, OF_BUDGET))
    for key in OF_BUDGET:
        if key in written:  # from the command line
            budget[key] = written.pop(key)
    for key in written:
        if key not in KNOWN:
            raise ConfigError(key, written[key], "an ablation has no such key", did_you_mean(key, KNOWN))
    match = _match(budget)
    arms, usual = _arms(written, budget)
    baseline = written.get("baseline", usual)
    if baseline is None:
        raise ConfigError("baseline", None, "the other arms are compared with it", f"Name one: {', '.join(arms)}")
    baseline = str(baseline)  # names are text, but YAML reads 1 as a number and off as false
    compared = {name: arm for name, arm in arms.items() if arm.compared}
    if baseline not in compared:
        raise ConfigError(
            "baseline", baseline, "must be the name of an arm that is compared", did_you_mean(baseline, compared)
        )
    direction = written.get("direction")
    if direction is not None and direction not in DIRECTIONS:
        raise ConfigError("direction", direction, "must be minimize or maximize", did_you_mean(direction, DIRECTIONS))
    return Definition(
        name=Path(name).stem,
        about=str(written.get("about", "")),
        base=_overrides("base", written.get("base") or []),
        baseline=baseline,
        arms=arms,
        budget=match,
        seeds=_seeds(written.get("seeds", 1)),
        tokens=None if written.get("tokens") is None else whole("tokens", written["tokens"], 1, "counts tokens"),
        lr=_rates(written.get("lr")),
        metric=_text("metric", written.get("metric", "val/loss")),
        direction=direction,
        workers=whole("workers", written.get("workers", 1), 1, "is the number of parallel jobs"),
        also=_overrides("also", written.get("also") or []),
    )


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
            raise ConfigError(str(file), plain, "must be a mapping", f"Its keys are: {', '.join(KNOWN)}")
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


def _match(budget: Mapping[str, Any]) -> Match | None:
    if not budget:
        return None
    for key in ("match", "by"):
        if budget.get(key) is None:
            rule = "is required: a budget has the matched figure and the knob"
            raise ConfigError(f"budget.{key}", None, rule, "Write budget: {match: params, by: d_ff, tol: 0.005}")
    return Match(str(budget["match"]), str(budget["by"]), number("tol", budget.get("tol", TOL)))


def _seeds(value: Any) -> tuple[int, ...]:
    """A number of seeds, or the seeds themselves."""
    if isinstance(value, str) and ("," in value or value.startswith("[")):
        value = value.strip("[] ").split(",")
    if not isinstance(value, list):
        count = whole("seeds", value, 1, "is the number of seeds")
        if count > MAX_SEEDS:
            raise ConfigError("seeds", value, f"must be at most {MAX_SEEDS}", "To name one seed, write seeds=[1234]")
        return tuple(range(count))
    seeds = tuple(whole("seeds", seed, 0, "must list whole numbers") for seed in value)
    for seed in seeds:
        check_value("seeds", seed, Seed)
    if not seeds or len(set(seeds)) < len(seeds):
        raise ConfigError("seeds", value, "must list at least one seed, each once", "Write seeds=3 or seeds=[0,1,2]")
    return seeds


def _rates(value: Any) -> tuple[float, ...] | None:
    if value is None or value == "null":
        return None
    given = value.strip("[] ").split(",") if isinstance(value, str) else value if isinstance(value, list) else [value]
    rates = tuple(number("lr", rate) for rate in given)
    if not rates or len(set(rates)) < len(rates) or not all(rate > 0 for rate in rates):
        raise ConfigError("lr", value, "must list learning rates above 0, each once", "Write lr=[0.005,0.01]")
    return rates


def _text(key: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ConfigError(key, value, "must be text", f"Write e.g. {key}=val/loss")
    return value


def _mapping(key: str, value: Any, known: Sequence[str] | None = None) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        keys = ", ".join(known) if known else "names"
        raise ConfigError(key, value, "must be a mapping", f"Its keys are {keys}")
    for inner in value:
        if known is not None and inner not in known:
            raise ConfigError(f"{key}.{inner}", value[inner], f"{key} has no such key", did_you_mean(inner, known))
    return value


def _overrides(key: str, value: Any) -> tuple[str, ...]:
    listed = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(listed, list) or not all(isinstance(item, str) and item for item in listed):
        rule = "must be a list of overrides, as for blockwright train"
        raise ConfigError(key, value, rule, "Write [model/attention=gqa, optimizer.lr=0.01]; quote what holds braces")
    return tuple(listed)


# --- arms -------------------------------------------------------------------------------------------------------------


def _arms(written: Mapping[str, Any], budget: Mapping[str, Any]) -> tuple[dict[str, ArmSpec], str | None]:
    """All arms, and the baseline unless another is named."""
    sources = [_explicit(written.get("arms") or {}, budget)]
    sources += [_generated(kind, written[kind]) for kind in GENERATORS if written.get(kind)]
    arms: dict[str, ArmSpec] = {}
    for name, arm in itertools.chain.from_iterable(source.items() for source in sources):
        if name in arms:
            raise ConfigError("arms", name, "two arms have this name", "Rename one")
        arms[name] = arm
    if len(arms) < 2:
        rule = f"has {len(arms)} arms, but a comparison needs two"
        raise ConfigError("arms", ", ".join(arms), rule, "Write arms: {mha: [model/attention=mha], …}")
    if len(arms) > MAX_ARMS:
        raise ConfigError("arms", len(arms), f"must be at most {MAX_ARMS}", "Remove values from the grid")
    return arms, next((next(iter(source)) for source in sources[1:] if source), None)


def _explicit(arms: Any, budget: Mapping[str, Any]) -> dict[str, ArmSpec]:
    found: dict[str, ArmSpec] = {}
    for name, value in _mapping("arms", arms).items():
        spec = _mapping(f"arms.{name}", value, OF_ARM) if isinstance(value, Mapping) else {"overrides": value}
        own = {key: spec[key] for key in OF_BUDGET if key in spec}
        match = _match({**budget, **own}) if own else None
        target = None if spec.get("target") is None else number(f"arms.{name}.target", spec["target"])
        if target is not None and not (target > 0 and (match or budget)):
            rule = "is the budget of this arm, so it must be above 0"
            raise ConfigError(f"arms.{name}.target", target, rule, "Write it beside budget: {match: params, by: d_ff}")
        listed = spec.get("like") or []
        likes = [_other_arm(f"arms.{name}.like", o, found) for o in (listed if isinstance(listed, list) else [listed])]
        first = itertools.chain.from_iterable(found[like].overrides for like in likes if like is not None)
        overrides = (*first, *_overrides(f"arms.{name}", spec.get("overrides")))
        start = _other_arm(f"arms.{name}.init_from", spec.get("init_from"), found)
        against = _other_arm(f"arms.{name}.against", spec.get("against"), found)
        if not isinstance(compared := spec.get("compared", True), bool):
            raise ConfigError(
                f"arms.{name}.compared", compared, "must be true or false", "Write false, or leave it out"
            )
        found[str(name)] = ArmSpec(overrides, match, target, start, against, compared)
    return found


def _other_arm(path: str, name: Any, above: Mapping[str, ArmSpec]) -> str | None:
    """The name of an arm written before this one, so that no two wait for each other."""
    if name is None:
        return None
    if str(name) not in above:
        raise ConfigError(path, name, "must name an arm that is written above it", did_you_mean(str(name), above))
    return str(name)


def _generated(kind: str, value: Any) -> dict[str, ArmSpec]:
    made = {"grid": _grid, "leave_one_out": _leave_one_out, "staircase": _staircase}[kind]
    return {name: ArmSpec(overrides) for name, overrides in made(_mapping(kind, value)).items()}


def _grid(groups: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """Every combination of values: ``{model/attention: [mha, gqa], model/norm: [rmsnorm, layernorm]}`` makes four."""
    for key, values in groups.items():
        if not isinstance(values, list) or not values or len(set(map(str, values))) < len(values):
            raise ConfigError(f"grid.{key}", values, "must list values, each once", "Write model/attention: [mha, gqa]")
    combinations = itertools.product(*([(key, _in_hydra(value)) for value in values] for key, values in groups.items()))
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
    steps = {str(name): _overrides(f"leave_one_out.{name}", value) for name, value in recipe.items()}
    arms = {"everything": tuple(itertools.chain.from_iterable(steps.values()))}
    for left_out in steps:
        kept = (overrides for name, overrides in steps.items() if name != left_out)
        arms[f"without {left_out}"] = tuple(itertools.chain.from_iterable(kept))
    return arms


def _staircase(recipe: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """No changes, the baseline; then the changes cumulatively, one after another."""
    arms: dict[str, tuple[str, ...]] = {"start": ()}
    so_far: tuple[str, ...] = ()
    for name, value in recipe.items():
        so_far = (*so_far, *_overrides(f"staircase.{name}", value))
        arms[f"+ {name}"] = so_far
    return arms
