from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from blockwright.blocks.gating.base import Routing
from blockwright.registry import register
from blockwright.registry.ranges import Positive
from blockwright.training.objectives.teaching.base import Lesson, Teaching


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
            wanted = (lesson.teacher(*lesson.given).float() / self.temperature).log_softmax(-1)
        hidden, routings = lesson.student.hidden(*lesson.given)
        found = (lesson.student.logits(hidden).float() / self.temperature).log_softmax(-1)
        return self.temperature**2 * (wanted.exp() * (wanted - found)).sum(-1), routings
