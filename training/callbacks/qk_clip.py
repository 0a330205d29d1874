"""QK-clip: scale down the query and key weights of heads whose attention scores have grown too large."""

from __future__ import annotations

from collections import Counter

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from blockwright.blocks.attention.base import Attention, ScoreRows, row_factors
from blockwright.blocks.kernels.largest_score import LargestScores
from blockwright.registry import ConfigError
from blockwright.registry.enforcing import enforced
from blockwright.registry.ranges import Fraction, Positive
from blockwright.training.cadence import logs_now
from blockwright.training.callbacks.step_end import StepEnd
from blockwright.training.figure import TRAIN, Figure
from blockwright.training.parallel.local import own_place, plain
from blockwright.training.tasks.base import Task


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
