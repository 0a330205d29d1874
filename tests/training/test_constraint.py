"""Steps that a constraint makes: norms that stay, directions of every optimizer, shards that move as the whole does."""

from __future__ import annotations

import copy
import functools
import itertools
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from many_ranks import spawn
from torch import Tensor, nn

from blockwright.blocks.initialise import weights
from blockwright.registry.errors import ConfigError
from blockwright.training.optimizers.adamw import AdamW
from blockwright.training.optimizers.combined import ConstrainedOptimizer
from blockwright.training.optimizers.matrices import SOAP, Muon, NorMuon
from blockwright.training.optimizers.recipe import Constraint, Hyperball, Norms, OptimizerRecipe
from blockwright.training.optimizers.stacked import StackedMuon, StackedNorMuon, StackedSOAP

SHAPES = [(7, 5), (3, 6, 10), (8, 8)]
RECIPES: list[type[OptimizerRecipe]] = [AdamW, Muon, NorMuon, SOAP]


class Rows(Constraint):
    """Hyperball row by row."""

    dims = (-1,)

    def moved(self, weight: Tensor, update: Tensor, rate: float, radius: Tensor, norms: Norms) -> Tensor:
        step = weight + update * (rate * radius / norms(update).clamp(min=1e-30))
        return step * (radius / norms(step).clamp(min=1e-30))


class Maps(nn.Module):
    """Matrices, a stack, a head, a table and a vector."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(5, 4), nn.Linear(4, 5)
        self.maps = nn.ParameterList([nn.Parameter(torch.randn(shape) * 0.3) for shape in SHAPES])


def with_gradients(module: nn.Module, seed: int) -> None:
    torch.manual_seed(seed)
    for p in module.parameters():
        p.grad = torch.randn_like(p)


def norm(x: Tensor) -> Tensor:
    return torch.linalg.matrix_norm(x.detach(), keepdim=True)


@pytest.mark.parametrize("recipe", RECIPES)
def test_each_matrix_keeps_its_norm_and_turns_by_the_rate(recipe: Any) -> None:
    torch.manual_seed(0)
    model = Maps()
    optimizer = recipe(lr=0.02, constraint=Hyperball()).build(model)
    radii = [norm(p) for p in model.maps]
    for step in range(4):
        before = [p.detach().clone() for p in model.maps]
        with_gradients(model, step)
        optimizer.step()
        if recipe is SOAP and step == 0:  # its first gradient moves nothing
            continue
        for p, old, radius in zip(model.maps, before, radii, strict=True):
            torch.testing.assert_close(norm(p), radius, rtol=1e-5, atol=0)
            assert (norm(p - old) > 0.9 * 0.02 * radius).all()
            assert (norm(p - old) < 1.1 * 0.02 * radius).all()


@pytest.mark.parametrize("recipe", RECIPES)
def test_it_takes_the_direction_of_the_optimizer_and_leaves_the_rest_to_it(recipe: Any) -> None:
    torch.manual_seed(0)
    held, plain = Maps(), Maps()
    plain.load_state_dict(held.state_dict())
    constrained = recipe(lr=0.02, constraint=Hyperball()).build(held)
    optimizer = recipe(lr=0.02, weight_decay=0.0).build(plain)
    decayed = recipe(lr=0.02).build(rest := copy.deepcopy(plain))
    for step in range(3):
        start = [p.detach().clone() for p in plain.maps]
        for module, each in ((held, constrained), (plain, optimizer), (rest, decayed)):
            with_gradients(module, step)
            each.step()
        moves = [p.detach() - old for p, old in zip(plain.maps, start, strict=True)]
        for p, old, move in zip(held.maps, start, moves, strict=True):
            step_to = old + 0.02 * norm(old) * move / norm(move).clamp(min=1e-30)
            torch.testing.assert_close(p.detach(), step_to * norm(old) / norm(step_to), rtol=1e-3, atol=1e-4)
        plain.maps.load_state_dict(held.maps.state_dict())
    for name in ("embedding.weight", "head.weight", "head.bias"):
        assert torch.equal(held.state_dict()[name], rest.state_dict()[name])


def test_a_step_without_a_gradient_or_at_a_rate_of_zero_moves_nothing() -> None:
    model = Maps()
    optimizer = AdamW(lr=0.02, constraint=Hyperball()).build(model)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    before = copy.deepcopy(model.state_dict())
    with_gradients(model, 0)
    model.maps[0].grad = None
    optimizer.step()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=1e-6, atol=1e-7)


def test_a_bfloat16_weight_turns_by_steps_that_are_short_beside_it() -> None:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(64, 48, dtype=torch.bfloat16))
    module = nn.ParameterDict({"map": weight})
    optimizer = AdamW(lr=0.02, constraint=Hyperball()).build(module)
    before, weight.grad = weight.detach().clone(), torch.randn_like(weight)
    optimizer.step()
    turned = (norm((weight - before).float()) / norm(before.float())).item()
    assert turned == pytest.approx(0.02, rel=0.1)


def test_what_holds_nothing_a_misspelt_pattern_and_factors_of_width_are_refused() -> None:
    maps = nn.ModuleDict({"maps": nn.Linear(3, 3)})
    for free, path in ((["maps"], "optimizer.constraint"), (["mapz"], "optimizer.constraint.free")):
        with pytest.raises(ConfigError) as caught:
            AdamW(constraint=Hyperball(free=free)).build(maps)
        assert caught.value.path == path
    with pytest.raises(ConfigError):
        Muon(constraint=Hyperball()).step_norm(weights(Maps())[-1])


# Matrices and stacks over ranks


@pytest.mark.slow
def test_sharded_parameters_step_as_whole_ones_do() -> None:
    # Forked ranks end without Python's finalization, in which gloo's threads may still let go of tensors and abort.
    spawn(2, step_sharded)


def step_sharded() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor

    rank = torch.distributed.get_rank()
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    cases: list[tuple[tuple[int, ...], Placement]] = [
        ((4, 8, 6), Shard(0)),  # experts
        ((3, 8, 6), Shard(0)),  # two here, one there
        ((1, 8, 6), Shard(0)),  # one here, none there
        ((7, 4), Shard(0)),  # a matrix cut into rows, as FSDP does
        ((4, 6, 8), Shard(2)),  # experts cut by tensor parallelism
        ((6, 8), Replicate()),  # whole on every rank, its gradient left as partial sums
    ]
    kinds: list[Any] = [StackedMuon, StackedNorMuon, functools.partial(StackedSOAP, frequency=2)]
    for make, constraint in itertools.product([*kinds, "adamw"], [None, Hyperball(), Rows()]):
        if make == "adamw" and constraint is not None:
            continue
        used = cases if make in ("adamw", StackedMuon) and constraint is None else cases[:-1]
        torch.manual_seed(0)
        values = [torch.randn(shape) for shape, _ in used]
        whole = [nn.Parameter(value.clone()) for value in values]
        cuts = [distribute_tensor(value, mesh, [cut]) for value, (_, cut) in zip(values, used, strict=True)]
        sharded = [nn.Parameter(cut) for cut in cuts]
        if make == "adamw":  # with a plain parameter among the sharded ones, as when a part of the model is left whole
            (plain := nn.Parameter(torch.ones(4, 4))).grad = torch.ones(4, 4)
            pair: list[Any] = [AdamW(lr=1e-2).build(nn.ParameterList([*most, plain])) for most in (whole, sharded)]
        else:
            pair = [make(parameters, lr=1e-2) for parameters in (whole, sharded)]
        if constraint is not None:
            pair = [ConstrainedOptimizer([o], constraint, p) for o, p in zip(pair, (whole, sharded), strict=True)]
        for _ in range(5):
            for one, many, (shape, cut) in zip(whole, sharded, used, strict=True):
                one.grad = torch.randn(shape)
                if isinstance(cut, Replicate):
                    other = torch.randn(shape)
                    part = one.grad - other if rank == 0 else other
                    many.grad = DTensor.from_local(part, mesh, [Partial()])
                else:
                    many.grad = distribute_tensor(one.grad, mesh, [cut])
            for optimizer in pair:
                optimizer.step()
        for one, many in zip(whole, sharded, strict=True):
            torch.testing.assert_close(many.full_tensor(), one, rtol=0, atol=1e-5)  # type: ignore[attr-defined]


# Slow references, matrix by matrix in fp64


def reference_normuon(weight: Tensor, gradients: list[Tensor], lr: float, decay: float) -> Tensor:
    """Li et al. 2025, algorithm 1, with the exact orthogonal factor instead of the Newton–Schulz iteration."""
    momentum, v = torch.zeros_like(weight), torch.zeros(len(weight), dtype=weight.dtype)
    for g in gradients:
        momentum = 0.95 * momentum + 0.05 * g
        u, _, w = torch.linalg.svd(0.05 * g + 0.95 * momentum, full_matrices=False)
        v = 0.9 * v + 0.1 * (u @ w).square().mean(1)
        normal = (u @ w) / v.sqrt()[:, None]
        factor = 0.2 * (weight.shape[0] * weight.shape[1]) ** 0.5 / normal.norm()
        weight = weight - lr * decay * weight - lr * factor * normal
    return weight


@pytest.mark.parametrize("shape", [(7, 5), (5, 9), (6, 6)])
def test_normuon_steps_as_its_paper(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:

    def exact(x: Tensor, steps: int) -> Tensor:
        u, _, w = torch.linalg.svd(x.double(), full_matrices=False)
        return u @ w

    monkeypatch.setattr("blockwright.training.optimizers.stacked.orthogonalize", exact)
    torch.manual_seed(0)
    stack = torch.randn(3, *shape, dtype=torch.float64)
    gradients = [torch.randn_like(stack) for _ in range(6)]
    parameter = nn.Parameter(stack.clone())
    optimizer = StackedNorMuon([parameter], lr=0.1, weight_decay=0.3, beta2=0.9, ns_dtype="float32")
    for g in gradients:
        parameter.grad = g.clone()
        optimizer.step()
    expected = [reference_normuon(w, [g[i] for g in gradients], 0.1, 0.3) for i, w in enumerate(stack)]
    torch.testing.assert_close(parameter.detach(), torch.stack(expected), rtol=0, atol=1e-5)


def reference_soap(
    weight: Tensor, gradients: list[Tensor], q: Tensor, p: Tensor, lr: float, decay: float, frequency: int
) -> Tensor:
    """Vyas et al. 2024, algorithm 3, with Kronecker products: the preconditioner acts on vec(g).

    The first eigenvectors are those that are tested: of a singular matrix they are not unique.
    """
    b1, b2, b3, eps = 0.95, 0.9, 0.8, 1e-8
    first = gradients[0]
    left, right = (1 - b3) * first @ first.T, (1 - b3) * first.T @ first
    for basis, moment in ((q, left), (p, right)):
        turned = basis.T @ moment @ basis
        torch.testing.assert_close(turned, turned.diagonal().sort(descending=True).values.diag(), rtol=0, atol=1e-9)
    m, v = torch.zeros_like(first), torch.zeros_like(first)
    for t, g in enumerate(gradients[1:], start=1):
        basis = torch.kron(q, p)  # of the rows of g one after the other
        turned = (basis.T @ g.flatten()).reshape(g.shape)
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * turned.square()
        m_hat, v_hat = m / (1 - b1**t), v / (1 - b2**t)
        ratio = (basis.T @ m_hat.flatten()).reshape(g.shape) / (v_hat.sqrt() + eps)
        weight = (weight - lr * (basis @ ratio.flatten()).reshape(g.shape)) * (1 - lr * decay)
        left, right = b3 * left + (1 - b3) * g @ g.T, b3 * right + (1 - b3) * g.T @ g
        if t % frequency == 0:
            for side, moment in ((0, left), (1, right)):
                old = (q, p)[side]
                order = sorted(range(len(moment)), key=lambda i: -float(old[:, i] @ moment @ old[:, i]))
                new = torch.linalg.qr((moment @ old)[:, order]).Q
                q, p = (new, p) if side == 0 else (q, new)
                v = v[order] if side == 0 else v[:, order]
    return weight


@pytest.mark.parametrize("shape", [(7, 5), (5, 9), (6, 6)])
def test_soap_steps_as_its_paper(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    stack = torch.randn(2, *shape, dtype=torch.float64)
    gradients = [torch.randn_like(stack) for _ in range(9)]
    parameter = nn.Parameter(stack.clone())
    settings: dict[str, Any] = {"betas": (0.95, 0.9), "shampoo_beta": 0.8, "weight_decay": 0.3, "frequency": 3}
    optimizer = StackedSOAP([parameter], lr=0.1, **settings)
    bases: list[Tensor] = []
    for g in gradients:
        parameter.grad = g.clone()
        optimizer.step()
        bases = bases or [optimizer.state[parameter][f"{side}_basis"].clone() for side in ("row", "column")]
    expected = [
        reference_soap(w, [g[i] for g in gradients], bases[0][i], bases[1][i], 0.1, 0.3, 3) for i, w in enumerate(stack)
    ]
    # The first moment over the longer side is nearly singular, and a QR decomposition of it loses digits.
    torch.testing.assert_close(parameter.detach(), torch.stack(expected), rtol=0, atol=1e-3)


def test_soap_keeps_the_basis_of_a_side_that_is_too_long() -> None:
    parameter = nn.Parameter(torch.randn(9, 4))
    optimizer = StackedSOAP([parameter], max_side=4)
    parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    assert {"column_basis"} == {name for name in optimizer.state[parameter] if name.endswith("basis")}


def test_a_constraint_of_another_package_is_an_option() -> None:
    sys.path.insert(0, str(Path(__file__).parents[1] / "plugin"))
    try:
        from blockwright_guest.row_sphere import RowSphere
    finally:
        sys.path.pop(0)
    torch.manual_seed(0)
    model = Maps()
    optimizer = NorMuon(lr=0.02, constraint=RowSphere()).build(model)
    before = [p.detach().norm(dim=-1) for p in model.maps]
    for step in range(3):
        with_gradients(model, step)
        optimizer.step()
    for p, lengths in zip(model.maps, before, strict=True):
        torch.testing.assert_close(p.detach().norm(dim=-1), lengths, rtol=1e-5, atol=0)


def test_state_of_other_shapes_is_counted() -> None:
    from blockwright.training.parallel.arithmetic import state_factors

    with torch.device("meta"):
        model = Maps()
    model.layers = nn.ModuleList()
    model.with_layers = lambda layers: model  # type: ignore[attr-defined]
    factors = state_factors(model, SOAP())  # type: ignore[arg-type]
    assert factors["maps.0"] == (0.0, 2 + 2 * (7 * 7 + 5 * 5) / 35)
    assert factors["head.weight"] == (2.0, 0.0)


def test_soap_takes_a_gradient_that_is_not_finite() -> None:
    parameter = nn.Parameter(torch.randn(9, 4))
    optimizer = StackedSOAP([parameter])
    for _ in range(2):
        parameter.grad = torch.full_like(parameter, torch.nan)
        optimizer.step()
    assert parameter.isnan().any()
