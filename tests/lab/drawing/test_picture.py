"""Pictures of every preset and every block: nothing overlaps, nothing leaves the sheet, every number is true."""

import re
from collections.abc import Sequence
from functools import cache
from xml.etree import ElementTree as ET

import pytest

from blockwright import registry
from blockwright.blocks.compose import compose, preset
from blockwright.lab.card_request import Options
from blockwright.lab.describe import figures
from blockwright.lab.drawing.alone import alone, block_picture
from blockwright.lab.drawing.figures import layers, parameters, spans, totals
from blockwright.lab.drawing.parts import Scheme
from blockwright.lab.drawing.picture import picture
from blockwright.lab.drawing.scheme import scheme
from blockwright.registry import presets
from tests.lab.drawing.svg import SVG, groups, outside, overlaps, texts

BLOCKS = [f"{kind}/{name}" for kind in registry.kinds() for name in registry.names(kind)]
PRESETS = presets.names()[::5]
SHORT = 64  # tokens that FLOPs are counted for: counting takes the longer, the longer they are


def composition(name: str) -> dict[str, object]:
    """A preset, with a vocabulary where it leaves that to the tokenizer."""
    return {"vocab_size": 257, **presets.read(name)}


@cache
def drawn(name: str) -> Scheme:
    return scheme(composition(name), name, SHORT)


@pytest.mark.slow
@pytest.mark.parametrize("name", PRESETS)
def test_no_text_of_a_preset_meets_another_and_no_list_of_layers_is_cut(name: str) -> None:
    for equations in (False, True):
        root = ET.fromstring(picture(drawn(name), equations=equations))
        boxes = list(texts(root))
        assert len(boxes) > 10
        assert overlaps(boxes) == [] and outside(root, boxes) == []
        shown = {text.text for text in root.iter(f"{SVG}text")}
        assert {layers(panel) for panel in drawn(name).panels} <= shown


@pytest.mark.slow
def test_no_text_of_a_block_meets_another() -> None:
    wrong = []
    for block in BLOCKS:
        of = alone(*block.split("/"))
        root = ET.fromstring(block_picture(of, equations=True))
        boxes = list(texts(root))
        if overlaps(boxes) or outside(root, boxes):
            wrong.append(block)
        if groups(root)[of.kind].get("data-parameters") != str(of.parameters):
            wrong.append(f"{block}: parameters")
    assert not wrong


@pytest.mark.slow
@pytest.mark.parametrize("name", PRESETS)
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


def test_a_picture_has_the_sizes_of_its_model() -> None:
    shown = {text.text for text in ET.fromstring(picture(drawn("deepseek_v2"))).iter(f"{SVG}text")}
    assert "60 layers · d_model 5,120 · vocabulary 102,400 · 163,840 positions" in shown


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gpt_oss_20b", ("49,152 B", "cache a token, bf16; 24,576 B beyond windows")),
        ("deepseek_v2", ("69,120 B", "cache a token, bf16")),
    ],
)
def test_a_cache_with_windows_is_given_beyond_them_too(name: str, expected: tuple[str, str]) -> None:
    assert totals(drawn(name).totals)[-1] == expected


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (range(60), "0–59"),
        ((3, 7, 11, 15, 19), "3, 7, 11, …, 19"),
        ((0, 1, 3, 4, 6, 7), "0–1, 3–4, 6–7"),
        ((0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14), "0–2, 4–6, …, 12–14"),
    ],
)
def test_many_layers_are_written_shortly(layers: Sequence[int], expected: str) -> None:
    assert spans(layers) == expected


def test_a_factor_is_shown_whether_it_is_the_default_or_not_and_however_it_is_written() -> None:
    for factor in (40, 40.0):
        position = {"name": "yarn", "factor": factor, "theta": 10000}
        of = scheme({**composition("tiny"), "position": position}, context=8).panels[0].attention
        assert next(child for child in of.children if child.kind == "position").lines == (
            "factor 40",
            "original_positions 4,096",
        )


def test_windowed_attention_without_a_window_says_so() -> None:
    full, windowed = (panel.attention for panel in reversed(drawn("gpt_oss_20b").panels))
    assert full.lines[-1] == "no window" and windowed.lines[-1] == "window 128"
