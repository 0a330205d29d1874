"""Pictures in prompts and boxes in answers."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from blockwright.lab.seeing import drawn
from blockwright.training.data.boxes import boxes, overlap


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("<|ref|>a dog<|/ref|><|det|>[[12, 30, 500, 999]]<|/det|>", [(12, 30, 500, 999)]),
        ("two: [[1,2,3,4], [5, 6, 7, 8]]", [(1, 2, 3, 4), (5, 6, 7, 8)]),
        ("(10, 20, 30, 40) and [10.5, 20, 30, 40.25]", [(10, 20, 30, 40), (10.5, 20, 30, 40.25)]),
        ("turned [[50, 60, 10, 20]], outside [[-5, 0, 2000, 10]]", [(10, 20, 50, 60), (0, 0, 999, 10)]),
        ("cut off [[1, 2, 3, 4", [(1, 2, 3, 4)]),
        ("none [[1, 2, 3]] [] [[a, b, c, d]] 1, 2, 3, 4 [1, 2, 3, 4, 5]", []),
    ],
)
def test_boxes_are_read_from_text_that_need_not_be_well_formed(text: str, found: list[tuple[float, ...]]) -> None:
    assert boxes(text) == found


def test_overlap_is_intersection_over_union() -> None:
    assert overlap((0, 0, 10, 10), (0, 0, 10, 10)) == 1.0
    assert overlap((0, 0, 10, 10), (5, 0, 15, 10)) == pytest.approx(50 / 150)
    assert overlap((0, 0, 10, 10), (20, 0, 30, 10)) == overlap((1, 1, 1, 1), (1, 1, 1, 1)) == 0.0


def test_boxes_are_drawn_where_they_say() -> None:
    page = Image.new("RGB", (100, 50), "white")
    red = (np.asarray(drawn(page, [(0, 0, 499.5, 999)])) == (255, 0, 0)).all(-1)
    assert red[:, 0].all() and red[0, :50].all() and red[:, 49:51].any(1).all() and not red[:, 52:].any()
    assert not (np.asarray(page) == (255, 0, 0)).all(-1).any()
