"""``blockwright blocks [KIND[/NAME]]``: list blocks, their parameters and ranges; ``model[/NAME]`` lists presets."""

from __future__ import annotations

import fnmatch
import sys
from collections.abc import Sequence

from rich.markup import escape
from rich.table import Table

from blockwright.registry import catalogue, presets
from blockwright.registry.command import run_command
from blockwright.registry.errors import ConfigError, did_you_mean
from blockwright.registry.printing import console, show

USAGE = """\
blockwright blocks [KIND[/NAME] | model[/NAME]]

                 every registered block, by kind
KIND             the blocks of one kind: attention
KIND/NAME        one block: type, default, range and meaning of each parameter. Wildcards work: 'attention/m*'
model[/NAME]     the presets
"""


def main(arguments: Sequence[str]) -> None:
    """Print the catalogue, one kind, one block, or with ``model`` the presets; wildcards as in ``attention/m*``.

    Raises:
        ConfigError: there is no such kind or block
    """
    if {"-h", "--help"} & set(arguments):
        print(USAGE, end="")
        return
    if len(arguments) > 1:
        rule = "takes one kind or block to show"
        raise ConfigError("arguments", " ".join(arguments), rule, "Write e.g. attention, attention/mla or 'gating/*'")
    if arguments and arguments[0].partition("/")[0] == "model":
        _show_presets(arguments[0].partition("/")[2] or "*")
        return
    kind, _, pattern = (arguments[0] if arguments else "*").strip("/").partition("/")
    roots = () if arguments else catalogue.kinds(catalogue.ROOT)  # whole tasks and data modules are no blocks
    kinds = [each for each in catalogue.kinds(None) if each not in roots and fnmatch.fnmatchcase(each, kind)]
    kinds.sort(key=lambda each: catalogue.find_family(each).group)
    if not kinds:
        raise ConfigError("kind", kind, "there is no such kind of block", did_you_mean(kind, catalogue.kinds(None)))
    found = [(k, n) for k in kinds for n in catalogue.names(k, pattern or "*")]
    if not found:
        known = did_you_mean(pattern, [n for k in kinds for n in catalogue.names(k)])
        raise ConfigError(kind, pattern, f"no {kind} is registered under this name", known)
    if pattern:
        for k, n in found:
            _show_block(catalogue.lookup(k, n))
    else:
        _show_family(found)


def _show_presets(pattern: str) -> None:
    found = fnmatch.filter(presets.names(), pattern)
    if not found:
        raise ConfigError("model", pattern, "there is no such preset", did_you_mean(pattern, presets.names()))
    table = Table("model=<name>", "provider", "what it is")
    for name in found:
        preset = presets.find(name)
        table.add_row(f"[bold]{name}[/]", escape(preset.owner), escape(preset.summary))
    show(table)


def _show_family(found: list[tuple[str, str]]) -> None:
    table = Table()
    roots = {catalogue.find_family(kind).root for kind, _ in found}
    table.add_column(
        f"{'<root>/' if len(roots) > 1 else f'{root}/' if (root := min(roots)) else ''}<kind>=<name>", no_wrap=True
    )
    for heading in ("provider", "what it is"):
        table.add_column(heading)
    last = None
    for kind, name in found:
        entry = catalogue.lookup(kind, name)
        if last not in (None, kind):
            table.add_section()
        last = kind
        family = catalogue.find_family(kind)
        group = family.group if len(roots) > 1 else kind
        option = f"{group}{'/' if family.root else '='}[bold]{name}[/]"
        table.add_row(option, escape(entry.provider), escape(entry.schema.summary))
    show(table)
    print("blockwright blocks KIND/NAME lists the parameters of one.")


def _show_block(entry: catalogue.Entry) -> None:
    out = console()
    out.print(f"[bold]{entry.kind}/{entry.name}[/]  {escape(entry.schema.summary)}")
    out.print(f"{entry.cls.__module__}.{entry.cls.__qualname__}, provided by {entry.provider}")
    table = Table()
    table.add_column("parameter", no_wrap=True)
    for heading in ("type", "default", "meaning"):
        table.add_column(heading)
    for p in entry.schema.parameters.values():
        table.add_row(p.name, *map(escape, (p.type, catalogue.default(p), p.description)))
    for p in entry.schema.fixed.values():
        table.add_row(p.name, *map(escape, ("fixed", p.written, p.description)))
    if table.row_count:
        show(table)
    else:
        out.print("It takes no parameters.")
    supplied = ", ".join(sorted(entry.schema.context)) or "nothing"
    out.print(f"supplied by the composer: {supplied}")
    names = [n for n, p in entry.schema.parameters.items() if not p.child]
    family = catalogue.find_family(entry.kind)
    example = f" {family.path}.{names[0]}=…" if names else ""
    out.print(f"blockwright train {family.group}={entry.name}{example}", soft_wrap=True)


if __name__ == "__main__":
    sys.exit(run_command(main))
