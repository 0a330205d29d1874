from __future__ import annotations

from torch import nn

from blocks.cost import signature
from blocks.norm.layernorm import LayerNorm
from blocks.norm.rmsnorm import RMSNorm
from blocks.norm.rmsnorm1p import RMSNorm1p
from blocks.residual.attention_residual import AttentionResidual
from blocks.residual.prenorm import PreNorm
from blocks.residual.streams import Streams
from blocks.transplant.base import Setting, Transplant, Transplanted
from registry import register

NORMS = ("attention_norm", "ffn_norm")
SCALE_FREE = (RMSNorm, LayerNorm, RMSNorm1p)  # the same whatever the scale of what they read, but for eps


@register("transplant", "streams")
class FromPreNorm(Transplant):
    """One residual stream → several: ``prenorm`` → ``mhc``, ``hyper_connections`` or ``attention_residual``.

    The norms are copied, and the connections stay as they begin, at which these blocks compute what ``prenorm`` does:
    what is read from equal streams adds up to one of them, each output is written once to each, and mixing leaves equal
    streams equal. Attention over the depth begins as the mean of the sources, their sum but for a scale: exact with
    norms that do not see it, the final one included.
    """

    def serves(self, old: nn.Module, new: nn.Module) -> bool:
        if type(old) is not PreNorm or not isinstance(new, Streams | AttentionResidual):
            return False
        return all(signature(getattr(old, norm)) == signature(getattr(new, norm)) for norm in NORMS)

    def __call__(self, old: nn.Module, new: nn.Module, setting: Setting) -> Transplanted:
        copied = old.state_dict()
        begun = {name: tensor for name, tensor in new.state_dict().items() if name.split(".")[0] not in NORMS}
        drawn = sum(t.numel() for name, t in begun.items() if name.endswith("connection.weight"))
        exact = isinstance(new, Streams) or all(isinstance(getattr(new, norm), SCALE_FREE) for norm in NORMS)
        note = "connections begin as one stream's"
        return Transplanted({**begun, **copied}, frozenset(copied), exact, note, drawn)
