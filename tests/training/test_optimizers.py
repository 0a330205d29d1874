"""Weight decay where it belongs, Muon slice by slice, and two optimizers that look like one."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blockwright.blocks.compose import compose
from blockwright.blocks.initialise import weights
from blockwright.blocks.memory import Table
from blockwright.registry.errors import ConfigError
from blockwright.training.optimizers.adamw import AdamW
from blockwright.training.optimizers.combined import CombinedOptimizer
from blockwright.training.optimizers.matrices import SOAP, HeadMuon, Muon, NorMuon
from blockwright.training.optimizers.recipe import Hyperball, OptimizerRecipe
from blockwright.training.optimizers.row_adam import RowAdam
from blockwright.training.optimizers.stacked import StackedHeadMuon, StackedMuon
from blockwright.training.parallel.collectives import clip, total_norm

RECIPES: dict[str, type[OptimizerRecipe]] = {
    "adamw": AdamW, "head_muon": HeadMuon, "muon": Muon, "normuon": NorMuon, "soap": SOAP,
}  # fmt: skip
EVERY = [recipe(lr=1e-2) for recipe in RECIPES.values()]
HELD = [recipe(lr=1e-2, constraint=Hyperball()) for recipe in RECIPES.values()]
V, D, E, W = 11, 8, 4, 12


class Experts(nn.Module):
    """E experts with stacked weights and a stacked bias, mixed by a softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.gating = nn.Linear(D, E, bias=False)
        self.up = nn.Parameter(torch.randn(E, D, W) * 0.3)
        self.up_bias = nn.Parameter(torch.zeros(E, W))
        self.down = nn.Parameter(torch.randn(E, W, D) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.einsum("btd,edw->ebtw", x, self.up) + self.up_bias[:, None, None]
        out = torch.einsum("ebtw,ewd->ebtd", F.silu(hidden), self.down)
        return torch.einsum("ebtd,bte->btd", out, self.gating(x).softmax(-1))


class Tiny(nn.Module):
    """One of every kind of parameter that a decoder has."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(V, D)
        self.position = nn.ParameterDict({"learned": nn.Parameter(torch.randn(6, D) * 0.1)})
        self.mix = nn.Linear(D, 2 * D)
        self.out = nn.Linear(2 * D, D, bias=False)
        self.filter = nn.Conv1d(D, D, 3, padding=1)
        self.shared_gate = nn.Linear(D, 1, bias=False)
        self.ffn = Experts()
        self.norm = nn.RMSNorm(D)
        self.head = nn.Linear(D, V, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.position["learned"][: tokens.size(1)]
        x = x + self.out(F.silu(self.mix(x)))
        x = x + self.filter(x.mT).mT * self.shared_gate(x).sigmoid()
        return self.head(self.norm(x + self.ffn(x)))


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # nothing here is worth a second thread
    yield
    torch.set_num_threads(threads)


def names_by_group(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, set[str]]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {group["name"]: {names[p] for p in group["params"]} for group in optimizer.param_groups}


def train(model: nn.Module, optimizer: Any, steps: range, scheduler: Any = None) -> list[float]:
    """Steps on batches that depend on the step alone, with clipping; returns the losses."""
    losses = []
    for step in steps:
        tokens = torch.randint(V, (2, 6), generator=torch.Generator().manual_seed(step))
        loss = F.cross_entropy(model(tokens).flatten(0, 1), tokens.roll(-1, 1).flatten())
        loss.backward()
        nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 0.5)
        optimizer.step()
        optimizer.zero_grad()
        if scheduler is not None:
            scheduler.step()
        losses.append(loss.item())
    return losses


# Which weight is decayed, and by whom


def test_decay_is_for_matrices_expert_stacks_and_filters_only() -> None:
    model = Tiny()
    assert names_by_group(model, AdamW().build(model)) == {
        "decay": {
            "mix.weight", "out.weight", "filter.weight", "shared_gate.weight",
            "ffn.gating.weight", "ffn.up", "ffn.down", "head.weight",
        },
        "no_decay": {
            "embedding.weight", "position.learned", "mix.bias", "filter.bias", "ffn.up_bias", "norm.weight",
        },
    }  # fmt: skip


@pytest.mark.parametrize("recipe", [*EVERY, *HELD])
def test_every_trainable_parameter_is_held_once_and_a_tied_head_is_an_embedding(recipe: OptimizerRecipe) -> None:
    for tied in (False, True):
        model = Tiny(tied)
        model.mix.requires_grad_(False)
        groups = recipe.build(model).param_groups
        held = [p for group in groups for p in group["params"]]
        assert len(held) == len(set(held)) and set(held) == {p for p in model.parameters() if p.requires_grad}
    (group,) = [group for group in groups if any(p is model.head.weight for p in group["params"])]
    assert group["weight_decay"] == 0.0


def test_a_norm_per_head_and_a_learned_table_of_biases_are_not_maps() -> None:
    class HeadNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4, 8))

    class Position(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.buckets = nn.Parameter(torch.zeros(32, 4))
            self.gate = nn.Linear(8, 4, bias=False)

    kinds = {w.names[0]: w.kind for w in weights(nn.ModuleDict({"position": Position(), "q_norm": HeadNorm()}))}
    assert kinds == {"position.buckets": "table", "position.gate.weight": "matrix", "q_norm.weight": "vector"}


def test_a_module_in_two_places_is_held_once_under_both_names() -> None:
    shared = nn.Linear(D, D, bias=False)
    (weight,) = weights(nn.ModuleDict({"a": shared, "head": shared}))
    assert weight.names == ("a.weight", "head.weight")
    assert not Muon().takes(weight)


def test_a_model_with_nothing_to_train_is_refused() -> None:
    with pytest.raises(ConfigError, match="requires a gradient"):
        AdamW().build(Tiny().requires_grad_(False))


# AdamW


@pytest.mark.parametrize("fused", [None, False, True])
def test_adamw_steps_bit_for_bit_as_torch_does(fused: bool | None) -> None:
    ours, theirs = Tiny(), Tiny()
    theirs.load_state_dict(ours.state_dict())
    optimizer = AdamW(lr=1e-2, betas=(0.8, 0.9), weight_decay=0.3, eps=1e-6, fused=fused).build(ours)
    decayed = [p for name, p in theirs.named_parameters() if p.ndim >= 2 and name.split(".")[0] in
               ("mix", "out", "filter", "shared_gate", "ffn", "head") and name != "ffn.up_bias"]  # fmt: skip
    others = [p for p in theirs.parameters() if all(p is not q for q in decayed)]
    reference = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.3}, {"params": others, "weight_decay": 0.0}],
        lr=1e-2,
        betas=(0.8, 0.9),
        eps=1e-6,
        fused=True if fused is None else fused,
    )
    # Clipping sums the norms in the order of the parameters: give both the same.
    assert train(ours, optimizer, range(5)) == train(theirs, reference, range(5))
    assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_fused_is_chosen_where_every_device_has_it() -> None:
    assert all(group["fused"] for group in AdamW().build(Tiny()).param_groups)
    assert not any(group["fused"] for group in AdamW().build(Tiny().to("meta")).param_groups)
    mixed = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2, device="meta")])
    assert not any(group["fused"] for group in AdamW().build(mixed).param_groups)


# Muon


def test_muon_takes_hidden_matrices_and_expert_stacks_and_adamw_the_rest() -> None:
    model = Tiny()
    assert names_by_group(model, Muon().build(model)) == {
        "muon": {"mix.weight", "out.weight", "ffn.up", "ffn.down"},
        "adamw_decay": {"filter.weight", "shared_gate.weight", "ffn.gating.weight", "head.weight"},
        "adamw_no_decay": {
            "embedding.weight", "position.learned", "mix.bias", "filter.bias", "ffn.up_bias", "norm.weight",
        },
    }  # fmt: skip


def test_muon_leaves_to_adamw_what_its_configuration_names() -> None:
    model = Tiny()
    groups = names_by_group(model, Muon(adamw_names=["mix"]).build(model))
    assert "mix.weight" in groups["adamw_decay"]
    assert {"head.weight", "ffn.gating.weight"} <= groups["muon"]
    assert "embedding.weight" in groups["adamw_no_decay"]


@pytest.mark.parametrize(
    ("adjust_lr_fn", "elements"), [("original", 2**18), ("match_rms_adamw", 1)]
)  # one batch, or many
def test_stacked_muon_steps_each_slice_as_torch_muon_does(adjust_lr_fn: str, elements: int, monkeypatch: Any) -> None:
    monkeypatch.setattr("blockwright.training.optimizers.stacked.CPU_ELEMENTS", elements)
    # torch's Muon computes in bfloat16 whatever it is given. The algorithm is compared in float32, to the last digits;
    # the next test compares bfloat16 with bfloat16.
    monkeypatch.setattr(Tensor, "bfloat16", lambda tensor: tensor.clone())
    shapes = [(5, 12, 8), (5, 8, 12), (3, 8, 8), (2, 3, 8, 12), (12, 8), (8, 12), (8, 8)]
    steps_as_torch(shapes, adjust_lr_fn, "float32", tolerance=1e-5)


def test_stacked_muon_in_bfloat16_steps_as_torch_muon_does_to_bfloat16() -> None:
    # Rounding to 8 bits differs by the order of sums: an update of 0.2 · lr an element, a few parts in 256 of it off.
    steps_as_torch([(5, 12, 8), (8, 12), (8, 8)], "match_rms_adamw", "bfloat16", tolerance=2e-4)


def steps_as_torch(shapes: list[tuple[int, ...]], adjust_lr_fn: str, ns_dtype: str, tolerance: float) -> None:
    ours = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = [[nn.Parameter(m.clone()) for m in p.detach().reshape(-1, *p.shape[-2:])] for p in ours]
    options = {"lr": 1e-2, "weight_decay": 0.1, "momentum": 0.9, "ns_steps": 5, "adjust_lr_fn": adjust_lr_fn}
    optimizer = StackedMuon(ours, ns_dtype=ns_dtype, **options)
    reference = torch.optim.Muon([m for slices in theirs for m in slices], **options)
    for _ in range(4):
        for parameter, slices in zip(ours, theirs, strict=True):
            parameter.grad = torch.randn_like(parameter)
            for m, gradient in zip(slices, parameter.grad.reshape(-1, *parameter.shape[-2:]), strict=True):
                m.grad = gradient.clone()
        optimizer.step()
        reference.step()
    for parameter, slices in zip(ours, theirs, strict=True):
        expected = torch.stack([m.detach() for m in slices]).reshape(parameter.shape)
        torch.testing.assert_close(parameter.detach(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("adjust_lr_fn", ["original", "match_rms_adamw"])
def test_muon_by_head_is_muon_on_the_heads_matrices(adjust_lr_fn: str) -> None:
    shapes, rows = [(12, 8), (12, 3), (18, 8)], [(4,), (4,), (2, 4)]  # a head's matrix wide, tall, and two of them
    ours = [nn.Parameter(torch.randn(shape)) for shape in shapes]

    def heads(matrix: Tensor, rows: tuple[int, ...]) -> list[Tensor]:
        return list(matrix.split(list(rows) * (len(matrix) // sum(rows))))

    theirs = [[nn.Parameter(m.clone()) for m in heads(p.detach(), r)] for p, r in zip(ours, rows, strict=True)]
    options: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.1, "adjust_lr_fn": adjust_lr_fn, "ns_dtype": "float32"}
    groups = [{"params": [p], "rows": r} for p, r in zip(ours, rows, strict=True)]
    optimizer, reference = StackedHeadMuon(groups, **options), StackedMuon([m for p in theirs for m in p], **options)
    for _ in range(3):
        for parameter, r, parts in zip(ours, rows, theirs, strict=True):
            parameter.grad = torch.randn_like(parameter)
            for part, gradient in zip(parts, heads(parameter.grad, r), strict=True):
                part.grad = gradient.clone()
        optimizer.step()
        reference.step()
    for parameter, parts in zip(ours, theirs, strict=True):
        torch.testing.assert_close(parameter.detach(), torch.cat([p.detach() for p in parts]), rtol=0, atol=1e-6)


def test_matrices_of_heads_are_of_whole_heads_and_what_ranks_split_by_heads(tiny: Any) -> None:
    blocks = {
        name: compose(tiny(n_layers=2, attention={"name": name}), device="meta").layers[1].attention
        for name in ("delta_product", "gqa", "kda", "mla")
    }
    for name, block in blocks.items():
        assert len(block.head_rows()) == (2 if name == "mla" else 3)
        for leaf, rows in block.head_rows().items():
            assert block.parallel_plan()[leaf] == "column" and len(block.get_parameter(leaf)) % sum(rows) == 0, name
    model = compose(tiny(n_layers=2, attention={"name": "mla", "n_heads": 4}))
    named = names_by_group(model, HeadMuon().build(model))
    assert named["muon_rows12_rows12"] == {f"layers.{i}.attention.kv_up.weight" for i in range(2)}
    assert "layers.0.attention.output.weight" in named["muon"]


def test_a_gradient_of_zeros_moves_nothing_but_decays() -> None:
    parameter = nn.Parameter(torch.ones(2, 4, 4))
    parameter.grad = torch.zeros(2, 4, 4)
    parameter.grad[1] = torch.randn(4, 4)  # an expert that no token chose, beside one that was chosen
    StackedMuon([parameter], lr=0.1, weight_decay=0.5).step()
    torch.testing.assert_close(parameter[0].detach(), torch.full((4, 4), 0.95))
    assert not torch.allclose(parameter[1], torch.full((4, 4), 0.95), atol=1e-3)
    still, moving = nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(4, 4))
    moving.grad = torch.randn(4, 4)
    StackedMuon([still, moving]).step()
    assert torch.equal(still, torch.ones(4, 4)) and not torch.equal(moving, torch.ones(4, 4))


# Two optimizers that look like one


def test_a_scheduler_drives_every_part_from_its_own_peak() -> None:
    model = Tiny()
    optimizer = Muon(lr=2e-2, adjust_lr_fn="original", adamw_lr=1e-3).build(model)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))
    train(model, optimizer, range(3), scheduler)
    assert isinstance(optimizer, CombinedOptimizer)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([2e-2 / 4, 1e-3 / 4, 1e-3 / 4])
    assert [g["lr"] for part in optimizer.parts for g in part.param_groups] == [g["lr"] for g in optimizer.param_groups]


@pytest.mark.parametrize("recipe", [*EVERY, HELD[1]])
def test_a_resumed_training_is_bit_exact(recipe: OptimizerRecipe) -> None:
    def schedule(optimizer: Any) -> Any:
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step / 4))

    model = Tiny()
    optimizer = recipe.build(model)
    scheduler = schedule(optimizer)
    train(model, optimizer, range(4), scheduler)
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict(), scheduler.state_dict()], file)
    expected = train(model, optimizer, range(4, 9), scheduler)

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = Tiny()
    resumed.load_state_dict(saved[0])
    optimizer = recipe.build(resumed)
    scheduler = schedule(optimizer)
    optimizer.load_state_dict(saved[1])
    scheduler.load_state_dict(saved[2])
    assert train(resumed, optimizer, range(4, 9), scheduler) == expected
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), resumed.parameters(), strict=True))


def test_distributed_checkpointing_names_and_restores_the_state() -> None:
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    model = Tiny()
    optimizer = Muon(lr=1e-2).build(model)
    train(model, optimizer, range(3))
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    weights_then = copy.deepcopy(model.state_dict())
    assert set(saved["state"]) == {name for name, _ in model.named_parameters()}
    assert set(saved["state"]["ffn.up"]) == {"momentum_buffer"}
    expected = train(model, optimizer, range(3, 6))

    resumed = Tiny()
    resumed.load_state_dict(weights_then)
    optimizer = Muon(lr=1e-2).build(resumed)
    set_optimizer_state_dict(resumed, optimizer, saved)
    assert train(resumed, optimizer, range(3, 6)) == expected


def test_a_copy_stands_on_its_own_and_a_group_added_later_is_refused() -> None:
    model = Tiny()
    optimizer = Muon(lr=1e-2).build(model)
    train(model, optimizer, range(2))
    other_model, other = copy.deepcopy((model, optimizer))
    expected = train(model, optimizer, range(2, 4))
    assert train(other_model, other, range(2, 4)) == expected
    with pytest.raises(NotImplementedError):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})


# As configuration


REFUSED = [
    ("adamw", "lr", (0.0, float("nan"), "fast", True)),
    ("adamw", "weight_decay", (-0.1,)),
    ("adamw", "eps", (0.0,)),
    ("adamw", "betas", ([0.9], 0.9, [0.9, 1.0])),
    ("muon", "momentum", (1.0,)),
    ("muon", "ns_steps", (0, 2.5)),
    ("muon", "adjust_lr_fn", ("orginal",)),
    ("muon", "ns_dtype", ("float16",)),
    ("normuon", "beta2", (1.0,)),
    ("soap", "frequency", (0,)),
    ("soap", "shampoo_beta", (-0.1,)),
]


@pytest.mark.parametrize(("name", "key", "values"), REFUSED)
def test_nonsense_is_refused_with_its_path(name: str, key: str, values: tuple[Any, ...]) -> None:
    for value in values:
        with pytest.raises(ConfigError) as caught:
            RECIPES[name](**{key: value})
        assert caught.value.path == f"optimizer.{key}" and caught.value.remedy


def test_a_rate_of_adamw_is_asked_for_where_muons_is_another() -> None:
    with pytest.raises(ConfigError) as caught:
        Muon(adjust_lr_fn="original")
    assert caught.value.path == "optimizer.adamw_lr"


# On a composed decoder


def test_a_composed_mixture_of_experts_is_split_as_its_families_say(tiny: Any) -> None:
    from blockwright.blocks.compose import compose

    model = compose(tiny(moe=True, position={"name": "learned"}), device="meta")
    groups = {
        group: {".".join(part for part in name.split(".") if not part.isdigit()) for name in names}
        for group, names in names_by_group(model, Muon().build(model)).items()
    }
    assert groups["adamw_decay"] == {"layers.ffn.gating.weight", "head.weight"}
    assert groups["adamw_no_decay"] == {
        "embedding.weight", "position.embedding.weight", "norm.weight",
        "layers.residual.attention_norm.weight", "layers.residual.ffn_norm.weight",
    }  # fmt: skip
    assert {"layers.ffn.experts.gate_up", "layers.ffn.experts.down", "layers.ffn.shared.up.weight"} <= groups["muon"]


# ---- tables ---------------------------------------------------------------------------------------------------------


def seen(rows: list[int], values: Tensor, size: int) -> Tensor:
    """A sparse gradient [V,W] with these rows, one of them perhaps twice."""
    return torch.sparse_coo_tensor(torch.tensor([rows]), values, (size, values.shape[1]))


def test_a_row_seen_again_has_the_moments_and_takes_the_step_of_the_dense_rule() -> None:
    whole = nn.Parameter(torch.randn(9, 4, dtype=torch.float64))
    table = nn.Parameter(whole.detach().clone())
    settings: dict[str, Any] = {"lr": 3e-2, "betas": (0.8, 0.9)}
    dense, sparse = torch.optim.AdamW([whole], weight_decay=0.0, **settings), RowAdam([table], **settings)
    for rows in ([0, 1, 2], [2, 5, 2], [0], [7, 1], [0, 2, 8, 5]):
        table.grad = seen(rows, torch.randn(len(rows), 4, dtype=torch.float64), 9)
        whole.grad = table.grad.to_dense()
        before = table.detach().clone(), whole.detach().clone()
        sparse.step()
        dense.step()
        moved, expected = table.detach() - before[0], whole.detach() - before[1]
        torch.testing.assert_close(moved[rows], expected[rows], rtol=1e-6, atol=1e-9)
        still = [row for row in range(9) if row not in rows]
        assert not moved[still].any()
        for moment in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(sparse.state[table][moment][rows], dense.state[whole][moment][rows])


@pytest.mark.parametrize("recipe", [AdamW(lr=1e-2), Muon(lr=1e-2)], ids=lambda r: type(r).__name__)
def test_every_recipe_gives_tables_to_the_rule_for_rows(recipe: OptimizerRecipe) -> None:
    model = nn.ModuleDict({"table": Table(50, 4), "mix": nn.Linear(4, 4)})
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    optimizer = recipe.build(model)
    before = model["table"].weight.detach().clone()
    ids = torch.tensor([3, 3, 41])
    for _ in range(2):
        optimizer.zero_grad()
        model["mix"](model["table"](ids)).square().sum().backward()
        optimizer.step()
    moved = (model["table"].weight.detach() != before).any(1).nonzero().flatten().tolist()
    assert moved == [3, 41]
    state = optimizer.state_dict()
    again = recipe.build(model)
    again.load_state_dict(state)
    assert again.state[model["table"].weight].keys() == {"step", "exp_avg", "exp_avg_sq", "seen"}


def test_clipping_scales_sparse_gradients_with_the_others() -> None:
    weight, table = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(9, 4))
    weight.grad, table.grad = torch.randn(3, 4), seen([2, 5, 2], torch.randn(3, 4), 9)
    want = [p.grad.to_dense().clone() for p in (weight, table)]
    norm = torch.cat([g.flatten() for g in want]).norm()
    torch.testing.assert_close(total_norm([weight, table]), norm)
    clip([weight, table], 0.1)
    for parameter, gradient in zip((weight, table), want, strict=True):
        torch.testing.assert_close(parameter.grad.to_dense(), gradient * 0.1 / norm, rtol=1e-4, atol=1e-6)
    assert table.grad.is_sparse


def test_a_closure_is_evaluated_once_with_gradients() -> None:
    model = Tiny()
    optimizer = Muon().build(model)
    calls = []

    def closure() -> float:
        calls.append(torch.is_grad_enabled())
        return 1.5

    assert optimizer.step(closure) == 1.5
    assert calls == [True]
