"""Letters that can be shown, and widths of text.

Widths are estimated from above: fonts differ from reader to reader, and texts may not meet in any of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

# Advance widths of DejaVu Sans in em, which is among the widest of the fonts that systems choose.
_ADVANCES = {
    0.29: "'ijlIJ",
    0.34: " ,.·/:;\\|",
    0.4: "f-()[]t!²₁₂ₙ",
    0.46: 'r"',
    0.53: "*_`–sz?",
    0.58: "cLFk",
    0.64: "vxyγλPTYaoδθeESbdghnpquσΣ$0123456789{}β√",
    0.7: "KαAVΔBRXZC",
    0.79: "UHNDG&OQ",
    0.86: "w∞#+<=>^~×≤≥−←→M",
}
_WIDTHS = {letter: width for width, letters in _ADVANCES.items() for letter in letters}
WIDEST = 1.0  # of any other letter
BOLD = 1.12
BETWEEN = " · "


def clean(text: str) -> str:
    """A text without characters that would move a cursor, or that XML has not: names of files may have any."""
    return "".join(c if c.isprintable() else "·" for c in text)


def width(text: str, size: float, bold: bool = False) -> float:
    """Pixels of a text, at most, at a font size in pixels."""
    return sum(_WIDTHS.get(letter, WIDEST) for letter in text) * size * (BOLD if bold else 1)


def lines(items: Iterable[str], room: float, size: float, between: str = BETWEEN) -> list[str]:
    """Items joined into lines that fit into the room; an item that does not fit is broken at spaces, or cut."""
    found: list[str] = []
    for item in items:
        joined = f"{found[-1]}{between}{item}" if found else item
        if found and width(joined, size) <= room:
            found[-1] = joined
        else:
            found += _broken(item, room, size)
    return found


def _broken(text: str, room: float, size: float) -> list[str]:
    if width(text, size) <= room:
        return [text]
    words = text.split(" ")
    if len(words) == 1:
        return [cut(text, room, size)]
    return lines(words, room, size, " ")


def cut(text: str, room: float, size: float, bold: bool = False) -> str:
    """A text shortened in the middle until it fits."""
    if width(text, size, bold) <= room:
        return text
    for kept in range(len(text) - 1, 0, -1):
        tail = kept // 3
        short = f"{text[: kept - tail]}…{text[len(text) - tail :]}"
        if width(short, size, bold) <= room:
            return short
    return "…"


def widest(texts: Sequence[str], size: float, bold: bool = False) -> float:
    """Pixels of the widest of some texts."""
    return max((width(text, size, bold) for text in texts), default=0.0)
