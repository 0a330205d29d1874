"""The ledger of a surgery: what each operator did, what it claims, and how far it moved the logits.

A measurement on random tokens (probing.py) checks each claim of an operator. Exact is what is claimed *and*
measured to be within ``TOLERANCE``: tokens alone would miss what they do not reach, such as a bound on large values. A
claim that the measurement does not bear out is an error of the operator, with the place and the settings that differ.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from blockwright.blocks.decoder import Decoder
from blockwright.plugins.surgery.growth import Growth
from blockwright.plugins.surgery.probing import Batch, distance, grown, mixed, random_batches, read
from blockwright.plugins.surgery.transplant.base import shown

TOLERANCE = 1e-4  # largest difference of a logit over the largest logit; rounding in fp32 stays a hundred times below
TOGETHER = "all together"
DEPTH = "layers"  # path of an operation that changes the depth


@dataclass(frozen=True)
class Operation:
    """What was done in one place.

    Args:
        path: of the block in the new decoder: ``layers.3.attention``
        name: of the operator
        claimed: whether the operator says that the block computes what the old one did
        note: in a few words
        copied, derived, drawn: parameters
        settings: in which the blocks differ: path → old and new value
    """

    path: str
    name: str
    claimed: bool
    note: str = ""
    copied: int = 0
    derived: int = 0
    drawn: int = 0
    settings: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Line:
    """One operator, with its operations that make the same claim.

    Args:
        operator: its name
        operations: what it did
        difference: of the logits, with these operations alone (plugins/surgery/probing.py); None if not measured
        reason: why that could not be measured
        place: of the first operation that is measured otherwise than claimed; None if none alone is
    """

    operator: str
    operations: tuple[Operation, ...]
    difference: float | None = None
    reason: str = ""
    place: Operation | None = None

    @property
    def claimed(self) -> bool:
        return all(operation.claimed for operation in self.operations)

    @property
    def exact(self) -> bool:
        """Whether the model computes the same: claimed, and measured."""
        return self.claimed and self.difference is not None and self.difference <= TOLERANCE

    @property
    def refuted(self) -> bool:
        """Whether the measurement does not bear out the claim."""
        return self.claimed and self.difference is not None and self.difference > TOLERANCE

    @property
    def note(self) -> str:
        """Of the first operation that has one, and why it was not measured."""
        of_operation = "" if self.operator == TOGETHER else next((o.note for o in self.operations if o.note), "")
        return "; ".join(note for note in (of_operation, self.reason) if note)

    def __str__(self) -> str:
        """In one line, as a run logs it."""
        if self.difference is None:
            found = "not measured"
        else:
            found = f"{'exact' if self.exact else 'not exact'}, logits within {self.difference:.2g} of their scale"
        return f"{self.operator}: {found}" + (f" ({self.note})" if self.note else "")

    @property
    def error(self) -> str:
        """What is wrong with a claim that the measurement refutes."""
        where = f"{self.place.path} computes" if self.place else "its blocks compute"
        differs = shown(
            {k: v for o in ((self.place,) if self.place else self.operations) for k, v in o.settings.items()}
        )
        found = f"the logits differ by {self.difference:.2g} of their scale, above {TOLERANCE:g}"
        settings = f"settings that differ: {differs or 'none that a block stores'}"
        return f"{self.operator} claims that {where} the same, but {found}; {settings}"


@dataclass(frozen=True)
class Ledger:
    """Everything that a surgery did.

    Args:
        lines: one for each operator and claim
        together: all of them
        tokens: of the random text that was measured on; 0 if nothing was
    """

    lines: tuple[Line, ...]
    together: Line
    tokens: int

    @property
    def operations(self) -> tuple[Operation, ...]:
        return self.together.operations

    @property
    def exact(self) -> bool:
        """Whether the new model computes what the old one does."""
        return self.together.exact and all(line.exact or line.difference is None for line in self.lines)

    def report(self) -> list[str]:
        """A sentence for each line, and for each error."""
        return [*map(str, (*self.lines, self.together)), *(f"error of an operator: {error}" for error in self.errors)]

    @property
    def errors(self) -> list[str]:
        """What operators claim, and a measurement refutes."""
        return [line.error for line in (*self.lines, self.together) if line.refuted]


def measured(old: Decoder, new: Decoder, growth: Growth, done: Sequence[Operation]) -> Ledger:
    """Hold every claim to the logits on random tokens.

    Args:
        old, new: before and after the surgery
        growth: the one that it used
        done: what was done
    """
    names = sorted(dict.fromkeys(operation.name for operation in done), key=lambda name: name == "copy")
    # Old, new, the old one at the new depth, and each operator alone, in at most three groups.
    # The largest whole number among settings that differ, such as a window: longer sequences may show it
    values = (value for operation in done for pair in operation.settings.values() for value in pair)
    reach = max((value for value in values if type(value) is int), default=0)
    batches = random_batches(old, new, 3 * len(names) + 3, reach)
    apart = _Apart(old, grown(old, len(new.layers), growth), new, batches)
    together = Line(TOGETHER, tuple(done), distance(apart.before, read(new, batches)))
    lines = [line for name in names for line in _lines(name, [o for o in done if o.name == name], apart)]
    return Ledger(tuple(lines), together, sum(batch.tokens.numel() for batch in batches))


class _Apart:
    """What operations do to the logits, each without the others.

    Args:
        old, base, new: before the surgery, at the new depth but otherwise as before, and after it
        batches: what they read
    """

    def __init__(self, old: Decoder, base: Decoder, new: Decoder, batches: list[Batch]) -> None:
        self.base, self.new, self.batches = base, new, batches
        self.before = read(old, batches)
        self.at_depth = self.before if base is old else read(base, batches)

    def line(self, name: str, group: Sequence[Operation]) -> Line:
        """What these operations of an operator do; not measured where the others cannot be left out, as half of the
        streams."""
        line = Line(name, tuple(group))
        if any(operation.path == DEPTH for operation in group):
            return replace(line, difference=distance(self.before, self.at_depth))
        try:
            alone = mixed(self.base, self.new, [operation.path for operation in group])
            return replace(line, difference=distance(self.at_depth, read(alone, self.batches)))
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, LookupError) as error:
            # Old and new have been read, so each block works: only their shapes do not fit one another.
            found = (str(error).splitlines() or [type(error).__name__])[0]
            return replace(line, reason=f"cannot be done without the others ({found})")


def _lines(name: str, ours: Sequence[Operation], apart: _Apart) -> list[Line]:
    """The operations of one operator by their claims, or in one line where they cannot be separated."""
    groups = [[o for o in ours if o.claimed is claimed] for claimed in (True, False)]
    found = [_line(name, group, apart) for group in groups if group]
    if len(found) == 2 and any(line.difference is None for line in found):
        return [_line(name, ours, apart)]
    return found


def _line(name: str, group: Sequence[Operation], apart: _Apart) -> Line:
    line = apart.line(name, group)
    return replace(line, place=_place(line, apart)) if line.refuted else line


def _place(line: Line, apart: _Apart) -> Operation | None:
    """The first operation of a refuted line that is refuted alone, found by halves: each would take too long."""
    ours = line.operations
    if len(ours) == 1:
        return ours[0]
    middle = len(ours) // 2
    halves = (apart.line(line.operator, half) for half in (ours[:middle], ours[middle:]))
    half = next((half for half in halves if half.refuted), None)
    return None if half is None else _place(half, apart)
