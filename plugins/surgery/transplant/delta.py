from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from blockwright.blocks.attention.delta_rule import GatedDelta, GatedDelta2
from blockwright.blocks.attention.grouped import GroupedAttention
from blockwright.blocks.attention.recurrent import Recurrent
from blockwright.plugins.surgery.transplant.base import Setting, Transplant, Transplanted, shapes
from blockwright.plugins.surgery.transplant.heads import regrouped
from blockwright.registry import BlockError, register

COPIED = ("query", "key", "value", "output")


@register("transplant", "delta")
class Delta(Transplant):
    """Softmax attention → a recurrence with queries, keys and values, a start for aligning layers.

    As in Zhang et al. 2024 (LoLCATs), arXiv 2410.10254, and Goldstein et al. 2025 (RADLADS), arXiv 2505.03005: query,
    key, value and output projections are copied; heads are repeated or averaged where their numbers differ. Serves
    every recurrent mixer whose projections have these names: delta rules, ``rwkv7``, Mamba's, ``lightning``.
    Convolutions see the current token only. Decay, gates and all else are drawn. Never exact: recover it with
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
        if not isinstance(old, GroupedAttention) or old.value is None or old.readout is not None:
            return False
        projects = isinstance(new, Recurrent) and all(isinstance(getattr(new, m, None), nn.Linear) for m in COPIED)
        return projects and old.output.out_features == new.output.out_features  # type: ignore[union-attr]

    def __call__(self, old: nn.Module, new: nn.Module, setting: Setting) -> Transplanted:
        assert isinstance(old, GroupedAttention) and isinstance(new, Recurrent)
        H, N = old.head_dim, old.query.out_features // old.head_dim
        heads = {"query": N, "key": old.n_kv_heads, "value": old.n_kv_heads}
        state = new.memory()["state"]
        if state != (N, H, H):
            rule = f"must be those of the {N} heads of width {H} whose weights are copied"
            remedy = f"Write n_heads={N} and {H} for the widths of keys and of values"
            raise BlockError("head_dim", state, rule, remedy)
        tensors = {"output.weight": old.output.weight}
        convolutions = dict(new.named_children())
        for name, number in heads.items():
            project = new.get_submodule(name)
            assert isinstance(project, nn.Linear)
            rows = project.out_features // H
            theirs = getattr(old, name).weight.unflatten(0, (number, H))
            if rows % number and number % rows:
                rule = f"must be a multiple or a divisor of the {number} heads there"
                raise BlockError("n_key_heads", rows, rule, "Leave it out")
            tensors[f"{name}.weight"] = regrouped(theirs, rows).flatten(0, 1)
            if f"{name}_conv" in convolutions:
                conv = torch.zeros_like(convolutions[f"{name}_conv"].weight)  # type: ignore[arg-type]
                conv[:, -1] = 1.0
                tensors[f"{name}_conv.weight"] = conv
        copied = frozenset(name for name in tensors if "conv" not in name)
        return Transplanted(tensors, copied, exact=False, note="projections copied; decay and gates drawn")


STRENGTH, GATES = "strength.weight", {"erase.weight": "head_dim", "write.weight": "v_head_dim"}
DELTA = {"name": "kda", "n_heads": 4, "head_dim": 8}


@register("transplant", "erase_and_write")
class EraseAndWrite(Transplant):
    """A delta rule of one strength → one that erases and writes by gates (gated_delta|kda → gated_delta_2).

    Both gates begin as the strength, b = w = β, the same for every channel, which is exact while β stays below 1: with
    ``negative_eigenvalues`` it reaches 2, and w does not.
    """

    handles: ClassVar[tuple[str, ...]] = ("name", "strength", "erase", "write")
    example: ClassVar[tuple[Mapping[str, Any], Mapping[str, Any]]] = (
        {"attention": DELTA},
        {"attention": {**DELTA, "name": "gated_delta_2"}},
    )

    def serves(self, old: nn.Module, new: nn.Module) -> bool:
        if not isinstance(old, GatedDelta) or not isinstance(new, GatedDelta2):
            return False
        before, after = shapes(old), shapes(new)
        return before.keys() - {STRENGTH} == after.keys() - GATES.keys() and all(
            after[name] == shape for name, shape in before.items() if name != STRENGTH
        )

    def __call__(self, old: nn.Module, new: nn.Module, setting: Setting) -> Transplanted:
        assert isinstance(old, GatedDelta) and isinstance(new, GatedDelta2)
        kept = {name: tensor for name, tensor in old.state_dict().items() if name != STRENGTH}
        widths = {name: getattr(new, width) for name, width in GATES.items()}
        gates = {name: old.strength.weight.repeat_interleave(width, 0) for name, width in widths.items()}
        exact = old.reach == 1.0
        note = "both gates begin as the strength" if exact else "the strength reaches 2, writing 1"
        return Transplanted({**kept, **gates}, frozenset({*kept, *gates}), exact=exact, note=note)
