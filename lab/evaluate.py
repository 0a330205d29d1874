"""``blockwright evaluate MODEL OPTION …``: measure what a model can do; --help lists the ways of all plug-ins.

An entry point of the group ``blockwright.evaluations`` gives a way its option: ``suite = "module:main"`` is chosen by
``--suite``. The docstring of the module begins with the way's form and what it measures.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
from importlib.metadata import EntryPoint, entry_points

from blockwright.registry import ConfigError
from blockwright.registry.plugins import source

OPTIONS = "blockwright.evaluations"  # a group of entry points: completion reads it too


def main(arguments: Sequence[str]) -> None:
    """Run the evaluation whose option is among the arguments.

    Raises:
        registry.ConfigError: an error in the command line or the model
    """
    offered = {f"--{point.name}": point for point in sorted(entry_points(group=OPTIONS), key=lambda p: p.name)}
    if list(arguments) in (["-h"], ["--help"]):
        print(*map(_described, offered.values()), sep="\n")
        print("\nblockwright evaluate MODEL OPTION VALUE --help describes a way.")
        return
    options = {word.split("=")[0] for word in arguments}
    chosen = next((point for option, point in offered.items() if option in options), None)
    if chosen is not None:
        chosen.load()(arguments)
        return
    rule, remedy = (
        "does not say by what it is evaluated",
        f"Add one of {', '.join(offered)}: blockwright evaluate --help",
    )
    raise ConfigError("command line", " ".join(arguments), rule, remedy)


def _described(point: EntryPoint) -> str:
    """The first paragraph of an evaluation's module, read without importing it."""
    file = source(point.module)
    text = "" if file is None or not file.is_file() else ast.get_docstring(ast.parse(file.read_text())) or ""
    return text.partition("\n\n")[0].replace("\n", " ").replace("``", "") or f"--{point.name}: {point.value}"
