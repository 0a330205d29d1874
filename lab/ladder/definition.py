"""The definition of a ladder: the arms of an ablation at several sizes and durations, read from conf/ladder.

A plug-in offers a package folder of definitions through the entry-point group ``blockwright.ladders``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge

from blockwright.lab.ablation import definition as ablation
from blockwright.lab.ablation.definition import Overrides
from blockwright.lab.definitions import Files
from blockwright.lab.match.sizing import Match
from blockwright.lab.statistics.tuning import RATE
from blockwright.registry import BlockError, ConfigError
from blockwright.registry.ranges import Count, Positive, ProperFraction
from blockwright.registry.reading import Remedy, keys, typed
from blockwright.registry.reading import read as read_settings
from blockwright.training.configuration.conf import CONF

ENTRY_POINTS = "blockwright.ladders"
FEWEST = 2  # sizes, and durations of each: a law through fewer is none
OF_ABLATION = ("about", "base", "baseline", "arms", "grid", "leave_one_out", "staircase", "budget", "seeds", "metric")
Tokens = Annotated[float, Ge(1)]


@dataclass(frozen=True)
class Settings:
    """What a ladder has beside its arms.

    Args:
        sizes: name → overrides, ascending; or settings with a value for each size, d_model: [64, 96, 128, 192]
        durations: tokens per parameter of the baseline at each size, embedding and head not counted
        tokens: of every size, instead of ``durations``
        decay: share of a duration in which the rate falls to 0
        warmup: share of the longest duration in which the rate rises
        tune: setting → number of values to try first, an octave apart; None: every arm is trained at its composed rate
        tune_sizes: number of sizes, the smallest first, at which arms are tuned; larger ones take the values that these
            lead to. None: half of them
        workers: parallel jobs
    """

    sizes: Annotated[dict[str, Any], Remedy("Write sizes: {d_model: [64, 96, 128, 192]}")]
    durations: Annotated[tuple[Positive, ...] | None, Remedy("Write durations: [5, 10, 20]")] = None
    tokens: Annotated[tuple[Tokens, ...] | None, Remedy("Write tokens: [1e6, 2e6, 4e6]")] = None
    decay: ProperFraction = 0.2
    warmup: ProperFraction = 0.02
    tune: Annotated[dict[str, Count] | None, Remedy(f"Write tune: {{{RATE}: 5}}, or null")] = field(
        default_factory=lambda: {RATE: 5}
    )
    tune_sizes: Count | None = None
    workers: Count = 1

    def __post_init__(self) -> None:
        if (self.durations is None) == (self.tokens is None):
            what = "has neither durations nor tokens" if self.tokens is None else "has both durations and tokens"
            raise BlockError("durations", self.durations, what, "Write durations: [5, 10, 20], tokens per parameter")
        key, lengths = ("durations", self.durations) if self.tokens is None else ("tokens", self.tokens)
        assert lengths is not None
        if len(set(lengths)) < max(FEWEST, len(lengths)):
            rule = f"must list at least {FEWEST} lengths, each once: with one, size and data rise together"
            raise BlockError(key, list(lengths), rule, f"Write {key}=[{lengths[0] / 4:g},{lengths[0]:g}]")
        if list(lengths) != sorted(lengths):
            raise BlockError(key, list(lengths), "must rise", f"Write {key}={sorted(lengths)}")
        if self.tune is not None and len(self.tune) != 1:
            raise BlockError("tune", self.tune, "names one setting", f"Write tune: {{{RATE}: 5}}")
        if self.tune is not None and min(self.tune.values()) < 3:
            raise BlockError("tune", self.tune, "needs three values to see a best one", f"Write tune: {{{RATE}: 5}}")


@dataclass(frozen=True)
class Ladder:
    """A ladder.

    Args:
        arms: the ablation that is repeated at every size
        sizes: name → overrides, ascending
        settings: as written
    """

    arms: ablation.Definition
    sizes: dict[str, tuple[str, ...]]
    settings: Settings

    @property
    def lengths(self) -> dict[str, float]:
        """Name of each duration → tokens per parameter, or tokens."""
        s = self.settings
        if s.tokens is not None:
            return {f"{tokens:g} tokens": tokens for tokens in s.tokens}
        return {f"{ratio:g} tokens per parameter": ratio for ratio in s.durations or ()}

    @property
    def tuned_sizes(self) -> tuple[str, ...]:
        """The sizes at which arms are tuned."""
        if self.settings.tune is None:
            return ()
        half = (len(self.sizes) + 1) // 2
        return tuple(self.sizes)[: self.settings.tune_sizes or half]


OWN = tuple(keys(Settings))
KEYS = (*OF_ABLATION, *OWN)
OF_COMMAND_LINE = ("seeds", "metric", "baseline", *keys(Match), *(key for key in OWN if key != "sizes"))
FILES = Files("ladder", CONF / "ladder", ENTRY_POINTS, KEYS)


def read(name: str, changes: Mapping[str, str] | None = None) -> Ladder:
    """Read a ladder by name, or from a YAML file.

    Args:
        name: of a file in conf/ladder or of a plug-in, or a path
        changes: keys of the definition from the command line, which override the file's

    Raises:
        ConfigError: it does not exist, or is invalid
    """
    written = FILES.read(name)
    for key, value in written.items():
        if key not in KEYS:
            raise ConfigError(key, value, "there is no such key", f"Its keys are {', '.join(KEYS)}")
    changes = changes or {}
    own = typed(Settings, {key: text for key, text in changes.items() if key in OWN})
    settings = {**{key: written[key] for key in OWN if key in written}, **own}
    for this, other in (("durations", "tokens"), ("tokens", "durations")):
        if this in own and other not in own:
            settings.pop(other, None)
    of_arms = {**{key: value for key, value in written.items() if key in OF_ABLATION}, "tune": None}
    arms = ablation.defined(Path(name).stem, of_arms, {k: text for k, text in changes.items() if k not in OWN})
    _refuse_starts(arms)
    ladder = read_settings(Settings, settings)
    sizes = _sizes(ladder.sizes)
    if (ladder.tune_sizes or 0) > len(sizes):
        rule, remedy = f"is more than the {len(sizes)} sizes", f"Write tune_sizes={len(sizes)} to tune at each"
        raise ConfigError("tune_sizes", ladder.tune_sizes, rule, remedy)
    return Ladder(arms, sizes, ladder)


def _refuse_starts(arms: ablation.Definition) -> None:
    for name, arm in arms.arms.items():
        if arm.init_from is not None or not arm.compared:
            rule = "starts from the weights of another arm, whose training the law would not count"
            raise ConfigError(f"arms.{name}", arm.init_from, rule, "Write an ablation for it")


def _sizes(written: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """Sizes by name: as written, or one for each value of the listed settings."""
    lists = [value for value in written.values() if isinstance(value, list | tuple) and value]
    are_values = len(lists) == len(written) > 0 and all(
        isinstance(each, int | float) for values in lists for each in values
    )
    sizes = _listed(written) if are_values else _named(written)
    if len(sizes) < FEWEST:
        rule = "is one size, and a law through one size is none" if sizes else "lists no size"
        raise ConfigError("sizes", dict(written), rule, "Write sizes: {d_model: [64, 96, 128, 192]}")
    return sizes


def _listed(written: Mapping[str, list[float]]) -> dict[str, tuple[str, ...]]:
    counts = {key: len(values) for key, values in written.items()}
    if len(set(counts.values())) > 1:
        raise ConfigError("sizes", counts, "lists a number of values for each setting, which differ", "Write as many")
    paths = [key if "." in key else f"model.{key}" for key in written]
    sizes = {}
    for values in zip(*written.values(), strict=True):
        overrides = tuple(f"{path}={value}" for path, value in zip(paths, values, strict=True))
        sizes[" ".join(map(str, values))] = overrides
    if len(sizes) < next(iter(counts.values())):
        raise ConfigError("sizes", dict(written), "must list each value once", "Remove the second")
    return sizes


def _named(written: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    @dataclass(frozen=True)
    class Named:
        sizes: dict[str, Overrides]

    return read_settings(Named, {"sizes": dict(written)}).sizes
