"""The differences of six pairs of models, as files: rows of the table, and the mark of every box of the picture.

They hold what is compared and drawn, not how: no coordinate, no colour. After a change that is meant, write them anew
and read what changed: ``python -m tests.lab.difference.test_golden``.
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
from blockwright.lab.difference.picture import SIGNS, SVG, side_by_side
from blockwright.lab.difference.settings import read

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
    return "\n".join([*table, "", *sorted(boxes(ET.fromstring(side_by_side(found))))]) + "\n"


def boxes(root: ET.Element) -> Iterator[str]:
    """A line for each box of a picture: its side, its path, and the sign that it has."""
    for place in root.iter(f"{{{SVG}}}g"):
        if letter := place.get("data-side"):
            for group in place.iter(f"{{{SVG}}}g"):
                if path := group.get("data-path"):
                    signs = [each.text or "" for each in group if each.get("class") == "sign"]
                    mark = group.get("class", "").split()
                    assert signs == [SIGNS[each] for each in mark if each in SIGNS], path
                    yield " ".join([letter, path, *mark, *signs])


@pytest.mark.parametrize(("a", "b"), PAIRS, ids=[f"{a}-{b}" for a, b in PAIRS])
def test_difference_is_that_of_the_file(a: str, b: str) -> None:
    assert written(difference(side(a), side(b))) == (GOLDEN / f"{a}-{b}.txt").read_text()


def write() -> None:
    for a, b in PAIRS:
        (GOLDEN / f"{a}-{b}.txt").write_text(written(difference(side(a), side(b))))


if __name__ == "__main__":
    sys.exit(write())
