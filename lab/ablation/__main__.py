"""``blockwright ablate NAME [OVERRIDE …]``: run a matched comparison, from its definition to its report."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from blockwright.lab.ablation import definition, forecast, planning
from blockwright.lab.ablation.planning import Plan
from blockwright.lab.card import scaled
from blockwright.lab.definitions import refuse_overrides
from blockwright.lab.match.table import arms_table
from blockwright.lab.report import build
from blockwright.lab.sweep import launcher
from blockwright.lab.sweep import plan as plans
from blockwright.lab.sweep.runner import resume_command, run_plan
from blockwright.registry import ConfigError
from blockwright.registry.command import Parser, read_words, run_command
from blockwright.registry.errors import require
from blockwright.registry.printing import show

USAGE = """\
blockwright ablate                                      list conf/ablation and those of plug-ins
blockwright ablate NAME [KEY=VALUE …] [OVERRIDE …] [--plan-only]

NAME       a file of conf/ablation or of a plug-in, or the path of one
seeds      how many, or which: seeds=3, seeds=[1,2,3]; or see=0.01, a difference that is to be seen, with pairs=3
           where the noise is not known; or hours=1; or until=verdict, with looks=[4,8,12,16], spend=pocock, hours=1
tune       tries of the learning rate for each arm: tune=5; tune={optimizer.lr: 5, model.init.std: 3}; tune=null
tune_seeds seeds of each of these tries, whose mean is fitted
tuned_by   figure that judges these tries, where it is not the compared one
within     difference below which arms count as the same
tokens     that each job trains on; becomes trainer.max_steps
workers    jobs at a time, each with its share of the cores
launcher   of Hydra, that runs the jobs instead: joblib, …; its options are hydra.launcher.KEY=VALUE
match, by, tol, baseline, lr, metric, direction    instead of the definition's
OVERRIDE   any other KEY=VALUE is for all arms, as blockwright train takes it: data=text optimizer.lr=0.02

Every arm (one side of the comparison) is composed, built on the meta device and matched before the first job.
--plan-only stops there, with the plan written.
"""


@dataclass(frozen=True)
class Request:
    """A parsed and validated command line."""

    name: str
    changes: dict[str, str]
    overrides: list[str]
    plan_only: bool
    launcher: dict[str, Any]


def read(arguments: Sequence[str]) -> Request:
    """Parse a command line.

    Raises:
        ConfigError: no name, an unknown flag, an argument that is not KEY=VALUE
    """
    parser = Parser(prog="blockwright ablate")
    parser.add_argument("--plan-only", action="store_true")
    flags, words = read_words(parser, arguments, (*definition.OF_COMMAND_LINE, launcher.KEY), n_names=1)
    words, of_launcher = launcher.take(words)
    if not words.names:
        raise ConfigError("NAME", None, "must name an ablation", f"Known: {', '.join(definition.names())}")
    name = words.names[0]
    refuse_overrides(words.overrides, "ablation", name, definition.KEYS)
    return Request(name, words.settings, words.overrides, flags.plan_only, of_launcher)


def plan_table(plan: Plan) -> Table:
    """The planned arms, with what was matched, their jobs and tokens, as far as they are known."""
    jobs = {one.arm.name: forecast.jobs_of(plan, one.arm.name) for one in plan.arms}
    unknown = "by epochs" if plan.tokens_per_step else "not counted"
    tokens = [scaled(jobs[name] * of) if of is not None else unknown for name, of in plan.tokens.items()]
    more = {"jobs": [str(jobs[one.arm.name]) for one in plan.arms], "tokens": tokens}
    return arms_table(plan.arms, plan.definition.baseline, plan.arms[0].arm.context, more)


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
        show(definition.FILES.table("blockwright ablate"))
        return 0
    asked = read(arguments)
    if asked.plan_only:
        require("lab", "scipy", path="blockwright.lab.ablation")
    else:
        build.need_packages()
    plan = planning.make(definition.read(asked.name, asked.changes), asked.overrides)
    d = plan.definition
    show(plan_table(plan))
    each = f" of {plan.tokens_per_step:,} tokens each" if plan.tokens_per_step else ""
    steps = f"{plan.steps:,} steps{each}" if plan.steps > 0 else "steps by epochs"
    steps += "" if len(set(plan.tokens.values())) == 1 else " in the baseline, but different in some arms"
    print(f"{forecast.jobs(plan)}; {steps}, {d.workers} at a time; compared by {d.metric}")
    print(forecast.seen(plan), flush=True)
    written = plan.as_plain(["blockwright", "ablate", *arguments]) | asked.launcher
    directory = plans.begin(plan.log_dir, "ablation", d.name, written)
    if asked.plan_only:
        print(f"{directory / plans.PLAN}: nothing was started. Run it: {resume_command(directory)}", flush=True)
        return 0
    return run_plan(directory)


if __name__ == "__main__":
    sys.exit(run_command(main))
