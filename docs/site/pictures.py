"""Pictures of models and of blocks in them, next to the pages that show them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from blockwright.lab.drawing.parts import Box, Scheme
from blockwright.lab.drawing.picture import picture
from docs.site.pages import Pages


def add(pages: Pages, place: str, drawn: Scheme, marked: tuple[str, str] | None = None) -> str:
    """Add a picture next to a page; returns the Markdown that shows it.

    Args:
        pages: of the site
        place: of the page
        drawn: the model
        marked: kind and name of the block that the page is about
    """
    file = place.removesuffix(".md") + ".svg"
    marks = {box.path: "changed" for box in boxes(drawn) if (box.kind, box.name) == marked}
    pages.files[file] = picture(drawn, marks)
    return f"![{_alternative(drawn)}](/{file})"


def _alternative(drawn: Scheme) -> str:
    """What a picture shows, for those who do not see it."""
    layers = [f"{len(panel.layers)} × {panel.attention.name} and {panel.ffn.name}" for panel in drawn.panels]
    return f"{drawn.title}: {'; '.join(layers)}; {drawn.totals.parameters:,} parameters"


def boxes(part: object) -> Iterator[Box]:
    """All boxes in a scheme, or in a part of it."""
    if isinstance(part, Box):
        yield part
    if isinstance(part, tuple):
        for each in part:
            yield from boxes(each)
    elif dataclasses.is_dataclass(part):
        for field in dataclasses.fields(part):
            yield from boxes(getattr(part, field.name))
