"""The command line of ``blockwright match``: arms in the syntax of a sweep, and how to match them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from blockwright.lab.match.sizing import TOL, Match
from blockwright.registry import ConfigError, did_you_mean
from blockwright.registry.arguments import read_arguments
from blockwright.training.configuration.conf import CONF
from blockwright.training.configuration.refusals import explain

KEYS = ("match", "by", "tol", "baseline", "target", "context")


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
    """A command line → what is asked.

    Raises:
        ConfigError: an unknown option, a value that cannot be, an arm named twice
    """
    given = read_arguments(arguments, options=KEYS, flags=("--json",))
    own, arms = given.options, swept(given.overrides)
    match = _match(own)
    targets = _targets(own, list(arms), match)
    if len(arms) == 1 and not targets:
        remedy = "Sweep something: model/attention=mha,gqa,mqa,mla; or give a number: target=7.1e9"
        raise ConfigError(
            "command line", " ".join(given.overrides), "makes one arm, and nothing to match it with", remedy
        )
    baseline = own.get("baseline", next(iter(arms)))
    if baseline not in arms:
        raise ConfigError("baseline", baseline, "is the name of an arm", did_you_mean(baseline, arms))
    context = whole("context", own["context"], 1, "is a number of tokens") if "context" in own else None
    return Request(arms, match, baseline, targets, context, "--json" in given.flags)


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


def _match(own: Mapping[str, str]) -> Match | None:
    if "match" not in own:
        if extra := [key for key in ("by", "tol", "target") if key in own]:
            rule = "says how arms are matched, and nothing says in what"
            raise ConfigError(extra[0], own[extra[0]], rule, "Write e.g. match=params")
        return None
    if "by" not in own:
        remedy = "Write e.g. by=d_ff"
        raise ConfigError("by", None, "arms are sized by a knob, and none is named", remedy)
    return Match(own["match"], own["by"], number("tol", own.get("tol", TOL)))


def _targets(own: Mapping[str, str], arms: Sequence[str], match: Match | None) -> dict[str, float]:
    if "target" not in own or match is None:
        return {}
    values = [number("target", value.strip()) for value in own["target"].split(",")]
    values = values * len(arms) if len(values) == 1 else values
    if len(values) != len(arms):
        rule = f"takes one number for all arms or one for each of the {len(arms)}"
        raise ConfigError("target", own["target"], rule, f"The arms are: {', '.join(arms)}")
    for value in values:
        if not value > 0:
            raise ConfigError("target", value, "is what the budget is to be, above 0", "Write e.g. target=7.1e9")
    return dict(zip(arms, values, strict=True))


def number(key: str, value: Any) -> float:
    """A finite number, from a command line or a file.

    Raises:
        ConfigError: it is none
    """
    try:
        found = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        found = math.nan
    if not math.isfinite(found):
        raise ConfigError(key, value, "is a number", f"Write e.g. {key}=0.01")
    return found


def whole(key: str, value: Any, least: int, rule: str) -> int:
    """A whole number that is not too small; 2e6 is one.

    Raises:
        ConfigError: it is none
    """
    try:
        found = number(key, value)
    except ConfigError:
        found = math.nan
    if not found == found // 1 or found < least:
        raise ConfigError(key, value, f"{rule}, at least {least}", f"Write e.g. {key}={max(least, 3)}")
    return int(found)
