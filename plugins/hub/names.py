"""Tables of parameter names: which part of our tensor equals which view of theirs.

A row maps a *part* of our tensor to a *view* of theirs. Both are views without a copy, so one row fills our tensor on
import and theirs on export, and a round trip is bit-exact.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from torch import Tensor

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Form:
    """Layout of one of their tensors.

    Args:
        view: brings theirs into our order, without copying
        shape: shape of our part → shape of their tensor
    """

    view: Callable[[Tensor], Tensor]
    shape: Callable[[Shape], Shape]


@dataclass(frozen=True)
class Row:
    """One row of a table of names.

    Placeholders: ``{i}`` a layer, ``{n+i}`` the i-th layer after the last one, ``{i/2}`` and ``{i%2}`` where one of
    their layers is two of ours, ``{e}`` an expert, ``{name}`` any name;
    a final ``*`` is ``weight`` or ``bias``, the same on both sides.

    Args:
        ours: pattern of our names
        theirs: pattern of theirs; empty for training state that only we keep, which starts at 0
        part: selects the part of our tensor, given the tensor and the expert
        form: layout of their tensor
        copy_of: theirs repeats this tensor of ours, once for every tensor that ``ours`` matches; the copy must be equal
            to it, and may be missing
        constant: theirs holds this number, once for every tensor that ``ours`` matches: our block has it in its code
        beside: another of our names, which this layer must have too; not have, if it begins with ``!``
        also: another pattern of theirs that is read where the first is missing; it is never written
    """

    ours: str
    theirs: str
    part: Callable[[Tensor, int], Tensor] = lambda tensor, expert: tensor
    form: Form = Form(lambda tensor: tensor, lambda shape: shape)
    copy_of: str = ""
    constant: float | None = None
    also: str = ""
    beside: str = ""

    @property
    def stores(self) -> bool:
        """Whether theirs has content that ours is made of, and not only repeats or fixes something."""
        return not self.copy_of and self.constant is None


@dataclass(frozen=True)
class Link:
    """A row applied: one tensor of theirs and (a part of) one of ours."""

    theirs: str
    ours: str
    row: Row
    expert: int
    also: str = ""

    def part(self, ours: Tensor) -> Tensor:
        """The part of our tensor, a view; the row's constant, if it has one."""
        if self.row.constant is not None:
            return ours.new_full((), self.row.constant)
        return self.row.part(ours, self.expert)

    def shape(self, ours: Tensor) -> Shape:
        """The shape that their tensor must have."""
        return tuple(self.row.form.shape(tuple(self.part(ours).shape)))


def links(rows: Sequence[Row], ours: Mapping[str, Tensor], n_layers: int) -> Iterator[Link]:
    """Every pair of tensors, in our order.

    Args:
        rows: the table
        ours: our tensors by name; may be on the meta device
        n_layers: depth of the decoder

    Raises:
        LookupError: a tensor of ours has no counterpart
    """
    for name, tensor in ours.items():
        found = False
        for row in rows:
            match = _pattern(row.ours).fullmatch(name)
            if match is None or not _applies(row, match.groupdict(), ours):
                continue
            found = found or row.stores
            # How many of their tensors make up one of ours
            for expert in range(tensor.shape[0] if "{e}" in row.theirs else len(row.theirs[:1])):
                theirs, also = (_spell(text, match.groupdict(), n_layers, expert) for text in (row.theirs, row.also))
                yield Link(theirs, row.copy_of or name, row, expert, also)
        if not found:
            raise LookupError(name)


def _applies(row: Row, found: Mapping[str, str], ours: Mapping[str, Tensor]) -> bool:
    """Whether the layer of this tensor has, or has not, what the row asks for."""
    wanted = _spell(row.beside.removeprefix("!"), found, 0, 0)
    return not row.beside or (wanted in ours) != row.beside.startswith("!")


@lru_cache
def _pattern(ours: str) -> re.Pattern[str]:
    text = re.escape(ours).replace(r"\{i\}", r"(?P<i>\d+)").replace(r"\*", "(?P<leaf>weight|bias)")
    return re.compile(text.replace(r"\{name\}", "(?P<name>.+)"))


def _spell(theirs: str, found: Mapping[str, str], n_layers: int, expert: int) -> str:
    i = int(found.get("i", 0))
    name = theirs.replace("{i}", str(i)).replace("{n+i}", str(n_layers + i)).replace("{e}", str(expert))
    name = name.replace("{i/2}", str(i // 2)).replace("{i%2}", str(i % 2))
    return name.replace("*", found.get("leaf", "")).replace("{name}", found.get("name", ""))


def one_expert(ours: Tensor, expert: int) -> Tensor:
    """[E,…] → […] of one expert."""
    return ours[expert]


def expert_gate(ours: Tensor, expert: int) -> Tensor:
    """[E,2F,D] → [F,D], the gate of one expert: its first rows."""
    return ours[expert].chunk(2)[0]


def expert_up(ours: Tensor, expert: int) -> Tensor:
    """[E,2F,D] → [F,D], the up-projection of one expert: its last rows."""
    return ours[expert].chunk(2)[1]


TRANSPOSED = Form(lambda theirs: theirs.mT if theirs.ndim > 1 else theirs, lambda shape: (*shape[:-2], *shape[:-3:-1]))


UNBATCHED = Form(lambda theirs: theirs[0], lambda shape: (1, *shape))
PATCHES = Form(lambda theirs: theirs.flatten(1), lambda shape: (shape[0], 3, *[math.isqrt(shape[1] // 3)] * 2))


def one_of(parts: int, n: int) -> Form:
    """Ours is the n-th of ``parts`` that are fused along the outputs."""
    return Form(lambda theirs: theirs.chunk(parts)[n], lambda shape: (parts * shape[0], *shape[1:]))


def third(n: int) -> Form:
    """Ours is the n-th of three fused along the outputs of a transposed matrix, or of its bias."""
    return Form(lambda theirs: theirs.t().chunk(3)[n], lambda shape: (*shape[1:], 3 * shape[0]))


def block(widths: Sequence[int], n: int, groups: int = 1, taps: bool = False) -> dict[str, Any]:
    """``part`` and ``form`` of a row where ours is the n-th of several fused along the outputs, within each group.

    Args:
        widths: rows of each within a group
        n: which of them is ours
        groups: theirs repeats [first, second, …] for each
        taps: whether theirs is the weight of a convolution, [W,1,taps] where ours is [W,taps]
    """
    start, whole = sum(widths[:n]), sum(widths)

    def view(theirs: Tensor) -> Tensor:
        return (theirs[:, 0] if taps else theirs).unflatten(0, (groups, whole)).narrow(1, start, widths[n])

    def shape(ours: Shape) -> Shape:
        return (groups * whole, *((1,) if taps else ()), *ours[2:])

    return {"part": lambda tensor, expert: tensor.unflatten(0, (groups, -1)), "form": Form(view, shape)}


TAPS = Form(lambda theirs: theirs[:, 0], lambda shape: (shape[0], 1, shape[1]))  # of a convolution
BROADCAST = Form(lambda theirs: theirs[0, 0, :, 0], lambda shape: (1, 1, *shape, 1))  # a number for each head


def beside(name: str, rows: Iterable[Row]) -> tuple[Row, ...]:
    """The rows, applied only in layers that have a tensor of ours of this name, or have not (``!``)."""
    return tuple(replace(row, beside=name) for row in rows)
