"""The rules of the house, each held by a machine."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("blockwright", "registry", "blocks", "interop", "training", "lab", "benchmarks")
SOURCES = [p for package in PACKAGES for p in (ROOT / package).rglob("*.py")]


def test_nothing_below_imports_the_front_door() -> None:
    for source in SOURCES:
        for node in ast.walk(ast.parse(source.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(n.partition(".")[0] == "train" for n in names), source


def test_init_files_hold_no_code() -> None:
    for source in SOURCES:
        if source.name == "__init__.py":
            for node in ast.parse(source.read_text()).body:
                assert isinstance(node, ast.Import | ast.ImportFrom | ast.Expr | ast.Assign), source


def test_no_drawer_for_odds_and_ends() -> None:
    drawers = {"utils", "util", "common", "core", "helpers", "misc"}
    assert not [p for p in SOURCES if p.stem in drawers or p.parent.name in drawers]


def test_no_block_takes_open_ended_arguments() -> None:
    for source in (ROOT / "blocks").rglob("*.py"):
        for node in ast.walk(ast.parse(source.read_text())):
            if isinstance(node, ast.FunctionDef):
                assert node.args.kwarg is None, f"{source}:{node.lineno}"


def test_registered_blocks_are_files_of_their_name() -> None:
    import registry

    for kind in registry.kinds():
        for name in registry.names(kind):
            cls = registry.lookup(kind, name).cls
            if cls.__module__.partition(".")[0] == "blocks":
                assert cls.__module__ == f"blocks.{kind}.{name}"
