"""The composed configuration as a tree: on the screen, and in the run directory."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.text import Text
from rich.tree import Tree

from blockwright.registry.printing import console
from blockwright.training.writing import write_text

PARTS = ("model", "data", "task", "optimizer", "scheduler", "trainer", "callbacks", "logger", "paths", "extras")


def show(plain: Mapping[str, Any], directory: Path, print_config: bool) -> None:
    """Save the tree as ``config_tree.log``, and print it if ``print_config``, else where it is."""
    tree = Tree("configuration")
    for key in [*PARTS, *(k for k in plain if k not in PARTS)]:
        _grow(tree, key, plain[key])
    text, saved = io.StringIO(), directory / "config_tree.log"
    console(text).print(tree)
    write_text(saved, text.getvalue())
    if print_config:
        console().print(tree)
    else:
        print(f"Configuration: {saved}")


def _grow(tree: Tree, key: str, value: Any) -> None:
    if isinstance(value, Mapping) and value:
        branch = tree.add(Text(str(key), style="bold"))
        for inner, below in value.items():
            _grow(branch, inner, below)
    else:
        tree.add(Text.assemble((str(key), "cyan"), f": {value}"))
