"""``blockwright transfer base=64 to=256``: what a learning rate costs that is tuned on a narrower model."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Ge, Le

from blockwright.lab.statistics.tuning import RATE, TUNE, octaves
from blockwright.lab.sweep import launcher
from blockwright.lab.sweep import plan as plans
from blockwright.lab.sweep.runner import run_plan
from blockwright.lab.transfer import design
from blockwright.lab.transfer.design import BASE, RULES, STANDARD
from blockwright.registry import ConfigError
from blockwright.registry.command import Parser, read_words, run_command
from blockwright.registry.errors import require
from blockwright.registry.ranges import Count
from blockwright.registry.reading import keys, typed
from blockwright.registry.reading import read as read_settings

if TYPE_CHECKING:
    from blockwright.training.configuration.run import Run

USAGE = """\
blockwright transfer base=64 to=256 [grow={…}] [tries=5] [seeds=3] [workers=1] [OVERRIDE …] [--plan-only]
blockwright transfer DIR

base, to   d_model of the smaller and of the larger model
grow       sizes of the smaller model that grow with d_model: grow='{attention: {n_heads: 4}, ffn: {d_ff: 256}}'
tries      rates of each model on one seed, an octave apart, around optimizer.lr; more follow where they are needed
seeds      fresh ones, on which the larger model is trained at the transferred rate, at its own, and without rules
workers    jobs at a time
launcher   of Hydra, that runs the jobs instead: joblib, …; its options are hydra.launcher.KEY=VALUE
OVERRIDE   as blockwright train takes it: optimizer=adamw optimizer.lr=0.01 trainer.max_steps=70; the rules are those
           of parametrisation=width unless another is chosen
DIR        of a transfer that was stopped: it is resumed; of one that has ended: its table

Prints the best rates, how far they moved, the excess loss of the transferred rate over the tuned one, and the loss of
tuned standard parametrisation beside it; writes transfer.json.
"""


@dataclass(frozen=True)
class Settings:
    """The command's own settings; see USAGE."""

    base: Count
    to: Count
    grow: dict[str, Any] = field(default_factory=dict)
    tries: Annotated[int, Ge(3), Le(99)] = 5
    seeds: Annotated[int, Ge(1), Le(10_000)] = 3
    workers: Count = 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. A refusal prints one message and returns 64."""
    return run_command(_run, arguments)


def _run(arguments: Sequence[str]) -> int:
    if {"-h", "--help"} & set(arguments):
        print(USAGE, end="")
        return 0
    parser = Parser(prog="blockwright transfer")
    parser.add_argument("--plan-only", action="store_true")
    flags, words = read_words(parser, arguments, (*keys(Settings), launcher.KEY), n_names=1)
    words, of_launcher = launcher.take(words)
    require("lab", "scipy", path="blockwright.lab.transfer")
    if words.names:
        directory = Path(words.names[0])
        if not directory.is_dir():
            raise ConfigError(
                "DIR", str(directory), "there is no such folder", "Name that of a transfer, or write base=64 to=256"
            )
        if words.settings or words.overrides:
            given = " ".join([*words.settings, *words.overrides])
            raise ConfigError("command line", given, "is in the plan of the folder", "Leave it out")
    else:
        settings = read_settings(Settings, typed(Settings, words.settings))
        command = ["blockwright", "transfer", *arguments]
        directory = _planned(settings, words.overrides, {"command": shlex.join(command), **of_launcher})
    plan = plans.read(directory)
    if plan["kind"] != "transfer":
        raise ConfigError("DIR", str(directory), f"is a sweep of kind {plan['kind']}", "Name one of a transfer")
    if flags.plan_only:
        print(f"{directory / plans.PLAN}: nothing was started. Run it: blockwright transfer {directory}")
        return 0
    return run_plan(directory)


def _planned(settings: Settings, overrides: Sequence[str], more: Mapping[str, Any]) -> Path:
    """Check every arm, and write the plan.

    Args:
        settings: of the command
        overrides: for all arms
        more: the command and its launcher, for the plan

    Raises:
        ConfigError: a width cannot be composed, or is no larger than the base
    """
    if settings.to <= settings.base:
        raise ConfigError("to", settings.to, f"must be wider than base ({settings.base})", "Write e.g. base=64 to=256")
    _refuse_set(overrides)
    from blockwright.lab.widths import Family, has_rules

    family = Family(settings.base, settings.grow)
    rules = list(overrides) if has_rules(overrides) else [*overrides, "parametrisation=width"]
    plain = [o for o in overrides if not o.lstrip("+").startswith("parametrisation")]
    arms = {
        BASE: [*plain, *family.overrides(settings.base, False)],
        RULES: [*rules, *family.overrides(settings.to, True)],
        STANDARD: [*plain, *family.overrides(settings.to, False)],
    }
    runs = {name: _checked(each) for name, each in arms.items()}
    rate = runs[BASE].optimizer.get("lr")
    if not isinstance(rate, float | int):
        raise ConfigError(RATE, rate, "is the rate that is tuned", "Write optimizer.lr=0.01")
    plan: dict[str, Any] = {
        **more,
        "kind": "transfer",
        "name": f"{settings.base} to {settings.to}",
        "metric": "val/loss",
        "direction": "minimize",
        "workers": settings.workers,
        "widths": [settings.base, settings.to],
        "tune": {RATE: settings.tries},
        "seeds_planned": settings.seeds,
        "arms": [{"name": name, "overrides": each} for name, each in arms.items()],
    }
    rates = octaves(rate, settings.tries)
    jobs = [design.job(plan, arm, arm, TUNE, runs[BASE].seed, each) for arm in arms for each in rates]
    plan["jobs"] = [{"job": i, **each} for i, each in enumerate(jobs)]
    return plans.begin(runs[BASE].paths["log_dir"], "transfer", "", plan)


def _refuse_set(overrides: Sequence[str]) -> None:
    for override in overrides:
        key, _, value = override.lstrip("+~").partition("=")
        if key == "model.d_model":
            raise ConfigError(key, value, "is set by base and to", "Leave it out")
        if key == "hparams_search" or key.startswith(("hydra.", "hydra/")):
            raise ConfigError(key, value, "is set by the transfer for each job", "Leave it out")


def _checked(overrides: Sequence[str]) -> Run:
    from blockwright.training.configuration import placeholders
    from blockwright.training.configuration.composing import compose_config
    from blockwright.training.entry.parse import parse_settings
    from blockwright.training.entry.preflight import check  # Lightning, which --help does without

    run = parse_settings(compose_config(overrides, output_dir=placeholders.ANY))
    check(run)
    return run


if __name__ == "__main__":
    sys.exit(main())
