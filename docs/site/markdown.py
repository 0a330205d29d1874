"""Markdown of the site: what its pages are made of, their links, and the dialect of its builder.

Pages are CommonMark with tables. The last step, ``for_builder``, rewrites what zensical's Python-Markdown would read
otherwise. Another builder, such as Sphinx with MyST, leaves that step out.
"""

from __future__ import annotations

import html
import posixpath
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path


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


# Code comes first, so that nothing inside it counts as a link.
_CODE = r"(?P<code>^(?P<fence>```+|~~~+).*?^(?P=fence)`*$|``.+?``|`(?:[^`\n]|\n(?!\n|\|))+`)"
_TARGET = r"(?P<before>\]\()(?P<target>[^)\s]+)\)|(?P<attribute>src=\")(?P<source>[^\"]+)\""
_LINK = re.compile(f"{_CODE}|{_TARGET}", re.M | re.S)
_PARTS = re.compile(_CODE, re.M | re.S)
_ITEM = re.compile(r"(?:[*+-]|\d+\.) ")
_ARXIV = re.compile(r"arXiv (\d{4}\.\d{4,5})")


def link(text: str, place: str) -> str:
    """A link to a page of the site, from any page: ``Pages.write`` makes it relative."""
    return f"[{text}](/{place})"


def relinked(text: str, change: Callable[[str], str]) -> str:
    """The text with the target of every link and picture of this site changed.

    Args:
        text: Markdown
        change: path, with ``#anchor`` if it has one → another. Addresses and anchors of the same page keep theirs
    """

    def replace(found: re.Match[str]) -> str:
        if found["code"]:
            return found[0]
        target = found["target"] or found["source"]
        if "://" in target or target.startswith(("#", "mailto:")):
            return found[0]
        return f"{found['before']}{change(target)})" if found["target"] else f'{found["attribute"]}{change(target)}"'

    return _LINK.sub(replace, text)


def links(text: str) -> list[str]:
    """The targets of the links and pictures of a text, addresses of other sites left out."""
    found: list[str] = []
    relinked(text, lambda target: found.append(target) or target)  # type: ignore[func-returns-value]
    return found


def relative(place: str, page: str) -> str:
    """The path of a place as seen from a page, both from the site's root; an anchor stays."""
    path, hash_, anchor = place.partition("#")
    return posixpath.relpath(path, posixpath.dirname(page) or ".") + hash_ + anchor


def prose(docstring: str) -> str:
    """A docstring as Markdown: what means something in it, other than code and lists, is shown as it is written."""
    pieces = _PARTS.split(re.sub(r"``(.+?)``", r"`\1`", docstring, flags=re.S))
    shown = [piece if _PARTS.fullmatch(piece) else _escaped(piece) for piece in pieces[::3]]
    code = [piece or "" for piece in pieces[1::3]]
    return "".join(text + span for text, span in zip(shown, [*code, ""], strict=True))


def _escaped(text: str) -> str:
    kept = html.escape(text, quote=False)
    escaped = re.sub(r"(?<!^)(?<!\n)\*|[\[\]_]", r"\\\g<0>", kept)  # an asterisk at the start of a line makes a list
    return _ARXIV.sub(r"[arXiv \1](https://arxiv.org/abs/\1)", escaped)


def fence(text: str, language: str) -> str:
    """A text as a block of code."""
    longest = max((len(ticks) for ticks in re.findall(r"^`{3,}", text, re.M)), default=2)
    ticks = "`" * max(3, longest + 1)
    return f"{ticks}{language}\n{text.rstrip()}\n{ticks}"


def title(text: str) -> str:
    """The first heading of a page, without marks."""
    heading = re.search(r"^# (.+)$", text, re.M)
    return re.sub(r"[\\`]", "", heading[1]) if heading else ""


def for_builder(text: str) -> str:
    """A page as Python-Markdown reads it: a list after a line of text, and bars inside the code of a table."""
    lines: list[str] = []
    fenced = False
    for line in text.split("\n"):
        fenced ^= bool(re.match(r"```|~~~", line))
        before = lines[-1] if lines else ""
        if not fenced and _ITEM.match(line) and before.strip() and not _ITEM.match(before) and not before[0].isspace():
            lines.append("")
        lines.append(line if fenced or not line.startswith("|") else re.sub(r"`[^`]+`", _bars, line))
    return "\n".join(lines)


def _bars(code: re.Match[str]) -> str:
    return code[0].replace("\\|", "|")
