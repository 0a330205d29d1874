"""``blockwright coordinates [OVERRIDE …] widths=64,128,256``: whether activations keep their size as a model grows."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Len
from rich.table import Table

from blockwright.registry import ConfigError
from blockwright.registry.command import Parser, read_words, run_command, strict_json
from blockwright.registry.printing import show
from blockwright.registry.ranges import Count
from blockwright.registry.reading import Remedy, keys, typed
from blockwright.registry.reading import read as read_settings

if TYPE_CHECKING:
    from blockwright.blocks.widths import Size, Slope
    from blockwright.training.configuration.run import Run

TOLERANCE = 0.1  # of the slope of changes under rules; seen are up to 0.08
OF_SCORES = 0.25  # above which largest scores grow: they are extremes, so their slopes scatter by 0.2
ROWS, LENGTH = 4, 32  # of the batch
USAGE = """\
blockwright coordinates [OVERRIDE …] [widths=64,128,256] [steps=4] [seeds=4] [grow={…}] [--json]

widths     values of model.d_model, at least two; the smallest is the base of parametrisation=width
steps      of the optimizer, on one batch of drawn tokens
seeds      of initial weights, over which sizes are averaged
grow       sizes of the smallest model that grow with d_model: grow='{attention: {n_heads: 4}, ffn: {d_ff: 256}}'
OVERRIDE   as blockwright train takes it: parametrisation=width optimizer=adamw optimizer.lr=3e-3 model/attention=kda

A row for each kind of activation: the slope of log |a| against log width at the start, and of log |change| after the
steps; 0 means that widths train alike. Under a parametrisation other than standard, exit code 1 if a change's slope is
beyond ±0.1, or that of largest scores above 0.25. Left out there are outputs that shrink by design (an embedding that
is multiplied by the root of d_model, the norm before a tied head, queries of heads that become wider) and routed
experts, whose change is mostly which of them a token goes to: the ffn around them is judged.
"""


@dataclass(frozen=True)
class Settings:
    """The command's own settings; see USAGE."""

    widths: Annotated[list[Count], Len(2), Remedy("Write widths=64,128,256")] = field(
        default_factory=lambda: [64, 128, 256]
    )
    steps: Count = 4
    seeds: Count = 4
    grow: dict[str, Any] = field(default_factory=dict)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. A refusal prints one message and returns 64."""
    return run_command(_run, arguments)


def _run(arguments: Sequence[str]) -> int:
    if {"-h", "--help"} & set(arguments):
        print(USAGE, end="")
        return 0
    parser = Parser(prog="blockwright coordinates")
    parser.add_argument("--json", action="store_true")
    flags, words = read_words(parser, arguments, keys(Settings))
    settings = read_settings(Settings, typed(Settings, words.settings))
    if len(set(settings.widths)) < 2:
        rule = "a slope needs two different widths"
        raise ConfigError("widths", settings.widths, rule, "Write widths=64,128,256")
    from blockwright.lab.widths import has_rules  # it imports Hydra

    rules = has_rules(words.overrides)
    found = check(words.overrides, settings, rules)
    off = {kind for kind, slope in found.items() if rules and is_beyond(kind, slope.change)}
    if flags.json:
        rows = {kind: slope._asdict() for kind, slope in found.items()}
        print(strict_json({"widths": settings.widths, "rules": rules, "slopes": rows, "beyond": sorted(off)}))
    else:
        show(_table(found, off))
        for note in _notes(words.overrides, settings) if off else ():
            print(note)
    return 1 if off else 0


def _notes(overrides: Sequence[str], settings: Settings) -> list[str]:
    """What the rules have to say of the widest model: the sides that do not grow, for one."""
    from blockwright.lab.widths import Family
    from blockwright.training.configuration import parts

    wider = Family(min(settings.widths), settings.grow).overrides(max(settings.widths), parametrised=True)
    return parts.parametrisation(_run_of([*overrides, *wider])).notes()


def is_beyond(kind: str, change: float) -> bool:
    """Whether the slope of a change is more than noise under rules."""
    return change > OF_SCORES if kind.endswith(".scores") else abs(change) > TOLERANCE


def check(overrides: Sequence[str], settings: Settings, rules: bool) -> dict[str, Slope]:
    """The slopes of a configuration.

    Args:
        overrides: of a run
        settings: of the command
        rules: whether it has a parametrisation other than the standard one

    Raises:
        ConfigError: a width cannot be composed
    """
    from blockwright.blocks.compose import compose
    from blockwright.blocks.experts import Experts
    from blockwright.blocks.widths import kind_of, multiplied, slopes
    from blockwright.lab.widths import Family

    widths = sorted(settings.widths)
    family = Family(widths[0], settings.grow)
    at = {width: [*overrides, *family.overrides(width, rules)] for width in widths}
    runs = {width: _run_of(each) for width, each in at.items()}  # all are checked before the first trains
    jobs = [(width, seed) for width in widths for seed in range(settings.seeds)]
    measured = [_measured(runs[width], seed, settings.steps) for width, seed in jobs]
    found = slopes([width for width, _ in jobs], measured)
    base, widest = (compose(runs[width].model, device="meta") for width in (widths[0], widths[-1]))
    moved = multiplied(base, widest)
    routed = [name for name, module in base.named_modules() if isinstance(module, Experts)]
    for kind in map(kind_of, [*moved, *routed] if rules else ()):
        found.pop(kind, None)
    return found


def _run_of(overrides: Sequence[str]) -> Run:
    from blockwright.training.configuration import placeholders
    from blockwright.training.configuration.composing import compose_config
    from blockwright.training.entry.parse import parse_settings
    from blockwright.training.entry.start import recipe_of

    run = parse_settings(compose_config(overrides, output_dir=placeholders.ANY))
    recipe_of(run)
    return run


def _measured(run: Run, seed: int, steps: int) -> Mapping[str, Size]:
    from blockwright.blocks.compose import compose
    from blockwright.blocks.widths import measure, text
    from blockwright.training.entry.start import recipe_of

    recipe = recipe_of(run)
    decoder = compose(run.model, seed=seed, scales=recipe.scales)
    tokens = text(ROWS, LENGTH, run.model["vocab_size"], seed)
    return measure(decoder, recipe.build(decoder), tokens, steps)


def _table(found: Mapping[str, Slope], off: set[str]) -> Table:
    table = Table("activation", "size at the start", "change by training", "")
    for kind, slope in found.items():
        mark = "beyond" if kind in off else ""
        table.add_row(kind, f"{slope.initial:+.2f}", f"{slope.change:+.2f}", mark)
    return table


if __name__ == "__main__":
    sys.exit(main())
