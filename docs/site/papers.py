"""One page of papers: what of this project each is about, from docstrings and the first lines of presets."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator

from blockwright import registry
from blockwright.lab.catalogue import table
from blockwright.registry import presets
from docs.site.markdown import link, prose
from docs.site.pages import Pages
from docs.site.presets import place as preset_place
from docs.site.sources import block_place

PLACE = "reference/papers.md"
_PAPER = re.compile(r"(?P<clause>[^;:\n]*?)[,(]?\s*arXiv (?P<number>\d{4}\.\d{4,5})")
_SENTENCE = re.compile(r"(?<!\bal)\. ")


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
    pages.add(PLACE, "\n\n".join(["# Papers", about, "\n".join(table(["arXiv", "called", "blocks and presets"], rows))]))


def cited(text: str) -> Iterator[tuple[str, str]]:
    """What a text calls each paper before its arXiv number, and the number."""
    for found in _PAPER.finditer(" ".join(text.split())):
        clause = _SENTENCE.split(found["clause"])[-1]
        yield clause.replace("`", "").strip(" ,("), found["number"]


def _called(names: list[str]) -> str:
    """The first name with a year, else the first of a few words."""
    short = [name for name in names if name and len(name) < 60]
    return next((name for name in short if re.search(r"\b(?:19|20)\d\d\b", name)), short[0] if short else "")


def _texts() -> Iterator[tuple[str, str]]:
    """Docstring of a block, or the first line of a preset → the link to its page."""
    for family in registry.catalogue.families():
        for name in registry.names(family.kind):
            docstring = inspect.getdoc(registry.lookup(family.kind, name).cls) or ""
            yield docstring, link(f"`{family.kind}/{name}`", block_place(family.kind, name))
    for name in presets.names():
        yield presets.find(name).summary, link(f"`model={name}`", preset_place(name))
