"""The command line of ``blockwright match``: arms in the syntax of a sweep, and how to match them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from blockwright.lab.match.sizing import Match
from blockwright.registry import ConfigError, did_you_mean
from blockwright.registry.command import Parser, read_words
from blockwright.registry.ranges import Count, Positive
from blockwright.registry.reading import Remedy, keys, typed
from blockwright.registry.reading import read as read_settings
from blockwright.training.configuration.composing import explain
from blockwright.training.configuration.conf import CONF


@dataclass(frozen=True)
class Settings:
    """The settings of a command line.

    Args:
        baseline: name of an arm; None: the first
        target: budget of all arms, or of each
        context: sequence length for FLOPs; None: data.sequence_length
    """

    baseline: str | None = None
    target: Annotated[tuple[Positive, ...] | None, Remedy("Write e.g. target=7.1e9")] = None
    context: Count | None = None


@dataclass(frozen=True)
class Request:
    """A parsed and validated command line.

    Args:
        arms: name → overrides, in the order of the sweep
        match: how to match them; None to only compare them
        baseline: the arm that the others are matched to
        targets: arm → its budget, instead of the baseline's
        context: sequence length for FLOPs; None: data.sequence_length
        as_json: whether to print one document of plain numbers
    """

    arms: dict[str, list[str]]
    match: Match | None
    baseline: str
    targets: dict[str, float]
    context: int | None
    as_json: bool


def read(arguments: Sequence[str]) -> Request:
    """Parse a command line.

    Raises:
        ConfigError: an unknown option, an invalid value, an arm named twice
    """
    parser = Parser(prog="blockwright match")
    parser.add_argument("--json", action="store_true")
    flags, words = read_words(parser, arguments, [*keys(Match), *keys(Settings)])
    how = {key: text for key, text in words.settings.items() if key in keys(Match)}
    others = {key: text for key, text in words.settings.items() if key not in how}
    settings = read_settings(Settings, typed(Settings, others))
    match = read_settings(Match, typed(Match, how)) if how or settings.target else None
    arms = swept(words.overrides)
    targets = _targets(settings.target or (), list(arms))
    if len(arms) == 1 and not targets:
        remedy = "Sweep something: model/attention=mha,gqa,mqa,mla; or give a number: target=7.1e9"
        rule = "makes one arm, and nothing to match it with"
        raise ConfigError("command line", " ".join(words.overrides), rule, remedy)
    baseline = settings.baseline or next(iter(arms))
    if baseline not in arms:
        raise ConfigError("baseline", baseline, "is the name of an arm", did_you_mean(baseline, arms))
    return Request(arms, match, baseline, targets, settings.context, flags.json)


def swept(overrides: Sequence[str]) -> dict[str, list[str]]:
    """The jobs that ``blockwright train -m OVERRIDES`` would run, each named after what distinguishes it.

    Raises:
        ConfigError: an override cannot be read, or two arms would be the same
    """
    choices: list[list[tuple[str, str]]] = []  # for each override: what it may be, and how that is called
    GlobalHydra.instance().clear()
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        parser = OverridesParser.create(GlobalHydra.instance().config_loader())
        try:
            for override in parser.parse_overrides(list(overrides)):
                if not override.is_sweep_override():
                    choices.append([(str(override.input_line), "")])
                    continue
                key, values = override.get_key_element(), list(override.sweep_string_iterator())
                choices.append([(f"{key}={value}", value) for value in values])
        except HydraException as error:
            raise explain(error, overrides) from None
    arms: dict[str, list[str]] = {}
    for chosen in itertools.product(*choices):
        name = "+".join(value for _, value in chosen if value) or "model"
        if name in arms:
            remedy = "Name every value once"
            raise ConfigError("command line", name, "two arms of the sweep would have this name", remedy)
        arms[name] = [text for text, _ in chosen]
    return arms


def _targets(targets: tuple[float, ...], arms: Sequence[str]) -> dict[str, float]:
    """Arm → target."""
    targets = targets * len(arms) if len(targets) == 1 else targets
    if targets and len(targets) != len(arms):
        rule = f"takes one number for all arms or one for each of the {len(arms)}"
        raise ConfigError("target", targets, rule, f"The arms are: {', '.join(arms)}")
    return dict(zip(arms, targets, strict=False))
