"""The data module of skills, ``data=skills``: questions made without end, of one skill or of several in turn."""

from __future__ import annotations

from typing import Any

from blockwright.plugins.skills.rows import Mixed, SkillRows, ids_of
from blockwright.plugins.skills.skill.base import MARKS, SYMBOLS, Skill, name_of
from blockwright.registry import register
from blockwright.registry.errors import ConfigError
from blockwright.registry.ranges import Count
from blockwright.training.data.corpus import Split
from blockwright.training.data.modules.batches import Feeding
from blockwright.training.data.modules.fresh import FreshRowDataModule


@register("data", "skills")
class SkillsDataModule(FreshRowDataModule):
    """Rows of questions, of which the answers alone are scored. Nothing is read, and no row is served twice.

    Several skills take turns, a row each, and a row begins with a mark of its skill. A row has one of the levels of
    its skill, drawn evenly: the hardest difficulty, its half, its quarter, …

    Args:
        feeding: how rows are made into batches; the tokenizer has an id for each symbol
        skill: of the rows, or several
        held_out: rows of val and of test
    """

    def __init__(self, feeding: Feeding, skill: list[Skill], held_out: Count = 256) -> None:
        super().__init__(feeding, held_out)
        self.skills = skill
        self._check_skills()
        if (unequal := len(ids_of(self.tokenizer))) != SYMBOLS:
            rule = f"makes {unequal} tokens of the {SYMBOLS} symbols of skills, and each must be one"
            remedy = f"Write data/tokenizer=chars data.tokenizer.vocab_size={SYMBOLS + 2}, or data/tokenizer=bytes"
            raise ConfigError("data.tokenizer", self.tokenizer.kind, rule, remedy)

    def _check_skills(self) -> None:
        names = [name_of(skill) for skill in self.skills]
        if not 1 <= len(names) <= len(MARKS):
            rule = f"must be 1 to {len(MARKS)} skills: each has a mark of its own"
            raise ConfigError("data.skill", names, rule, "Write data.skill=[recall,depth]")
        if twice := [name for i, name in enumerate(names) if name in names[:i]]:
            raise ConfigError("data.skill", twice[0], "is named twice", "Name each skill once")
        for name, skill in zip(names, self.skills, strict=True):
            if (needed := max(map(skill.length, skill.levels))) > self.sequence_length:
                rule = f"needs rows of {needed} tokens at {skill.difficulty} {skill.unit}"
                of = f"{rule} (data.sequence_length = {self.sequence_length})"
                remedy = f"Set data.sequence_length={needed}, or lower the difficulty"
                raise ConfigError("data.skill", name, of, remedy)

    def _rows(self, split: Split) -> SkillRows:
        return SkillRows(Mixed(self.skills, ids_of(self.tokenizer), self.sequence_length, self.seed), split)

    def _made_by(self) -> dict[str, Any]:
        return {f"skill.{name_of(skill)}": dict(vars(skill)) for skill in self.skills}
