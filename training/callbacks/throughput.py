"""Speed of a run: tokens per second, and model FLOPs utilisation (MFU)."""

from __future__ import annotations

import time
from typing import Any

import lightning as L
import torch

from blockwright.blocks.cost import training_flops_per_token
from blockwright.registry.enforcing import enforced
from blockwright.registry.ranges import Whole
from blockwright.training.cadence import logs_now
from blockwright.training.figure import Figure
from blockwright.training.parallel.ranks import data_ranks
from blockwright.training.tasks.base import Task

SPEED = ("speed",)  # the group of its figures


@enforced("callbacks.throughput")
class Throughput(L.Callback):
    """Logs ``speed/tokens_per_second`` and ``speed/mfu``, of tokens without padding; of a task that samples what it
    trains on, also ``speed/rollout_tokens_per_second`` of sampling alone, and ``speed/update_tokens_per_second`` of the
    rest.

    Model FLOPs are those of the forward pass, counted on the meta device per token at the batch's length, times three
    for training, without recomputation. The peak is measured at the start with one large product, times the number of
    processes, in the precision in which a step multiplies: bf16 under ``bf16-mixed``, whose weights are fp32. Where
    fp32 is faster, as on a CPU that emulates bf16, that is the peak.

    Args:
        warmup: optimizer steps excluded from the first figure
    """

    figures = (
        Figure("tokens_per_second", "tokens/s", "more", SPEED),
        Figure("mfu", "of the measured peak", "more", SPEED),
        Figure("rollout_tokens_per_second", "tokens/s", "more", SPEED),
        Figure("update_tokens_per_second", "tokens/s", "more", SPEED),
    )
    observes = "measures speed"

    def __init__(self, warmup: Whole = 2) -> None:
        self.warmup = warmup
        self._tokens: int | torch.Tensor = 0  # on the device, which the host does not wait for
        self._since = 0.0
        self._outside = 0.0
        self._flops: float | None = None
        self._peak = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        one = torch.ones(1, 1, dtype=next(pl_module.parameters()).dtype, device=pl_module.device)
        with trainer.precision_plugin.forward_context():
            multiplied = (one @ one).dtype
        self._peak = matmul_peak(pl_module.device, multiplied) * trainer.world_size
        self._steps_seen = 0

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._outside = time.perf_counter()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._since += time.perf_counter() - self._outside

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._steps_seen < self.warmup:
            self._steps_seen += not trainer.fit_loop._should_accumulate()
            self._since, self._tokens = time.perf_counter(), 0
            _sampled(pl_module)
            return
        self._tokens += pl_module.tokens_of(batch) if isinstance(pl_module, Task) else batch["tokens"].numel()
        if logs_now(trainer):
            if self._flops is None and isinstance(pl_module, Task):
                self._flops = training_flops_per_token(_trained(pl_module), batch["tokens"].shape[1])
            seconds = time.perf_counter() - self._since
            sampled, sampling = _sampled(pl_module)
            tokens, sampled = (_of_all(n, trainer, pl_module.device) for n in (self._tokens, sampled))
            rate = tokens / seconds
            pl_module.log("speed/tokens_per_second", rate)
            if self._flops:
                pl_module.log("speed/mfu", rate * self._flops / self._peak)
            if sampled:
                pl_module.log("speed/rollout_tokens_per_second", sampled / sampling)
                pl_module.log("speed/update_tokens_per_second", tokens / (seconds - sampling))
            self._since, self._tokens = time.perf_counter(), 0


def _trained(task: Task) -> dict[str, Any]:
    """Its composition, without multi-token prediction where that is frozen, as tasks that do not train it ask."""
    config = dict(task.model_config)
    return config if any(p.requires_grad for p in task.model.mtp.parameters()) else {**config, "mtp": None}


def _of_all(tokens: int | torch.Tensor, trainer: L.Trainer, device: torch.device) -> int:
    """Tokens of all ranks, of which each may have other padding."""
    ranks = data_ranks(trainer)
    return int(ranks.sum(torch.as_tensor(tokens, device=device, dtype=torch.int64))) // ranks.together


def _sampled(task: L.LightningModule) -> tuple[int, float]:
    return task.take_sampled() if isinstance(task, Task) else (0, 0.0)


def matmul_peak(device: torch.device, dtype: torch.dtype, size: int | None = None) -> float:
    """FLOPs per second of one device for a square product in a precision; in fp32 where that is faster, as on a CPU
    that emulates bf16. ``size``: rows of the matrices; None: as many as reach the peak."""
    precisions = {dtype} if dtype.itemsize > 2 else {dtype, torch.float32}
    return max(_peak_in(device, each, size or (1024 if device.type == "cpu" else 8192)) for each in precisions)


@torch.no_grad()
def _peak_in(device: torch.device, dtype: torch.dtype, size: int, repeats: int = 8) -> float:
    """The best of several, against noise of other processes, on a CPU in about a second, since one that emulates
    ``dtype`` takes seconds for each."""
    a = torch.randn(size, size, device=device, dtype=dtype)
    best, until = float("inf"), time.perf_counter() + 1.0
    for _ in range(repeats):
        if device.type == "cpu" and time.perf_counter() > until:
            break
        start = time.perf_counter()
        a @ a
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
