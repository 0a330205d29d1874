"""A page for every public name, which mkdocstrings fills from the source."""

from __future__ import annotations

import inspect

import blockwright
from blockwright import api
from blockwright.lab.catalogue import table
from docs.site.markdown import Pages, link, prose


def place(name: str) -> str:
    """The page of a public name."""
    return f"reference/interface/{name}.md"


def add(pages: Pages) -> None:
    """Add the pages of all public names, and their list."""
    parts = [
        "# The public interface",
        "`import blockwright` gives these names, each imported when first used. Only they are stable:"
        f" {link('changes', 'project/changes.md')} are recorded.",
    ]
    for heading, names in api.sections():
        rows = [[link(f"`{name}`", place(name)), _summary(name)] for name in names]
        parts += [f"## {heading}", "\n".join(table(["name", "what it is"], rows))]
        for name in names:
            pages.add(place(name), f"# {name}\n\n::: blockwright.{name}\n")
    pages.add("reference/interface/index.md", "\n\n".join(parts))


def _summary(name: str) -> str:
    value = getattr(blockwright, name)
    if not (inspect.isclass(value) or inspect.isfunction(value)):
        return "a type"
    return prose(" ".join((inspect.getdoc(value) or "").partition("\n\n")[0].split()))
