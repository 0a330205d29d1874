"""Parse command lines of ``KEY=VALUE`` arguments: a command's own options, and Hydra overrides for everything else."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from blockwright.registry.errors import ConfigError, did_you_mean

HELP = ("-h", "--help")


@dataclass(frozen=True)
class Arguments:
    """A parsed command line.

    Args:
        options: the command's own ``KEY=VALUE`` arguments
        overrides: all other ``KEY=VALUE`` and ``~KEY`` arguments, unchanged, for Hydra
        flags: ``--flag`` → its value; empty for a flag without one
        names: all other arguments
    """

    options: dict[str, str]
    overrides: list[str]
    flags: dict[str, str]
    names: list[str]


def read_arguments(
    arguments: Sequence[str], *, options: Collection[str], flags: Collection[str], n_names: int = 0
) -> Arguments:
    """Parse a command line.

    Args:
        arguments: of the command
        options: keys of the command's own options
        flags: the command's flags; ``--plot=FILE`` for one that takes a value
        n_names: maximum number of arguments that are neither a flag nor ``KEY=VALUE``

    Raises:
        ConfigError: an unknown flag, an option given twice or without its value, or too many other arguments
    """
    takes_value = {flag.partition("=")[0]: "=" in flag for flag in flags}
    found = Arguments({}, [], {}, [])
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        key, equals, value = word.partition("=")
        if word.startswith("-"):
            found.flags[key] = _flag_value(key, value, equals, rest, takes_value)
        elif not equals and not word.startswith("~"):
            found.names.append(word)
        elif key in options:
            if key in found.options:
                raise ConfigError(key, value, f"is given twice, {found.options[key]} before", "Leave one of them out")
            found.options[key] = value
        else:
            found.overrides.append(word)
    if len(found.names) > n_names:
        word = found.names[n_names]
        if word in options:
            raise ConfigError("command line", word, "has no value", f"Write {word}=VALUE")
        remedy = f"Write model={word} for a model" if not n_names else f"Name one at a time: {found.names[0]}, say"
        raise ConfigError("command line", word, "is not KEY=VALUE", remedy)
    return found


def _flag_value(key: str, value: str, equals: str, rest: list[str], takes_value: dict[str, bool]) -> str:
    if key not in takes_value:
        remedy = "Leave it out: this command already runs all values" if key in ("-m", "--multirun") else ""
        raise ConfigError(
            "command line", key, "there is no such flag", remedy or did_you_mean(key, [*takes_value, *HELP])
        )
    if not takes_value[key]:
        if equals:
            raise ConfigError(key, value, "takes no value", f"Write {key}")
        return ""
    if not equals and rest and not rest[0].startswith("-") and "=" not in rest[0]:
        return rest.pop(0)
    return value
