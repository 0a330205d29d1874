"""Measure a skill: the share of answers that are right at each difficulty, and what the model remembers meanwhile."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from blockwright.blocks.cost import cache_bytes
from blockwright.blocks.decoder import Decoder
from blockwright.blocks.kernels.cross_entropy import IGNORED
from blockwright.lab.statistics.intervals import wilson
from blockwright.plugins.skills.rows import framed
from blockwright.plugins.skills.skill.base import Ints, Skill, name_of
from blockwright.registry.folder import write_json

FILE = "skills.json"  # of a run
SEED = 1  # of the measured rows: the same for every model, and no rows of training
BATCH_TOKENS = 2**13


@dataclass(frozen=True)
class Level:
    """What was found at one difficulty.

    Args:
        difficulty: in the unit of the skill
        length: tokens of a row
        rows, answers: measured
        right: answers that are the likeliest token, given the right ones before
        solved: rows all of whose answers are right
        nats: mean loss of an answer
        chance: share of answers that are right without attention
        floor: share that a guess among the answers of the row has right
        state_bytes: of the caches at this length, in fp32; None if the model cannot decode by cache
        bits: that weights must hold to answer everything; None if rows hold all that is asked
    """

    difficulty: int
    length: int
    rows: int
    answers: int
    right: int
    solved: int
    nats: float
    chance: float
    floor: float
    state_bytes: int | None = None
    bits: float | None = None

    @property
    def accuracy(self) -> float:
        return self.right / self.answers

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of the accuracy, by rows: answers of one row are not independent."""
        centre, half = wilson(self.accuracy, self.rows)
        return max(0.0, centre - half), min(1.0, centre + half)

    def learned_bits(self) -> float | None:
        """Bits that the weights hold: of all that there are, the share by which the loss is below a blind guess."""
        if self.bits is None:
            return None
        each = self.bits / self.difficulty
        return self.difficulty * max(0.0, each - self.nats / math.log(2))


@dataclass(frozen=True)
class Measured:
    """A skill of a model.

    Args:
        skill: its name
        unit: of the difficulty
        trained: the hardest difficulty of training
        levels: by difficulty, ascending
        parameters: of the model
    """

    skill: str
    unit: str
    trained: int
    levels: tuple[Level, ...] = field(default=())
    parameters: int = 0

    @property
    def at_trained(self) -> Level:
        """The level of training, or the hardest below it that was measured."""
        return next((level for level in reversed(self.levels) if level.difficulty <= self.trained), self.levels[0])

    def to_plain(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> Measured:
        """From the contents of a file, which may be untrusted.

        Raises:
            ValueError, TypeError, KeyError: they are no such thing
        """
        levels = tuple(_level(each) for each in plain["levels"])
        if not levels or not all(
            0 <= level.right <= level.answers and level.answers and level.difficulty and level.rows for level in levels
        ):
            raise ValueError("levels without answers, or more right ones than answers")
        names = [str(plain[key])[:40] for key in ("skill", "unit")]
        return cls(names[0], names[1], int(plain["trained"]), levels, int(plain["parameters"]))


def _level(plain: Mapping[str, Any]) -> Level:
    whole = {key: int(plain[key]) for key in ("difficulty", "length", "rows", "answers", "right", "solved")}
    state, bits = plain["state_bytes"], plain["bits"]
    return Level(
        **whole,
        nats=float(plain["nats"]),
        chance=float(plain["chance"]),
        floor=float(plain["floor"]),
        state_bytes=None if state is None else int(state),
        bits=None if bits is None else float(bits),
    )


def measure(
    decoder: Decoder,
    skill: Skill,
    place: int,
    ids: Ints,
    samples: int,
    difficulties: Sequence[int] | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> Measured:
    """Measure one skill of a decoder, in evaluation mode.

    Args:
        decoder: in evaluation mode
        skill: that is asked for
        place: of the skill in the list of the run: what its rows are marked with
        ids: of the symbols
        samples: rows of each difficulty
        difficulties: measured ones; None for those of training
        tell: is given a line after each difficulty
    """
    levels = []
    for difficulty in difficulties or skill.levels:
        levels.append(_measured(decoder, skill, place, ids, samples, difficulty))
        tell(f"{name_of(skill)} at {difficulty:,} {skill.unit}: {levels[-1].accuracy:.3f}")
    parameters = sum(parameter.numel() for parameter in decoder.parameters())
    return Measured(name_of(skill), skill.unit, skill.difficulty, tuple(levels), parameters)


def _measured(decoder: Decoder, skill: Skill, place: int, ids: Ints, samples: int, difficulty: int) -> Level:
    length = skill.length(difficulty)
    asked = skill.generate(SEED, difficulty, samples)
    tokens, targets = map(torch.from_numpy, framed(asked.symbols, asked.scored, place, ids, length))
    right, answers, nats = _scores(decoder, tokens, targets)
    return Level(
        difficulty,
        length,
        samples,
        int(answers.sum()),
        int(right.sum()),
        int((right == answers).sum()),
        nats / int(answers.sum()),
        skill.chance(difficulty),
        skill.floor(difficulty),
        _state_bytes(decoder, length),
        skill.bits(difficulty),
    )


@torch.no_grad()
def _scores(decoder: Decoder, tokens: torch.Tensor, targets: torch.Tensor) -> tuple[Any, Any, float]:
    """Right answers and answers of each row [n], and the summed loss of all, in nats."""
    right, nats = [], 0.0
    device = decoder.embedding.weight.device
    rows = max(1, BATCH_TOKENS // tokens.shape[1])
    for given, wanted in zip(tokens.split(rows), targets.split(rows), strict=True):
        scored = (wanted != IGNORED).to(device)
        logits = decoder.logits(decoder.hidden(given.to(device))[0][scored]).float()
        answers = wanted.to(device)[scored]
        nats += float(F.cross_entropy(logits, answers, reduction="sum"))
        hits = torch.zeros_like(scored)
        hits[scored] = logits.argmax(-1) == answers
        right.append(hits.sum(1).cpu())
    return torch.cat(right), (targets != IGNORED).sum(1), nats


def _state_bytes(decoder: Decoder, length: int) -> int | None:
    try:
        return cache_bytes(decoder, length, torch.float32)
    except NotImplementedError:
        return None


def write(directory: Path, found: list[Measured]) -> Path:
    """Write ``skills.json``."""
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / FILE, {"skills": [each.to_plain() for each in found]})
    return directory / FILE
