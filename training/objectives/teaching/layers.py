from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from blocks.attention.base import takes_losses
from blocks.carry import takes_carry
from blocks.decoder import Decoder
from blocks.ffn.base import takes_real
from blocks.gating.base import Routing
from registry import BlockError, register
from training.objectives.teaching.base import Lesson, Teaching

PARTS = ("attention", "ffn")
FILLED = ("carry", "losses")  # arguments that a block adds to


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
            (given, named), wanted = seen[path]
            block = lesson.student.get_submodule(path)
            given_too = {"real": real} if real is not None and takes_real(block) else {}
            found = block(*given, **_taken(block, named), **given_too)
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


def _taken(block: nn.Module, named: dict[str, Any]) -> dict[str, Any]:
    """Of the arguments of a teacher's block those that the student's takes."""
    takes = {"carry": takes_carry(block), "losses": takes_losses(block), "real": False}
    return {key: value for key, value in named.items() if takes.get(key, True)}


def _output(found: Any) -> Tensor:
    return found[0] if isinstance(found, tuple) else found


@torch.no_grad()
def _watched(lesson: Lesson, paths: Sequence[str]) -> dict[str, tuple[tuple[Any, Any], Tensor]]:
    """The arguments and outputs of the teacher's blocks, by path."""
    read: dict[str, tuple[Any, Any]] = {}
    gave: dict[str, Tensor] = {}

    def before(path: str) -> Any:
        def hook(module: nn.Module, given: Any, named: Any) -> None:  # a block fills some dicts
            read[path] = given, {key: dict(value) if key in FILLED else value for key, value in named.items()}

        return lesson.teacher.get_submodule(path).register_forward_pre_hook(hook, with_kwargs=True)

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
