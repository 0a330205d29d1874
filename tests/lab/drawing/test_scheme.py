"""A scheme composes one of each distinct layer; what it says is that of the whole."""

from __future__ import annotations

import inspect
import json
import re

import pytest
import torch
from torch import Tensor, nn

from blockwright import registry
from blockwright.blocks.attention.base import Attention
from blockwright.blocks.base import Block, Drawn
from blockwright.blocks.compose import compose, preset
from blockwright.blocks.cost import cache_bytes, count_parameters, flops_per_token, growth_beyond_windows
from blockwright.blocks.forward_pass import Pass
from blockwright.blocks.norm import Norm, RMSNorm
from blockwright.blocks.residual.base import Mixer, Residual
from blockwright.blocks.sample import sample
from blockwright.lab.drawing import figures
from blockwright.lab.drawing.boxes import RELATION, box, equations
from blockwright.lab.drawing.parts import Branch, branches, norms
from blockwright.lab.drawing.picture import picture
from blockwright.lab.drawing.scheme import runs, scheme
from blockwright.registry import presets, register
from blockwright.registry.recording import Built, recorded

FAR = 2**15
TINY = {"vocab_size": 257, "n_layers": 5}
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
def test_sample_costs_what_the_whole_does(changes):
    model = preset("tiny", {**TINY, **changes})
    one_of_each, whole = sample(model), compose(model, device="meta")
    assert sorted(index for layers in one_of_each.layers for index in layers) == list(range(5))
    assert count_parameters(one_of_each) == count_parameters(whole)
    assert flops_per_token(one_of_each, 33) == flops_per_token(whole, 33)
    assert cache_bytes(one_of_each, 77, torch.bfloat16) == cache_bytes(whole, 77, torch.bfloat16)
    assert growth_beyond_windows(one_of_each) == growth_beyond_windows(whole)


@pytest.mark.parametrize(
    "name",
    [
        "gpt_oss_20b",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("deepseek_v4_flash", "kimi_linear_48b_a3b")),
    ],
)
def test_what_is_cached_weighs_what_the_caches_do(name):
    of = scheme(presets.read(name), context=8)
    bytes_ = sum(
        len(panel.layers) * (held.per_token * FAR + held.constant) * (4 if held.wide else 2)
        for panel in of.panels
        for held in panel.attention.cached
    )
    assert bytes_ == cache_bytes(compose(presets.read(name), device="meta"), FAR, torch.bfloat16)


def test_layers_composed_alike_are_one_panel_and_parts_add_up():
    of = scheme(presets.read("deepseek_v3"), context=8)
    layers = sum(len(panel.layers) * panel.parameters for panel in of.panels)
    assert layers + of.embedding.parameters + of.norm.parameters + of.head.parameters == of.totals.parameters
    for panel in of.panels:
        assert panel.parameters == sum(box.parameters for box in (panel.attention, panel.ffn, panel.residual))
    idle = sum(len(panel.layers) * (panel.parameters - panel.active) for panel in of.panels)
    assert of.totals.active == of.totals.parameters - idle
    same = {"variants": {"ffn": {"same": {"name": "swiglu", "d_ff": 64}}}, "layout": {"ffn": "ffn*2 same*"}}
    written = preset("tiny", {**TINY, "ffn": {"name": "swiglu", "d_ff": 64}, **same})
    assert [panel.layers for panel in scheme(written, context=8).panels] == [(0, 1, 2, 3, 4)]
    assert len(sample(preset("tiny", {**TINY, "attention": "lightning"})).layers) == 5  # which depend on their depth
    of = scheme(preset("tiny", TINY), "V4", 8)
    plain = json.loads(json.dumps(of.plain()))
    assert plain["title"] == "V4" and plain["panels"][0]["attention"]["path"] == "layers.0.attention"
    assert plain["panels"][0]["residual"]["children"][0]["written"].startswith("model.")
    model = preset("tiny", {**TINY, "position": "learned", "mtp": {"depth": 2}})
    made = scheme(model)
    paths = [box.path for box in made.boxes()]
    assert len(set(paths)) == len(paths)
    panels = {panel.path for panel in made.panels}
    assert set(re.findall(r'data-path="([^"]+)"', picture(made))) - panels <= set(paths)
    assert {"embedding", "position", "norm", "head", "mtp.0", "mtp.1", "layers.0.attention.kv_norm"} <= set(paths)


@pytest.mark.parametrize(
    ("sequence", "expected"),
    [("A", "A1"), ("ABBB", "A1 B3"), ("ABABAB", "AB3"), ("ABBCBBBCBBBCBB", "A1 BBCB3 B1"), ("ABCABCC", "ABC2 C1")],
)
def test_stack_is_written_as_runs(sequence, expected):
    assert " ".join(f"{''.join(run.panels)}{run.times}" for run in runs(sequence)) == expected


def test_plug_in_is_drawn_by_its_signature_and_by_what_it_says():
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
    Guest.drawn = lambda self: Drawn(("as wide as it is long",))
    again = scheme(preset("tiny", {**TINY, "attention": "guest_of_pictures"}), context=8)
    assert again.panels[0].attention.lines == ("as wide as it is long",)
    assert Block.drawn(compose({**preset("tiny", TINY)}).norm) == Drawn()


class Parent(nn.Module):
    """Keeps one of two children, and copies of neither."""

    def __init__(self, kept: RMSNorm, left: RMSNorm) -> None:
        super().__init__()
        self.kept = kept


def test_child_that_a_block_leaves_unused_is_not_drawn():
    entry, kept, left = registry.lookup("norm", "rmsnorm"), RMSNorm(8), RMSNorm(4)
    parent = Parent(kept, left)
    of_parent = Built(entry, "model.norm", parent, {}, {"kept": kept, "left": left})
    of_children = {id(child): Built(entry, "model.norm", child, {}, {}) for child in (kept, left)}
    drawn = box(parent, "norm", "norm", {id(parent): of_parent, **of_children})
    assert [child.path for child in drawn.children] == ["norm.kept"]


def test_layer_has_what_a_token_adds_to_its_cache_and_what_beyond_windows():
    gqa = {"name": "gqa", "n_heads": 4, "n_kv_heads": 2, "head_dim": 8}
    plain = {"vocab_size": 257, "n_layers": 1, "layout": {"ffn": "ffn*"}}
    (whole,) = scheme(preset("tiny", {**plain, "attention": gqa})).panels
    assert figures.of_layer(whole)[-1] == "32 cached a token"
    (windowed,) = scheme(preset("tiny", {**plain, "attention": {**gqa, "name": "sliding_window", "window": 16}})).panels
    assert figures.of_layer(windowed)[-1] == "32 cached a token, 0 beyond windows"


PRE = (Branch(("attention",), before="attention_norm"), Branch(("ffn",), before="ffn_norm"))
SANDWICH = (
    Branch(("attention",), before="attention_norm", after="attention_out_norm"),
    Branch(("ffn",), before="ffn_norm", after="ffn_out_norm"),
)
EXPECTED = {
    "attention_residual": PRE,
    "convolved": PRE,
    "gated_streams": (Branch(("attention",)), Branch(("ffn",))),  # its norms are within what reads the streams
    "hyper_connections": PRE,
    "mhc": PRE,
    "mixture_of_depths": PRE,
    "normed_embeddings": PRE,
    "parallel": (Branch(("attention", "ffn"), before="attention_norm"),),
    "postnorm": (Branch(("attention",), beyond="attention_norm"), Branch(("ffn",), beyond="ffn_norm")),
    "pre_postnorm": (
        Branch(("attention",), before="attention_norm", beyond="attention_sum_norm"),
        Branch(("ffn",), before="ffn_norm", beyond="ffn_sum_norm"),
    ),
    "prenorm": PRE,
    "reordered": (Branch(("attention",), after="attention_norm"), Branch(("ffn",), after="ffn_norm")),
    "read_ahead": PRE,
    "sandwich": SANDWICH,
    "scaled_sandwich": SANDWICH,
    "sigmoid_skip": PRE,
}
AROUND = {"convolved", "normed_embeddings"}


def observed(residual):
    with recorded() as records:
        decoder = compose(preset("tiny", {"vocab_size": 257, "residual": residual}), device="meta")
    block = decoder.layers[1].residual
    return branches(block, norms(block, records), decoder.config["d_model"])


def test_every_residual_block_is_expected():
    assert set(EXPECTED) == {
        n for n in registry.names("residual") if registry.lookup("residual", n).provider == "blockwright"
    }


@pytest.mark.parametrize("name", EXPECTED)
def test_branches(name):
    inner = {"residual": "prenorm"} if name in AROUND else {}
    assert observed({"name": name, **inner}) == EXPECTED[name]


class Swapped(Residual):
    """A plug-in's block: the ffn first, after a norm; then the attention, normed behind."""

    def __init__(self, first: Norm, last: Norm) -> None:
        super().__init__()
        self.first, self.last = first, last

    def forward(self, x: Tensor, attention: Mixer, ffn: Mixer, given: Pass) -> Tensor:
        x = x + ffn(self.first(x))
        return x + self.last(attention(x))


class Bare(Residual):
    """A plug-in's block without a norm, whose mixers run side by side."""

    def forward(self, x: Tensor, attention: Mixer, ffn: Mixer, given: Pass) -> Tensor:
        return x + attention(x) + ffn(x)


def test_plug_in_is_drawn_as_it_computes():
    assert branches(Bare(), {}, 8) == (Branch(("attention", "ffn")),)
    with torch.device("meta"):
        first, last = RMSNorm(8), RMSNorm(8)
    found = branches(Swapped(first, last), {"first": first, "last": last}, 8)
    assert found == (Branch(("ffn",), before="first"), Branch(("attention",), after="last"))


FORMULAS = {
    "attention/mla": (
        "[c; k_rope] = W_kv_down x",
        "[k_n; v_n] = W_kv_up,n norm(c)",
        "[q_n; q_rope,n] = W_q,n x (or, compressed, W_q_up,n norm(W_q_down x))",
        "k_n ← [k_n; rot(k_rope)]",
        "q_n ← [q_n; rot(q_rope,n)]",
        "y = W_o [softmax(q_n k_nᵀ / √(nope + rope)) v_n]_n",
    ),
    "attention/mamba2": (
        "v, k, q = silu(conv(W x))",
        "Δ = softplus(W_Δ x + b)",
        "S ← e^{−Δ exp(a)} S + k (Δ v)ᵀ",
        "y = Sᵀ q + d v",
        "exp(a) = 1 … N",
    ),
    "attention/differential": (
        "λ₀ = 0.8 − 0.6 exp(−0.3 layer), λ = exp(λ_q1·λ_k1) − exp(λ_q2·λ_k2) + λ₀",
        "y = W_o [(1 − λ₀) norm((softmax(q₁k₁ᵀ/√H) − λ softmax(q₂k₂ᵀ/√H)) v)]_n",
    ),
    "ffn/swiglu": ("y = W_down (silu(W_gate x) ⊙ W_up x)",),
    "ffn/none": (),
    "balance/communication": ("loss = α Σ_d f''_d P''_d", "f''_d = D n_d / (M T)", "P''_d = Σ_{i on d} P_i"),
    "balance/expert": ("loss = α Σ_i f_i P_i", "f_i = E n_i / (k T)", "P_i = mean_t (s_i,t / Σ_j s_j,t)"),
    "gating/topk_softmax": ("z = W x + b", "g_i = exp(z_i) / Σ_{j chosen} exp(z_j) for the k highest z_i"),
    "norm/rmsnorm": ("y = x / sqrt(mean(x²) + eps) · g",),
    "residual/prenorm": ("x ← x + attention(norm₁(x))", "x ← x + ffn(norm₂(x))"),
}
FORMULATED = ("attention", "ffn", "experts", "norm", "residual", "output_gate", "qk_norm")


@pytest.mark.parametrize("block", FORMULAS)
def test_formulas(block):
    assert equations(registry.lookup(*block.split("/")).cls) == FORMULAS[block]


@pytest.mark.parametrize("kind", FORMULATED)
def test_every_docstring_with_a_formula_gives_one(kind):
    for name in registry.names(kind):
        cls = registry.lookup(kind, name).cls
        second = [*(inspect.getdoc(cls) or "").partition("\nArgs:")[0].split("\n\n"), ""][1]
        if RELATION.search(second):
            assert equations(cls), name


def test_brackets_are_closed():
    for kind in registry.kinds():
        for name in registry.names(kind):
            for formula in equations(registry.lookup(kind, name).cls):
                assert all(formula.count(a) == formula.count(b) for a, b in ("()", "[]", "{}")), (name, formula)
