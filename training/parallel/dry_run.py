"""``trainer.dry_run=true``: build, shard, take three steps on synthetic tokens, print each rank's memory, and stop."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from rich.table import Table
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from blockwright.blocks.compose import compose
from blockwright.registry.printing import show
from blockwright.training.configuration import parts
from blockwright.training.configuration.instantiate import instantiate
from blockwright.training.configuration.run import Run
from blockwright.training.parallel.arithmetic import held_bytes, whole_regions
from blockwright.training.parallel.local import plain
from blockwright.training.parallel.ranks import data_ranks
from blockwright.training.parallel.sizes import Sizes

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
