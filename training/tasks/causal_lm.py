"""The task of causal language modelling: predict each next token."""

from __future__ import annotations

from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from blockwright.blocks.decoder import Decoder
from blockwright.blocks.forward_pass import Share
from blockwright.blocks.gating.base import Routing
from blockwright.blocks.kernels.cross_entropy import IGNORED
from blockwright.blocks.layer import later_targets
from blockwright.registry import ConfigError, register
from blockwright.registry.ranges import NonNegative
from blockwright.training.figure import MEASURED, OF_TEXT, TRAIN, Figure
from blockwright.training.metrics import Accuracy
from blockwright.training.tasks.base import Batch, Task
from blockwright.training.tasks.making import Setup
from blockwright.training.tasks.means import Scored

# --- the objective of causal language modelling, as functions of a decoder's outputs and targets ---


def count_scored(targets: Tensor, weights: Tensor | None = None) -> Tensor:
    """How many targets [B,T] are scored, or the sum of their weights [B,T]."""
    scored = targets != IGNORED
    return scored.sum() if weights is None else (scored * weights).sum()


def count_each_depth(
    targets: Tensor, segments: Tensor | None, depths: int, weights: Tensor | None = None
) -> dict[str, Tensor]:
    """Denominators of the loss terms: scored tokens, and those of each multi-token prediction depth.

    Args:
        targets: the next token after each, [B,T]
        segments: the document of each token, [B,T]; None where a row is one document
        depths: of multi-token prediction; depth k predicts k tokens further ahead
        weights: of the targets, [B,T], for the total only; None for 1
    """
    counts = {"total": count_scored(targets, weights)}
    later = {f"mtp{k}": count_scored(later_targets(targets, segments, k)) for k in range(1, depths + 1)}
    return {**counts, **later}


TOGETHER = 1024  # tokens whose logits are in memory at a time


@register("task", "causal_lm")
class CausalLM(Task):
    """Predicts each next token; validation counts the text only.

    The loss is the mean over all scored tokens, plus that of multi-token prediction, each depth a mean over the tokens
    that it scores, plus balance losses. Where a batch has ``weights`` of its targets (data.transforms), the first mean,
    its logged loss and its bits per byte are weighted by them; multi-token prediction is not.

    ``acceptance_K`` is the share of tokens for which the likeliest token of depth K of multi-token prediction is that
    of the model itself: of greedy drafts that follow right ones, those that generation would accept. It is measured on
    the text itself, without decoding; not where the tokens of a sequence are spread over ranks.

    A loop with exits trains on the expected loss over the visits after which a token may leave, and is validated with
    the visit that it takes.

    Args:
        setup: the model and how it is trained
        z_loss: weight of the mean of log² Z, Z the sum of the exponentials of a token's logits; 0 for none. 1e-4 in
            PaLM. Not applied to multi-token prediction
    """

    figures: ClassVar[tuple[Figure, ...]] = (
        *OF_TEXT,
        Figure("logit_z", "of the loss", "less", TRAIN),
        Figure("acceptance_{depth}", "of drafts", "more"),
    )
    reads = ("tokens", "targets", "n_bytes")
    splits = True

    def __init__(self, setup: Setup, z_loss: NonNegative = 0.0) -> None:
        super().__init__(setup)
        self.z_loss = z_loss
        self.exits = bool((self.model_config.get("loop") or {}).get("exit"))
        if self.exits and z_loss:
            rule = "is of one prediction of a token, and a loop with exits trains those after all visits"
            raise ConfigError("task.z_loss", z_loss, rule, "Write task.z_loss=0, or model.loop.exit=null")
        depths = (self.model_config["mtp"] or {"depth": 0})["depth"]
        self.agreement = nn.ModuleDict({f"{stage}_{k}": Accuracy() for stage in MEASURED for k in range(1, depths + 1)})

    def objective(self, batch: Batch, stage: str) -> Scored:
        decoder, segments, train = self.model, batch.get("segments"), stage == "train"
        z_loss = self.z_loss if train else 0.0
        share = self.share(batch)
        targets, weights = batch["targets"], batch.get("weights")
        if share is not None:
            targets, weights = share.take(targets), None if weights is None else share.take(weights)
        given = (batch["tokens"], batch.get("positions"), segments)
        media = decoder.media(batch)
        if train and self.exits:
            states, routings = decoder.exits(*given, share=share, media=media)
            hidden, total = states[-1], decoder.expected_nll(states, targets, weights)
            z = torch.zeros_like(total)
        else:
            hidden, routings = decoder.hidden(*given, share=share, media=media)
            total, z = decoder.nll_and_z(hidden, targets, z_loss, weights)
        terms: dict[str, Tensor] = {}
        if train and len(decoder.mtp):
            terms["mtp"], further = self._predict_further(batch, hidden, share)
            routings = [*routings, *further]
        if not train and share is None:
            self._compare_drafts(batch, hidden, stage)
        figures = {"logit_z": self.step.mean(z_loss * z, "total")} if z_loss else {}
        logged = total.detach() - z_loss * z
        return Scored(total, count_scored(targets, weights), logged, terms, figures, routings)

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        return count_each_depth(batch["targets"], batch.get("segments"), len(self.model.mtp), batch.get("weights"))

    def _predict_further(
        self, batch: Batch, hidden: Tensor, share: Share | None
    ) -> tuple[Tensor, list[Routing | None]]:
        """The weighted loss of multi-token prediction, a mean over its depths, and the routing of their layers."""
        given = (batch["tokens"], batch["targets"], batch.get("positions"), batch.get("segments"))
        depths, routings = self.model.mtp_nll(hidden, *given, share=share)
        means = [self.step.mean(nll, f"mtp{k}") for k, (nll, _) in enumerate(depths, start=1)]
        return self.model_config["mtp"]["loss_weight"] * torch.stack(means).mean(), routings

    @torch.no_grad()
    def _compare_drafts(self, batch: Batch, hidden: Tensor, stage: str) -> None:
        """Count the tokens for which each depth's likeliest is the model's own, given its states [B,T,D]."""
        decoder, segments = self.model, batch.get("segments")
        if not len(decoder.mtp):
            return
        own = _likeliest(decoder, hidden)
        further = decoder.mtp_states(hidden, batch["tokens"], batch.get("positions"), segments)
        for k, (states, _) in enumerate(further, start=1):
            scored = later_targets(batch["targets"], segments, k) != IGNORED
            agree = _likeliest(decoder, states) == own[:, k:]
            cast(Accuracy, self.agreement[f"{stage}_{k}"]).update(agree[scored])

    def _begin(self, stage: str) -> None:
        super()._begin(stage)
        for metric in self._agreements(stage).values():
            metric.reset()

    def _conclude(self, stage: str) -> None:
        super()._conclude(stage)
        for k, metric in self._agreements(stage).items():
            if metric.of:
                self.log(f"{stage}/acceptance_{k}", metric.compute().float())

    def _agreements(self, stage: str) -> dict[str, Accuracy]:
        named = ((name.rpartition("_"), metric) for name, metric in self.agreement.items())
        return {k: cast(Accuracy, metric) for (of, _, k), metric in named if of == stage}


def _likeliest(decoder: Decoder, states: Tensor) -> Tensor:
    """The likeliest next token of states [B,T,D], [B,T]; not the logits of all at once, which are large."""
    parts = states.flatten(0, 1).split(TOGETHER)
    return torch.cat([decoder.logits(part).argmax(-1) for part in parts]).view(states.shape[:2])


# --- the task of recalling: causal language modelling that also counts how many targets are the likeliest token ---


@register("task", "recall")
class Recall(CausalLM):
    """Trains as ``causal_lm`` does, and measures ``accuracy``: for data of which only what can be known is scored.

    A validation takes a second forward pass, whose logits the loss does not keep.

    Args:
        setup: the model and how it is trained
        z_loss: as of ``causal_lm``
    """

    figures: ClassVar[tuple[Figure, ...]] = (*CausalLM.figures, *Accuracy.figures)
    splits = False  # it compares whole windows

    def __init__(self, setup: Setup, z_loss: NonNegative = 0.0) -> None:
        super().__init__(setup, z_loss)
        self.right = nn.ModuleDict({stage: Accuracy() for stage in ("val", "test")})

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        super().validation_step(batch, batch_idx, dataloader_idx)
        self._count("val", batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        super().test_step(batch, batch_idx)
        self._count("test", batch)

    def _begin(self, stage: str) -> None:
        super()._begin(stage)
        self._accuracy(stage).reset()

    def _conclude(self, stage: str) -> None:
        super()._conclude(stage)
        self.log(f"{stage}/accuracy", self._accuracy(stage).compute().float())

    def _count(self, stage: str, batch: Batch) -> None:
        scored = batch["targets"] != IGNORED
        likeliest: Tensor = self.predict_step(batch, 0)
        self._accuracy(stage).update((likeliest == batch["targets"])[scored])

    def _accuracy(self, stage: str) -> Accuracy:
        metric = self.right[stage]
        assert isinstance(metric, Accuracy)
        return metric
