"""Inputs: what a decoder reads beside text, with a kind that the project does not have. Those of images have tests of
their own (test_images.py)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from blockwright.blocks.compose import check, compose
from blockwright.blocks.conformance.cases import CHECKS, Case
from blockwright.blocks.cost import count_families
from blockwright.blocks.generation.generate import Continuations
from blockwright.lab.card import Options, Request, table
from blockwright.lab.describe import document
from blockwright.registry import BlockError, ConfigError
from tests.blocks.small import Make, drawn

ROOT = Path(__file__).resolve().parents[2]
SIGLIP = {"name": "siglip", "tile": 16, "patch": 8, "width": 8, "depth": 1, "n_heads": 2, "norm": "layernorm"}
IMAGE = {"images": {"name": "early_fusion", "image_token": 60}, "projector": "linear", "tiling": "native"}
IMAGE |= {"vision": {**SIGLIP, "ffn": {"name": "gelu", "d_ff": 8}}}
SOUND = {"sound": {"name": "frames", "sound_token": 59}}


@pytest.fixture(autouse=True)
def sound(temporary_blocks: None) -> None:
    """The input of the how-to page: frames of 8 samples, an embedding each."""
    page = (ROOT / "docs/how-to/block-reference.md").read_text()
    (code,) = re.findall(r"```python\n(# my_blocks/sound.py.*?)```", page, re.S)
    exec(code, {"__name__": "sound"})


def heard(n: int, seed: int = 0) -> Tensor:
    return drawn(n, 8, dtype=torch.float32, seed=seed)


def test_several_inputs_each_take_the_places_of_their_token(tiny: Make) -> None:
    decoder = compose(tiny(**IMAGE, **SOUND)).eval()
    assert list(decoder.inputs) == ["images", "sound"]
    tokens = torch.tensor([[5, 59, 59, 7, 60, 60, 60, 60, 59]])
    tiles = torch.zeros(1, 3, 16, 16, dtype=torch.uint8)
    batch = {"tokens": tokens, "sound.samples": heard(3), "images.tiles": tiles}
    batch |= {"images.grids": torch.ones(1, 2).long()}
    x = decoder.look_up(tokens, decoder.media(batch))
    ear: Any = decoder.inputs["sound"]
    assert torch.equal(x[tokens == 59], ear(heard(3)))
    assert torch.equal(x[tokens == 60], decoder.inputs["images"](decoder.media(batch)["images"]))
    assert torch.equal(x[0, [0, 3]], decoder.embedding(tokens[0, [0, 3]]))


def test_media_without_an_input_and_places_that_disagree_are_refused(tiny: Make) -> None:
    assert compose(tiny(**SOUND)).media({"tokens": torch.zeros(1, 4)}) == {}
    with pytest.raises(BlockError) as caught:
        compose(tiny(**IMAGE)).media({"sound.samples": heard(3)})
    assert caught.value.parameter == "sound" and "Choose a model with sound" in caught.value.remedy
    with pytest.raises(BlockError, match="2 places of token 59, and 3 embeddings"):
        compose(tiny(**SOUND))(torch.tensor([[5, 59, 59]]), media={"sound": heard(3)})


def test_what_reads_ids_is_refused_beside_inputs(tiny: Make) -> None:
    for path, changes in (("model.mtp", {"mtp": {"depth": 1}}), ("model.gating", {"gating": "hash"})):
        with pytest.raises(ConfigError) as caught:
            check(tiny(moe=True, **SOUND, **changes))
        assert caught.value.path == path and "model.sound=null" in caught.value.remedy


@torch.no_grad()
def test_generation_embeds_media_before_it_splits_a_prompt(tiny: Make, randomise: Any) -> None:
    decoder = compose(tiny(**SOUND)).eval()
    randomise(decoder)
    prompt = [5, *[59] * 30, 7]
    rows = [list(Continuations(decoder, [prompt], 6, media={"sound": heard(30)}, chunk=n)) for n in (7, 99)]
    other = list(Continuations(decoder, [prompt], 6, media={"sound": heard(30, seed=1)}))
    assert rows[0] == rows[1] != other


def test_card_counts_an_input_in_its_own_line_and_shows_its_examples(tiny: Make) -> None:
    hearing, text = (compose(tiny(**more), device="meta") for more in (SOUND, {}))
    assert count_families(hearing)["ear"] == 8 * 48 and "ear" not in count_families(text)
    found = document(Request(["hearing", "text"], [Options(context=8)] * 2, [], 1, False, None), [hearing, text])
    one, other = found["models"]
    ours, theirs = one["parameters"]["families"], other["parameters"]["families"]
    assert ours.items() - theirs.items() == {("ear", 8 * 48)} and theirs["ear"] == 0
    second = one["inputs"]["sound"]["second"]
    assert (second["frames"], second["tokens"], second["embedding_flops"]) == (10, 10, 2 * 10 * 8 * 48)
    labels = list(table(found).columns[0].cells)
    assert "sound, second: frames" in labels and "  ear" in labels


def test_input_of_another_package_passes_the_conformance_checks() -> None:
    found = {name: Case("sound", "frames", name).brief() for name in CHECKS if name != "compile"}
    assert not {name: outcome.reason for name, outcome in found.items() if outcome.status == "failed"}
