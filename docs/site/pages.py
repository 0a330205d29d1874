"""The pages of the site before it is built: a folder of Markdown and pictures."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path

from docs.site.markdown import for_builder, relative, relinked


@dataclass
class Pages:
    """The site's pages.

    Args:
        texts: place, as ``reference/blocks/index.md`` → Markdown, whose links begin with ``/``, the site's root
        files: place → a file that is copied, or its content
    """

    texts: dict[str, str] = field(default_factory=dict)
    files: dict[str, Path | str] = field(default_factory=dict)

    def add(self, place: str, text: str) -> None:
        """Add a page.

        Raises:
            ValueError: there is one of this place
        """
        if place in self.texts:
            raise ValueError(f"two pages have the place {place}")
        self.texts[place] = text.rstrip() + "\n"

    def write(self, folder: Path) -> None:
        """Write the pages, in place of those that the folder has; links become relative."""
        shutil.rmtree(folder, ignore_errors=True)
        for place, text in self.texts.items():
            _file(folder, place).write_text(for_builder(_linked(text, place)))
        for place, content in self.files.items():
            if isinstance(content, Path):
                shutil.copyfile(content, _file(folder, place))
            else:
                _file(folder, place).write_text(content)


def _file(folder: Path, place: str) -> Path:
    file = folder / place
    file.parent.mkdir(parents=True, exist_ok=True)
    return file


def _linked(text: str, page: str) -> str:
    """A page whose links are relative to it."""

    def lead(target: str) -> str:
        return relative(target.removeprefix("/"), page) if target.startswith("/") else target

    return relinked(text, lead)
