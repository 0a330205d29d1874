from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn

from blockwright.blocks.residual.attention_residual import AttentionResidual
from blockwright.blocks.residual.base import Streams
from blockwright.blocks.residual.norms import PreNorm
from blockwright.plugins.surgery.transplant.base import Setting, Transplant, Transplanted, shapes
from blockwright.registry import register

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
