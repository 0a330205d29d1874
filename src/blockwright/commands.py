"""The commands that installed packages offer, this one included.

An entry point of the group ``blockwright.commands.HEADING`` gives a command its name: ``NAME = "module:main"``, where
``main`` takes the arguments and may return an exit code. ``blockwright --help`` lists it under the heading: one of
``HEADINGS``, or a package's own; one of the group ``blockwright.commands`` itself is listed last. The docstring of the
module begins with the command's form and what it does: a line like ``blockwright NAME DIR [OVERRIDE …]``, in double
backticks, a colon and a sentence; of several commands, a paragraph each. Both are read from the source, so that help
and completion import nothing.
"""

from __future__ import annotations

import ast
import functools
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points

from blockwright.registry import plugins
from blockwright.registry.errors import ConfigError, did_you_mean

ENTRY_POINTS = "blockwright.commands"
HEADINGS = ("compose", "train", "compare", "look", "use", "scale")
OTHERS = "more"
_FORM = re.compile(r"``blockwright (?P<form>[^`]+)``: (?P<about>.+?)(?:\. |\.?$)")


@dataclass(frozen=True)
class Command:
    """One command.

    Args:
        point: the entry point that offers it
        source: of its module
    """

    point: EntryPoint
    source: str

    @functools.cached_property
    def tree(self) -> ast.Module:
        """The parsed source of the module."""
        return ast.parse(self.source)

    @property
    def form(self) -> str:
        """How it is written after ``blockwright``: its name, and what it takes."""
        return self._described()[0]

    @property
    def heading(self) -> str:
        """What help lists it under."""
        return self.point.group.removeprefix(ENTRY_POINTS).removeprefix(".") or OTHERS

    @property
    def about(self) -> str:
        """What it does, in a line."""
        return self._described()[1]

    def run(self, arguments: Sequence[str]) -> int | None:
        """Import the command and run it; returns its exit code, None for 0."""
        return self.point.load()(arguments)

    def _described(self) -> tuple[str, str]:
        paragraphs = [text.replace("\n", " ") for text in (ast.get_docstring(self.tree) or "").split("\n\n")]
        described = [found for text in paragraphs if (found := _FORM.match(text))]
        own = [found for found in described if found["form"].split()[0] == self.point.name]
        chosen = next(iter(own or described), None)
        form, about = (chosen["form"], chosen["about"]) if chosen else (self.point.name, paragraphs[0].rstrip("."))
        return form, about.replace("``", "")


def offers() -> dict[str, list[EntryPoint]]:
    """Name of each command → the entry points that offer it, in alphabetical order.

    Raises:
        ConfigError: there is none, not even of this project, whose metadata an editable install does not renew
    """
    offered: dict[str, list[EntryPoint]] = {}
    found = entry_points()
    groups = [group for group in found.groups if f"{group}.".startswith(f"{ENTRY_POINTS}.")]
    points = [point for group in groups for point in found.select(group=group)]
    for point in sorted(points, key=lambda point: point.name):
        offered.setdefault(point.name, []).append(point)
    if not offered:
        rule = "names no command: the installation is older than the source"
        raise ConfigError("blockwright", None, rule, "Install it again: pip install -e .")
    return offered


def commands() -> dict[str, Command]:
    """Name → command. One whose module cannot be found, or that two packages offer, only causes a warning."""
    readable = {}
    for name in offers():
        try:
            readable[name] = command(name)
        except ConfigError as error:
            warnings.warn(f"command {name!r} {error.rule}. {error.remedy}", stacklevel=2)
    return readable


def command(name: str) -> Command:
    """The command of a name.

    Raises:
        ConfigError: no package offers it, several do, or its module cannot be found
    """
    points = offers().get(name, [])
    if not points:
        raise ConfigError("command line", name, "is not a command", did_you_mean(name, offers()))
    if len(points) > 1:
        owners = " and ".join(sorted(map(plugins.owner, points)))
        raise ConfigError("command line", name, f"is offered by {owners}", "Uninstall one of them")
    (point,) = points
    file, owner = plugins.source(point.module), plugins.owner(point)
    if file is None or not file.is_file():
        rule = f"is offered by {owner}, whose module {point.module} cannot be found"
        raise ConfigError("command line", name, rule, f"Install {owner} again")
    return Command(point, file.read_text())
