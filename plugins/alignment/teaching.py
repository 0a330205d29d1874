"""Losses of distillation: a student learns from the teacher that it was made from."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blockwright.blocks.decoder import Decoder
from blockwright.blocks.forward_pass import Pass
from blockwright.blocks.gating.base import Routing
from blockwright.blocks.kernels.scoring import is_real
from blockwright.registry import BlockError, Composable, family, register
from blockwright.registry.ranges import Positive

PARTS = ("attention", "ffn")  # of a layer, that are compared


@dataclass(frozen=True)
class Lesson:
    """A batch, and the two models.

    Args:
        student: learns
        teacher: frozen, in evaluation mode
        tokens, targets: [B,T]; targets of −100 are not scored
        positions, segments: as for ``Decoder.hidden``
    """

    student: Decoder
    teacher: Decoder
    tokens: Tensor
    targets: Tensor
    positions: Tensor | None = None
    segments: Tensor | None = None

    @property
    def real(self) -> Tensor | None:
        """[B,T], which are tokens and not padding; None for all."""
        return None if self.segments is None else is_real(self.segments)

    @property
    def inputs(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The input of both models."""
        return self.tokens, self.positions, self.segments


@family("teaching", root="task")
class Teaching(Composable):
    """A loss of the student."""

    def __init__(self) -> None: ...

    @abstractmethod
    def __call__(self, lesson: Lesson) -> tuple[Tensor, Sequence[Routing | None]]:
        """The loss of each token [B,T] with its gradient, and the routings of the student's layers."""


@register("teaching", "language")
class Language(Teaching):
    """The next token, as without a teacher: −log p(target)."""

    def __call__(self, lesson: Lesson) -> tuple[Tensor, Sequence[Routing | None]]:
        hidden, routings = lesson.student.hidden(*lesson.inputs)
        logits = lesson.student.logits(hidden).float()
        return F.cross_entropy(logits.mT, lesson.targets, reduction="none"), routings


@register("teaching", "logits")
class Logits(Teaching):
    """The teacher's distribution of each next token: τ² KL(softmax(teacher/τ) ‖ softmax(student/τ)), in nats.

    Hinton et al. 2015, arXiv 1503.02531. At temperature 1 it is 0 where both agree.

    Args:
        temperature: τ
    """

    def __init__(self, temperature: Positive = 1.0) -> None:
        self.temperature = temperature

    def __call__(self, lesson: Lesson) -> tuple[Tensor, Sequence[Routing | None]]:
        with torch.no_grad():
            teacher = (lesson.teacher(*lesson.inputs).float() / self.temperature).log_softmax(-1)
        hidden, routings = lesson.student.hidden(*lesson.inputs)
        student = (lesson.student.logits(hidden).float() / self.temperature).log_softmax(-1)
        return self.temperature**2 * (teacher.exp() * (teacher - student)).sum(-1), routings


@register("teaching", "layers")
class Layers(Teaching):
    """Each changed block alone: it reads what the teacher's block reads, and learns to give what that gives.

    The mean over the changed attentions and feed-forward blocks of ‖student(x) − teacher(x)‖² / E‖teacher(x)‖², which
    is 1 for a block that gives 0. Layer-wise alignment of Zhang et al. 2024 (LoLCATs), arXiv 2410.10254, and Bick et
    al. 2024 (MOHAWK), arXiv 2408.10189. Changed are blocks of another class or of other shapes; the others have no
    gradient.

    Raises:
        BlockError: the models have different depths, or no block has changed
    """

    def __call__(self, lesson: Lesson) -> tuple[Tensor, Sequence[Routing | None]]:
        paths = changed(lesson.student, lesson.teacher)
        watched = _watched(lesson, paths)
        losses: list[Tensor] = []
        real = lesson.real
        routings: list[Routing | None] = [None] * len(lesson.student.layers)
        for path in paths:
            (x, given), target = watched[path]
            output = lesson.student.get_submodule(path)(x, given)
            if isinstance(output, tuple):  # of a feed-forward block
                routings[int(path.split(".")[1])] = output[1]
            error, size = ((_tensor(output) - target).float().square().sum(-1), target.float().square().sum(-1))
            losses.append(error / (size if real is None else size[real]).mean().clamp(min=1e-12))
        return torch.stack(losses).mean(0), routings


def changed(student: Decoder, teacher: Decoder) -> list[str]:
    """Paths of the blocks that have another class or other shapes than the teacher's.

    Raises:
        BlockError: the models have different depths, or no block has changed
    """
    if student.loop is not None or teacher.loop is not None:
        rule = "compares what each layer reads once, and a loop visits layers again"
        raise BlockError("name", "layers", rule, "Use logits: task.stages=[{loss: logits}]")
    if len(student.layers) != len(teacher.layers):
        rule = f"compares {len(student.layers)} layers with the teacher's {len(teacher.layers)} one by one"
        raise BlockError("name", "layers", rule, "Use logits: task.stages=[{loss: logits}]")
    paths = [f"layers.{i}.{part}" for i in range(len(student.layers)) for part in PARTS]
    differing = [path for path in paths if _kind(student.get_submodule(path)) != _kind(teacher.get_submodule(path))]
    if not differing:
        rule = "aligns the blocks that differ from the teacher's, and none does"
        raise BlockError("name", "layers", rule, "Use logits: task.stages=[{loss: logits}]")
    return differing


def _kind(block: nn.Module) -> tuple[Any, ...]:
    """Class and shapes of a block."""
    return type(block), [(name, tuple(p.shape)) for name, p in block.named_parameters()]


def _tensor(output: Any) -> Tensor:
    """The tensor of a block's output, beside which a feed-forward block returns its routing."""
    return output[0] if isinstance(output, tuple) else output


@torch.no_grad()
def _watched(lesson: Lesson, paths: Sequence[str]) -> dict[str, tuple[tuple[Tensor, Pass], Tensor]]:
    """Input and output of the teacher's blocks, by path."""
    inputs: dict[str, tuple[Tensor, Pass]] = {}
    outputs: dict[str, Tensor] = {}

    def before(path: str) -> Any:
        def hook(module: nn.Module, arguments: tuple[Tensor, Pass]) -> None:  # before the block fills the dicts
            x, given = arguments
            inputs[path] = x, given._replace(carry=dict(given.carry or {}), losses=dict(given.losses or {}))

        return lesson.teacher.get_submodule(path).register_forward_pre_hook(hook)

    def after(path: str) -> Any:
        def hook(module: nn.Module, arguments: Any, output: Any) -> None:
            outputs[path] = _tensor(output)

        return lesson.teacher.get_submodule(path).register_forward_hook(hook)

    hooks = [watch(path) for path in paths for watch in (before, after)]
    try:
        lesson.teacher.hidden(*lesson.inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return {path: (inputs[path], outputs[path]) for path in paths}
