"""Verdicts on arms that do not differ, from trainings: how often a comparison is wrong.

    python -m benchmarks.same_arms train     # the bank: 180 runs of 2.4 CPU-seconds; resumes where it was stopped
    python -m benchmarks.same_arms           # 800 ablations of runs from the bank, and their verdicts

The bank, benchmarks/results/same_arms.csv, has the losses of experiment=small_text with RoPE's two pairings, which are
permutations of each other's weights, so that all runs are draws of one distribution. 28 orders of the data have four
runs each: both pairings with the order's own initial weights, and both with others; they are arms that share seeds.
Further orders have one run each, for arms that share none.

An ablation is planned by the lab, its jobs get losses from the bank, and ``blockwright verdict`` reads its folder.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import random
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blockwright.lab.ablation import definition, planning
from blockwright.lab.calibration.control import METRIC
from blockwright.lab.calibration.runs import all_losses
from blockwright.lab.report import terminal
from blockwright.lab.sweep import plan as plans
from blockwright.registry.folder import write_json
from blockwright.training.result import RESULTS

BANK = Path(__file__).resolve().parent / "results" / "same_arms.csv"
ABLATION = Path(__file__).resolve().parent / "same_arms.yaml"
ORDERS, PAIRED = 96, 28  # of the data; those with four runs
ABLATIONS = 200  # of each number of seeds
SEEDS = (3, 5)
SAME_WEIGHTS, OTHERS, FURTHER = 0, 1000, 2000  # added to the order of the data for the seed of the weights
Key = tuple[str, int, int]  # pairing, seed of the weights, seed of the order
ARMS = (("half_split", SAME_WEIGHTS), ("interleaved", SAME_WEIGHTS), ("half_split", OTHERS), ("interleaved", FURTHER))


# --- the bank ---------------------------------------------------------------------------------------------------------


def wanted() -> Iterator[Key]:
    """The runs of the bank."""
    for order in range(ORDERS):
        for pairing, more in ARMS if order < PAIRED else ARMS[:1]:
            yield pairing, order + more, order


def overrides(key: Key) -> tuple[str, ...]:
    """Of blockwright train."""
    pairing, weights, order = key
    return "experiment=small_text", f"model.position.pairing={pairing}", f"seed={weights}", f"data.seed={order}"


def bank(file: Path = BANK) -> dict[Key, float]:
    """The losses that are recorded."""
    if not file.exists():
        return {}
    rows = csv.reader(line for line in file.read_text().splitlines() if not line.startswith("#"))
    return {(pairing, int(weights), int(order)): float(loss) for pairing, weights, order, loss in rows}


def train(workers: int) -> None:
    """Run what the bank lacks, and append each loss at once."""
    known = bank()
    waiting = {overrides(key): key for key in wanted() if key not in known}
    with BANK.open("a") as file:
        write = csv.writer(file, lineterminator="\n")
        for run, loss in all_losses(waiting, workers):
            write.writerow([*waiting[run], loss])
            file.flush()


# --- ablations of it --------------------------------------------------------------------------------------------------

Draw = Mapping[tuple[int, int], float]  # arm and seed → loss


def paired(losses: Mapping[Key, float], rng: random.Random, seeds: int) -> Draw:
    """Four arms that share the orders of the data, and two by two the initial weights."""
    whole = [
        order for order in range(PAIRED) if all((pairing, order + more, order) in losses for pairing, more in ARMS)
    ]
    orders, arms = rng.sample(whole, seeds), rng.sample(ARMS, len(ARMS))
    return {
        (i, seed): losses[pairing, order + more, order]
        for i, (pairing, more) in enumerate(arms)
        for seed, order in enumerate(orders)
    }


def apart(losses: Mapping[Key, float], rng: random.Random, seeds: int) -> Draw:
    """Four arms that share neither orders nor weights."""
    own = [loss for (pairing, weights, order), loss in losses.items() if (pairing, weights) == ("half_split", order)]
    drawn = iter(rng.sample(own, len(ARMS) * seeds))
    return {(i, seed): next(drawn) for i in range(len(ARMS)) for seed in range(seeds)}


DRAWS = {"share seeds": paired, "share none": apart}


def plan(seeds: int) -> dict[str, Any]:
    """The contents of plan.json."""
    return planning.make(definition.read(str(ABLATION), {"seeds": str(seeds)})).as_plain(["blockwright", "ablate"])


def write(folder: Path, plan: Mapping[str, Any], draw: Draw) -> None:
    """An ablation whose jobs have ended with the losses of a draw."""
    plans.write(folder, plan)
    names = [arm["name"] for arm in plan["arms"]]
    for job in plan["jobs"]:
        loss = draw[names.index(job["arm"]), job["seed"]]
        figures = {METRIC: {"unit": "nats per token", "better": "less"}}
        result = {"status": "completed", "metrics": {METRIC: loss}, "figures": figures}
        (folder / str(job["job"])).mkdir()
        write_json(folder / str(job["job"]) / RESULTS, result)


def kinds(folder: Path) -> list[str]:
    """The verdict on each arm, by ``blockwright verdict``."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        terminal.verdict_command([str(folder), "--json"])
    return [each["kind"] for each in json.loads(said.getvalue())["verdicts"]]


@dataclass(frozen=True)
class Share:
    """How many ablations called an arm better or worse."""

    wrong: int
    of: int

    @property
    def value(self) -> float:
        return self.wrong / self.of


def wrong(losses: Mapping[Key, float], how: str, seeds: int, number: int = ABLATIONS) -> Share:
    """Draw ablations, and count those that see a difference.

    Args:
        losses: of the bank
        how: of ``DRAWS``
        seeds: of each ablation
        number: of ablations
    """
    rng, planned, seen = random.Random(f"{how} {seeds}"), plan(seeds), 0
    with tempfile.TemporaryDirectory() as folder:
        for i in range(number):
            write(Path(folder, str(i)), planned, DRAWS[how](losses, rng, seeds))
            seen += any(kind in ("better", "worse") for kind in kinds(Path(folder, str(i))))
    return Share(seen, number)


def main(arguments: Sequence[str]) -> None:
    """Train the bank, or draw from it."""
    if list(arguments) == ["train"]:
        train(1)
        return
    losses = bank()
    print(f"{len(losses)} runs, {ABLATIONS} ablations of {len(ARMS)} arms each")
    for how in DRAWS:
        for seeds in SEEDS:
            share = wrong(losses, how, seeds)
            print(f"arms that {how}, {seeds} seeds: {share.wrong} of {share.of} see a difference ({share.value:.1%})")


if __name__ == "__main__":
    main(sys.argv[1:])
