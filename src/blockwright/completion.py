"""Completion of command lines in bash, and in zsh by its ``bashcompinit``.

The form of a command (blockwright/commands.py) says what can follow: ``--flag``, ``one|of|these``, ``key=``; OVERRIDE
stands for Hydra's groups, options and keys, KIND for registered blocks. Files always can follow. Groups and options
come from the folders of conf and the catalogue; only for a key below a group is the configuration composed.
"""

from __future__ import annotations

import ast
import contextlib
import io
import os
import re
from collections.abc import Iterator, Sequence
from importlib.metadata import entry_points

from blockwright.commands import Command, command, offers
from blockwright.registry import plugins
from blockwright.registry.errors import ConfigError

FLAG = "--complete"
SCRIPT = f"""[ -n "$ZSH_VERSION" ] && autoload -U +X bashcompinit && bashcompinit
_blockwright() {{
  local word="${{COMP_WORDS[COMP_CWORD]}}" known
  known=$("${{COMP_WORDS[0]}}" {FLAG} "${{COMP_WORDS[@]:1:COMP_CWORD}}" 2>/dev/null)
  COMPREPLY=($(compgen -W "$known" -- "$word") $([ "$COMP_CWORD" -gt 1 ] && compgen -f -- "$word"))
}}
COMP_WORDBREAKS=${{COMP_WORDBREAKS//=}}
complete -o nospace -F _blockwright blockwright
"""


def complete(words: Sequence[str]) -> list[str]:
    """What the last word can become.

    Args:
        words: after ``blockwright``; the last may be unfinished or empty
    """
    name, *rest = words
    if not rest:
        candidates: list[str] = [*offers(), "--help", "--version"]
    else:
        try:
            candidates = list(_arguments(command(name), rest))
        except ConfigError:
            candidates = []
    return sorted({each for each in candidates if each.startswith(words[-1])})


def _arguments(known: Command, words: Sequence[str]) -> Iterator[str]:
    """What can stand after a command's name.

    Args:
        known: the command
        words: after its name; the last one is completed
    """
    form, word = known.form, words[-1]
    if word.startswith("-"):
        yield from ("--help", "--config-dir", *_flags(known))
        return
    actions = re.match(r"\S+ ([a-z]+(?:\|[a-z]+)+)", form)
    if actions and len(words) == 1:
        yield from actions[1].split("|")
        return
    yield from re.findall(r"\b[a-z_.]+=", form)
    if "KIND" in form:
        yield from _blocks()
    if "OVERRIDE" in form:
        yield from _overrides(words)


def _flags(known: Command) -> Iterator[str]:
    """The flags of a command: of its form and of its source."""
    yield from re.findall(r"(?<![\w-])--[a-z][\w-]*", "\n".join([known.form, *_texts(known.tree)]))


def _texts(tree: ast.Module) -> Iterator[str]:
    """The texts of a module that contain flags: its USAGE, and those that it adds to a parser.

    OPTIONS names a group of entry points, each an option that is described by its own module.
    """
    for node in ast.walk(tree):
        match node:
            case ast.Assign(targets=[ast.Name(id="USAGE")], value=ast.Constant(value=str(text))):
                yield text
            case ast.Call(func=ast.Attribute(attr="add_argument"), args=[ast.Constant(value=str(text)), *_]):
                yield text
            case ast.Assign(targets=[ast.Name(id="OPTIONS")], value=ast.Constant(value=str(group))):
                for point in entry_points(group=group):
                    yield f"--{point.name}"
                    if (file := plugins.source(point.module)) and file.is_file():
                        of_option = ast.parse(file.read_text())
                        yield from (ast.get_docstring(of_option) or "", *_texts(of_option))


def _blocks() -> Iterator[str]:
    from blockwright.registry import catalogue

    for family in catalogue.families():
        yield family.kind
        yield from (f"{family.kind}/{name}" for name in catalogue.names(family.kind))


def _overrides(words: Sequence[str]) -> Iterator[str]:
    """Groups, their options and the keys of the configuration that the earlier words compose.

    The blocks are asked for only where no file answers: that may import them.
    """
    from blockwright.registry import catalogue
    from blockwright.training.configuration import conf

    group, equals, _ = words[-1].partition("=")
    if "." in group:
        yield from _keys(words)
    elif equals:
        known = conf.options(group) or catalogue.names(group.rpartition("/")[2])
        yield from (f"{group}={option}" for option in known)
    elif "/" in group:
        yield from (f"{each}=" for each in conf.groups())
    else:
        groups = conf.of_files()
        yield from (f"{each}=" for each in [*groups, *conf.settings()])
        yield from (f"{root}{end}" for root in {each.partition("/")[0] for each in groups} for end in "./")


def _keys(words: Sequence[str]) -> Iterator[str]:
    """What Hydra offers: it composes the earlier words."""
    os.environ["COMP_LINE"] = f"train.py {' '.join(words)}"
    with contextlib.redirect_stdout(io.StringIO()) as offered, contextlib.suppress(SystemExit):
        command("train").run(["-sc", "query=bash"])
    yield from offered.getvalue().split()
