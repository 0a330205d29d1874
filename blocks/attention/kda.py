from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from blockwright.blocks.attention.gated_delta import GatedDelta
from blockwright.registry import register


@register("attention", "kda", fixes={"n_key_heads": None})
class KDA(GatedDelta):
    """Kimi Delta Attention: the gated delta rule with a decay for each channel of the keys.

    Kimi Linear, arXiv 2510.26692. It is ``gated_delta`` with the children ``decay: channel`` and
    ``output_gate: low_rank`` as defaults, and as many heads of keys as of values.
    """

    default_children: ClassVar[Mapping[str, Any]] = {"decay": {"name": "channel"}, "output_gate": {"name": "low_rank"}}
