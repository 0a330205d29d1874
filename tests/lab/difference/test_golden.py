"""The differences of six pairs of models, as files: rows of the table, and the mark of every box of the picture.

They hold what is compared and drawn, not how: no coordinate, no colour. After a change that is meant, write them
again and read what changed: ``python -m tests.lab.difference.test_golden``.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from blockwright.blocks.compose import preset
from blockwright.lab.difference import rows
from blockwright.lab.difference.difference import Difference, Side, difference
from blockwright.lab.difference.marks import Letter, marks
from blockwright.lab.difference.picture import SIGNS, SVG, side_by_side
from blockwright.lab.difference.settings import read
from blockwright.lab.drawing.scheme import scheme

GOLDEN = Path(__file__).with_name("golden")
FILE = """
inherits: tiny
attention: {name: gqa, n_heads: 8, n_kv_heads: 2}
gating: {top_k: 2}
layout: {ffn: dense*2 ffn*}
"""
PAIRS = (
    ("deepseek_v2", "deepseek_v3"),
    ("tiny", "file"),
    ("mixtral_8x7b", "qwen3_30b_a3b"),
    ("gemma2_9b", "gemma3_27b"),
    ("gpt_oss_20b", "gpt_oss_120b"),
    ("nemotron_h_8b", "olmo_hybrid_7b"),
)


def side(name: str) -> Side:
    words = {"vocab_size": 257}
    if name == "file":
        return Side("file.yaml", read(f"vocab_size: 257{FILE}"))
    return Side(name, read(preset(name, words if name == "tiny" else None)))


def written(found: Difference) -> str:
    """The contents of the file of a difference."""
    table = ["\t".join(row) for row in (*rows.costs(found), *rows.composition(found))]
    sides: tuple[tuple[Letter, Side], ...] = (("a", found.a), ("b", found.b))
    boxes = [
        f"{x} {path} {mark}" for x, of in sides for path, mark in marks(found, scheme(of.model.decoder), x).items()
    ]
    return "\n".join([*table, "", *sorted(boxes)]) + "\n"


@pytest.mark.slow
@pytest.mark.parametrize(("a", "b"), PAIRS, ids=[f"{a}-{b}" for a, b in PAIRS])
def test_difference_is_that_of_the_file(a: str, b: str) -> None:
    found = difference(side(a), side(b))
    golden = (GOLDEN / f"{a}-{b}.txt").read_text()
    assert written(found) == golden
    marked = {tuple(line.split()) for line in golden.partition("\n\n")[2].splitlines()}
    drawn = list(boxes_of(ET.fromstring(side_by_side(found))))
    assert len(drawn) > 10 and {box for box in drawn if box[2]} <= marked
    assert {path for _, path, mark in drawn if not mark} <= {f"layers.{i}" for i in range(99)}  # panels that differ


def boxes_of(root: ET.Element) -> Iterator[tuple[str, str, str]]:
    """Each box of a picture: its side, its path and its mark, which has the sign of it too."""
    for place in root.iter(f"{{{SVG}}}g"):
        for group in place.iter(f"{{{SVG}}}g") if place.get("data-side") else ():
            if path := group.get("data-path"):
                mark, signs = group.get("class", ""), [each.text for each in group if each.get("class") == "sign"]
                assert signs == [SIGNS[mark]] if mark in SIGNS else signs == [], path
                yield place.get("data-side", ""), path, mark


def write() -> None:
    for a, b in PAIRS:
        (GOLDEN / f"{a}-{b}.txt").write_text(written(difference(side(a), side(b))))


if __name__ == "__main__":
    sys.exit(write())
