"""Size arms to a budget, and report what was changed and the remaining differences."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Annotated, Any, Literal, get_args

import torch
from omegaconf import DictConfig

from blockwright import registry
from blockwright.blocks.compose import check, compose
from blockwright.blocks.cost import cache_bytes_per_token, count_families, count_parameters, training_flops_per_token
from blockwright.blocks.decoder import Decoder
from blockwright.lab.card import flat
from blockwright.lab.match import knobs
from blockwright.lab.match.knobs import Found, Keys, Knob, Place, UnmovedError, nearest
from blockwright.registry import BlockError, ConfigError
from blockwright.registry.ranges import BelowOne
from blockwright.registry.reading import Key, Remedy
from blockwright.training.configuration.composing import compose_config
from blockwright.training.configuration.named_model import composition_of

# --- the four budgets for matching arms -------------------------------------------------------------------------------


Budget = Literal["params", "active_params", "flops", "cache_bytes"]
BUDGETS: tuple[Budget, ...] = get_args(Budget)
WORDS = {
    "params": "parameters",
    "active_params": "active parameters",
    "flops": "training FLOPs per token",
    "cache_bytes": "cache bytes per token",
}


@dataclass(frozen=True)
class Figures:
    """Cost of a model.

    Args:
        params: all parameters
        active_params: those that one token uses, embedding and head included
        flops: of training, per token of a sequence of the measured length
        cache_bytes: of a sequence of the measured length, per token, fp32; None if an attention has no cache
    """

    params: int
    active_params: int
    flops: float
    cache_bytes: float | None


def measure(model: Mapping[str, Any] | Decoder, context: int) -> Figures:
    """Measure all four figures.

    Args:
        model: the composition, as plain types, or its decoder on the meta device
        context: T, sequence length for FLOPs and caches

    Raises:
        ConfigError: it cannot be built
    """
    decoder = model if isinstance(model, Decoder) else compose(model, device="meta")
    counted = count_parameters(decoder)
    return Figures(counted.total, counted.active, _flops(decoder, context), _cache(decoder, context))


def measure_one(model: Mapping[str, Any] | Decoder, budget: str, context: int) -> float | None:
    """Measure one figure, for a search; arguments and errors as in ``measure``."""
    decoder = model if isinstance(model, Decoder) else compose(model, device="meta")
    ways: dict[str, Callable[[], float | None]] = {
        "params": lambda: sum(count_families(decoder).values()),
        "active_params": lambda: count_parameters(decoder).active,
        "flops": lambda: _flops(decoder, context),
        "cache_bytes": lambda: _cache(decoder, context),
    }
    return ways[budget]()


def residuals(figures: Figures, goal: Mapping[str, float | None]) -> dict[str, float | None]:
    """Relative excess of each figure over the goal's; None if there is nothing to compare."""
    found: dict[str, float | None] = {}
    for budget in BUDGETS:
        ours, theirs = getattr(figures, budget), goal.get(budget)
        found[budget] = None if ours is None or not theirs else ours / theirs - 1
    return found


def _flops(decoder: Decoder, context: int) -> float:
    return training_flops_per_token(decoder, context)


def _cache(decoder: Decoder, context: int) -> float | None:
    try:
        return cache_bytes_per_token(decoder, context, torch.float32)
    except NotImplementedError:  # a plug-in's attention may have no cache
        return None


TOL = 0.005  # relative to the budget
DEFAULT_CONTEXT = 256  # sequence length in tokens, if the data module has none


@dataclass(frozen=True)
class Match:
    """The figure in which arms are matched, and the knob.

    Args:
        budget: one of ``BUDGETS``
        by: a knob (lab/match/knobs.py)
        tol: allowed relative deviation of an arm
    """

    budget: Annotated[Budget, Key("match")]
    by: Annotated[str, Remedy("Write e.g. by=d_ff")]
    tol: Annotated[BelowOne, Remedy(f"Write e.g. tol={TOL}")] = TOL

    def __post_init__(self) -> None:
        if self.by not in knobs.KNOBS and not self.by.startswith("model."):
            remedy = f"{registry.did_you_mean(self.by, knobs.KNOBS)}, or a dotted path such as model.ffn.d_ff"
            raise BlockError("by", self.by, "is not a knob", remedy)


@dataclass(frozen=True)
class Arm:
    """A named composition.

    Args:
        name: of the arm
        overrides: that define it, in Hydra's grammar
        model: the validated composition, as plain types
        written: the model's node as composed by Hydra, which determines the valid overrides
        context: T, tokens of its training sequences
    """

    name: str
    overrides: tuple[str, ...]
    model: dict[str, Any]
    written: dict[str, Any]
    context: int


@dataclass(frozen=True)
class Sized:
    """An arm after matching.

    Args:
        arm: before matching
        figures: its cost after matching
        match: how it was matched; None for a baseline, or without matching
        target: its target; None: the baseline's figure
        changed: dotted path → value before, value after
        overrides: that define it after matching
        residual: relative excess of each figure over the baseline's, also where the arm has a target of its own
        multiple: the multiple found by the search; None if the arm is unchanged
    """

    arm: Arm
    figures: Figures
    match: Match | None = None
    target: float | None = None
    changed: dict[str, tuple[int, int]] = field(default_factory=dict)
    overrides: tuple[str, ...] = ()
    residual: dict[str, float | None] = field(default_factory=dict)
    multiple: int | None = None

    def as_plain(self, baseline: bool) -> dict[str, Any]:
        """In the format of plan.json and ``--json``."""
        match = self.match and {
            "budget": self.match.budget,
            "by": self.match.by,
            "tol": self.match.tol,
            "target": self.target,
            "multiple": self.multiple,
            "changed": {path: list(pair) for path, pair in self.changed.items()},
            "residual": self.residual,
        }
        return {
            "name": self.arm.name,
            "baseline": baseline,
            "overrides": list(self.overrides),
            "figures": asdict(self.figures),
            "match": match,
        }


@contextmanager
def named(arm: str) -> Iterator[None]:
    """Prefix the path of a ConfigError with an arm's name."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"arm {arm}: {error.path}", error.value, error.rule, error.remedy) from None


def read_arm(name: str, overrides: Sequence[str], context: int | None = None) -> Arm:
    """Compose and check an arm.

    Args:
        name: of the arm
        overrides: as for blockwright train
        context: sequence length; None: data.sequence_length

    Raises:
        ConfigError: it cannot be composed or built
    """
    with named(name):
        config = compose_config(overrides)
        return arm_of(name, overrides, config, check(composition_of(registry.to_plain(config.model))), context)


def arm_of(
    name: str, overrides: Sequence[str], config: DictConfig, model: dict[str, Any], context: int | None = None
) -> Arm:
    """An arm from a composed configuration ``config`` and its validated model."""
    length = config.data.get("sequence_length") if context is None else context
    return Arm(name, tuple(overrides), model, registry.to_plain(config.model), length or DEFAULT_CONTEXT)


def size(
    arms: Sequence[Arm],
    baseline: str,
    match: Match | None,
    targets: Mapping[str, float] | None = None,
    ways: Mapping[str, Match] | None = None,
) -> list[Sized]:
    """Size every arm.

    Args:
        arms: of different names
        baseline: the arm that the others are matched to; unchanged unless it has a target
        match: how to match; None leaves all arms unchanged
        targets: arm → its budget, instead of the baseline's
        ways: arm → how to match it, instead of ``match``

    Returns:
        the sized arms, in order

    Raises:
        ConfigError: an arm has no such knob, or does not reach the budget
    """
    given, ways = targets or {}, ways or {}
    first = next(arm for arm in arms if arm.name == baseline)
    base = _sized(first, ways.get(baseline, match), None, given.get(baseline))
    goal = asdict(base.figures)
    found = [
        base if arm is first else _sized(arm, ways.get(arm.name, match), goal, given.get(arm.name)) for arm in arms
    ]
    return [_compared(sized, goal, sized is base) for sized in found]


def _compared(sized: Sized, goal: dict[str, Any], is_base: bool) -> Sized:
    match = None if is_base and sized.target is None else sized.match
    return replace(sized, residual=residuals(sized.figures, goal), match=match)


def _sized(arm: Arm, match: Match | None, goal: Mapping[str, Any] | None, target: float | None) -> Sized:
    left_alone = Sized(arm, measure(arm.model, arm.context), match, target, overrides=arm.overrides)
    if match is None or (goal is None and target is None):
        return left_alone
    own, wanted = getattr(left_alone.figures, match.budget), target if goal is None else target or goal[match.budget]
    with named(arm.name):
        knob = knobs.find(arm.model, match.by)
        if own is None or wanted is None:
            rule = "an attention has no new_cache, so its cache cannot be measured"
            raise ConfigError("match", match.budget, rule, "Match another budget, or give the block a new_cache")
        if not wanted:
            remedy = "Match another budget, or give a target"
            raise ConfigError("match", match.budget, "the baseline has none of it, so nothing can match it", remedy)
        if abs(own / wanted - 1) <= match.tol:
            return left_alone
        decoders: dict[int, Decoder] = {}
        found = _search(arm, knob, match, own, wanted, decoders)
        off = found.figure / wanted - 1
        if abs(off) > match.tol:
            raise _unreached(arm, knob, match, found, off)
    new = {place: knob.at(found.value)[place.keys] for place in knob.places}
    new = {place: value for place, value in new.items() if value != place.value}
    overrides = (*arm.overrides, *(override(arm.written, place, value) for place, value in new.items()))
    with named(arm.name):
        _refuse_followers(overrides, check(knobs.changed(arm.model, knob.at(found.value))), match.by)
    return replace(
        left_alone,
        figures=measure(decoders[found.value], arm.context),
        changed={place.path: (place.value, value) for place, value in new.items()},
        overrides=overrides,
        multiple=found.multiple,
    )


def _refuse_followers(overrides: Sequence[str], measured: Mapping[str, Any], by: str) -> None:
    """Refuse overrides that compose another model than was measured: an interpolation follows what they change."""
    ours = flat(check(composition_of(registry.to_plain(compose_config(overrides).model))))
    theirs = flat(measured)
    if ours != theirs:
        key = next(key for key in (*ours, *theirs) if ours.get(key) != theirs.get(key))
        rule = f"model.{key} follows it by an interpolation, so another model would be trained than was measured"
        raise ConfigError("by", by, rule, f"Write model.{key} as a number, or size the arm by another knob")


def _search(arm: Arm, knob: Knob, match: Match, own: float, wanted: float, decoders: dict[int, Decoder]) -> Found:
    """Search; every decoder that was measured is left in ``decoders``, by the knob's value."""

    def figure(value: int) -> float | None:
        try:
            decoders[value] = compose(knobs.changed(arm.model, knob.at(value)), device="meta")
        except ConfigError:  # not divisible by heads, not possible with the layout, …
            return None
        return measure_one(decoders[value], match.budget, arm.context)

    try:
        return nearest(figure, knob.value, own, wanted, knob.multiples, match.tol, knob.largest)
    except UnmovedError:
        rule = f"does not change {WORDS[match.budget]}"
        raise ConfigError("by", match.by, rule, _others(arm, match)) from None


def _unreached(arm: Arm, knob: Knob, match: Match, found: Found, off: float) -> ConfigError:
    at = " ".join(f"{place.path}={knob.at(found.value)[place.keys]}" for place in knob.places)
    nearest_is = f"the nearest is {found.figure:,.0f}, {100 * off:+.3g} % off, at {at}"
    rule = f"{WORDS[match.budget]} do not come within {100 * match.tol:g} % by {match.by}: {nearest_is}"
    wide = math.ceil(1000 * abs(off) + 1) / 1000  # above it, in few digits
    enough = f"Write tol={wide:g}. " if wide < 0.99 else ""  # of a tolerance that is one
    return ConfigError("tol", match.tol, rule, f"{enough}{_others(arm, match)}")


def _others(arm: Arm, match: Match) -> str:
    """The arm's other knobs that change the budget, as a remedy."""
    here = measure_one(arm.model, match.budget, arm.context)
    moving = [name for name in knobs.knobs_of(arm.model) if name != match.by and _moves(arm, match, name, here)]
    return f"Or use another knob: {', '.join(moving)}" if moving else "No other knob moves them"


def _moves(arm: Arm, match: Match, name: str, here: float | None) -> bool:
    knob = knobs.find(arm.model, name)
    for value in (2 * knob.value, knob.value + 1):
        try:
            return measure_one(knobs.changed(arm.model, knob.at(value)), match.budget, arm.context) != here
        except ConfigError:
            continue
    return False


def override(written: Mapping[str, Any], place: Place, value: int) -> str:
    """A change as a Hydra override.

    Args:
        written: the model's node as composed by Hydra
        place: the changed place
        value: its new value
    """
    node: Any = written
    keys: Keys = place.keys
    for i, key in enumerate(keys[:-1]):
        known = range(len(node)) if isinstance(node, list) else node
        if key not in known:
            return f"++{place.path}={value}"
        node = node[key]
        if isinstance(node, str):  # a bare name has no keys yet
            return f"++{Place(keys[: i + 1], 0).path}={{name:{node},{keys[-1]}:{value}}}"
    return f"{'' if keys[-1] in node else '++'}{place.path}={value}"
