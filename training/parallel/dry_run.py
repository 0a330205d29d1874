"""``trainer.dry_run=true``: build, shard, take three steps on synthetic tokens, print each rank's memory, and stop."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from math import prod
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from rich.table import Table
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, Dataset

from blockwright.blocks.compose import compose
from blockwright.blocks.decoder import Decoder
from blockwright.blocks.precision import default_dtype
from blockwright.registry.printing import show
from blockwright.training.configuration import parts
from blockwright.training.configuration.instantiate import instantiate
from blockwright.training.configuration.run import Run
from blockwright.training.optimizers.recipe import OptimizerRecipe
from blockwright.training.parallel.arithmetic import held_bytes, whole_regions
from blockwright.training.parallel.build import LOW, Sharding, build
from blockwright.training.parallel.local import plain
from blockwright.training.parallel.meshes import make_meshes
from blockwright.training.parallel.ranks import data_ranks
from blockwright.training.parallel.sizes import Sizes, sizes_of

STEPS = 3
COLUMNS = ("parameters", "gradients", "optimizer", "activations")


class Synthetic(L.LightningDataModule):
    """Random tokens in batches of the run's size.

    Args:
        vocab_size: exclusive bound of the ids
        length: tokens per window
        batch_size: windows over all ranks
        batches: number of batches
    """

    def __init__(self, vocab_size: int, length: int, batch_size: int, batches: int) -> None:
        super().__init__()
        self.vocab_size, self.length, self.batch_size, self.batches = vocab_size, length, batch_size, batches

    def train_dataloader(self) -> Any:
        assert self.trainer is not None
        ranks = data_ranks(self.trainer)
        rows = self.batch_size * ranks.together // ranks.number
        return DataLoader(_Random(self.vocab_size, rows, self.length, self.batches), batch_size=None)


class _Random(Dataset[dict[str, Tensor]]):
    def __init__(self, vocab_size: int, rows: int, length: int, batches: int) -> None:
        self.shape, self.vocab_size, self.batches = (rows, length + 1), vocab_size, batches

    def __len__(self) -> int:
        return self.batches

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        draw = torch.Generator().manual_seed(index)
        tokens = torch.randint(self.vocab_size, self.shape, generator=draw)
        n_bytes = torch.full((self.shape[0],), self.shape[1] - 1, dtype=torch.int64)
        return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "n_bytes": n_bytes}


class Meter(L.Callback):
    """Bytes held by this rank: parameters, gradients, optimizer state, and peak activations.

    Activations are what autograd saves for the backward pass, each storage once, without weights. On a GPU they are the
    allocator's peak minus all of the above.
    """

    def __init__(self) -> None:
        self.bytes: dict[str, int] = dict.fromkeys(COLUMNS, 0)
        self._kept: dict[int, int] = {}
        self._hooks: Any = None

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)
        self._kept = {}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor)
        self._hooks.__enter__()

    def _keep(self, tensor: Tensor) -> Tensor:
        root = tensor._base if tensor._base is not None else tensor
        if not isinstance(root, torch.nn.Parameter) and hasattr(tensor, "untyped_storage"):
            storage = tensor.untyped_storage()
            self._kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        self._hooks.__exit__(None, None, None)
        self.bytes["activations"] = max(self.bytes["activations"], sum(self._kept.values()))

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        parameters = list(pl_module.parameters())
        self.bytes["parameters"] = sum(map(_size, parameters))
        self.bytes["gradients"] = sum(_size(p.grad) for p in parameters if p.grad is not None)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        states = [v for o in trainer.optimizers for values in o.state.values() for v in values.values()]
        self.bytes["optimizer"] = sum(_size(v) for v in states if isinstance(v, Tensor) and v.ndim)
        if pl_module.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(pl_module.device)
            self.bytes["activations"] = max(0, peak - sum(self.bytes[name] for name in COLUMNS[:3]))


def _size(tensor: Tensor) -> int:
    return plain(tensor).numel() * tensor.element_size()


def dry_run(run: Run, trainer_node: Mapping[str, Any]) -> dict[str, float]:
    """Run the steps and print the table, on the first rank.

    Args:
        run: checked
        trainer_node: its trainer, without this project's own keys

    Returns:
        the bytes of this rank, by name
    """
    model, data = run.model, run.data
    task, meter = parts.build("task", run), Meter()
    accumulated = trainer_node.get("accumulate_grad_batches", 1)
    length, batch_size = data.get("sequence_length", 256), data.get("batch_size", 16)
    tokens = Synthetic(model["vocab_size"], length, batch_size, STEPS * accumulated)
    alone = {"max_steps": STEPS, "logger": False, "enable_checkpointing": False, "limit_val_batches": 0}
    silent = {"enable_progress_bar": False, "val_check_interval": None, "max_epochs": 1}
    trainer = instantiate({**trainer_node, **alone, **silent, "callbacks": [meter]}, "trainer")
    trainer.fit(task, tokens)
    rows: list[Any] = [None] * trainer.world_size
    if dist.is_available() and dist.is_initialized():
        dist.all_gather_object(rows, meter.bytes)
    else:
        rows = [meter.bytes]
    if trainer.is_global_zero:
        meshes = getattr(trainer.strategy, "meshes", None)
        sizes = meshes.sizes if meshes is not None else Sizes()
        ranks = data_ranks(trainer)
        _show(rows, sizes, model, task.configured.recipe, ranks.number // ranks.together)
    return {f"dry_run/{name}_bytes": float(value) for name, value in meter.bytes.items()}


def _show(rows: list[dict[str, int]], sizes: Sizes, model: Mapping[str, Any], recipe: Any, readers: int) -> None:
    decoder = compose(model, device="meta")
    plan = held_bytes(decoder, sizes, recipe)
    table = Table(title=f"dry run: {len(rows)} ranks, {readers} of them read different windows; MB a rank")
    table.add_column("rank")
    for name in COLUMNS:
        table.add_column(f"peak {name}" if name == "activations" else name, justify="right")
    for rank, row in enumerate(rows):
        table.add_row(str(rank), *(f"{row[name] / 1e6:,.2f}" for name in COLUMNS))
    table.add_row("plan", *(f"{plan[name] / 1e6:,.2f}" if name in plan else "" for name in COLUMNS))
    show(table)
    for name in whole_regions(decoder, sizes):
        print(f"{name} cannot be split by heads: every rank of a tensor group computes it whole")


# --- ``trainer.dry_run=true trainer.world=N``: what each of N ranks would hold, found in one process ---


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
            name: spread_over(sizes, tensors) for name, tensors in zip(COLUMNS[:3], _kept(decoder, recipe), strict=True)
        }
    whole = compose(run.model, device="meta")
    plan = held_bytes(whole, sizes, recipe) if precision not in HALVES else {}
    _show_imagined(held, plan, f"{run.model['n_layers']} layers, {run.task['name']}")
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


def _show_imagined(held: Mapping[str, list[int]], plan: Mapping[str, int], what: str) -> None:
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
