from __future__ import annotations

from typing import ClassVar

from blockwright.blocks.attention.grouped import GroupedAttention
from blockwright.registry import register


@register("attention", "keys_as_values", fixes={"window": None, "value_bias": None})
class KeysAsValues(GroupedAttention):
    """Grouped-query attention with one projection for keys and values.

    Gemma 4's full layers (``attention_k_eq_v``): v_g = W_k,g x, and k_g = norm(v_g), rotated; the rest is ``gqa``. The
    cache holds both, 2·K·H numbers per token, since only keys are rotated. ``grouped_tied`` rotates a part beside, and
    caches once.
    """

    projects_values: ClassVar[bool] = False
