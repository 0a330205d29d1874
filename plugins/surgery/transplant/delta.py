from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from blockwright.blocks.attention.gated_delta import CONVOLVED, GatedDelta
from blockwright.blocks.attention.grouped import GroupedAttention
from blockwright.plugins.surgery.transplant.base import Setting, Transplant, Transplanted
from blockwright.plugins.surgery.transplant.heads import regrouped
from blockwright.registry import BlockError, register


@register("transplant", "delta")
class Delta(Transplant):
    """Softmax attention → a delta-rule mixer (mha|gqa → gated_delta|kda), a start for aligning layers.

    As in Zhang et al. 2024 (LoLCATs), arXiv 2410.10254, and Goldstein et al. 2025 (RADLADS), arXiv 2505.03005: query,
    key, value and output projections are copied; heads are repeated or averaged where their numbers differ.
    Convolutions see the current token only. Decay, strength and output gate are drawn. Never exact: recover it with
    ``task=distill``, layers first.
    """

    handles: ClassVar[tuple[str, ...]] = (
        *("name", "head_dim", "n_kv_heads", "position", "scale", "window", "values", "selector", "scores", "qk_norm"),
        *("v_head_dim", "shared_by", "reach", "query_conv", "key_conv", "value_conv", "strength", "decay", "norm"),
        "output_gate",
    )
    example: ClassVar[tuple[Mapping[str, Any], Mapping[str, Any]]] = (
        {},
        {"attention": {"name": "kda", "n_heads": 4, "head_dim": 8}},
    )

    def serves(self, old: nn.Module, new: nn.Module) -> bool:
        both = isinstance(old, GroupedAttention) and isinstance(new, GatedDelta)
        return both and old.readout is None and old.output.out_features == new.output.out_features

    def __call__(self, old: nn.Module, new: nn.Module, setting: Setting) -> Transplanted:
        assert isinstance(old, GroupedAttention) and isinstance(new, GatedDelta)
        H, N = old.head_dim, old.query.out_features // old.head_dim
        heads = {"query": N, "key": old.n_kv_heads, "value": old.n_kv_heads}
        if (new.head_dim, new.v_head_dim) != (H, H) or new.value.out_features != N * H:
            rule = f"must be those of the {N} heads of width {H} whose weights are copied"
            remedy = f"Write n_heads={N} and head_dim={H}, and leave v_head_dim out"
            raise BlockError("head_dim", (new.head_dim, new.v_head_dim), rule, remedy)
        tensors = {"output.weight": old.output.weight}
        for name in CONVOLVED:
            rows = getattr(new, name).out_features // H
            theirs = getattr(old, name).weight.unflatten(0, (heads[name], H))
            if rows % heads[name] and heads[name] % rows:
                rule = f"must be a multiple or a divisor of the {heads[name]} heads there"
                raise BlockError("n_key_heads", rows, rule, "Leave it out")
            tensors[f"{name}.weight"] = regrouped(theirs, rows).flatten(0, 1)
            conv = torch.zeros_like(getattr(new, f"{name}_conv").weight)
            conv[:, -1] = 1.0
            tensors[f"{name}_conv.weight"] = conv
        copied = frozenset(name for name in tensors if "conv" not in name)
        return Transplanted(tensors, copied, exact=False, note="projections copied; decay, strength and gate drawn")
