"""The definition of an ablation: arms, baseline, budget, seeds and tokens, read from conf/ablation.

A plug-in offers a package folder of definitions through the entry-point group ``blockwright.ablations``.

A definition is data. Its overrides use Hydra's grammar, as in blockwright train.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Le

from blockwright.lab.definitions import Files
from blockwright.lab.match.sizing import Match
from blockwright.lab.report.sweep import Solved
from blockwright.lab.statistics.looks import Spend
from blockwright.lab.statistics.tuning import RATE
from blockwright.registry import BlockError, ConfigError, did_you_mean
from blockwright.registry.ranges import Count, Positive, Seed
from blockwright.registry.reading import Remedy, checked, keys, typed
from blockwright.registry.reading import read as read_settings
from blockwright.training.configuration.conf import CONF

# --- settings of an ablation that contradict or replace each other ----------------------------------------------------


SEQUENTIAL = ("until", "looks", "spend", "hours")
OF_TUNING = ("tune", "tune_seeds", "tuned_by")
REPLACES = {  # key of the command line → keys of the file that it takes the place of
    "lr": OF_TUNING,
    "tune": ("lr",),
    "seeds": ("see", "pairs", *SEQUENTIAL),
    "see": ("seeds", *SEQUENTIAL),
    **dict.fromkeys(SEQUENTIAL, ("seeds", "see", "pairs")),
}
CONTRADICT = (("lr", "tune"), ("seeds", "see"), ("seeds", "until"), ("seeds", "hours"), ("see", "looks"))


def replaced(written: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a file, changed by those of the command line."""
    gone = {key for change in changes for key in REPLACES.get(change, ())}
    gone |= set(OF_TUNING[1:]) if changes.get("tune", ...) is None else set()
    gone -= changes.keys()
    return {**{key: value for key, value in written.items() if key not in gone}, **changes}


def refuse_contradictions(settings: Mapping[str, Any]) -> None:
    """Refuse two settings that choose the same, and one that has no effect without another.

    Raises:
        ConfigError: at the second of the two
    """
    chosen = {key: value for key, value in settings.items() if value is not None}
    for path, rule, remedy in _faults(chosen):
        raise ConfigError(path, chosen[path], rule, remedy)


def _faults(chosen: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Path, rule and remedy of each."""
    pairs = [*CONTRADICT, *([] if "until" in chosen else [("see", "hours")])]
    for one, other in pairs:
        if one in chosen and other in chosen:
            what = "which rate" if one == "lr" else "how many seeds"
            yield other, f"says {what}, and so does {one}", f"Leave out {one} or {other}"
    uses = {"looks": "until", "spend": "until", "pairs": "see", **dict.fromkeys(OF_TUNING[1:], "tune")}
    for key, needed in uses.items():
        if key in chosen and needed not in chosen:
            example = {"until": "until: verdict", "see": "see: 0.01", "tune": "tune: 5"}[needed]
            yield key, f"has no use without {needed}", f"Write {example} too, or leave out {key}"
    if isinstance(rates := chosen.get("lr"), list | tuple) and len(rates) > 1:
        for key in ("see", "until", "hours"):
            if key in chosen:
                rule = "chooses the seeds of one rate an arm, but lr lists several"
                yield key, rule, f"Leave out lr, so that each arm is tuned, or {key}"


ENTRY_POINTS = "blockwright.ablations"
MAX_ARMS, MAX_SEEDS = 1000, 1000
TRIES = 5  # of the rate, where a definition says nothing of it
LOOKS = (4, 8, 12, 16)
Tries = Annotated[int, Ge(3), Le(25), "a parabola needs three"]
Name = Annotated[Any, "the name of an arm: YAML reads 1 as a number and off as false"]
Overrides = Annotated[
    tuple[str, ...],
    Remedy("Write [model/attention=gqa, optimizer.lr=0.01], as for blockwright train; quote what holds braces"),
]


@dataclass(frozen=True)
class ArmSpec:
    """An arm of the definition.

    Args:
        overrides: define it, on top of ``base``
        match: how it is matched, if not as the ablation's other arms
        target: its budget, if not the baseline's
        like: arms whose overrides precede its own
        init_from: arm whose run of the same seed and learning rate its weights start from; None for random ones
        against: arm that it is compared with, if not the baseline
        compared: whether it has the metric; false for one that others only start from
    """

    overrides: Overrides = ()
    match: Match | None = None
    target: Annotated[Positive | None, Remedy("Write a number, next to budget: {match: params, by: d_ff}")] = None
    like: tuple[Name, ...] = ()
    init_from: Name = None
    against: Name = None
    compared: bool = True


@dataclass(frozen=True)
class Definition:
    """An ablation: the keys of its file, with the arms of ``grid``, ``leave_one_out`` and ``staircase`` in ``arms``.

    Args:
        name: of the definition's file
        about: the claim it tests, in one line
        base: overrides common to all arms
        baseline: the arm that the others are compared with and matched to
        arms: name → arm, in order
        grid: key → values: every combination is an arm
        leave_one_out: name → overrides: an arm with all, and one without each
        staircase: name → overrides: an arm with none, and one for each further change
        budget: what arms are matched in; None: nothing
        seeds: one job per seed, arm and learning rate; None: as many as ``see``, ``hours`` or ``looks`` need
        tokens: training tokens per job; None: by trainer.max_steps
        lr: peak learning rates to compare each arm at; None: the composed one, or the tuned one
        tune: path of a setting → values tried for each arm, in octaves around the composed one, one setting after
            another; None: nothing is tuned. A file that has neither ``tune`` nor ``lr`` tunes the rate by five tries
        tune_seeds: seeds of each of those tries, whose mean is fitted; they are compared with nothing
        tuned_by: figure by which those values are judged; None: the compared one
        see: difference in the metric's unit that is seen four times in five; chooses the seeds
        pairs: pairs of runs of the baseline that measure the noise for ``see`` first, where it is not known
        hours: wall time; chooses the seeds, or ends ``until``
        until: ``verdict``: seeds are added at ``looks`` until every arm has one
        looks: numbers of seeds at which verdicts are looked for
        spend: function that spends the level over the looks
        within: margin δ, in the metric's unit, within which two arms count as the same
        solved: compare the shares of seeds whose figure is at least ``at``, instead of means
        metric: the compared figure
        direction: of a figure that no arm's task or callback declares; None: it follows
        workers: parallel jobs
        also: further figures in the report's table, with their intervals but without comparisons
    """

    name: str
    about: str = ""
    base: Overrides = ()
    baseline: Name = None
    arms: dict[str, ArmSpec] = field(default_factory=dict)
    grid: dict[str, Annotated[list[Any], Remedy("Write model/attention: [mha, gqa]")]] = field(default_factory=dict)
    leave_one_out: dict[str, Overrides] = field(default_factory=dict)
    staircase: dict[str, Overrides] = field(default_factory=dict)
    budget: Match | None = None
    seeds: Annotated[tuple[Seed, ...] | None, Remedy("Write seeds=3 or seeds=[0,1,2]")] = None
    tokens: Annotated[float, Ge(1), Remedy("Write e.g. tokens=2e6")] | None = None
    lr: Annotated[tuple[Positive, ...] | None, Remedy("Write lr=[0.005,0.01]")] = None
    tune: Annotated[dict[str, Tries] | None, Remedy("Write tune: 5, or {optimizer.lr: 5, model.init.std: 3}")] = None
    tune_seeds: Annotated[Annotated[int, Ge(1), Le(50)] | None, Remedy("Write tune_seeds=3")] = None
    tuned_by: str | None = None
    see: Annotated[Positive | None, Remedy("Write see=0.01")] = None
    pairs: Annotated[Annotated[int, Ge(2), Le(50)] | None, Remedy("Write pairs=3")] = None
    hours: Annotated[Positive | None, Remedy("Write hours=1")] = None
    until: Literal["verdict"] | None = None
    looks: Annotated[tuple[Annotated[int, Ge(2), Le(MAX_SEEDS)], ...] | None, Remedy("Write looks=[4,8,12,16]")] = None
    spend: Spend = "obrien_fleming"
    within: Annotated[Positive | None, Remedy("Write within=0.01")] = None
    solved: Solved | None = None
    metric: str = "val/loss"
    direction: Literal["minimize", "maximize"] | None = None
    workers: Count = 1
    also: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for key, values in {"seeds": self.seeds, "lr": self.lr}.items():
            if values is not None and not _distinct(values):
                raise BlockError(key, list(values), "must list at least one value, each once", f"Write {key}=[…]")
        if self.looks is not None and (list(self.looks) != sorted(set(self.looks)) or not self.looks):
            raise BlockError("looks", list(self.looks), "must be numbers of seeds that rise", "Write looks=[4,8,12,16]")
        if self.tokens is not None and self.tokens % 1:
            raise BlockError("tokens", self.tokens, "counts tokens", "Write e.g. tokens=2e6")


KEYS = tuple(key for key in keys(Definition) if key != "name")
SEEDS = ("seeds", "see", "pairs", "hours", "until", "looks", "spend")  # that choose how many
OTHERS = ("lr", "tune", "tune_seeds", "tuned_by", "within", "tokens", "workers", "metric", "direction", "baseline")
OF_COMMAND_LINE = (*SEEDS, *OTHERS, *keys(Match))


def _distinct(values: Sequence[Any]) -> bool:
    return bool(values) and len(set(map(str, values))) == len(values)


FILES = Files("ablation", CONF / "ablation", ENTRY_POINTS, KEYS)


def names() -> list[str]:
    """Names of the ablations in conf/ablation and of plug-ins."""
    return FILES.names()


def about(name: str) -> str:
    """The claim that an ablation tests, in one line."""
    return FILES.about(name)


def read(name: str, changes: Mapping[str, str] | None = None) -> Definition:
    """Read an ablation by name, or from a YAML file.

    Args:
        name: of a file in conf/ablation or of a plug-in, or a path
        changes: keys of the definition from the command line, which override the file's

    Raises:
        ConfigError: it does not exist, or is invalid
    """
    return defined(Path(name).stem, FILES.read(name), changes or {})


def defined(name: str, written: Mapping[str, Any], changes: Mapping[str, str]) -> Definition:
    """A definition from the contents of its file.

    Args:
        name: of the definition
        written: keys of its file
        changes: keys from the command line, which override the file's

    Raises:
        ConfigError: it is invalid
    """
    definition = read_settings(Definition, {**_settings(written, changes), "name": name})
    arms, usual = _arms(definition)
    baseline = str(usual if definition.baseline is None else definition.baseline)
    compared = {name: arm for name, arm in arms.items() if arm.compared}
    if baseline not in compared:
        rule, remedy = "must be the name of an arm that is compared", did_you_mean(definition.baseline or "", compared)
        raise ConfigError("baseline", definition.baseline, rule, remedy)
    tokens = None if definition.tokens is None else int(definition.tokens)
    tune = definition.tune and {path: definition.tune[path] for path in sorted(definition.tune, key=RATE.__ne__)}
    found = replace(definition, baseline=baseline, arms=arms, tokens=tokens, tune=tune or None)
    _refuse_tuned_starts(found)
    if found.pairs and arms[baseline].init_from is not None:
        rule = f"are of a baseline that starts from random weights, but {baseline} starts from another arm"
        raise ConfigError("pairs", found.pairs, rule, "Write seeds=N instead of see and pairs")
    if found.until and not found.see and not found.looks:
        return replace(found, looks=LOOKS)
    return replace(found, seeds=(0,)) if not any((found.seeds, found.see, found.hours, found.until)) else found


def _refuse_tuned_starts(definition: Definition) -> None:
    for name, arm in definition.arms.items() if definition.tune else ():
        if arm.init_from is not None or not arm.compared:
            how = "only gives others their weights" if arm.init_from is None else f"starts from arm {arm.init_from}"
            rule = f"tunes arms that start from random weights, but arm {name} {how}"
            raise ConfigError("tune", definition.tune, rule, "Write tune: null, and each arm's rate in its overrides")


def _settings(written: Mapping[str, Any], changes: Mapping[str, str]) -> dict[str, Any]:
    """The settings of a definition: those of its file, changed by the command line, with short forms written out."""
    own = {key: text for key, text in changes.items() if key not in keys(Match)}
    match = typed(Match, {key: text for key, text in changes.items() if key not in own})
    settings = replaced(written, typed(Definition, own))
    budget = {} if settings.get("budget") is None else settings["budget"]
    if match and isinstance(budget, Mapping):
        settings["budget"] = {**budget, **match}
    if isinstance(arms := settings.get("arms"), Mapping):
        settings["arms"] = {name: _written_out(arm, settings.get("budget")) for name, arm in arms.items()}
    if "tune" not in settings and settings.get("lr") is None:
        settings["tune"] = TRIES
    refuse_contradictions(settings)
    if isinstance(tries := settings.get("tune"), int):
        settings["tune"] = {RATE: checked(tries, Annotated[Tries, Remedy("Write tune=5, or tune=null")], "tune")}
    elif tries == {}:
        raise ConfigError("tune", tries, "names no setting", "Write tune=5, or tune=null")
    elif isinstance(tries, Mapping):
        settings["tune"] = {str(path): checked(each, Tries, f"tune.{path}") for path, each in tries.items()}
    if isinstance(count := settings.get("seeds"), int):
        limits = Annotated[int, Ge(1), Le(MAX_SEEDS), Remedy("Write seeds=3; to name one seed, seeds=[1234]")]
        settings["seeds"] = list(range(checked(count, limits, "seeds")))
    return settings


def _written_out(arm: Any, budget: Any) -> Any:
    """An arm as a mapping: it may be its overrides alone, and keys of a match change some of the budget."""
    if not isinstance(arm, Mapping):
        return {} if arm is None else {"overrides": arm}
    match = {key: value for key, value in arm.items() if key in keys(Match)}
    if match and isinstance(budget, Mapping):
        match = {**budget, **match}
    return {**{key: value for key, value in arm.items() if key not in match}, **({"match": match} if match else {})}


# --- arms -------------------------------------------------------------------------------------------------------------


def _arms(definition: Definition) -> tuple[dict[str, ArmSpec], str | None]:
    """All arms, and the baseline unless another is named."""
    d = definition
    generated = [_grid(d.grid), _leave_one_out(d.leave_one_out), _staircase(d.staircase)]
    arms = _explicit(definition)
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


def _explicit(definition: Definition) -> dict[str, ArmSpec]:
    """The arms of the file, with the overrides of those that they are like."""
    arms: dict[str, ArmSpec] = {}
    for name, arm in definition.arms.items():
        if arm.target is not None and not (arm.match or definition.budget):
            rule, remedy = "is the budget of this arm, and nothing is matched", "Write it next to budget: {match, by}"
            raise ConfigError(f"arms.{name}.target", arm.target, rule, remedy)
        likes = [_other_arm(f"arms.{name}.like", like, arms) for like in arm.like]
        inherited = itertools.chain.from_iterable(arms[like].overrides for like in likes if like is not None)
        arms[name] = replace(
            arm,
            overrides=(*inherited, *arm.overrides),
            init_from=_other_arm(f"arms.{name}.init_from", arm.init_from, arms),
            against=_other_arm(f"arms.{name}.against", arm.against, arms),
        )
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
    for key, values in groups.items():
        if not _distinct(values):
            raise ConfigError(f"grid.{key}", values, "must list values, each once", "Write model/attention: [mha, gqa]")
    choices = [[(key, _in_hydra(value)) for value in values] for key, values in groups.items()]
    combinations = itertools.product(*choices)
    return {"+".join(v for _, v in chosen): tuple(f"{k}={v}" for k, v in chosen) for chosen in combinations}


def _in_hydra(value: Any) -> str:
    """A YAML value in Hydra's override grammar."""
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{_in_hydra(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_in_hydra, value)) + "]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _leave_one_out(recipe: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """All changes of a recipe at once, the baseline; and for each change, all others."""
    if not recipe:
        return {}
    arms = {"everything": _together(recipe)}
    for left_out in recipe:
        arms[f"without {left_out}"] = _together({name: value for name, value in recipe.items() if name != left_out})
    return arms


def _staircase(recipe: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """No changes, the baseline; then the changes cumulatively, one after another."""
    if not recipe:
        return {}
    arms: dict[str, tuple[str, ...]] = {"start": ()}
    so_far: tuple[str, ...] = ()
    for name, value in recipe.items():
        arms[f"+ {name}"] = so_far = (*so_far, *value)
    return arms


def _together(recipe: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    return tuple(itertools.chain.from_iterable(recipe.values()))
