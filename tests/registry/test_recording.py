"""What was built is recorded: its values as they are settled, its children by their places."""

from __future__ import annotations

from typing import Any

import pytest

from blockwright.blocks.compose import compose, preset
from blockwright.blocks.decoder import Decoder
from blockwright.registry.recording import Built, recorded

LOSSES = {"name": "softmax_topk", "top_k": 4, "balance": ["expert", "z_loss"]}
MODEL: dict[str, Any] = {"vocab_size": 257, "n_layers": 2, "gating": LOSSES}


@pytest.fixture
def built() -> dict[str, Built]:
    """Path of a module → the record of what was built there."""
    with recorded() as records:
        decoder: Decoder = compose(preset("tiny", MODEL), device="meta")
    return {path: records[id(module)] for path, module in decoder.named_modules() if id(module) in records}


def test_null_is_what_the_block_has_settled_on(built: dict[str, Built]) -> None:
    attention = built["layers.0.attention"]
    assert attention.settings["v_head_dim"] is None and attention.settled("v_head_dim") == 24
    assert attention.settings["q_lora_rank"] is None and attention.settled("q_lora_rank") is None
    assert attention.settled("kv_lora_rank") == attention.settings["kv_lora_rank"]


def test_children_of_a_list_have_their_index_and_null_has_no_place(built: dict[str, Built]) -> None:
    (gating,) = [each for each in built.values() if each.entry.kind == "gating"]
    assert [(slot, child.entry.name) for slot, child in _slots(gating, built)] == [
        ("balance.0", "expert"),
        ("balance.1", "z_loss"),
    ]
    attention = built["layers.0.attention"]
    assert None in attention.children.values() and None not in dict(attention.slots()).values()


def _slots(of: Built, built: dict[str, Built]) -> list[tuple[str, Built]]:
    return [(slot, next(b for b in built.values() if b.block is child)) for slot, child in of.slots()]


def test_nothing_is_recorded_outside() -> None:
    with recorded() as records:
        pass
    compose(preset("tiny", MODEL), device="meta")
    assert records == {}
