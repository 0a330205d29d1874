"""What a block says of itself in a picture (lab/drawing), beyond its signature and its children."""

from __future__ import annotations

from typing import NamedTuple


class Drawn(NamedTuple):
    """The drawing of a block.

    lines: its label, a short line each, with numbers of the block that was built; None: its parameters, as in YAML
    acts: what it acts on in the block around it: ``queries``, ``keys``, ``values``, ``scores``, ``state``, ``output``,
        several of them separated by commas; "" for a block that is a part of the flow itself
    """

    lines: tuple[str, ...] | None = None
    acts: str = ""
