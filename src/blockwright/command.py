"""``blockwright COMMAND …``: every command of the installed packages under one name.

Nothing is imported before it is needed, so that ``--help`` and completion are fast.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from blockwright import completion
from blockwright.commands import HEADINGS, OTHERS, command, commands
from blockwright.registry.command import run_command
from blockwright.registry.errors import ConfigError

OF_TRAIN = ("-m", "--multirun", "fit", "validate", "test", "predict")


def usage() -> str:
    """The text of ``--help``."""
    known = commands()
    width = max(map(len, known)) + 2
    own = sorted({each.heading for each in known.values()} - {*HEADINGS, OTHERS})
    under: dict[str, list[str]] = {heading: [] for heading in (*HEADINGS, *own, OTHERS)}
    for name, each in known.items():
        under[each.heading].append(f"  {name:{width}}{each.about}")
    listed = "\n\n".join("\n".join((f"{heading}:", *lines)) for heading, lines in under.items() if lines)
    return (
        "blockwright COMMAND [ARGUMENT …]\n\n"
        f"{listed}\n\n"
        "blockwright COMMAND --help describes a command's arguments. Every command finds presets, experiments and\n"
        "other options of yours in the folder conf, or that of --config-dir DIR. Tab completion in bash or zsh:\n"
        '  eval "$(blockwright --completion)"\n'
    )


def run(arguments: Sequence[str]) -> int | None:
    """Run a command line after the word ``blockwright``."""
    name, *rest = arguments or ["--help"]
    if name in ("-h", "--help", "help"):
        print(usage(), end="")
    elif name == "--version":
        from blockwright import __version__

        print(f"blockwright {__version__}")
    elif name == "--completion":
        print(completion.SCRIPT, end="")
    elif name == completion.FLAG:
        print("\n".join(completion.complete(rest)))
    elif "=" in name or name in OF_TRAIN:
        raise ConfigError("command line", name, "is not a command", f"Write: blockwright train {name} …")
    else:
        return command(name).run(rest)
    return None


def main() -> None:
    """The console script."""
    sys.exit(run_command(run))
