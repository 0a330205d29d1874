"""How parallel training splits a parameter: by the plan of its block, or as the matrix that it adapts."""

from __future__ import annotations

from collections.abc import Mapping

from blockwright.blocks.base import Placement
from blockwright.blocks.lora import A, B, is_adapter


def placement(name: str, plans: Mapping[str, Placement]) -> Placement:
    """The placement of a parameter.

    An adapter's A [r,in] is split with a matrix's inputs, its B [out,r] with the outputs.

    Args:
        name: of the parameter
        plans: of all blocks (``parallel_plan``), by the names of parameters
    """
    if not is_adapter(name):
        return plans.get(name, "replicate")
    outputs = name.endswith(B)
    whole = plans.get(name.removesuffix(B if outputs else A), "replicate")
    return whole if whole == "expert" or whole == ("column" if outputs else "row") else "replicate"
