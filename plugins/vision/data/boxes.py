"""Boxes in a text about a picture, as DeepSeek-VL2 writes them."""

from __future__ import annotations

import re

Box = tuple[float, float, float, float]  # x1, y1, x2, y2 in thousandths of the picture
_NUMBER = r"\s*(-?\d+(?:\.\d+)?)\s*"
_BOX = re.compile(r"[\[(]" + ",".join([_NUMBER] * 4) + r"(?:[\])]|$)")


def boxes(text: str) -> list[Box]:
    """Every four numbers in brackets, closed or cut off at the end, in order of their corners and within the picture.

    Malformed ones, with fewer or more numbers, are passed over.
    """
    found = []
    for match in _BOX.finditer(text):
        x1, y1, x2, y2 = (min(max(float(n), 0.0), 999.0) for n in match.groups())
        found.append((min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)))
    return found


def overlap(one: Box, other: Box) -> float:
    """Intersection over union of two boxes, 0 to 1."""
    width, height = (min(one[i + 2], other[i + 2]) - max(one[i], other[i]) for i in (0, 1))
    shared = max(width, 0.0) * max(height, 0.0)
    areas = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (one, other))
    return shared / (areas - shared) if areas > shared else 0.0
