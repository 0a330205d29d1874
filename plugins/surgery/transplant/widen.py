from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from blockwright.blocks.attention.grouped import GroupedAttention
from blockwright.blocks.experts import Experts
from blockwright.blocks.ffn import FFN
from blockwright.blocks.norm import Norm
from blockwright.blocks.residual.base import Residual
from blockwright.plugins.surgery.transplant.base import Setting, Transplant, Transplanted, shapes
from blockwright.registry import register

WIDENED = (GroupedAttention, FFN, Norm, Residual, nn.Embedding, nn.Linear)


@register("transplant", "widen")
class Widen(Transplant):
    """A block → the same block of a model n times as wide.

    Samragh et al. 2024 (HyperCloning), arXiv 2409.12903: the residual stream is n copies of the narrow one; matrices
    are repeated n times in both directions and divided by n, vectors and embeddings are repeated, and there are n times
    as many heads. Exact: every copy computes what the narrow block did. Heads keep their width. For dense
    models of ``mha``, ``gqa`` or ``mqa``: repeated parts of one projection (MLA's latents, gated expert stacks) would
    not stay in order.
    """

    handles: ClassVar[tuple[str, ...]] = ("n_kv_heads",)
    example: ClassVar[tuple[Mapping[str, Any], Mapping[str, Any]]] = (
        {},
        {
            "d_model": 64,
            "attention": {"name": "gqa", "n_heads": 8, "n_kv_heads": 4},
            "ffn": {"name": "swiglu", "d_ff": 96},
        },
    )

    def serves(self, old: nn.Module, new: nn.Module) -> bool:
        if type(old) is not type(new) or not isinstance(old, WIDENED):
            return False
        stacks = any(isinstance(m, Experts) for m in new.modules())
        return not stacks and _ratio(old, new) > 1 and _heads(old) == _heads(new)

    def __call__(self, old: nn.Module, new: nn.Module, setting: Setting) -> Transplanted:
        wanted, tensors = shapes(new), {}
        shrinks = {f"{name}.weight".lstrip(".") for name, m in new.named_modules() if isinstance(m, nn.Linear)}
        for name, tensor in old.state_dict().items():
            times = [here // there for there, here in zip(tensor.shape, wanted[name], strict=True)]
            tensors[name] = _repeated(tensor, times) / (times[-1] if name in shrinks else 1)
        return Transplanted(tensors, frozenset(tensors), exact=True, note=f"{_ratio(old, new)} copies side by side")


def _heads(block: nn.Module) -> tuple[int, int] | None:
    """Width of a head, and how many query heads share one of keys; None for no attention."""
    if not isinstance(block, GroupedAttention):
        return None
    return block.head_dim, block.query.out_features // block.head_dim // block.n_kv_heads


def _repeated(tensor: Tensor, times: list[int]) -> Tensor:
    return tensor.repeat(times) if tensor.ndim else torch.clone(tensor)


def _ratio(old: nn.Module, new: nn.Module) -> int:
    """How many times wider the new block is; 0 if that is no whole number, or differs between its tensors."""
    there, here = shapes(old), shapes(new)
    if there.keys() != here.keys():
        return 0
    found = set()
    for name, shape in there.items():
        if len(shape) != len(here[name]) or any(b % a for a, b in zip(shape, here[name], strict=True)):
            return 0
        found |= {b // a for a, b in zip(shape, here[name], strict=True)} - {1}
    return next(iter(found)) if len(found) == 1 else 0
