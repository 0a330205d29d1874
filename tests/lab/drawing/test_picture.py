"""Pictures of every preset and every block: nothing overlaps, nothing leaves the sheet, every number is true."""

import re
from functools import cache
from xml.etree import ElementTree as ET

import pytest

from blockwright import registry
from blockwright.blocks.compose import compose, preset
from blockwright.lab.card import Options
from blockwright.lab.describe import figures
from blockwright.lab.drawing.figures import layers, parameters, spans, totals
from blockwright.lab.drawing.picture import alone, block_picture, picture
from blockwright.lab.drawing.scheme import scheme
from blockwright.registry import presets
from tests.lab.drawing.svg import SVG, groups, outside, overlaps, texts

BLOCKS = [f"{kind}/{name}" for kind in registry.kinds() for name in registry.names(kind)]
PRESETS = presets.names()[::8]
SHORT = 64  # tokens that FLOPs are counted for: counting takes the longer, the longer they are


def composition(name):
    """A preset, with a vocabulary where it leaves that to the tokenizer."""
    return {"vocab_size": 257, **presets.read(name)}


@cache
def drawn(name):
    return scheme(composition(name), name, SHORT)


@pytest.mark.slow
@pytest.mark.parametrize("name", PRESETS)
def test_no_text_of_a_preset_meets_another_and_no_list_of_layers_is_cut(name):
    for equations in (False, True):
        root = ET.fromstring(picture(drawn(name), equations=equations))
        boxes = list(texts(root))
        assert len(boxes) > 10
        assert overlaps(boxes) == [] and outside(root, boxes) == []
        shown = {text.text for text in root.iter(f"{SVG}text")}
        assert {layers(panel) for panel in drawn(name).panels} <= shown


@pytest.mark.slow
def test_no_text_of_a_block_meets_another():
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
def test_numbers_of_a_picture_are_those_of_describe(name):
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


def test_marks_factors_and_names_from_outside_are_drawn():
    marks = {"layers.0.attention.position": "changed"}
    found = groups(ET.fromstring(picture(drawn("deepseek_v2"), marks)))
    assert found["layers.0.attention.position"].get("class") == "changed"
    assert "layers.0.attention.position" not in groups(ET.fromstring(picture(drawn("deepseek_v2"))))
    title = "<script>alert(1)</script>&\"'"
    drawing = picture(scheme(preset("tiny", {"vocab_size": 257}), title, SHORT))
    assert "<script" not in drawing
    assert ET.fromstring(drawing).findtext(f"{SVG}title") == title
    for factor in (40, 40.0):
        position = {"name": "yarn", "factor": factor, "theta": 10000}
        of = scheme({**composition("tiny"), "position": position}, context=8).panels[0].attention
        assert next(child for child in of.children if child.kind == "position").lines == (
            "factor 40",
            "original_positions 4,096",
        )


def test_a_picture_has_paths_titles_sizes_caches_and_numbered_formulas():
    root = ET.fromstring(picture(drawn("deepseek_v2"), equations=True))
    found = groups(root)
    paths = {"layers.0", "layers.0.attention", "layers.1.ffn.gating", "layers.1.ffn.gating.balance.0", "embedding"}
    assert paths | {"layers.1.attention.position", "layers.1.residual.attention_norm", "head", "norm"} <= set(found)
    assert all(group.find(f"{SVG}title") is not None for group in found.values())
    attention = found["layers.1.attention"]
    assert [text.text for text in attention.iter(f"{SVG}text") if "latent 512 + 64" in (text.text or "")]
    assert [rect for rect in attention.iter(f"{SVG}rect") if rect.get("class") == "hatch"]
    shown = [text.text or "" for text in root.iter(f"{SVG}text")]
    assert "60 layers · d_model 5,120 · vocabulary 102,400 · 163,840 positions" in shown
    listed = {found[1]: found[2] for name in shown if (found := re.fullmatch(r"(\(\d+\)) (\w+)", name))}
    assert len(listed) > 5 and all(f"{block} {number}" in shown for number, block in listed.items())


def test_windows_are_said_and_the_cache_is_given_beyond_them_too():
    assert totals(drawn("deepseek_v2").totals)[-1] == ("69,120 B", "cache a token, bf16")
    windowed = drawn("gpt_oss_20b")
    assert totals(windowed.totals)[-1] == ("49,152 B", "cache a token, bf16; 24,576 B beyond windows")
    full, short = (panel.attention.lines[-1] for panel in reversed(windowed.panels))
    assert (full, short) == ("no window", "window 128")
    assert spans((3, 7, 11, 15, 19)) == "3, 7, 11, …, 19" and spans((0, 1, 3, 4, 6, 7)) == "0–1, 3–4, 6–7"
    assert spans((0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14)) == "0–2, 4–6, …, 12–14" and spans(range(60)) == "0–59"
