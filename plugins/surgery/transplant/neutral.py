from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from blockwright.blocks.attention.base import Attention
from blockwright.blocks.attention.grouped import GroupedAttention
from blockwright.blocks.base import Remembering
from blockwright.blocks.convolution import Canon, Convolution
from blockwright.blocks.ffn import FFN
from blockwright.blocks.memory import Memory
from blockwright.blocks.residual.base import Residual, Streams
from blockwright.blocks.residual.norms import Convolved, PreNorm, SigmoidSkip
from blockwright.blocks.residual.over_depth import AttentionResidual
from blockwright.blocks.selector.base import Selector
from blockwright.blocks.values import ValueResidual
from blockwright.plugins.surgery.transplant.base import (
    Setting,
    Transplant,
    Transplanted,
    differences,
    shapes,
    unhandled,
)
from blockwright.registry import register


@register("transplant", "neutral")
class Neutral(Transplant):
    """An attention → the same with ``scores``, or with a position around its own, that begin without effect.

    Such are those that name values of theirs which have none: the identity of ``talking_heads``, ``dcmha`` without
    gates and written directions, ``banded`` with an empty bank. Their other parameters are drawn, so all learn.
    """

    handles: ClassVar[tuple[str, ...]] = ("scores", "position")
    example: ClassVar[tuple[Mapping[str, Any], Mapping[str, Any]]] = (
        {},
        {
            "attention": {"name": "gqa", "n_heads": 4, "n_kv_heads": 2, "scores": {"name": "dcmha", "width": 5}},
            "position": {"name": "banded", "rank": 3, "extent": 7, "inner": {"name": "rope"}},
        },
    )

    def serves(self, old: nn.Module, new: nn.Module) -> bool:
        if not isinstance(old, Attention) or not isinstance(new, Attention) or unhandled(self, old, new):
            return False
        added = _added(old, new)
        changed = {path.split(".")[0] for path in differences(old, new)}
        return bool(added) and changed == added.keys() and all(c.neutral() is not None for c in added.values())

    def __call__(self, old: nn.Module, new: nn.Module, setting: Setting) -> Transplanted:
        added = _added(old, new)
        around = "position" in added
        copied = {_moved(name) if around else name: tensor for name, tensor in old.state_dict().items()}
        begun = {f"{kind}.{n}": t for kind, child in added.items() for n, t in (child.neutral() or {}).items()}
        note = f"{' and '.join(added)} begin without effect"
        return Transplanted({**copied, **begun}, frozenset(copied), exact=True, note=note)


def _added(old: nn.Module, new: nn.Module) -> dict[str, Remembering]:
    """The children that the new attention alone has: scores, and a position around the old one's."""
    found: dict[str, Any] = {}
    scores, position = getattr(new, "scores", None), getattr(new, "position", None)
    if scores is not None and getattr(old, "scores", None) is None:
        found["scores"] = scores
    inner = getattr(position, "inner", None)
    if isinstance(inner, nn.Module) and not differences(old.get_submodule("position"), inner):
        found["position"] = position
    return {kind: child for kind, child in found.items() if isinstance(child, Remembering)}


def _moved(name: str) -> str:
    return name.replace("position.", "position.inner.", 1) if name.startswith("position.") else name


@register("transplant", "canon")
class CanonLayers(Transplant):
    """An attention or a feed-forward block → the same with Canon layers, which begin at zero: u + 0, which is exact."""

    handles: ClassVar[tuple[str, ...]] = (
        *("query_conv", "key_conv", "value_conv", "latent_conv", "gate_conv", "up_conv"),
    )
    example: ClassVar[tuple[Mapping[str, Any], Mapping[str, Any]]] = (
        {},
        {
            "ffn": {
                "name": "swiglu",
                "d_ff": 48,
                "gate_conv": {"name": "canon"},
                "up_conv": {"name": "canon", "taps": 3},
            }
        },
    )

    def serves(self, old: nn.Module, new: nn.Module) -> bool:
        if not isinstance(new, Attention | FFN) or type(old) is not type(new):
            return False
        added, before = (convolutions(block) for block in (new, old))
        begun = all(isinstance(block, Canon) for name, block in added.items() if name not in before)
        kept = all(shapes(block) == shapes(added[name]) for name, block in before.items() if name in added)
        grown = begun and kept and before.keys() < added.keys()
        return grown and without(added, new) == without(before, old) and not unhandled(self, old, new)

    def __call__(self, old: nn.Module, new: nn.Module, setting: Setting) -> Transplanted:
        copied = old.state_dict()
        begun = {name: torch.zeros_like(t) for name, t in new.state_dict().items() if name not in copied}
        return Transplanted({**copied, **begun}, frozenset(copied), exact=True, note="convolutions begin at zero")


def convolutions(block: nn.Module) -> dict[str, Convolution]:
    """Name → each convolution in a block."""
    return {name: part for name, part in block.named_modules() if isinstance(part, Convolution)}


def without(parts: Mapping[str, nn.Module], block: nn.Module) -> dict[str, tuple[int, ...]]:
    """Name → shape of everything in a block's state, but for that of some parts."""
    return {name: shape for name, shape in shapes(block).items() if name.rpartition(".")[0] not in parts}


INNER = "residual."


@register("transplant", "convolved")
class AroundMixers(Transplant):
    """A residual block → ``convolved`` around it, whose Canon layers begin at zero: u + 0, which is exact."""

    handles: ClassVar[tuple[str, ...]] = (
        *("name", "residual", "streams", "starts", "eps", "closing", "mixing"),
        *("attention_conv", "attention_out_conv", "ffn_conv", "ffn_out_conv"),
        *("attention_norm", "attention_out_norm", "ffn_norm", "ffn_out_norm"),
        *("attention_stream_norm", "ffn_stream_norm", "attention_connection", "ffn_connection"),
        *("attention_query", "ffn_query", "closing_query"),
    )
    example: ClassVar[tuple[Mapping[str, Any], Mapping[str, Any]]] = (
        {},
        {"residual": {"name": "convolved", "residual": {"name": "prenorm"}, "ffn_conv": {"name": "canon"}}},
    )

    def serves(self, old: nn.Module, new: nn.Module) -> bool:
        if not isinstance(old, Residual) or not isinstance(new, Convolved) or isinstance(old, Convolved):
            return False
        begun = all(isinstance(block, Canon) for block in convolutions(new).values())
        return begun and shapes(old) == shapes(new.residual) and not differences(old, new.residual)

    def __call__(self, old: nn.Module, new: nn.Module, setting: Setting) -> Transplanted:
        copied = {INNER + name: tensor for name, tensor in old.state_dict().items()}
        begun = {name: torch.zeros_like(t) for name, t in new.state_dict().items() if name not in copied}
        return Transplanted({**copied, **begun}, frozenset(copied), exact=True, note="convolutions begin at zero")


@register("transplant", "selector")
class AnotherSelector(Transplant):
    """An attention → the same with another selector, or with one, or without: all else is copied.

    A selector of the same shapes is copied too, as from ``dense`` to sparse; another one stays as it was drawn. Exact
    where neither leaves out a key of the longest sequence.
    """

    handles: ClassVar[tuple[str, ...]] = ("selector",)
    example: ClassVar[tuple[Mapping[str, Any], Mapping[str, Any]]] = (
        {},
        {
            "attention": {
                "name": "gqa",
                "n_heads": 4,
                "n_kv_heads": 2,
                "selector": {"name": "dsa", "n_heads": 2, "head_dim": 8, "top_k": 5, "dense": True},
            }
        },
    )

    def serves(self, old: nn.Module, new: nn.Module) -> bool:
        both = isinstance(old, Attention) and isinstance(new, Attention)
        chooses = any(isinstance(getattr(block, "selector", None), Selector) for block in (old, new))
        return both and chooses and _around(old) == _around(new) and not unhandled(self, old, new)

    def __call__(self, old: nn.Module, new: nn.Module, setting: Setting) -> Transplanted:
        here = shapes(new)
        tensors = {name: t for name, t in old.state_dict().items() if here.get(name) == tuple(t.shape)}
        selectors: list[Any] = [block.selector for block in (old, new) if block.selector is not None]
        exact = all(selector.takes_all(setting.max_positions) for selector in selectors)
        note = "no key is left out" if exact else "keys are left out"
        return Transplanted(tensors, frozenset(tensors), exact, note)


def _around(block: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of all but the selector."""
    return {name: shape for name, shape in shapes(block).items() if not name.startswith("selector.")}


@register("transplant", "sigmoid_skip")
class ToSigmoidSkip(Transplant):
    """``prenorm`` → ``sigmoid_skip``, whose gate begins at 1: the norms are copied. Exact."""

    handles: ClassVar[tuple[str, ...]] = ("name", "weight", "bias")
    example: ClassVar[tuple[Mapping[str, Any], Mapping[str, Any]]] = ({}, {"residual": {"name": "sigmoid_skip"}})

    def serves(self, old: nn.Module, new: nn.Module) -> bool:
        if type(old) is not PreNorm or not isinstance(new, SigmoidSkip):
            return False
        return shapes(old).items() <= shapes(new).items()

    def __call__(self, old: nn.Module, new: nn.Module, setting: Setting) -> Transplanted:
        copied = old.state_dict()
        return Transplanted({**new.state_dict(), **copied}, frozenset(copied), exact=True, note="gates begin at 1")


@register("transplant", "silent_memory")
class SilentMemory(Transplant):
    """A layer without a memory → one with a memory that adds nothing yet: exact, if the memory says how (``silent``).

    All else of it is drawn, so that it learns from the first step.
    """

    fills: ClassVar[bool] = True
    example: ClassVar[tuple[Mapping[str, Any], Mapping[str, Any]]] = (
        {},
        {"memory": {"name": "engram", "rows": 37, "n_heads": 2}},
    )

    def serves(self, old: nn.Module | None, new: nn.Module) -> bool:
        return old is None and isinstance(new, Memory)

    def __call__(self, old: nn.Module | None, new: nn.Module, setting: Setting) -> Transplanted:
        assert isinstance(new, Memory)
        begun = new.state_dict()
        silent = {name: torch.zeros_like(begun[name]) for name in new.silent if name in begun}
        drawn = sum(p.numel() for name, p in new.named_parameters() if name not in silent)
        note = f"{', '.join(silent)} begins at 0" if silent else "nothing of it can begin at 0"
        return Transplanted({**begun, **silent}, frozenset(), bool(silent), note, drawn)


FACTORS = "values.factors"


@register("transplant", "first_values")
class FirstValues(Transplant):
    """An attention → the same with ``values: value_residual``: λ₁ begins at 1, λ₂ at 0, which is exact."""

    handles: ClassVar[tuple[str, ...]] = ("values",)
    example: ClassVar[tuple[Mapping[str, Any], Mapping[str, Any]]] = ({}, {"values": {"name": "value_residual"}})

    def serves(self, old: nn.Module, new: nn.Module) -> bool:
        if not isinstance(old, GroupedAttention) or not isinstance(new, GroupedAttention) or old.values is not None:
            return False
        here = {name: shape for name, shape in shapes(new).items() if name != FACTORS}
        return isinstance(new.values, ValueResidual) and here == shapes(old) and not unhandled(self, old, new)

    def __call__(self, old: nn.Module, new: nn.Module, setting: Setting) -> Transplanted:
        copied = old.state_dict()
        begun = {FACTORS: torch.tensor((1.0, 0.0), dtype=torch.float32)}
        return Transplanted({**copied, **begun}, frozenset(copied), exact=True, note="values begin as they were")


NORMS = ("attention_norm", "ffn_norm")
NEGLIGIBLE = 1e-4  # what is read from M streams adds up to 1 + M·eps


@register("transplant", "streams")
class FromPreNorm(Transplant):
    """One residual stream → several: ``prenorm`` → ``mhc``, ``hyper_connections`` or ``attention_residual``.

    The norms are copied, and the connections stay as they begin, at which these blocks compute what ``prenorm`` does:
    what is read from equal streams adds up to one of them, each output is written once to each, and mixing leaves equal
    streams equal. Attention over the depth begins as the mean of the sources, their sum but for a scale: not exact,
    since even a norm that divides by the scale adds its eps before; the ledger says how far off that is.
    """

    handles: ClassVar[tuple[str, ...]] = (
        *("name", "streams", "closing", "mixing", "attention_connection", "ffn_connection"),
        *("starts", "eps", "attention_query", "ffn_query", "closing_query"),
    )
    example: ClassVar[tuple[Mapping[str, Any], Mapping[str, Any]]] = ({}, {"residual": {"name": "mhc"}})

    def serves(self, old: nn.Module, new: nn.Module) -> bool:
        if type(old) is not PreNorm or not isinstance(new, Streams | AttentionResidual):
            return False
        return all(shapes(getattr(old, norm)) == shapes(getattr(new, norm)) for norm in NORMS)

    def __call__(self, old: nn.Module, new: nn.Module, setting: Setting) -> Transplanted:
        copied = old.state_dict()
        begun = {name: tensor for name, tensor in new.state_dict().items() if name.split(".")[0] not in NORMS}
        drawn = sum(t.numel() for name, t in begun.items() if name.endswith("connection.weight"))
        exact = isinstance(new, Streams) and new.streams * _eps(new) < NEGLIGIBLE
        note = "connections begin as one stream's" if exact else "what is read from equal streams is not one of them"
        return Transplanted({**begun, **copied}, frozenset(copied), exact, note, drawn)


def _eps(block: nn.Module) -> float:
    """What is added to each number that the block reads a stream by; 0 for none."""
    parts = (getattr(block, name, None) for name in ("attention_connection", "ffn_connection", "closing"))
    return max(getattr(part, "eps", 0.0) for part in parts)
