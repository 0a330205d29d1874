from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from blockwright.blocks.ffn import MoE, SwiGLU
from blockwright.blocks.gating.base import LinearGating
from blockwright.plugins.surgery.transplant.base import Setting, Transplanted
from blockwright.plugins.surgery.transplant.upcycle import Upcycle, sum_of_weights, width
from blockwright.registry import BlockError, register


@register("transplant", "virtual_groups")
class VirtualGroups(Upcycle):
    """Fine-grained experts: the dense block is cut into G shards, each copied E/G times.

    He et al. 2024, arXiv 2410.07524: the G shards of one copy are a virtual group with one row of the router, so that
    they are chosen together, and top_k is a multiple of G. Then Σ w shard(x) = s/G · dense(x), with s the sum of a
    token's weights, and the outputs are multiplied by G/s. Exact if s is the same for all tokens. Expert c·G + i is
    shard i of copy c.
    """

    example: ClassVar[tuple[Mapping[str, Any], Mapping[str, Any]]] = (
        {},
        {
            "ffn": {"name": "moe", "n_experts": 8},
            "experts": {"name": "swiglu", "d_ff": 24},
            "gating": {"name": "topk_softmax", "top_k": 2},
        },
    )

    def suits(self, old: SwiGLU, new: MoE) -> bool:
        F, f = old.down.in_features, width(new.experts)
        groups, rest = divmod(F, f)
        return new.shared is None and groups > 1 and not rest and isinstance(new.gating, LinearGating)

    def __call__(self, old: nn.Module, new: nn.Module, setting: Setting) -> Transplanted:
        assert isinstance(old, SwiGLU) and isinstance(new, MoE) and isinstance(new.gating, LinearGating)
        gate, G = new.gating, old.down.in_features // width(new.experts)
        if gate.n_experts % G or gate.top_k % G:
            rule = f"and top_k must be multiples of the {G} shards that the dense block is cut into"
            remedy = f"Write n_experts={G * max(1, gate.n_experts // G)} and top_k={G * max(1, gate.top_k // G)}"
            raise BlockError("n_experts", f"{gate.n_experts}, top_k {gate.top_k}", rule, remedy)
        copies = gate.n_experts // G
        parts = [w.chunk(G, dim) for w, dim in ((old.gate.weight, 0), (old.up.weight, 0), (old.down.weight, 1))]
        gate_up = torch.stack([torch.cat(pair) for pair in zip(parts[0], parts[1], strict=True)])
        router = gate.weight.detach()[:copies].repeat_interleave(G, 0)
        tensors: dict[str, Tensor] = {"gating.weight": router, "experts.gate_up": gate_up.repeat(copies, 1, 1)}
        with torch.no_grad():
            gate.weight.copy_(router)
        total, same = sum_of_weights(gate, old.down.out_features, setting.seed)
        tensors["experts.down"] = torch.stack(parts[2]).repeat(copies, 1, 1) * (G / total)
        note = f"{copies} copies of {G} shards" + ("" if same else "; the weights of a token's experts vary in sum")
        copied = frozenset(tensors) - {"gating.weight"}
        return Transplanted(tensors, copied, same, note, drawn=router.numel())
