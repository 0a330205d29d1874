"""What a block says of itself in a picture (lab/drawing), beyond its signature and its children."""

from __future__ import annotations

from typing import NamedTuple


class Drawn(NamedTuple):
    """The drawing of a block. All that is left out follows from its signature.

    lines: its label, a few words each, with numbers of the block that was built; None: its parameters, as in YAML
    acts: what it acts on in the block around it, such as ``queries, keys``, ``scores`` or ``output``: a child that acts
        on one of ``ORDER`` is drawn in that order. "": its parameter says so
    hides: parameters that the label leaves out
    shows: parameters that the label has, default or not
    chosen: of how many equal parts a token uses how many: (6, 160)
    """

    lines: tuple[str, ...] | None = None
    acts: str = ""
    hides: tuple[str, ...] = ()
    shows: tuple[str, ...] = ()
    chosen: tuple[int, int] | None = None


# What children act on, in the order in which an attention computes; any other is drawn before them.
ORDER = ("queries", "keys", "values", "queries, keys", "state", "keys seen", "scores", "output", "training")


def number(value: int) -> str:
    """A width or a count in a label: 12,288."""
    return f"{value:,}"
