"""One page of papers: what of this project each is about, from docstrings and the first lines of presets."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator

from blockwright import registry
from blockwright.lab.catalogue import table
from blockwright.registry import presets
from docs.site.markdown import Pages, link, prose
from docs.site.presets import place as preset_place
from docs.site.sources import block_place

PLACE = "reference/papers.md"
_PAPER = re.compile(r"(?P<clause>[^;:\n]*?)[,(]?\s*arXiv (?P<number>\d{4}\.\d{4,5})")
# A name and a year, or a title of a few words, at the end of what stands before the number.
_NAME = re.compile(r"(?<![\w-])[a-z]?[A-Z][\w'’-]*(?: (?:[A-Z0-9][\w'’.-]*|&|et al\.|(?:19|20)\d\d|\([^()]*\)))*$")


def add(pages: Pages) -> None:
    """Add the page."""
    names: dict[str, list[str]] = {}
    places: dict[str, list[str]] = {}
    for text, shown in _texts():
        for name, number in cited(text):
            names.setdefault(number, []).append(name)
            if shown not in places.setdefault(number, []):
                places[number].append(shown)
    rows = [
        [f"[{number}](https://arxiv.org/abs/{number})", prose(_called(names[number])), ", ".join(places[number])]
        for number in sorted(places, key=lambda number: tuple(map(int, number.split("."))))
    ]
    about = f"The papers behind blocks and presets, in the order of their arXiv numbers: {len(rows)} of them."
    listed = "\n".join(table(["arXiv", "called", "blocks and presets"], rows))
    pages.add(PLACE, "\n\n".join(["# Papers", about, listed]))


def cited(text: str) -> Iterator[tuple[str, str]]:
    """What a text calls each paper before its arXiv number, "" for nothing, and the number."""
    for found in _PAPER.finditer(" ".join(text.split())):
        name = _NAME.search(found["clause"].replace("`", "").rstrip(" ,("))
        yield name[0] if name else "", found["number"]


def _called(names: list[str]) -> str:
    """The first name with a year, else the first."""
    dated = [name for name in names if re.search(r"\b(?:19|20)\d\d\b", name)]
    return next(filter(None, [*dated, *names]), "")


def _texts() -> Iterator[tuple[str, str]]:
    """Docstring of a block, or the first line of a preset → the link to its page."""
    for family in registry.catalogue.families():
        for name in registry.names(family.kind):
            docstring = inspect.getdoc(registry.lookup(family.kind, name).cls) or ""
            yield docstring, link(f"`{family.kind}/{name}`", block_place(family.kind, name))
    for name in presets.names():
        yield presets.find(name).summary, link(f"`model={name}`", preset_place(name))
