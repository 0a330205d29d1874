"""Plan a ladder: compose and match every arm at every size, and list its first jobs. Nothing is started here."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any

from blockwright import registry
from blockwright.blocks.compose import check, compose
from blockwright.blocks.cost import count_parameters
from blockwright.lab.ablation import planning as ablation
from blockwright.lab.ladder.definition import Ladder
from blockwright.lab.ladder.design import KEY, Cell, Job, Outline, Size, compared, schedule, spread, tries
from blockwright.lab.match.sizing import Sized, named
from blockwright.lab.statistics.law import Form, Rung
from blockwright.lab.statistics.law_check import APART, Usual, expected, unidentified
from blockwright.lab.statistics.tuning import composed_value, octaves
from blockwright.registry import ConfigError
from blockwright.training.configuration.composing import compose_config
from blockwright.training.configuration.named_model import composition_of

SET_BY_LADDER = ("scheduler", "trainer.max_steps", "callbacks.checkpoint", "callbacks.milestones", "seed")
PLACEHOLDER = 1000  # steps of the trainings that are composed to be counted


@dataclass(frozen=True)
class Plan:
    """A planned ladder.

    Args:
        ladder: its definition
        outline: what its jobs are made of
        sized: size → its arms, matched
        jobs: the first ones: the tries, or all if nothing is tuned
        log_dir: parent of the runs' folders
    """

    ladder: Ladder
    outline: Outline
    sized: dict[str, list[Sized]]
    jobs: list[Job]
    log_dir: str

    def as_plain(self, command: Sequence[str]) -> dict[str, Any]:
        """In the format of plan.json.

        Args:
            command: the command that made it
        """
        arms = self.ladder.arms
        largest = self.sized[list(self.sized)[-1]]
        return {
            "kind": "ladder",
            "name": arms.name,
            "command": shlex.join(command),
            "metric": arms.metric,
            "direction": "minimize",
            "workers": self.ladder.settings.workers,
            "jobs": self.jobs,
            "arms": [{**one.as_plain(one.arm.name == arms.baseline), "against": None} for one in largest],
            "tune": self.ladder.settings.tune,
            KEY: self.outline.as_plain(),
            "definition": {"arms": asdict(arms), "settings": asdict(self.ladder.settings)},
        }


def make(ladder: Ladder, overrides: Sequence[str] = ()) -> Plan:
    """Plan a ladder.

    Args:
        ladder: its definition
        overrides: for all arms at all sizes, after ``base`` and before those of an arm

    Raises:
        ConfigError: an arm cannot be composed, built or matched at a size, or a duration is too short
    """
    _refuse_set(ladder, overrides)
    plans = {name: _at(ladder, name, overrides) for name in ladder.sizes}
    first = next(iter(plans.values()))
    if first.direction != "minimize":
        raise ConfigError(
            "metric", ladder.arms.metric, "is to be maximized, and the law is of a loss", "Write val/loss"
        )
    tokens_per_step = _tokens_per_step(plans)
    start = {name: {one.arm.name: _start(ladder, one) for one in plan.arms} for name, plan in plans.items()}
    cells = {name: {o.arm.name: _cell(o, start[name][o.arm.name]) for o in p.arms} for name, p in plans.items()}
    base = {name: arms[ladder.arms.baseline].parameters for name, arms in cells.items()}
    _refuse_shrinking(base)
    sizes = {name: Size(_steps(ladder, base[name], tokens_per_step, name), arms) for name, arms in cells.items()}
    tune = ladder.settings.tune
    path, number = next(iter(tune.items())) if tune else (None, 1)
    s, arms, tuned = ladder.settings, ladder.arms, ladder.tuned_sizes
    seeds = arms.seeds or (0,)
    outline = Outline(arms.baseline, sizes, tokens_per_step, s.decay, s.warmup, seeds, path, number, tuned)
    for name in sizes:
        _check_lengths(outline, name)
    sized = {name: plan.arms for name, plan in plans.items()}
    return Plan(ladder, outline, sized, first_jobs(outline), first.log_dir)


def first_jobs(outline: Outline) -> list[Job]:
    """The tries of all arms at the sizes at which they are tuned; without tuning, all jobs."""
    if outline.tune is None:
        return compared(outline, {}, 0)
    jobs: list[Job] = []
    for size in outline.tuned_sizes:
        for arm, cell in outline.sizes[size].arms.items():
            jobs += tries(outline, size, arm, octaves(cell.start or 1.0, outline.tries), len(jobs))
    return jobs


def sees(outline: Outline) -> float:
    """The speed-up that a ladder shows four times in five, as a factor; infinite with too few trainings.

    By the law and the noise that small models of text usually have, and what tuning leaves in them, if no training is
    lost.
    """
    from scipy.stats import t

    rungs = [
        Rung(arm, name, duration, seed, cell.parameters, steps * outline.tokens_per_step, 0.0)
        for name, size in outline.sizes.items()
        for arm, cell in size.arms.items()
        for duration, steps in size.steps.items()
        for seed in outline.seeds
    ]
    form: Form = "alike" if unidentified(rungs) else "apart"
    usual = Usual()
    places = [(size, arm) for size in outline.tuned_sizes for arm in outline.sizes[size].arms] if outline.tune else []
    common = spread(outline, dict.fromkeys(places, usual.left))
    log_s = expected(rungs, outline.baseline, form, usual, common)
    return math.exp(log_s.half + float(t.ppf(0.8, log_s.dof)) * log_s.se) if log_s.dof >= 1 else math.inf


def _at(ladder: Ladder, size: str, overrides: Sequence[str]) -> ablation.Plan:
    """The ablation of a size, its arms matched."""
    arms = replace(ladder.arms, base=(*ladder.arms.base, *ladder.sizes[size]), seeds=(0,))
    try:
        return ablation.make(arms, [*overrides, *_placeholder()])
    except ConfigError as error:
        raise ConfigError(f"size {size}: {error.path}", error.value, error.rule, error.remedy) from None


def _placeholder() -> list[str]:
    return schedule(PLACEHOLDER, warmup=1, decay=1)


def _refuse_set(ladder: Ladder, overrides: Sequence[str]) -> None:
    written = [*ladder.arms.base, *overrides]
    written += [override for arm in ladder.arms.arms.values() for override in arm.overrides]
    written += [override for size in ladder.sizes.values() for override in size]
    for override in written:
        key, _, value = override.lstrip("+~").partition("=")
        if any(key == own or key.startswith(f"{own}.") for own in SET_BY_LADDER):
            remedy = "Leave it out; durations, decay, warmup and seeds are keys of the ladder"
            raise ConfigError(key, value, "is set by the ladder for each job", remedy)


def _cell(sized: Sized, start: float | None) -> Cell:
    """An arm at a size, with N of its active parameters."""
    model = sized.arm.model
    if sized.changed:
        model = check(composition_of(registry.to_plain(compose_config(sized.overrides).model)))
    counted = count_parameters(compose(model, device="meta"))
    parameters = counted.active - counted.embedding - counted.head
    own = tuple(override for override in sized.overrides if override not in _placeholder())
    return Cell(own, parameters, sized.figures.flops, start)


def _start(ladder: Ladder, sized: Sized) -> float | None:
    """The composed value of the tuned setting, in the middle of the tries."""
    if ladder.settings.tune is None:
        return None
    with named(sized.arm.name):
        config = compose_config(sized.overrides)
    return composed_value(config, next(iter(ladder.settings.tune)), sized.arm.name)


def _tokens_per_step(plans: Mapping[str, ablation.Plan]) -> int:
    """Of all arms and sizes, which share their batches, so that a step is as many tokens in each."""
    every = {name: plan.tokens_per_step for name, plan in plans.items()}
    for plan in plans.values():
        lengths = {name: of and of // PLACEHOLDER for name, of in plan.tokens.items()}
        every |= {f"arm {name}": of or 0 for name, of in lengths.items()}
    if 0 in every.values():
        rule = "cannot be counted: this data has no data.sequence_length or data.batch_size"
        raise ConfigError("data", "…", rule, "Choose data that has both")
    if len(set(every.values())) > 1:
        rule = "differs between sizes or arms, whose losses at one step would be of different tokens"
        raise ConfigError("data.batch_size × data.sequence_length", every, rule, "Write the same for all")
    return next(iter(every.values()))


def _refuse_shrinking(parameters: Mapping[str, float]) -> None:
    for (smaller, least), (name, own) in pairwise(parameters.items()):
        if own < APART * least:
            rule = (
                f"has {own:,.0f} parameters without embedding and head, after {smaller} with {least:,.0f}: sizes grow"
            )
            raise ConfigError("sizes", name, rule, f"Order them; each at least {100 * (APART - 1):.0f} % larger")


def _steps(ladder: Ladder, parameters: float, tokens_per_step: int, size: str) -> dict[str, int]:
    """Steps of each duration at a size."""
    found: dict[str, int] = {}
    for name, length in ladder.lengths.items():
        tokens = length if ladder.settings.tokens is not None else length * parameters
        if tokens < tokens_per_step:
            key = "tokens" if ladder.settings.tokens is not None else "durations"
            rule = f"is {tokens:,.0f} tokens at size {size}, less than one step ({tokens_per_step:,} tokens)"
            least = tokens_per_step * (100 if key == "tokens" else 100 / parameters)
            raise ConfigError(key, f"{length:g}", rule, f"Write {least:.3g} or more, or a smaller data.batch_size")
        found[name] = round(tokens / tokens_per_step)
    return found


def _check_lengths(outline: Outline, size: str) -> None:
    """Refuse durations that no trunk can have."""
    steps, warmup = outline.sizes[size].steps, outline.warmup_steps(size)
    shortest = next(iter(steps))
    if outline.branch(size, shortest) < warmup:
        decay = outline.decay_steps(size, shortest)
        rule = (
            f"is {steps[shortest]} steps at size {size}: a warm-up of {warmup} and a decay of {decay} leave no plateau"
        )
        raise ConfigError("durations", shortest, rule, "Write a longer one, a smaller warmup or decay")
    for (shorter, few), (longer, many) in pairwise(steps.items()):
        if few >= many:
            rule = f"are both {many} steps at size {size}"
            raise ConfigError("durations", [shorter, longer], rule, "Write lengths farther apart, or a smaller batch")
