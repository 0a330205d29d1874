"""The jobs of a ladder: its outline in plan.json, and which follow from the results.

Each arm is tried until it is tuned; the compared jobs run at the values that the tries lead to.

The longest duration of an (arm, size, seed) is a trunk under warm-up, plateau and decay. It keeps a checkpoint where
each shorter duration begins to decay; that job resumes from it and takes the decay alone. So durations of 5, 10 and 20
cost 1.15 times the longest, and are bit-identical to three trainings of their own.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from blockwright.lab.statistics import tuning
from blockwright.lab.statistics.law import Common
from blockwright.lab.statistics.tuning import COMPARE, RATE, SD_OF_RUN, TUNE, Fit, Try, loss_of, next_round
from blockwright.lab.statistics.variance import Left
from blockwright.registry import ConfigError
from blockwright.registry.ranges import Count, Positive, ProperFraction, Seed
from blockwright.registry.reading import read as read_settings
from blockwright.training.result import Result

KEY = "ladder"  # of the outline in plan.json
MILESTONES = "blockwright.training.callbacks.interruption.Milestones"  # not imported: it needs torch
Job = dict[str, Any]
Trunk = tuple[str, str, int]  # size, arm and seed of a trunk


@dataclass(frozen=True)
class Cell:
    """An arm at a size, matched.

    Args:
        overrides: that define it
        parameters: N, active ones without embedding and head
        flops: of training, per token
        start: composed value of the tuned setting; None if nothing is tuned
    """

    overrides: tuple[str, ...]
    parameters: Positive
    flops: Positive
    start: Positive | None = None


@dataclass(frozen=True)
class Size:
    """A size.

    Args:
        steps: duration → optimizer steps, ascending
        arms: arm → its cell
    """

    steps: dict[str, Count]
    arms: dict[str, Cell]

    @property
    def trunk(self) -> str:
        """The longest duration."""
        return list(self.steps)[-1]

    @property
    def tried(self) -> list[str]:
        """The durations that values are tried at: up to the middle; of an even number, up to the longer of two.

        One value serves all durations of a trunk, and the best rate falls with the duration. The shorter ones tell
        more, since too low a rate costs most there, and cost little: a decay is all that they add. Of two arms tuned at
        the longest, 8 times the shortest, the one whose rate noise had put 0.7 octaves lower was level with the other
        there, and 0.17 nats behind at the shortest. An arm was tuned at the middle alone, twice the shortest: there its
        rate was the best, and at the shortest 0.04 nats behind a rate 0.8 octaves higher (one seed).
        """
        return list(self.steps)[: len(self.steps) // 2 + 1]


@dataclass(frozen=True)
class Outline:
    """What the jobs of a ladder are made of.

    Args:
        baseline: the arm whose ρ are 1
        sizes: name → size, ascending
        tokens_per_step: over all processes
        decay: share of a duration in which the rate falls
        warmup: share of the longest duration in which the rate rises
        seeds: of the compared jobs
        tune: the tuned setting; None: nothing is tuned
        tries: number of values that are tried first
        tuned_sizes: at which arms are tuned
    """

    baseline: str
    sizes: dict[str, Size]
    tokens_per_step: Count
    decay: ProperFraction
    warmup: ProperFraction
    seeds: tuple[Seed, ...]
    tune: str | None = None
    tries: Count = 5
    tuned_sizes: tuple[str, ...] = ()

    def as_plain(self) -> dict[str, Any]:
        """In the format of plan.json."""
        return asdict(self)

    def warmup_steps(self, size: str) -> int:
        """The same for all durations of a size, whose plateaus are one."""
        steps = self.sizes[size].steps
        return max(1, round(self.warmup * steps[self.sizes[size].trunk]))

    def decay_steps(self, size: str, duration: str) -> int:
        return max(1, round(self.decay * self.sizes[size].steps[duration]))

    def branch(self, size: str, duration: str) -> int:
        """The last step before the decay of a duration."""
        return self.sizes[size].steps[duration] - self.decay_steps(size, duration)

    @property
    def tuning_seed(self) -> int:
        """A seed that is not compared: one that chose a value flatters it."""
        return max(self.seeds) + 1


def outline_of(plan: Mapping[str, Any]) -> Outline:
    """The outline in a plan.

    Raises:
        ConfigError: it is missing or damaged, or not all jobs are of it
    """
    outline = read_settings(Outline, plan.get(KEY), KEY)
    check_jobs(plan, outline)
    return outline


def check_jobs(plan: Mapping[str, Any], outline: Outline) -> None:
    """Refuse jobs that this outline cannot have made.

    Raises:
        ConfigError: a job lacks something, or names no cell of the ladder
    """
    for job in plan["jobs"]:
        of = outline.sizes.get(job.get("size", ""))
        known = of is not None and job.get("arm") in of.arms and job.get("duration") in of.steps
        tried = isinstance(job.get("tries"), dict) and (job.get("stage") != TUNE or len(job["tries"]) == 1)
        if not known or not tried or not {"stage", "seed", "parameters", "tokens"} <= job.keys():
            rule = f"job {job['job']} is of no arm, size and duration of the ladder"
            raise ConfigError("plan.json", "…", rule, "Correct it, or start a new ladder in another folder")


def schedule(steps: int, warmup: int, decay: int) -> list[str]:
    """Overrides of warm-up, plateau and decay to 0, without a best checkpoint, which nothing reads."""
    how = ["scheduler=warmup_stable_decay", f"scheduler.warmup={warmup}", f"scheduler.decay={decay}"]
    return [*how, f"trainer.max_steps={steps}", "callbacks.checkpoint=null"]


def tries(outline: Outline, size: str, arm: str, values: list[float], first: int) -> list[Job]:
    """The jobs that try values of the tuned setting: for each a trunk of the middle duration, and its decays."""
    jobs: list[Job] = []
    for value in values:
        place, tried = (size, arm, outline.tuning_seed), {str(outline.tune): value}
        jobs += _trunk(outline, place, outline.sizes[size].tried, tried, TUNE, first + len(jobs))
    return jobs


def compared(outline: Outline, tuned: Mapping[tuple[str, str], float], first: int) -> list[Job]:
    """The jobs of the law: each trunk, followed by its decays.

    Args:
        outline: of the ladder
        tuned: size and arm → value of the tuned setting; empty if nothing is tuned
        first: number of the first job
    """
    jobs: list[Job] = []
    for size, arm, seed in _trunks(outline):
        own = {str(outline.tune): tuned[size, arm]} if outline.tune else {}
        jobs += _trunk(outline, (size, arm, seed), outline.sizes[size].steps, own, COMPARE, first + len(jobs))
    return jobs


def _trunk(
    outline: Outline, place: Trunk, durations: Iterable[str], tried: Mapping[str, float], stage: str, first: int
) -> list[Job]:
    """The longest of some durations, which keeps a checkpoint for each shorter one, and the decays of those."""
    *shorter, longest = durations
    keep = [outline.branch(place[0], duration) for duration in shorter]
    jobs = [_job(outline, place, longest, tried) | {"job": first, "stage": stage}]
    jobs[0]["overrides"] += [milestones(keep)] if keep else []
    for number, (duration, step) in enumerate(zip(shorter, keep, strict=True), first + 1):
        branch = {"job": number, "stage": stage, "after": first, "from_step": step}
        jobs.append(_job(outline, place, duration, tried) | branch)
    return jobs


def _trunks(outline: Outline) -> Iterator[Trunk]:
    """Size, arm and seed of each; the largest last, so that a mistake shows early."""
    for size, of in outline.sizes.items():
        for seed in outline.seeds:
            for arm in of.arms:
                yield size, arm, seed


def milestones(steps: list[int]) -> str:
    """The override that keeps checkpoints of these steps."""
    return f"++callbacks.milestones={{_target_:{MILESTONES},steps:[{','.join(map(str, steps))}]}}"


def _job(outline: Outline, of: Trunk, duration: str, tried: Mapping[str, float]) -> Job:
    size, arm, seed = of
    cell, steps = outline.sizes[size].arms[arm], outline.sizes[size].steps[duration]
    shape = schedule(steps, outline.warmup_steps(size), outline.decay_steps(size, duration))
    values = [f"{path}={value!r}" for path, value in tried.items()]
    place = {"size": size, "duration": duration, "parameters": cell.parameters}
    overrides = [*cell.overrides, *shape, *values, f"seed={seed}"]
    tokens = steps * outline.tokens_per_step
    return {"arm": arm, "seed": seed, **place, "tokens": tokens, "tries": dict(tried), "overrides": overrides}


ROUNDS = 4  # of further tries at a size, after which an arm counts as not tuned
STEEPEST = -0.5  # of log rate over log N, which grows with the square of the width: AdamW without rules of width
Place = tuple[str, str]  # size and arm


def more(directory: Path, plan: Mapping[str, Any], results: Mapping[int, Result]) -> list[Job]:
    """The jobs that follow, of ``blockwright.designs``.

    Args:
        directory: of the ladder
        plan: contents of its plan.json
        results: number → result of each of its jobs
    """
    outline = outline_of(plan)
    first = 1 + max(job["job"] for job in plan["jobs"])
    if any(job.get("stage") == COMPARE for job in plan["jobs"]):
        return []
    tried = tried_of(plan, results)
    jobs: list[Job] = []
    for size in outline.tuned_sizes:
        jobs += _further(outline, size, {arm: tried[size, arm] for arm in outline.sizes[size].arms}, first + len(jobs))
    return jobs or compared(outline, values(outline, tuned_of(outline, tried)), first)


def _further(outline: Outline, size: str, of: Mapping[str, list[Try]], first: int) -> list[Job]:
    """The next round of a size."""
    jobs: list[Job] = []
    for arm, further in next_round(of, outline.tries, ROUNDS, SD_OF_RUN).items():
        jobs += tries(outline, size, arm, further, first + len(jobs))
    return jobs


def tried_of(plan: Mapping[str, Any], results: Mapping[int, Result]) -> dict[Place, list[Try]]:
    """Size and arm → what was tried, with the mean loss of its durations; a lost job has an infinite loss."""
    losses: dict[Place, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for job in plan["jobs"]:
        if job.get("stage") == TUNE:
            (value,) = job["tries"].values()
            loss = loss_of(results[job["job"]].value(plan["metric"]))
            losses[job["size"], job["arm"]][float(value)].append(loss)
    return {place: [Try(value, fmean(of)) for value, of in each.items()] for place, each in losses.items()}


@dataclass(frozen=True)
class Tuned:
    """An arm that was tuned at a size.

    Args:
        tries: all of them
        fit: of them
    """

    tries: tuple[Try, ...]
    fit: Fit


def tuned_of(outline: Outline, tried: Mapping[Place, list[Try]]) -> dict[Place, Tuned]:
    """Size and arm → its tuning."""
    return {
        place: Tuned(tuple(each), tuning.fit(each)) for place, each in tried.items() if place[0] in outline.tuned_sizes
    }


def common_of(outline: Outline, tuned: Mapping[Place, Tuned], sd_of_run: float) -> tuple[Common, ...]:
    """What tuning leaves: at each tuned size of an arm; beyond, where values follow from those, the mean of these.

    Args:
        outline: of the ladder
        tuned: size and arm → its tuning
        sd_of_run: of a training, without what all arms of its seed have in common
    """
    return spread(outline, {place: of.fit.left(sd_of_run) for place, of in tuned.items()})


def spread(outline: Outline, left: Mapping[Place, Left]) -> tuple[Common, ...]:
    """What tuning leaves at each size, given what it leaves where arms are tuned: ``common_of``."""
    of_arms: dict[str, dict[str, Left]] = defaultdict(dict)
    for (size, arm), of in left.items():
        of_arms[arm][size] = of
    found = []
    for arm, own in of_arms.items():
        every = sum(own.values(), Left())
        beyond = Left(every.variance / len(own), every.dof)
        found += [Common(arm, frozenset({size}), left) for size, left in own.items()]
        found.append(Common(arm, frozenset(outline.sizes.keys() - own.keys()), beyond))
    return tuple(found)


def values(outline: Outline, tuned: Mapping[Place, Tuned]) -> dict[Place, float]:
    """Size and arm → value: the vertex where an arm was tuned; beyond, from an arm's mean along a common slope.

    The slope, of log value over log N, is one for all arms: with an arm's own, the noise of two vertices at sizes near
    each other came to two octaves at the largest. A rate falls with N, by an octave a doubling of the width at most.
    """
    known: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for size in outline.tuned_sizes:
        for arm, cell in outline.sizes[size].arms.items():
            known[arm].append((math.log(cell.parameters), math.log(tuned[size, arm].fit.vertex)))
    # The least-squares slope of parallel lines, each through points of its own; 0 of one point each
    lines = list(known.values())
    centred = [(x - x0, y - y0) for points in lines for x0, y0 in [_mean(points)] for x, y in points]
    spread = math.fsum(x * x for x, _ in centred)
    slope = math.fsum(x * y for x, y in centred) / spread if spread else 0.0
    slope = min(0.0, max(STEEPEST, slope)) if outline.tune == RATE else slope
    found = {}
    for size, of in outline.sizes.items():
        for arm, cell in of.arms.items():
            x, y = _mean(known[arm])
            beyond = math.exp(y + slope * (math.log(cell.parameters) - x))
            found[size, arm] = tuned[size, arm].fit.vertex if size in outline.tuned_sizes else beyond
    return found


def _mean(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    return math.fsum(x for x, _ in points) / len(points), math.fsum(y for _, y in points) / len(points)
