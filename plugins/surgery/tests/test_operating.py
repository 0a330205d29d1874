"""Surgery: what is exact leaves the logits alone, what is not says so, and every number is accounted for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from blockwright.blocks.compose import compose
from blockwright.blocks.decoder import Decoder
from blockwright.blocks.forward_pass import Pass
from blockwright.plugins.surgery.growth import Ends, Growth, Stacked, Zeroed
from blockwright.plugins.surgery.ledger import TOLERANCE, Operation
from blockwright.plugins.surgery.operating import build, operate, plan, second_moments
from blockwright.plugins.surgery.probing import grown, mixed
from blockwright.plugins.surgery.transplant.base import Setting, Transplant, Transplanted
from blockwright.registry import ConfigError, register

EXACT = 1e-4  # largest difference of logits of about 4
DENSE: dict[str, Any] = {"vocab_size": 61, "d_model": 60, "n_layers": 2, "max_positions": 64, "init": {"std": 0.15}}
DENSE |= {"attention": {"name": "gqa", "n_heads": 6, "n_kv_heads": 3}, "ffn": {"name": "swiglu", "d_ff": 72}}
DENSE |= {"position": "rope", "norm": "rmsnorm", "residual": "prenorm"}
H = 10


def mla(rank: int, rotated: int, position: Any, **more: Any) -> dict[str, Any]:
    widths = {"kv_lora_rank": rank, "qk_nope_head_dim": H, "qk_rope_head_dim": rotated, "v_head_dim": H}
    return {"attention": {"name": "mla", "n_heads": 6, **widths, "kv_norm": "none", "position": position, **more}}


def moe(n_experts: int, d_ff: int, top_k: int, gate: Any = "topk_softmax", **more: Any) -> dict[str, Any]:
    gating = {"name": gate, "top_k": top_k} if isinstance(gate, str) else {**gate, "top_k": top_k}
    ffn = {"name": "moe", "n_experts": n_experts, **more}
    return {"ffn": ffn, "experts": {"name": "swiglu", "d_ff": d_ff}, "gating": gating}


CHOSEN = {"name": "rope_chosen", "of_dim": H}
MHA = {"attention": {"name": "mha", "n_heads": 6}}
GQA = DENSE["attention"]
DSA = {"name": "dsa", "n_heads": 2, "head_dim": 8, "top_k": 5}
ENGRAM = {"name": "engram", "rows": 37, "n_heads": 2}
WIDE = {
    "d_model": 120,
    "attention": {"name": "gqa", "n_heads": 12, "n_kv_heads": 6},
    "ffn": {"name": "swiglu", "d_ff": 144},
}
KDA = {"name": "kda", "n_heads": 4, "head_dim": 7, "v_head_dim": 5}
BY_HEAD = {"decay": {"name": "head"}, "output_gate": {"name": "silu"}}
SHARED = {"shared": {"name": "swiglu", "d_ff": 72}}


class Case:
    """An old decoder, and a new one made from it."""

    def __init__(
        self, old: Mapping[str, Any], new: Mapping[str, Any], named: tuple[Any, ...] = (), growth: Growth | None = None
    ) -> None:
        self.growth = growth or Zeroed()
        self.old: Decoder = compose({**DENSE, **old})
        for index, parameter in enumerate(p for p in self.old.parameters() if p.ndim < 2):  # gains and biases too
            with torch.no_grad():
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)), alpha=0.1)
        self.new: Decoder = compose({**DENSE, **old, **new}, seed=1)
        self.text = torch.randint(61, (4, 33), generator=torch.Generator().manual_seed(0))
        operators = [(n if isinstance(n, str) else n["name"], build(n, "surgery.transplant")) for n in named]
        steps = plan(self.old, self.new, operators, self.growth)
        self.ledger = operate(self.old, self.new, steps, self.growth, lambda: [{"tokens": self.text}], 0)

    @property
    def difference(self) -> float:
        with torch.no_grad():
            return float((self.old(self.text) - self.new(self.text)).abs().max())

    @property
    def done(self) -> tuple[Operation, ...]:
        return self.ledger.operations

    def of(self, name: str) -> list[Operation]:
        return [operation for operation in self.done if operation.name == name]


EXACT_ONES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("latent", MHA, mla(60, 60, CHOSEN)),  # full rank, and every pair of every head turns
    ("latent", {}, mla(30, 30, {**CHOSEN, "pairing": "interleaved"})),
    ("latent", {}, mla(60, 34, CHOSEN, q_lora_rank=60, q_norm="none")),  # more rank and more pairs than needed
    ("latent", {**MHA, "position": "none"}, mla(60, 2, "none")),  # half of the cache without positions
    ("repeat_heads", {}, MHA),
    ("window", {}, {"attention": {"name": "sliding_window", "n_heads": 6, "n_kv_heads": 3, "window": 64}}),
    ("selector", {}, {"attention": {**GQA, "selector": {**DSA, "dense": True}}}),
    ("selector", {"attention": {**GQA, "selector": {**DSA, "dense": True}}}, {"attention": GQA}),
    ("copies", {}, moe(4, 72, 2)),
    ("copies", {}, moe(4, 72, 2, {"name": "sigmoid_bias", "scaling": 2.5})),
    ("virtual_groups", {}, moe(8, 36, 2)),
    ("virtual_groups", {}, moe(8, 36, 4, {"name": "softmax_topk", "renormalise": True, "scaling": 2.5})),
    ("virtual_groups", {}, moe(9, 24, 6)),  # two of three copies at a time, which differ in weight
    ("shared", {}, moe(8, 24, 2, "softmax_topk", **SHARED)),
    ("zeroed", {"attention": {"name": "gqa", "n_heads": 6, "n_kv_heads": 3, "bias": True}}, {"n_layers": 5}),
    ("widen", {}, WIDE),
    ("widen", {"tie_embeddings": True, "scale_embeddings": True}, WIDE),
    ("untie", {"tie_embeddings": True}, {"tie_embeddings": False}),
    ("streams", {}, {"residual": "mhc"}),
    ("streams", {"norm": "layernorm"}, {"residual": {"name": "mhc", "mixing": "sinkhorn", "n_streams": 3}}),
    ("streams", {"norm": "none"}, {"residual": "hyper_connections", "ffn": {"name": "swiglu", "d_ff": 72}}),
    ("first_values", {"qk_norm": "per_head"}, {"values": "value_residual"}),
    ("shared_keys", {}, {"kv_source": "lent"}),
    ("shared_keys", {"attention": mla(60, 60, CHOSEN)["attention"]}, {"kv_source": "lent"}),
    ("silent_memory", {}, {"memory": ENGRAM}),
    ("silent_memory", {"residual": "mhc"}, {"overrides": [{"layers": 1, "memory": ENGRAM}]}),
    ("silent_memory", {"norm": "layernorm"}, {"memory": {"name": "per_layer_embedding", "width": 6}}),
    ("zeroed", {"memory": {"name": "per_layer_embedding", "width": 6}}, {"n_layers": 5}),
    ("sigmoid_skip", {"norm": "layernorm"}, {"residual": "sigmoid_skip"}),
    *(("loop", {}, {"loop": {"name": "cycle", "visits": 1, "entry": entry}}) for entry in ("plain", "normed", "add")),
    ("copy", {"loop": {"name": "cycle", "visits": 3}}, {"loop": {"name": "cycle", "visits": 3}}),
    ("neutral", {}, {"attention": {**GQA, "scores": "talking_heads"}}),
    ("neutral", {}, {"attention": {**GQA, "scores": {"name": "dcmha", "rank": 1, "width": 5}}}),
    ("neutral", {}, {"position": {"name": "banded", "rank": 3, "extent": 9, "inner": "rope"}}),
    ("neutral", {"position": "alibi"}, {"position": {"name": "banded", "extent": 9, "inner": "alibi"}}),
    ("erase_and_write", {"attention": KDA}, {"attention": {**KDA, "name": "gated_delta_2"}}),
    ("erase_and_write", {"attention": {**KDA, **BY_HEAD}}, {"attention": {**KDA, **BY_HEAD, "name": "gated_delta_2"}}),
]


@pytest.mark.slow
def test_exact_operator_leaves_the_logits_alone() -> None:
    for name, old, new in EXACT_ONES:
        case = Case(old, new)
        assert case.of(name) and case.ledger.exact and not case.ledger.errors, (name, new)
        assert case.difference < EXACT, (name, new)


@pytest.mark.parametrize("attention", [GQA, mla(60, 60, CHOSEN)["attention"]], ids=["gqa", "mla"])
def test_borrowed_keys_are_measured_together_with_the_lenders(attention: dict[str, Any]) -> None:
    case = Case({"attention": attention}, {"kv_source": "lent", "layout": {"kv_source": "lent borrowed"}})
    lender, borrower = sorted(case.of("shared_keys"), key=lambda operation: operation.path)
    assert lender.claimed and not borrower.claimed and "left out" in borrower.note
    assert borrower.drawn == borrower.derived == 0
    assert not case.ledger.exact and case.difference > 100 * EXACT
    with torch.no_grad():  # where both layers' keys agree, sharing them changes nothing
        twin = Case({"attention": attention, "n_layers": 1}, {"kv_source": "lent"})
    assert twin.ledger.exact


INEXACT: list[tuple[str, dict[str, Any], tuple[str, ...]]] = [
    ("latent", mla(24, 12, CHOSEN), ()),
    ("mean_heads", {"attention": {"name": "mqa", "n_heads": 6}}, ()),
    ("window", {"attention": {"name": "sliding_window", "n_heads": 6, "n_kv_heads": 3, "window": 8}}, ()),
    ("selector", {"attention": {**GQA, "selector": DSA}}, ()),
    ("delta", {"attention": {"name": "kda", "n_heads": 6}}, ()),
    ("delta", {"attention": {"name": "mamba3", "n_heads": 6, "head_dim": 10, "state_dim": 10, "rank": 3}}, ()),
    ("copies", moe(4, 72, 2, "softmax_topk"), ()),  # not renormalised: the sum of the weights varies
    ("drop", moe(4, 72, 2), ("drop",)),
    ("fit", {"residual": "sandwich"}, ()),
    ("loop", {"loop": {"name": "cycle", "visits": 2}}, ()),
    ("loop", {"loop": {"name": "repeat", "first": 1, "visits": 1, "entry": "adapter"}}, ()),
]


def test_inexact_operator_says_so() -> None:
    for name, new, named in INEXACT:
        case = Case({}, new, named)
        assert case.of(name) and not any(operation.claimed for operation in case.of(name)), new
        assert not case.ledger.exact and case.difference > 100 * EXACT, new


def test_mean_over_the_depth_is_nearly_the_sum_and_not_called_exact() -> None:
    (line, *_) = Case({}, {"residual": {"name": "attention_residual", "block": 3}}).ledger.lines
    assert line.operator == "streams" and not line.claimed and (line.difference or 0) < TOLERANCE


def test_stacking_is_not_exact() -> None:
    ledger = Case({}, {"n_layers": 4}, growth=Stacked()).ledger
    assert [line.operator for line in ledger.lines if not line.exact] == ["stacked"] and not ledger.exact


def test_first_and_last_layers_become_a_loop() -> None:
    loop = {"name": "cycle", "first": 1, "last": 1, "visits": 4}
    case = Case({"n_layers": 6}, {"n_layers": 3, "loop": loop}, growth=Ends(2))
    for new, old in ((0, 0), (1, 1), (2, 5)):
        assert torch.equal(case.new.layers[new].ffn.up.weight, case.old.layers[old].ffn.up.weight)  # type: ignore[union-attr]
    assert {line.operator for line in case.ledger.lines if not line.exact} == {"ends", "loop"}
    deeper = case.old.with_layers(case.old.layers[i] for i in (0, 1, 1, 1, 1, 5))
    torch.testing.assert_close(case.new(case.text), deeper(case.text))


def test_looped_model_keeps_its_weights_at_other_visits_and_without_a_loop() -> None:
    trained = {"loop": {"name": "cycle", "first": 1, "visits": 3, "entry": "adapter"}}
    for change in ({"loop": {**trained["loop"], "visits": 2}}, {"loop": None}):
        case = Case(trained, change)
        (operation,) = case.of("fit")
        assert operation.path == "loop" and not operation.claimed and not case.ledger.exact
        assert not any(o.drawn for o in case.done)


def test_every_parameter_is_copied_derived_or_drawn() -> None:
    """Of a swap that has all three, and an operator that draws part of what it copies."""
    case = Case({}, {**moe(4, 72, 2), "attention": {"name": "kda", "n_heads": 6}}, ("drop",))
    for operation in case.done:
        block: Any = case.new
        for key in operation.path.split("."):
            block = getattr(block, key) if not key.isdigit() else block[int(key)]
        assert operation.copied + operation.derived + operation.drawn == sum(p.numel() for p in block.parameters())
    half, router = 4 * 3 * 36 * 60, 4 * 60
    assert [(o.copied, o.derived, o.drawn) for o in case.of("drop")] == [(half, 0, half + router)] * 2
    assert all(o.copied and o.derived == 3 * 60 * 4 and o.drawn for o in case.of("delta"))


def test_each_operator_is_seen_alone() -> None:
    """With one block replaced, and with all."""
    case = Case({}, {**moe(4, 72, 2, "softmax_topk"), **MHA, "n_layers": 3})
    with torch.no_grad():
        before, after = case.old(case.text), case.new(case.text)
        base = grown(case.old, 3, case.growth)
        alone = mixed(base, case.new, [o.path for o in case.of("repeat_heads")])(case.text)
        deeper = base(case.text)
        every = mixed(base, case.new, [o.path for o in case.done])(case.text)
    assert (alone - before).abs().max() < EXACT and (deeper - before).abs().max() < EXACT
    assert torch.equal(every, after) and (every - before).abs().max() > 100 * EXACT


def test_second_moments_are_of_what_the_block_reads() -> None:
    decoder = compose(DENSE)
    text = torch.randint(61, (2, 9))
    read: list[Tensor] = []
    decoder.layers[1].attention.register_forward_pre_hook(lambda module, given: read.append(given[0]))
    batches = [{"tokens": row[None]} for row in text]
    moment = second_moments(decoder, ["layers.1.attention"], batches)["layers.1.attention"]
    x = torch.cat([each.flatten(0, 1) for each in read]).double()
    torch.testing.assert_close(moment, x.T @ x / 18)


def test_activations_beat_weights_where_inputs_are_uneven() -> None:
    """The rank that is kept is the one that the inputs use."""
    D, setting = DENSE["d_model"], Setting(64)
    old = compose({**DENSE, "position": "none"}).layers[0].attention
    x = torch.randn(1, 50, D) * torch.logspace(0, -3, D)[torch.randperm(D)]
    moment = (x[0].T @ x[0]).double() / 50
    errors = []
    for inputs in (moment, None):
        new = compose({**DENSE, "position": "none", **mla(16, 2, "none")}).layers[0].attention
        operator = build("latent", "surgery.transplant")
        with torch.no_grad():
            made = operator(old, new, Setting(setting.max_positions, inputs))
            new.load_state_dict({name: tensor.float() for name, tensor in made.tensors.items()})
            where = Pass(torch.arange(50)[None])
            errors.append(float((old(x, where) - new(x, where)).square().mean()))
    assert errors[0] < 0.5 * errors[1]


CAP = {"scores": {"name": "softcap", "cap": 2.0}}
REFUSED: list[tuple[dict[str, Any], dict[str, Any], dict[str, Any], str, str]] = [  # old, new, how, path, a word
    ({}, mla(24, 12, {**CHOSEN, "of_dim": 12}), {}, "model.attention.position", "of_dim=10"),
    ({}, mla(24, 12, "rope"), {}, "model.attention.position", "rope_chosen"),
    ({}, mla(24, 12, CHOSEN, qk_nope_head_dim=8), {}, "model.attention.qk_nope_head_dim", "10"),
    ({}, moe(8, 36, 3), {}, "model.ffn.n_experts", "top_k=2"),
    ({}, {}, {"named": ("drop",)}, "surgery.transplant", ""),
    ({"n_layers": 4}, {"n_layers": 2}, {"growth": Ends(3)}, "surgery.growth.front", ""),
    ({}, {"n_layers": 4}, {"growth": Ends(1)}, "surgery.growth.front", ""),
    ({"n_layers": 4, "loop": "cycle"}, {"n_layers": 2}, {}, "model.n_layers", ""),
    ({"attention": {**GQA, "bias": True}}, mla(24, 12, CHOSEN), {}, "model.attention.name", ""),
    ({"attention": {**GQA, **CAP}}, mla(24, 12, CHOSEN), {}, "model.attention.name", ""),
]


def test_what_cannot_be_made_or_kept_is_refused() -> None:
    for old, new, how, path, word in REFUSED:
        with pytest.raises(ConfigError) as caught:
            Case(old, new, **how)
        assert caught.value.path == path and word in str(caught.value)


@pytest.mark.usefixtures("temporary_blocks")
def test_plug_in_registers_an_operator_and_rivals_are_named() -> None:
    @register("transplant", "negate")
    class Negate(Transplant):
        """Copies experts, and changes their sign."""

        def serves(self, old: nn.Module, new: nn.Module) -> bool:
            return "experts.down" in new.state_dict() and "down.weight" in old.state_dict()

        def __call__(self, old: nn.Module, new: nn.Module, setting: Setting) -> Transplanted:
            return Transplanted({}, frozenset(), exact=False)

    with pytest.raises(ConfigError, match="copies, negate"):
        Case({}, moe(4, 72, 2))
    assert len(Case({}, moe(4, 72, 2), ("negate",)).of("negate")) == 2


def test_drop_draws_whole_units_and_leaves_the_others() -> None:
    """The same units in gate, up and down; with the mean and deviation of each matrix."""
    old, new = compose(DENSE), compose({**DENSE, **moe(3, 72, 2)})
    dense: Any = old.layers[0].ffn
    with torch.no_grad():
        dense.down.weight.add_(3.0)  # a mean that shows
        made = build({"name": "drop", "share": 0.25}, "surgery.transplant")(dense, new.layers[0].ffn, Setting(64))
    gate_up, down = made.tensors["experts.gate_up"], made.tensors["experts.down"]
    same = [(gate_up[:, :72] == dense.gate.weight).all(2), (gate_up[:, 72:] == dense.up.weight).all(2)]
    same.append((down == dense.down.weight).all(1))
    assert all(torch.equal(each, same[0]) for each in same) and (same[0].sum(1) == 54).all()
    assert not torch.equal(same[0][0], same[0][1])  # others in each expert
    drawn = down.mT[~same[0]].detach()
    assert abs(float(drawn.mean()) - 3.0) < 0.02
    assert abs(float(drawn.std()) / float(dense.down.weight.detach().std()) - 1) < 0.05


def test_delta_mixer_begins_with_the_projections_of_the_token_itself() -> None:
    case = Case({}, {"attention": {"name": "kda", "n_heads": 6}})
    old, new = (decoder.layers[0].attention for decoder in (case.old, case.new))
    x = torch.randn(1, 7, 60)
    with torch.no_grad():
        keys = new.convolved("key", x, None, None)[0]
        expected = nn.functional.silu(old.key(x).unflatten(-1, (3, H)).repeat_interleave(2, 2).flatten(2))
    torch.testing.assert_close(keys, expected)
