"""``trainer.dry_run=true trainer.world=N``: what each of N ranks would hold, found in one process.

The decoder of one rank is built by the code that a run uses, on the meta device and over torch's fake process group,
and its optimizer takes a step there: nothing is allocated, drawn or sent. Where its weights lie says what the other
ranks hold of them. Left out: activations, and what the collectives buffer (``blockwright plan`` estimates both).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from rich.table import Table
from torch import Tensor
from torch.distributed.tensor import DTensor

from blockwright.blocks.compose import compose
from blockwright.blocks.decoder import Decoder
from blockwright.blocks.precision import default_dtype
from blockwright.registry.printing import show
from blockwright.training.configuration.instantiate import instantiate
from blockwright.training.configuration.run import Run
from blockwright.training.optimizers.base import OptimizerRecipe
from blockwright.training.parallel.arithmetic import held_bytes
from blockwright.training.parallel.build import LOW, Sharding, build
from blockwright.training.parallel.meshes import make_meshes
from blockwright.training.parallel.sizes import Sizes, sizes_of

COLUMNS = ("parameters", "gradients", "optimizer")
HALVES = {"bf16-true": torch.bfloat16, "16-true": torch.float16}  # precision of the trainer → dtype of the weights


def imagine(run: Run) -> dict[str, float]:
    """Build, and print the table.

    Args:
        run: checked

    Returns:
        the bytes of the rank that holds most, by name
    """
    trainer = run.trainer
    sizes = sizes_of(trainer["strategy"], trainer["world"])
    recipe: OptimizerRecipe = instantiate(run.optimizer, "optimizer")
    precision = str(trainer.get("precision"))
    with ranks(sizes.world), default_dtype(HALVES.get(precision, torch.float32)):
        sharding = Sharding(make_meshes(sizes, "cpu"), LOW.get(precision))
        decoder = build(run.model, run.seed, sharding, shapes_only=True)
        held = {
            name: spread_over(sizes, tensors) for name, tensors in zip(COLUMNS, _kept(decoder, recipe), strict=True)
        }
    whole = compose(run.model, device="meta")
    plan = held_bytes(whole, sizes, recipe) if precision not in HALVES else {}
    _show(held, plan, f"{run.model['n_layers']} layers, {run.task['name']}")
    return {f"dry_run/{name}_bytes": float(max(values)) for name, values in held.items()}


@contextmanager
def ranks(world: int, rank: int = 0) -> Iterator[None]:
    """A process group whose other ranks are imagined: collectives return at once, and send nothing.

    DTensor caches what it worked out, with the mesh; a real mesh of the same shape would be taken for the imagined one.
    """
    from torch.distributed.tensor.debug import _clear_sharding_prop_cache
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        yield
    finally:
        dist.destroy_process_group()
        _clear_sharding_prop_cache()


def _kept(decoder: Decoder, recipe: OptimizerRecipe) -> tuple[Sequence[Tensor], ...]:
    """Parameters, their gradients, and what the optimizer keeps after a step."""
    parameters = list(decoder.parameters())
    optimizer = recipe.build(decoder)
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)
    optimizer.step()
    state = [v for values in optimizer.state.values() for v in values.values() if isinstance(v, Tensor) and v.ndim]
    return parameters, [p.grad for p in parameters if p.grad is not None], state


def spread_over(sizes: Sizes, tensors: Sequence[Tensor]) -> list[int]:
    """Bytes of tensors that each rank of the world holds, by their places in their meshes."""
    from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset

    @cache
    def numbers(shape: tuple[int, ...], mesh: tuple[int, ...], placements: tuple[Any, ...], at: tuple[int, ...]) -> int:
        return prod(_compute_local_shape_and_global_offset(shape, mesh, list(at), placements, skip_offset=True)[0])

    alike: dict[tuple[Any, ...], int] = defaultdict(int)
    for tensor in tensors:
        if isinstance(tensor, DTensor):
            mesh = tensor.device_mesh
            where = (tuple(tensor.shape), tuple(mesh.shape), tuple(tensor.placements), mesh.mesh_dim_names)
        else:
            where = (tuple(tensor.shape), (), (), ())
        alike[where] += tensor.element_size()
    found = []
    for rank in range(sizes.world):
        place = _place(rank, sizes)
        found.append(
            sum(
                nbytes * numbers(shape, mesh, placements, tuple(place[name] for name in names))
                for (shape, mesh, placements, names), nbytes in alike.items()
            )
        )
    return found


def _place(rank: int, sizes: Sizes) -> dict[str, int]:
    """Where a rank stands in each dimension of the meshes (meshes.py)."""
    rest, tensor = divmod(rank, sizes.tensor)
    replicate, shard = divmod(rest, sizes.sharing)
    return {
        "data": rest,
        "replicate": replicate,
        "shard": shard,
        "tensor": tensor,
        "rest": shard // sizes.expert,
        "expert": shard % sizes.expert,
    }


def _show(held: Mapping[str, list[int]], plan: Mapping[str, int], what: str) -> None:
    rows: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for rank, row in enumerate(zip(*held.values(), strict=True)):
        rows[tuple(f"{n / 1e6:,.2f}" for n in (*row, sum(row)))].append(rank)
    world = sum(map(len, rows.values()))
    table = Table(title=f"dry run: {world} imagined ranks, {what}; MB a rank")
    table.add_column("ranks")
    for name in (*held, "together"):
        table.add_column(name, justify="right")
    for row, members in rows.items():
        table.add_row(_runs(members), *row)
    if plan:
        table.add_row("plan, at most", *(f"{n / 1e6:,.2f}" for n in (*plan.values(), sum(plan.values()))))
    show(table)


def _runs(ranks: Sequence[int]) -> str:
    """[0, 1, 2, 7] → 0–2, 7."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and runs[-1][1] == rank - 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    texts = [str(first) if first == last else f"{first}–{last}" for first, last in runs]
    return ", ".join(texts if len(texts) <= 4 else [*texts[:3], f"… ({len(ranks)} in all)"])
