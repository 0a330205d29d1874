"""Recover a model after surgery: stages of what is trained, on which loss, for how many tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from blockwright import registry
from blockwright.blocks.checkpoint.source import load
from blockwright.blocks.decoder import Decoder
from blockwright.blocks.kernels.cross_entropy import IGNORED
from blockwright.plugins.alignment.teaching import Lesson, Teaching
from blockwright.registry import BlockError, ConfigError, Node, Scope, did_you_mean, register
from blockwright.registry.ranges import NonNegative
from blockwright.registry.schema import Place, conforms
from blockwright.training.figure import MEASURED, OF_TEXT, TRAIN, Figure
from blockwright.training.patterns import matching
from blockwright.training.tasks.base import Batch
from blockwright.training.tasks.causal_lm import CausalLM, count_scored
from blockwright.training.tasks.making import Setup
from blockwright.training.tasks.means import Scored


@dataclass(frozen=True)
class Stage:
    """A part of the training.

    Args:
        loss: what the student learns from
        tokens: how many tokens it lasts; None for the rest
        frozen: patterns of parameter names that are not trained in it
    """

    loss: Teaching
    tokens: int | None
    frozen: tuple[str, ...]


@register("task", "distill")
class Distill(CausalLM):
    """Trains a model towards a teacher, in stages; validation is that of language modelling.

    Goldstein et al. 2025 (RADLADS), arXiv 2505.03005: layers are aligned first, then logits. The teacher is a frozen
    run in memory beside the student, by default the one whose weights the student was made from. A stage begins with
    the first optimizer step after its predecessor's tokens; a resumed run continues in its stage. Unlike in the papers,
    all stages are one run with one schedule. One process only; a model with multi-token prediction or a batch with
    more than text is refused.

    Args:
        setup: the model and how it is trained
        teacher: a run's folder, a checkpoint or an imported folder; null is ``init_from``
        stages: list of {loss, tokens, frozen}: a registered ``teaching`` (``layers``, ``logits``, ``language``); how
            many tokens, null for the rest; patterns of what is frozen besides ``frozen`` of the task
        z_loss: not applied to what the teacher teaches
    """

    figures: ClassVar[tuple[Figure, ...]] = (
        *(replace(figure, groups=MEASURED) for figure in OF_TEXT),
        Figure("loss", "of the stage", "less", TRAIN),
        Figure("acceptance_{depth}", "of drafts", "more"),
    )
    splits = False

    def __init__(
        self,
        setup: Setup,
        teacher: Place | None = None,
        stages: Sequence[Mapping[str, Any]] = ({"loss": "logits"},),
        z_loss: NonNegative = 0.0,
    ) -> None:
        super().__init__(setup, z_loss)
        self.teacher = setup.trained if teacher is None else teacher
        self.stages = [_stage(each, f"task.stages.{i}") for i, each in enumerate(stages)]
        if not self.stages or any(stage.tokens is None for stage in self.stages[:-1]):
            rule = "is a list of stages, of which only the last may last for the rest"
            raise ConfigError("task.stages", list(stages), rule, "Give each stage before it its tokens")
        if self.model_config["mtp"]:
            raise ConfigError("model.mtp", self.model_config["mtp"], "is not trained by distillation", "Set it to null")
        self._taught: list[Decoder] = []  # in a list, so that it is no part of this module
        self._trainable: list[str] = []
        self._now: int | None = None

    # --- stages ---------------------------------------------------------------------------------------------------

    def stage_at(self, seen: int) -> int:
        """The index of the stage after so many tokens."""
        for index, stage in enumerate(self.stages):
            if stage.tokens is None or seen < stage.tokens:
                return index
            seen -= stage.tokens
        return len(self.stages) - 1

    def on_train_start(self) -> None:
        super().on_train_start()
        if self.trainer.world_size > 1:
            rule = "changes what is trained between stages, which several processes would have to agree on"
            raise ConfigError("trainer.devices", self.trainer.world_size, rule, "Write trainer.devices=1")
        if self.teacher is None:
            raise ConfigError("task.teacher", None, "needs a trained model", "Name a run: task.teacher=RUN")
        like = self.model.embedding.weight
        teacher = load(Path(self.teacher), dtype=like.dtype, device=like.device).choose_kernels(self.configured.kernels)
        if teacher.config["vocab_size"] != self.model_config["vocab_size"]:
            rule = f"has {teacher.config['vocab_size']} tokens, and the model {self.model_config['vocab_size']}"
            raise ConfigError("task.teacher", self.teacher, rule, "Name the run that the model was made from")
        self._taught = [teacher.requires_grad_(False)]
        self._trainable = [name for name, p in self.model.named_parameters() if p.requires_grad]
        for index, stage in enumerate(self.stages):
            matching(self._trainable, stage.frozen, f"task.stages.{index}.frozen")

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        super().on_train_batch_start(batch, batch_idx)
        now = self.stage_at(self.counted["tokens"])  # as of the last step: the same for all its micro-batches
        if now != self._now:
            self._now = now
            frozen = set(matching(self._trainable, self.stages[now].frozen, f"task.stages.{now}.frozen"))
            for name in self._trainable:
                self.model.get_parameter(name).requires_grad_(name not in frozen)

    def objective(self, batch: Batch, stage: str) -> Scored:
        if stage != "train":
            return super().objective(batch, stage)
        if media := self.model.media(batch):
            raise ConfigError("data", " and ".join(media), "are not read by distillation", "Choose data of text")
        assert self._now is not None
        self.counted.add("tokens", int(self.tokens_of(batch)))
        given = (batch["tokens"], batch["targets"], batch.get("positions"), batch.get("segments"))
        try:
            losses, routings = self.stages[self._now].loss(Lesson(self.model, self._taught[0], *given))
        except BlockError as error:
            raise ConfigError(f"task.stages.{self._now}.loss", error.value, error.rule, error.remedy) from None
        targets, weights = batch["targets"], batch.get("weights")
        scored = (targets != IGNORED) if weights is None else (targets != IGNORED) * weights
        return Scored((losses * scored).sum(), count_scored(targets, weights), routings=routings)


def _stage(node: Any, path: str) -> Stage:
    """Read a stage.

    Raises:
        ConfigError: it is none
    """
    keys = ("loss", "tokens", "frozen")
    if not isinstance(node, Mapping) or "loss" not in node:
        raise ConfigError(path, node, "is a mapping with a loss", "Write {loss: layers, tokens: 100000}")
    for key in node:
        if key not in keys:
            raise ConfigError(f"{path}.{key}", node[key], "a stage has no such key", did_you_mean(key, keys))
    tokens, frozen = node.get("tokens"), node.get("frozen") or []
    if tokens is not None and (not conforms(tokens, int) or tokens < 1):
        raise ConfigError(f"{path}.tokens", tokens, "counts tokens, at least 1", "Write null for the rest")
    loss: Teaching = registry.build("teaching", Node(node["loss"], f"{path}.loss"), Scope({}, {}))
    return Stage(loss, tokens, tuple(frozen))
