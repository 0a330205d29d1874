"""A scheme composes one of each distinct layer; what it says is that of the whole."""

import json
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from blockwright.blocks.attention.base import Attention
from blockwright.blocks.base import Block
from blockwright.blocks.compose import compose, preset
from blockwright.blocks.cost import cache_bytes, count_parameters, flops_per_token, growth_beyond_windows
from blockwright.blocks.drawn import Drawn
from blockwright.blocks.forward_pass import Pass
from blockwright.blocks.sample import sample
from blockwright.lab.drawing.picture import picture
from blockwright.lab.drawing.scheme import runs, scheme
from blockwright.registry import ConfigError, presets, register

FAR = 2**15
TINY: dict[str, Any] = {"vocab_size": 257, "n_layers": 5}
DEEP = [  # blocks that differ by depth
    {"attention": "lightning"},
    {"attention": "differential"},
    {"residual": {"name": "attention_residual", "block": 2}},
    {"residual": {"name": "mhc", "closing": "weighted"}},
    {"attention": {"name": "gqa", "selector": {"name": "shared", "of": {"name": "dsa", "top_k": 4}, "every": 2}}},
    {"layout": {"attention": ["mla*2", "gqa*3"], "ffn": "dense*1 ffn*"}},
    {"mtp": {"depth": 2}},
]


@pytest.mark.parametrize(
    "changes", [c if i == 4 else pytest.param(c, marks=pytest.mark.slow) for i, c in enumerate(DEEP)], ids=str
)
def test_sample_costs_what_the_whole_does(changes: dict[str, Any]) -> None:
    model = preset("tiny", {**TINY, **changes})
    one_of_each, whole = sample(model), compose(model, device="meta")
    assert sorted(index for layers in one_of_each.layers for index in layers) == list(range(5))
    assert count_parameters(one_of_each) == count_parameters(whole)
    assert flops_per_token(one_of_each, 33) == flops_per_token(whole, 33)
    assert cache_bytes(one_of_each, 77, torch.bfloat16) == cache_bytes(whole, 77, torch.bfloat16)
    assert growth_beyond_windows(one_of_each) == growth_beyond_windows(whole)


def test_layers_that_depend_on_their_depth_are_told_apart() -> None:
    made = sample(preset("tiny", {**TINY, "attention": "lightning"}))
    assert len(made.layers) == 5


@pytest.mark.slow
@pytest.mark.parametrize("name", presets.names()[::5])
def test_sample_of_a_preset_costs_what_the_whole_does(name: str) -> None:
    model = {"vocab_size": 257, **presets.read(name)}
    one_of_each, whole = sample(model), compose(model, device="meta")
    context = min(4096, whole.config["max_positions"])
    assert count_parameters(one_of_each) == count_parameters(whole)
    assert flops_per_token(one_of_each, context) == flops_per_token(whole, context)


@pytest.mark.parametrize(
    "name",
    [
        "gpt_oss_20b",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("deepseek_v4_flash", "kimi_linear_48b_a3b")),
    ],
)
def test_what_is_cached_weighs_what_the_caches_do(name: str) -> None:
    """Tensor by tensor: numbers that grow and numbers that stay, in bf16 and fp32."""
    of = scheme(presets.read(name), context=8)
    bytes_ = sum(
        len(panel.layers) * (held.per_token * FAR + held.constant) * (4 if held.wide else 2)
        for panel in of.panels
        for held in panel.attention.cached
    )
    assert bytes_ == cache_bytes(compose(presets.read(name), device="meta"), FAR, torch.bfloat16)


def test_parts_add_up() -> None:
    of = scheme(presets.read("deepseek_v3"), context=8)
    layers = sum(len(panel.layers) * panel.parameters for panel in of.panels)
    assert layers + of.embedding.parameters + of.norm.parameters + of.head.parameters == of.totals.parameters
    for panel in of.panels:
        assert panel.parameters == sum(box.parameters for box in (panel.attention, panel.ffn, panel.residual))
    idle = sum(len(panel.layers) * (panel.parameters - panel.active) for panel in of.panels)
    assert of.totals.active == of.totals.parameters - idle


@pytest.mark.parametrize(
    ("sequence", "expected"),
    [("A", "A1"), ("ABBB", "A1 B3"), ("ABABAB", "AB3"), ("ABBCBBBCBBBCBB", "A1 BBCB3 B1"), ("ABCABCC", "ABC2 C1")],
)
def test_stack_is_written_as_runs(sequence: str, expected: str) -> None:
    assert " ".join(f"{''.join(run.panels)}{run.times}" for run in runs(sequence)) == expected


def test_layers_that_are_composed_alike_are_one_panel() -> None:
    same = {"variants": {"ffn": {"same": {"name": "swiglu", "d_ff": 64}}}, "layout": {"ffn": "ffn*2 same*"}}
    written = preset("tiny", {**TINY, "ffn": {"name": "swiglu", "d_ff": 64}, **same})
    assert [panel.layers for panel in scheme(written, context=8).panels] == [(0, 1, 2, 3, 4)]


def test_scheme_is_data() -> None:
    of = scheme(preset("tiny", TINY), "V4", 8)
    plain = json.loads(json.dumps(of.plain()))
    assert plain["title"] == "V4" and plain["panels"][0]["attention"]["path"] == "layers.0.attention"
    assert plain["panels"][0]["residual"]["children"][0]["written"].startswith("model.")


def test_refusals_are_those_of_compose() -> None:
    with pytest.raises(ConfigError) as refused:
        scheme(preset("tiny", {"vocab_size": 257, "attention": {"name": "gqa", "n_heads": 7}}))
    assert refused.value.path == "model.attention.n_heads"


def test_plug_in_is_drawn_by_its_signature_and_by_what_it_says() -> None:
    @register("attention", "guest_of_pictures")
    class Guest(Attention):
        """A plug-in's mixer: it remembers nothing.

        Doe 2026: y = W x.

        Args:
            rank: width of the middle
            sharp: whether it is sharp
        """

        def __init__(self, d_model: int, rank: int = 3, sharp: bool = False) -> None:
            super().__init__()
            self.map = nn.Linear(d_model, d_model)

        def forward(self, x: Tensor, given: Pass) -> Tensor:
            return self.map(x)

    of = scheme(preset("tiny", {**TINY, "attention": {"name": "guest_of_pictures", "sharp": True}}), context=8)
    box = of.panels[0].attention
    assert box.lines == ("rank 3", "sharp") and box.cached == () and box.equations == ("y = W x",)
    assert of.totals.cache_numbers is None
    assert ">guest_of_pictures<" in picture(of)
    Guest.drawn = lambda self: Drawn(("as wide as it is long",))  # type: ignore[method-assign]
    again = scheme(preset("tiny", {**TINY, "attention": "guest_of_pictures"}), context=8)
    assert again.panels[0].attention.lines == ("as wide as it is long",)
    assert Block.drawn(compose({**preset("tiny", TINY)}).norm) == Drawn()


def test_boxes_are_all_that_the_picture_has_each_once() -> None:
    model = preset("tiny", {**TINY, "position": "learned", "mtp": {"depth": 2}})
    made = scheme(model)
    paths = [box.path for box in made.boxes()]
    assert len(set(paths)) == len(paths)
    panels = {panel.path for panel in made.panels}
    assert set(re.findall(r'data-path="([^"]+)"', picture(made))) - panels <= set(paths)
    assert {"embedding", "position", "norm", "head", "mtp.0", "mtp.1", "layers.0.attention.kv_norm"} <= set(paths)
