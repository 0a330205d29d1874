"""A control: a comparison whose outcome is known, read from conf/control.

A plug-in offers a package folder of controls through the entry-point group ``blockwright.controls``. A control is data.
Its overrides use Hydra's grammar, as in blockwright train.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

from blockwright.lab.ablation.definition import Overrides
from blockwright.lab.definitions import Files
from blockwright.registry import BlockError
from blockwright.registry.ranges import NonNegative, Seed
from blockwright.registry.reading import Remedy, keys
from blockwright.registry.reading import read as read_settings
from blockwright.training.configuration.conf import CONF

ENTRY_POINTS = "blockwright.controls"
METRIC = "val/loss"
Expect = Literal["worse", "better", "absent", "identical"]
Seeds = Annotated[tuple[Seed, ...], Remedy("Write seeds: [0, 1, 2, 3]")]


@dataclass(frozen=True)
class Control:
    """Two arms, and how the loss of the second is known to differ from that of the first.

    Args:
        name: of the file
        about: the known effect, in one line
        expect: ``worse`` or ``better``: the arm differs in this direction; ``absent``: both are draws of one
            distribution; ``identical``: both compute the same, bit for bit
        base: overrides common to both arms
        baseline, arm: overrides of each, after ``base``
        least: nats by which ``worse`` and ``better`` must differ; about half of what was measured, so that a machine
            that rounds otherwise passes, and an effect that is nearly gone does not
        seeds: a run of each arm per seed
        other_seeds: those of the arm, if they are not those of the baseline
    """

    name: str
    about: str
    expect: Expect
    base: Overrides = ()
    baseline: Overrides = ()
    arm: Overrides = ()
    least: NonNegative = 0.0
    seeds: Seeds = (0, 1, 2, 3, 4, 5)
    other_seeds: Seeds | None = None

    def __post_init__(self) -> None:
        needed = 1 if self.expect == "identical" else 2
        if len(set(self.seeds)) < max(needed, len(self.seeds)):
            rule = f"must list at least {needed} different seeds: an interval takes two"
            raise BlockError("seeds", list(self.seeds), rule, "Write seeds: [0, 1, 2, 3]")
        if self.other_seeds is not None and len(self.other_seeds) != len(self.seeds):
            rule = f"must be as many as seeds ({len(self.seeds)}), since runs are compared in pairs"
            raise BlockError("other_seeds", list(self.other_seeds), rule, "Write one for each")
        if self.least and not self.is_effect:
            raise BlockError("least", self.least, f"is of an effect, and {self.expect} expects none", "Leave it out")

    @property
    def is_effect(self) -> bool:
        """Whether it expects a difference."""
        return self.expect in ("worse", "better")

    def pairs(self) -> Iterator[tuple[tuple[str, ...], tuple[str, ...]]]:
        """The overrides of each pair of runs: of the baseline, and of the arm."""
        for seed, other in zip(self.seeds, self.other_seeds or self.seeds, strict=True):
            yield (*self.base, *self.baseline, f"seed={seed}"), (*self.base, *self.arm, f"seed={other}")


FILES = Files("control", CONF / "control", ENTRY_POINTS, tuple(key for key in keys(Control) if key != "name"), "--only")


def read(name: str) -> Control:
    """Read a control by its name.

    Raises:
        ConfigError: there is none, two have the name, or it is invalid
    """
    return read_settings(Control, {**FILES.read(name), "name": name}, f"control.{name}")
