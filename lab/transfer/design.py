"""A transfer: its jobs, what they have measured, and its report.

The rate is tuned at two widths, then compared on fresh seeds at the larger one.

Three arms are tuned: the small model, the large one under rules of width, and the large one in standard
parametrisation. Then the large model is trained with the best rate of the small one, and with its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from blockwright.lab.statistics.intervals import Comparison, compare, interval
from blockwright.lab.statistics.tuning import COMPARE, ENDS, RATE, SD_OF_RUN, TUNE, Fit, Try, fit, loss_of, next_round
from blockwright.registry import ConfigError
from blockwright.registry.errors import require
from blockwright.registry.folder import write_json
from blockwright.registry.printing import show
from blockwright.registry.ranges import Count
from blockwright.registry.reading import keys
from blockwright.registry.reading import read as read_settings
from blockwright.training.result import Result

BASE, RULES, STANDARD = "base", "rules", "standard"  # arms that are tuned
TRANSFERRED = "transferred"  # the arm under rules at the rate of the base
ROUNDS = 3  # of two further tries for each arm, at most


@dataclass(frozen=True)
class Outline:
    """What a plan.json of a transfer has beside its arms and jobs.

    Args:
        widths: d_model of the smaller and of the larger model
        tune: number of the first rates
        seeds_planned: fresh seeds of the comparison
    """

    widths: tuple[Count, Count]
    tune: dict[str, Count]
    seeds_planned: Count


def more(directory: Path, plan: Mapping[str, Any], results: Mapping[int, Result]) -> list[dict[str, Any]]:
    """Further tries while an arm needs them, then the comparison; see ``lab.sweep.seams.Design``."""
    check(plan)
    if any(job["stage"] == COMPARE for job in plan["jobs"]):
        return []
    tried = tries(plan, results)
    seed = plan["jobs"][0]["seed"]
    further = next_round(tried, plan["tune"][RATE], ROUNDS, SD_OF_RUN)
    jobs = [job(plan, arm, arm, TUNE, seed, rate) for arm, each in further.items() for rate in each]
    if not jobs:
        rates = {arm: fit(each).vertex for arm, each in tried.items()}
        arms = {TRANSFERRED: (RULES, rates[BASE]), RULES: (RULES, rates[RULES]), STANDARD: (STANDARD, rates[STANDARD])}
        fresh = range(seed + 1, seed + 1 + plan["seeds_planned"])
        jobs = [job(plan, name, of, COMPARE, each, rate) for name, (of, rate) in arms.items() for each in fresh]
    first = len(plan["jobs"])
    return [{"job": first + i, **each} for i, each in enumerate(jobs)]


def check(plan: Mapping[str, Any]) -> None:
    """Refuse a plan that ``blockwright transfer`` cannot have made.

    Raises:
        ConfigError: it is damaged
    """
    outline = read_settings(Outline, {key: plan[key] for key in keys(Outline) if key in plan}, "plan.json")
    tried = {job.get("arm") for job in plan["jobs"] if job.get("stage") == TUNE}
    named = {arm["name"] for arm in plan.get("arms", [])}
    if RATE not in outline.tune or not {BASE, RULES, STANDARD} <= tried & named:
        raise _damaged("lacks an arm of the transfer, or its tries")
    for each in plan["jobs"]:
        of = {TUNE: (BASE, RULES, STANDARD), COMPARE: (TRANSFERRED, RULES, STANDARD)}.get(each.get("stage"), ())
        if each.get("arm") not in of or each.get("seed") is None or not each.get("tries", {}).get(RATE, 0) > 0:
            raise _damaged(f"job {each['job']} is of no arm, seed and rate of the transfer")


def _damaged(rule: str) -> ConfigError:
    return ConfigError("plan.json", "…", rule, "Correct it, or start a new transfer in another folder")


def job(plan: Mapping[str, Any], name: str, of: str, stage: str, seed: int, rate: float) -> dict[str, Any]:
    """One training.

    Args:
        plan: whose ``arms`` have the overrides
        name: arm of the job
        of: arm whose overrides it has
        stage: ``tune`` or ``compare``
        seed: of the run
        rate: peak learning rate
    """
    overrides = next(arm["overrides"] for arm in plan["arms"] if arm["name"] == of)
    settings = [*overrides, f"seed={seed}", f"{RATE}={rate!r}"]
    return {"overrides": settings, "arm": name, "seed": seed, "stage": stage, "tries": {RATE: rate}}


def tries(plan: Mapping[str, Any], results: Mapping[int, Result]) -> dict[str, list[Try]]:
    """Arm → the rates that were tried, with their losses; a run without one counts as diverged."""
    found: dict[str, list[Try]] = {}
    for each in plan["jobs"]:
        if each["stage"] == TUNE:
            loss = loss_of(results[each["job"]].value(plan["metric"]), plan["direction"] == "maximize")
            found.setdefault(each["arm"], []).append(Try(each["tries"][RATE], loss))
    return found


def fits(plan: Mapping[str, Any], results: Mapping[int, Result]) -> dict[str, Fit]:
    """Arm → its best rate."""
    return {arm: fit(each) for arm, each in tries(plan, results).items()}


FILE = "transfer.json"


def read(directory: Path, plan: Mapping[str, Any]) -> dict[str, Any]:
    """The answer of an ended transfer, as plain types.

    Returns:
        ``widths``; ``rates``: arm → ``best``, ``edge``, ``regret`` and ``tries``; ``octaves``: arm at the larger width
        → how far its best rate is from the base's; ``loss``: arm → mean, interval and number of seeds; ``excess``: loss
        of the transferred rate over the tuned one; ``standard``: loss of tuned standard parametrisation over the
        transferred rate; both with intervals, paired over seeds; null without a common seed

    Raises:
        ConfigError: the plan is damaged
    """
    check(plan)
    results = {job["job"]: Result.read(directory / str(job["job"])) for job in plan["jobs"]}
    best, tried = fits(plan, results), tries(plan, results)
    losses: dict[str, dict[int, float]] = {TRANSFERRED: {}, RULES: {}, STANDARD: {}}
    for job in plan["jobs"]:
        value = results[job["job"]].value(plan["metric"])
        if job["stage"] == COMPARE and value is not None:
            losses[job["arm"]][job["seed"]] = value
    return {
        "widths": plan["widths"],
        "metric": plan["metric"],
        "rates": {
            arm: {
                "best": each.vertex,
                "edge": each.edge,
                "regret": _finite(each.regret),
                "tries": {repr(t.value): _finite(t.loss) for t in sorted(tried[arm], key=lambda t: t.value)},
            }
            for arm, each in best.items()
        },
        "octaves": {arm: math.log2(best[arm].vertex / best[BASE].vertex) for arm in (RULES, STANDARD)},
        "loss": {arm: vars(interval(list(of.values()))) if of else None for arm, of in losses.items()},
        "excess": _difference(compare(losses[TRANSFERRED], losses[RULES])),
        "standard": _difference(compare(losses[STANDARD], losses[TRANSFERRED])),
    }


def _difference(found: Comparison | None) -> dict[str, Any] | None:
    return None if found is None else {**vars(found.difference), "p": found.p}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def write(directory: Path, answer: Mapping[str, Any]) -> Path:
    """Write it as ``transfer.json``, and return the path."""
    write_json(directory / FILE, answer)
    return directory / FILE


def table(answer: Mapping[str, Any]) -> Table:
    """A row for each arm."""
    small, large = answer["widths"]
    title = f"d_model {small} → {large}, {answer['metric']}"
    shown = Table("rate of", "best rate", "octaves from the base", "loss there", title=title)
    names = {BASE: f"base, {small}", RULES: f"rules, {large}", STANDARD: f"standard, {large}"}
    for arm, name in names.items():
        of = answer["rates"][arm]
        edge = f" ({ENDS[of['edge']]} tried)" if of["edge"] else ""
        moved = f"{answer['octaves'][arm]:+.2f}" if arm in answer["octaves"] else ""
        shown.add_row(name, f"{of['best']:.3g}{edge}", moved, _shown(answer["loss"].get(arm)))
    transferred = (f"rules, {large}, transferred", f"{answer['rates'][BASE]['best']:.3g}", "+0.00")
    shown.add_row(*transferred, _shown(answer["loss"][TRANSFERRED]))
    return shown


def lines(answer: Mapping[str, Any]) -> list[str]:
    """What the table means, in words."""
    said = [
        f"No verdict: the best rate of {arm} is the {ENDS[each['edge']]} tried."
        for arm, each in answer["rates"].items()
        if each["edge"]
    ]
    for key, text in (
        ("excess", "the transferred rate costs {} over the tuned one"),
        ("standard", "tuned standard parametrisation is {} above the transferred rate under rules"),
    ):
        if answer[key] is not None:
            said.append(text.format(f"{_shown(answer[key], '+')} nats"))
    return said


def _shown(of: Mapping[str, Any] | None, sign: str = "") -> str:
    if of is None:
        return ""
    half = "" if of["low"] is None else f" ± {(of['high'] - of['low']) / 2:.4f}"
    return f"{of['mean']:{sign}.4f}{half}"


def need_packages() -> None:
    """Of ``lab.sweep.seams.Ending``."""
    require("lab", "scipy", path="blockwright.lab.transfer")


def conclude(directory: Path, plan: Mapping[str, Any], results: Mapping[int, Result]) -> None:
    """Print the answer of a transfer and write it; of ``lab.sweep.seams.Ending``."""
    found = read(directory, plan)
    show(table(found))
    print(*lines(found), write(directory, found), sep="\n")
