"""Pictures of every preset and every block: nothing overlaps, nothing leaves the sheet, every number is true."""

import re
from functools import cache
from xml.etree import ElementTree as ET

import pytest

from blockwright import registry
from blockwright.blocks.compose import compose, preset
from blockwright.lab.card_request import Options
from blockwright.lab.describe import figures
from blockwright.lab.drawing.alone import alone, block_picture
from blockwright.lab.drawing.figures import parameters
from blockwright.lab.drawing.parts import Scheme
from blockwright.lab.drawing.picture import picture
from blockwright.lab.drawing.scheme import scheme
from blockwright.registry import presets
from tests.lab.drawing.svg import SVG, groups, outside, overlaps, texts

BLOCKS = [f"{kind}/{name}" for kind in registry.kinds() for name in registry.names(kind)]
SHORT = 64  # tokens that FLOPs are counted for: counting takes the longer, the longer they are


def composition(name: str) -> dict[str, object]:
    """A preset, with a vocabulary where it leaves that to the tokenizer."""
    return {"vocab_size": 257, **presets.read(name)}


@cache
def drawn(name: str) -> Scheme:
    return scheme(composition(name), name, SHORT)


@pytest.mark.parametrize("name", presets.names())
@pytest.mark.parametrize("equations", [False, True])
def test_no_text_of_a_preset_meets_another(name: str, equations: bool) -> None:
    root = ET.fromstring(picture(drawn(name), equations=equations))
    boxes = list(texts(root))
    assert len(boxes) > 10
    assert overlaps(boxes) == []
    assert outside(root, boxes) == []


@pytest.mark.parametrize("block", BLOCKS)
def test_no_text_of_a_block_meets_another(block: str) -> None:
    of = alone(*block.split("/"))
    root = ET.fromstring(block_picture(of, equations=True))
    boxes = list(texts(root))
    assert overlaps(boxes) == [] and outside(root, boxes) == []
    assert groups(root)[of.kind].get("data-parameters") == str(of.parameters)


@pytest.mark.parametrize("name", presets.names())
def test_numbers_of_a_picture_are_those_of_describe(name: str) -> None:
    """Read back from the SVG: the totals, and the sum of the parts."""
    told = figures(compose(composition(name), device="meta"), Options(context=SHORT))
    root = ET.fromstring(picture(drawn(name)))
    read = {key: float(root.attrib[f"data-{key}"]) for key in ("parameters", "active", "forward-flops")}
    assert read["parameters"] == told["parameters"]["total"]
    assert read["active"] == told["parameters"]["active"]
    assert read["forward-flops"] == told["flops"]["forward_per_token"]
    assert float(root.attrib["data-training-flops"]) == told["flops"]["training_per_token"]
    assert float(root.attrib["data-cache-bytes"]) == told["cache"]["bytes_per_token"]["bf16"]
    assert float(root.attrib["data-cache-numbers"]) == told["cache"]["elements_per_token"]
    assert float(root.attrib["data-cache-beyond"]) == told["cache"]["elements_beyond_windows"]
    assert float(root.attrib["data-cache-at-context"]) == told["cache"]["bytes_at_context"]["bf16"]
    shown = {element.text for element in root.iter(f"{SVG}text")}
    assert {parameters(told["parameters"]["total"]), parameters(told["parameters"]["active"])} <= shown


def test_every_box_has_its_path_and_a_title() -> None:
    root = ET.fromstring(picture(drawn("deepseek_v2")))
    found = groups(root)
    paths = {"layers.0", "layers.0.attention", "layers.1.ffn.gating", "layers.1.ffn.gating.balance.0", "embedding"}
    assert paths | {"layers.1.attention.position", "layers.1.residual.attention_norm", "head", "norm"} <= set(found)
    assert all(group.find(f"{SVG}title") is not None for group in found.values())


def test_marks_are_classes_and_unfold_what_differs() -> None:
    marks = {"layers.0.attention.position": "changed"}
    found = groups(ET.fromstring(picture(drawn("deepseek_v2"), marks)))
    assert found["layers.0.attention.position"].get("class") == "changed"
    assert "layers.0.attention.position" not in groups(ET.fromstring(picture(drawn("deepseek_v2"))))


def test_what_is_cached_is_hatched() -> None:
    root = ET.fromstring(picture(drawn("deepseek_v2")))
    attention = groups(root)["layers.1.attention"]
    assert [text.text for text in attention.iter(f"{SVG}text") if "latent 512 + 64" in (text.text or "")]
    assert [rect for rect in attention.iter(f"{SVG}rect") if rect.get("class") == "hatch"]


def test_formulas_have_the_numbers_of_their_blocks() -> None:
    root = ET.fromstring(picture(drawn("deepseek_v2"), equations=True))
    names = [text.text or "" for text in root.iter(f"{SVG}text")]
    listed = {found[1]: found[2] for name in names if (found := re.fullmatch(r"(\(\d+\)) (\w+)", name))}
    assert len(listed) > 5
    for number, block in listed.items():
        assert f"{block} {number}" in names, block


def test_names_from_outside_are_escaped() -> None:
    title = "<script>alert(1)</script>&\"'"
    drawing = picture(scheme(preset("tiny", {"vocab_size": 257}), title, SHORT))
    assert "<script" not in drawing
    assert ET.fromstring(drawing).findtext(f"{SVG}title") == title
