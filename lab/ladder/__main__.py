"""``blockwright ladder NAME [OVERRIDE …]``: compare arms by one scaling law, from a definition to its report."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from blockwright.lab.card import scaled
from blockwright.lab.definitions import refuse_overrides
from blockwright.lab.ladder import definition, planning, report
from blockwright.lab.ladder.design import Outline
from blockwright.lab.ladder.planning import Plan
from blockwright.lab.sweep import launcher
from blockwright.lab.sweep import plan as plans
from blockwright.lab.sweep.runner import resume_command, run_plan
from blockwright.registry import ConfigError
from blockwright.registry.command import Parser, read_words, run_command
from blockwright.registry.errors import require
from blockwright.registry.printing import show

USAGE = """\
blockwright ladder                                      list conf/ladder and those of plug-ins
blockwright ladder NAME [KEY=VALUE …] [OVERRIDE …] [--plan-only]
blockwright ladder DIR [--at FLOPS | --at PARAMETERS,TOKENS]   the report of a ladder, and its forecast of a size

NAME       a file of conf/ladder or of a plug-in, or the path of one
seeds      how many, or which: seeds=3, seeds=[1,2,3]
durations  tokens per parameter of each size: durations=[5,10,20]; or tokens=[1e6,2e6], the same for all sizes
decay      share of a duration in which the rate falls to 0; warmup: of the longest, in which it rises
tune       the setting to tune, and the number of values to try first: tune='{optimizer.lr: 5}'; null for none
tune_sizes number of sizes at which arms are tuned, smallest first; larger ones take values from these
workers    jobs at a time, each with its share of the cores
launcher   of Hydra, that runs the jobs instead: joblib, …; its options are hydra.launcher.KEY=VALUE
match, by, tol, baseline, metric    instead of the definition's
OVERRIDE   any other KEY=VALUE is for all arms, as blockwright train takes it: data=text data.batch_size=8

Every arm is matched at every size before the first job. The longest duration of an arm, size and seed is a trunk; the
shorter ones resume from its checkpoints with a decay of their own. --plan-only stops there, with the plan written.
"""
SHORTEST = 100  # steps, below which a duration does not follow the law


@dataclass(frozen=True)
class Request:
    """A parsed and validated command line."""

    name: str
    changes: dict[str, str]
    overrides: list[str]
    plan_only: bool
    launcher: dict[str, Any]
    at: str | None


def read(arguments: Sequence[str]) -> Request:
    """Parse a command line.

    Raises:
        ConfigError: no name, an unknown flag, an argument that is not KEY=VALUE
    """
    parser = Parser(prog="blockwright ladder")
    parser.add_argument("--plan-only", action="store_true")
    parser.add_argument("--at", metavar="SIZE")
    flags, words = read_words(parser, arguments, (*definition.OF_COMMAND_LINE, launcher.KEY), n_names=1)
    words, of_launcher = launcher.take(words)
    if not words.names:
        known = ", ".join(definition.FILES.names())
        raise ConfigError("NAME", None, "must name a ladder", f"Known: {known}")
    name = words.names[0]
    refuse_overrides(words.overrides, "ladder", name, definition.KEYS)
    if Path(name).is_dir() and (words.settings or words.overrides or flags.plan_only):
        raise ConfigError(
            "DIR", name, "is the folder of a ladder, which is only reported", "Write --at SIZE, or nothing"
        )
    if flags.at is not None and not Path(name).is_dir():
        raise ConfigError("--at", flags.at, f"asks a ladder that has run, and {name} is no folder", "Name its folder")
    return Request(name, words.settings, words.overrides, flags.plan_only, of_launcher, flags.at)


def rungs_table(plan: Plan) -> Table:
    """The planned arms at each size, with their steps and tokens."""
    table = Table(box=box.SIMPLE_HEAD, highlight=False)
    for heading in ("size", "arm", "parameters", "FLOPs a token", "steps", "tokens", "changed"):
        table.add_column(heading, justify="left" if heading in ("size", "arm", "changed") else "right", overflow="fold")
    for size, of in plan.outline.sizes.items():
        steps = " ".join(map(str, of.steps.values()))
        tokens = " ".join(scaled(each * plan.outline.tokens_per_step) for each in of.steps.values())
        for i, (sized, (arm, cell)) in enumerate(zip(plan.sized[size], of.arms.items(), strict=True)):
            changed = ", ".join(f"{path} {old} → {new}" for path, (old, new) in sized.changed.items())
            figures = [scaled(cell.parameters), scaled(cell.flops)]
            first = (size, steps, tokens) if i == 0 else ("", "", "")
            table.add_row(Text(first[0]), Text(arm), *figures, first[1], first[2], Text(changed))
    return table


def summary(plan: Plan) -> str:
    """What will run, in lines."""
    own, compared = plan.outline, _compared(plan.outline)
    lines = [f"{compared} jobs of {len(own.seeds)} seeds are compared by {plan.ladder.arms.metric}"]
    if own.tune:
        sizes = ", ".join(own.tuned_sizes)
        lines.append(f"first, {len(plan.jobs)} jobs tune {own.tune} at size {sizes}, and more where that asks for it")
    lines[0] += f", {plan.ladder.settings.workers} at a time"
    if math.isinf(seen := planning.sees(own)):
        lines.append("so few sizes and seeds give a speed-up no interval: add seeds")
    else:
        usual = f"at the noise usual for text{', with what tuning usually leaves' if own.tune else ''}"
        lines.append(f"it sees a speed-up of {100 * (seen - 1):.2g} % four times in five, {usual}")
    short = [f"{s}: {min(of.steps.values())}" for s, of in own.sizes.items() if min(of.steps.values()) < SHORTEST]
    if short:
        lines.append(
            f"durations below {SHORTEST} steps do not follow a law well; the shortest by size: {', '.join(short)}"
        )
    return "\n".join(lines)


def _compared(outline: Outline) -> int:
    return len(outline.seeds) * sum(len(of.arms) * len(of.steps) for of in outline.sizes.values())


def main(arguments: Sequence[str]) -> int:
    """Run the command.

    Returns:
        0 when all jobs have ended, with or without success; 75 when stopped by a signal

    Raises:
        ConfigError: an error in the command line, the definition or an arm
    """
    if {"-h", "--help"} & set(arguments):
        print(USAGE, end="")
        return 0
    if not arguments:
        show(definition.FILES.table("blockwright ladder"))
        return 0
    asked = read(arguments)
    if Path(asked.name).is_dir():
        report.show(Path(asked.name), asked.at)
        return 0
    require("lab", "scipy", "threadpoolctl", *(() if asked.plan_only else ("jinja2",)), path="blockwright.lab.ladder")
    plan = planning.make(definition.read(asked.name, asked.changes), asked.overrides)
    show(rungs_table(plan))
    print(summary(plan), flush=True)
    written = plan.as_plain(["blockwright", "ladder", *arguments]) | asked.launcher
    directory = plans.begin(plan.log_dir, "ladder", plan.ladder.arms.name, written)
    if asked.plan_only:
        print(f"{directory / plans.PLAN}: nothing was started. Run it: {resume_command(directory)}", flush=True)
        return 0
    return run_plan(directory)


if __name__ == "__main__":
    sys.exit(run_command(main))
