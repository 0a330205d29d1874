from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from blockwright.blocks.decoder import Decoder
from blockwright.blocks.forward_pass import Pass
from blockwright.blocks.gating.base import Routing
from blockwright.registry import BlockError, register
from blockwright.training.objectives.teaching.base import Lesson, Teaching

PARTS = ("attention", "ffn")


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
        seen = _watched(lesson, paths)
        losses: list[Tensor] = []
        real = lesson.real
        routings: list[Routing | None] = [None] * len(lesson.student.layers)
        for path in paths:
            (x, given), wanted = seen[path]
            found = lesson.student.get_submodule(path)(x, given)
            if isinstance(found, tuple):  # of a feed-forward block
                routings[int(path.split(".")[1])] = found[1]
            error, size = ((_output(found) - wanted).float().square().sum(-1), wanted.float().square().sum(-1))
            losses.append(error / (size if real is None else size[real]).mean().clamp(min=1e-12))
        return torch.stack(losses).mean(0), routings


def changed(student: Decoder, teacher: Decoder) -> list[str]:
    """Paths of the blocks that have another class or other shapes than the teacher's.

    Raises:
        BlockError
    """
    if len(student.layers) != len(teacher.layers):
        rule = f"compares {len(student.layers)} layers with the teacher's {len(teacher.layers)} one by one"
        raise BlockError("name", "layers", rule, "Use logits: task.stages=[{loss: logits}]")
    paths = [f"layers.{i}.{part}" for i in range(len(student.layers)) for part in PARTS]
    found = [path for path in paths if _kind(student.get_submodule(path)) != _kind(teacher.get_submodule(path))]
    if not found:
        rule = "aligns the blocks that differ from the teacher's, and none does"
        raise BlockError("name", "layers", rule, "Use logits: task.stages=[{loss: logits}]")
    return found


def _kind(block: nn.Module) -> tuple[Any, ...]:
    return type(block), [(name, tuple(p.shape)) for name, p in block.named_parameters()]


def _output(found: Any) -> Tensor:
    return found[0] if isinstance(found, tuple) else found


@torch.no_grad()
def _watched(lesson: Lesson, paths: Sequence[str]) -> dict[str, tuple[tuple[Tensor, Pass], Tensor]]:
    """What the teacher's blocks are given and what they give, by path."""
    read: dict[str, tuple[Tensor, Pass]] = {}
    gave: dict[str, Tensor] = {}

    def before(path: str) -> Any:
        def hook(module: nn.Module, arguments: tuple[Tensor, Pass]) -> None:  # before the block fills the dicts
            x, given = arguments
            read[path] = x, given._replace(carry=dict(given.carry or {}), losses=dict(given.losses or {}))

        return lesson.teacher.get_submodule(path).register_forward_pre_hook(hook)

    def after(path: str) -> Any:
        def hook(module: nn.Module, given: Any, output: Any) -> None:
            gave[path] = _output(output)

        return lesson.teacher.get_submodule(path).register_forward_hook(hook)

    hooks = [watch(path) for path in paths for watch in (before, after)]
    try:
        lesson.teacher.hidden(*lesson.given)
    finally:
        for hook in hooks:
            hook.remove()
    return {path: (read[path], gave[path]) for path in paths}
