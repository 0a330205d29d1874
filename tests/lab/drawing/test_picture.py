"""A picture of a model has a box for each block, at its path."""

from xml.etree import ElementTree as ET

from blockwright.blocks.compose import preset
from blockwright.lab.drawing.picture import picture
from blockwright.lab.drawing.scheme import scheme


def test_every_box_has_its_path_and_a_title():
    drawn = ET.fromstring(picture(scheme(preset("deepseek_v2"), "DeepSeek-V2")))
    groups = {g.get("data-path"): g for g in drawn.iter("{http://www.w3.org/2000/svg}g")}
    assert {"layers.0.attention", "layers.0.attention.position", "layers.1.ffn.gating", "embedding", "head"} <= set(
        groups
    )
    assert all(group.find("{http://www.w3.org/2000/svg}title") is not None for group in groups.values())
