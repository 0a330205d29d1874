"""A box has the children that its block uses, and a layer the figures of its cache."""

from __future__ import annotations

from torch import nn

from blockwright import registry
from blockwright.blocks.compose import preset
from blockwright.blocks.norm.rmsnorm import RMSNorm
from blockwright.lab.drawing import figures
from blockwright.lab.drawing.boxes import box
from blockwright.lab.drawing.scheme import scheme
from blockwright.registry.recording import Built


class Parent(nn.Module):
    """Keeps one of two children, and copies of neither."""

    def __init__(self, kept: RMSNorm, left: RMSNorm) -> None:
        super().__init__()
        self.kept = kept


def test_child_that_a_block_leaves_unused_is_not_drawn() -> None:
    entry, kept, left = registry.lookup("norm", "rmsnorm"), RMSNorm(8), RMSNorm(4)
    parent = Parent(kept, left)
    of_parent = Built(entry, "model.norm", parent, {}, {"kept": kept, "left": left})
    of_children = {id(child): Built(entry, "model.norm", child, {}, {}) for child in (kept, left)}
    drawn = box(parent, "norm", "norm", {id(parent): of_parent, **of_children})
    assert [child.path for child in drawn.children] == ["norm.kept"]


def test_layer_has_what_a_token_adds_to_its_cache_and_what_beyond_windows() -> None:
    gqa = {"name": "gqa", "n_heads": 4, "n_kv_heads": 2, "head_dim": 8}
    plain = {"vocab_size": 257, "n_layers": 1, "layout": {"ffn": "ffn*"}}
    (whole,) = scheme(preset("tiny", {**plain, "attention": gqa})).panels
    assert figures.of_layer(whole)[-1] == "32 cached a token"
    (windowed,) = scheme(preset("tiny", {**plain, "attention": {**gqa, "name": "sliding_window", "window": 16}})).panels
    assert figures.of_layer(windowed)[-1] == "32 cached a token, 0 beyond windows"
