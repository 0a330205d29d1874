"""Callbacks that act at the end of an optimizer step, before anything can write a checkpoint of it.

Averaged weights, which are validated, tested and kept instead of the last ones, and QK-clip.
"""

from __future__ import annotations

import warnings
from collections import Counter
from itertools import chain
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from blockwright.blocks.attention.base import Attention, ScoreRows, row_factors
from blockwright.blocks.kernels.long_attention import LargestScores
from blockwright.registry import ConfigError
from blockwright.registry.enforcing import enforced
from blockwright.registry.ranges import Fraction, Positive, ProperFraction, Whole
from blockwright.training.cadence import logs_now
from blockwright.training.figure import TRAIN, Figure
from blockwright.training.parallel.local import own_place, plain
from blockwright.training.parallel.refusals import no_shards
from blockwright.training.tasks.base import Task


class StepEnd(L.Callback):
    """A callback whose state, or what it does to weights, belongs to an optimizer step.

    Lightning's ``on_train_batch_end`` calls one callback after the other, and each may write a checkpoint; what a later
    one does to the step would be missing in it. A ``Task`` calls ``on_step_end`` before all of them. For other modules
    it is called in ``on_train_batch_end``.
    """

    def on_step_end(self, trainer: L.Trainer, pl_module: L.LightningModule, step: int) -> None:
        """Act on the step just taken, or skipped.

        Args:
            trainer: does not count the step yet
            pl_module: the task
            step: optimizer steps done, with this one
        """
        raise NotImplementedError

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not isinstance(pl_module, Task) and not trainer.fit_loop._should_accumulate():
            self.on_step_end(trainer, pl_module, trainer.global_step)


# --- the base class of callbacks that run after all measurements ---


class Finale(L.Callback):
    """Called with the final figures: after training, full validation and testing, on rank 0."""

    def on_conclusion(self, trainer: L.Trainer, task: L.LightningModule, metrics: dict[str, float]) -> None:
        """``metrics`` holds the last value of everything logged, final validation and test included."""
        raise NotImplementedError


@enforced("callbacks.averaging")
class Averaging(WeightAveraging):
    """Validates, tests and ends with a moving average of the weights: w̄ ← β w̄ + (1 − β) w after each step.

    The average has less noise than the last weights: a difference of arms is seen with fewer seeds. Training itself is
    unchanged. A checkpoint's weights are the averaged ones, and the current ones are stored next to them, so that a
    resumed run is bit-identical to one that was not stopped.

    How this differs from Lightning's: whole numbers, such as the table of ``hash``, are the current ones; before
    ``from_step`` the current weights are measured and kept, not the initial ones; the average of weights in bf16 is in
    fp32; the current weights are replaced only when training has been saved, a checkpoint written amid a validation
    tells the two apart, and sums over ranks survive. Not for strategies that shard the model.

    Args:
        decay: β; the average reaches about 1 / (1 − β) steps back
        from_step: optimizer steps that are left out of the average, which until then is the current weights
    """

    whole = True  # of the weights of the model, on each process

    def __init__(self, decay: ProperFraction = 0.9, from_step: Whole = 0) -> None:
        super().__init__(avg_fn=self._mean)
        self.decay, self.from_step = decay, from_step
        self._averages = False  # whether the step that is taken is one of the average
        self._swapped = False  # whether the module holds the average, as in a validation
        self._exact: dict[str, Tensor] = {}  # then, what the module holds of it in a lower precision than it has

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        self._averages = step_idx is not None and step_idx > self.from_step
        return step_idx is not None

    def _mean(self, mean: Tensor, now: Tensor, n: Tensor) -> Tensor:
        # Lightning's β w̄ + (1 − β) w is cut to a whole number, so that an expert's index becomes that of another one.
        averages = self._averages and mean.is_floating_point()
        return mean.lerp(now.to(mean.dtype), 1 - self.decay) if averages else now

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit" and type(trainer.strategy).save_checkpoint is not Strategy.save_checkpoint:
            raise no_shards("callbacks.averaging", type(trainer.strategy).__name__)
        with warnings.catch_warnings():  # of models that are built by a hook, which may not be sharded
            warnings.filterwarnings("ignore", ".*WeightAveraging callback with a model that overrides.*")
            super().setup(trainer, pl_module, stage)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        pass  # a checkpoint that is written here stores the current weights, too

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._copy_average_to_current(pl_module)

    def _swap_models(self, pl_module: L.LightningModule) -> None:
        averaged: Any = self._average_model
        held = dict(pl_module.named_parameters()) | dict(pl_module.named_buffers())
        own = dict(averaged.module.named_parameters()) | dict(averaged.module.named_buffers())
        if not self._swapped:
            self._exact = {name: t.detach().clone() for name, t in own.items() if t.dtype != held[name].dtype}
        super()._swap_models(pl_module)
        self._swapped = not self._swapped
        if not self._swapped:  # or every validation would round the average, in which small steps of bf16 are lost
            for name, exact in self._exact.items():
                own[name].data.copy_(exact)
            self._exact = {}

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        if self._swapped:
            current, averaged = checkpoint["state_dict"], checkpoint["current_model_state"]
            checkpoint |= {"state_dict": {**averaged, **self._exact}, "current_model_state": current}

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        if (current := checkpoint.get("current_model_state")) is not None:
            weights = {name for name, _ in chain(pl_module.named_parameters(), pl_module.named_buffers())}
            sums = {name: value for name, value in checkpoint["state_dict"].items() if name not in weights}
            checkpoint["current_model_state"] = {**current, **sums}  # over all ranks: the task adds them last
        super().on_load_checkpoint(trainer, pl_module, checkpoint)


@enforced("callbacks.qk_clip")
class QKClip(StepEnd):
    """Bounds attention scores by the weights they come from, after each optimizer step.

    Kimi K2, arXiv 2507.20534, §2.1 (MuonClip). Where m, the largest score of a head in the step's batches, exceeds τ:
    W_q ← (τ/m)^α W_q and W_k ← (τ/m)^(1−α) W_k, biases alike, so that the head's scores become τ/m times as large. Of
    ``mla`` the same for the parts without position; the rotated part of the query takes all of τ/m, since all heads
    share its key. Heads that share a key (``gqa``, ``mqa``) are clipped together, by the largest m among them, as in
    Megatron-LM: the factor of a head alone would change the scores of the others.

    A score is q·k times its scale, before a softcap and the position's bias, of pairs that see each other: documents,
    window and selector are respected. m is over all micro-batches and ranks, with the weights of the forward pass; it
    costs one more product of queries and keys, two under activation checkpointing, where compiled layers also run as
    written. A step that ``callbacks.guard``
    skips clips nothing, nor does an m that is not finite. ``train/largest_score`` is logged.

    Attentions without scores (recurrent mixers), with ``qk_norm``, or with frozen weights are left out, in one warning.

    Args:
        threshold: τ, the largest score that is left as it is
        alpha: α, the share of the factor's exponent that falls to the queries
    """

    figures = (Figure("largest_score", "", None, TRAIN),)

    def __init__(self, threshold: Positive = 100.0, alpha: Fraction = 0.5) -> None:
        self.threshold, self.alpha = threshold, alpha
        self._watched: list[_Watched] = []
        self._tensor = 0  # this process's index among those that split heads

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not isinstance(pl_module, Task):
            return
        meshes = getattr(trainer.strategy, "meshes", None)
        if meshes is not None and meshes.context is not None:
            rule = "measures whole heads, and long windows that ranks share are attended to some heads at a time"
            raise ConfigError("callbacks.qk_clip", self.threshold, rule, "Train without trainer.strategy.context")
        self._tensor = 0 if meshes is None or meshes.tensor is None else meshes.tensor.get_local_rank()
        found = [(m, _clipped_rows(m)) for m in pl_module.model.modules() if isinstance(m, Attention) and not m.empty]
        if not any(rows for _, rows in found):
            rule = f"finds nothing to clip in this model ({_kinds([m for m, _ in found])})"
            remedy = "Remove it: scores that are normalised, absent or frozen need no bound"
            raise ConfigError("callbacks.qk_clip", self.threshold, rule, remedy)
        self._leave_out([m for m, rows in found if not rows])
        self._watched = [_Watched(m, rows) for m, rows in found if rows]

    def on_step_end(self, trainer: L.Trainer, pl_module: L.LightningModule, step: int) -> None:
        found = {watched: watched.take(self._tensor) for watched in self._watched}
        self._leave_out([watched.attention for watched, own in found.items() if own is None])
        seen = {watched: own for watched, own in found.items() if own is not None}
        self._watched = list(seen)
        if not seen:
            return
        largest = torch.cat(list(seen.values())).nan_to_num(nan=float("inf"))
        largest = trainer.strategy.reduce(largest, reduce_op="max")
        if logs_now(trainer):
            pl_module.log("train/largest_score", largest.max().float())
        factor = clip_factors(largest, self.threshold)
        if (factor < 1).any() and any(p.grad is not None for p in pl_module.parameters()):
            for watched, own in zip(self._watched, factor.split([w.n_heads for w in self._watched]), strict=True):
                watched.scale(own, self.alpha)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if isinstance(pl_module, Task):
            pl_module.model.choose_kernels(pl_module.configured.kernels)

    def _leave_out(self, attentions: list[Attention]) -> None:
        if attentions:
            rank_zero_warn(
                f"callbacks.qk_clip leaves out {_kinds(attentions)}: no scores that it can measure and bound by "
                "trained weights"
            )


def clip_factors(largest: Tensor, threshold: float) -> Tensor:
    """min(1, τ/m) of the largest scores of heads, [N]; 1 for those that are not finite."""
    above = largest.isfinite() & (largest > threshold)
    return torch.where(above, threshold / largest, 1.0)


class _Watched:
    """An attention, the rows that its scores are proportional to, and the largest scores of its heads."""

    def __init__(self, attention: Attention, rows: tuple[ScoreRows, ...]) -> None:
        self.attention, self.rows, self.scores = attention, rows, LargestScores(attention)
        self.weights = dict(attention.named_parameters())
        heads = [self.weights[part.name].shape[0] // part.height for part in rows]
        self.n_heads, self.n_groups = max(heads), min(heads)

    def take(self, index: int) -> Tensor | None:
        """The largest scores since the last call, [N], those of other ranks −∞; None if nothing has attended."""
        own = self.scores.take()
        if own is None:
            return None
        largest = own.new_full((self.n_heads,), float("-inf"))
        first = index * len(own) if len(own) < self.n_heads else 0
        largest[first : first + len(own)] = own
        return largest

    @torch.no_grad()
    def scale(self, factor: Tensor, alpha: float) -> None:
        """Multiply the scores of all heads by the least factor, of [N], in their group."""
        of_group = factor.unflatten(0, (self.n_groups, -1)).amin(1)
        for part in self.rows:
            weight = self.weights[part.name]
            factors = row_factors(part, weight.shape[0], of_group, alpha)
            (held, *_), (first, *_) = own_place(weight)
            local = plain(weight.detach())
            local.mul_(factors[first : first + held].view(-1, *[1] * (weight.ndim - 1)).to(local.device))


def _clipped_rows(attention: Attention) -> tuple[ScoreRows, ...]:
    """An attention's rows; none if any of them is not trained."""
    rows, weights = attention.score_rows(), dict(attention.named_parameters())
    return rows if all(weights[part.name].requires_grad for part in rows) else ()


def _kinds(attentions: list[Attention]) -> str:
    """``KDA (9 layers), MLA (1 layer)``"""
    counts = Counter(type(attention).__name__ for attention in attentions)
    return ", ".join(f"{name} ({n} layer{'s' * (n > 1)})" for name, n in counts.items()) or "no attention"
