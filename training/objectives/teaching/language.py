from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F

from blockwright.blocks.gating.base import Routing
from blockwright.registry import register
from blockwright.training.objectives.teaching.base import Lesson, Teaching


@register("teaching", "language")
class Language(Teaching):
    """The next token, as without a teacher: −log p(target)."""

    def __call__(self, lesson: Lesson) -> tuple[Tensor, Sequence[Routing | None]]:
        hidden, routings = lesson.student.hidden(*lesson.given)
        logits = lesson.student.logits(hidden).float()
        return F.cross_entropy(logits.mT, lesson.targets, reduction="none"), routings
