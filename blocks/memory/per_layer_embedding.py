from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from torch import Tensor
from torch.nn import functional as F

from blockwright.blocks.forward_pass import Pass
from blockwright.blocks.linear import Linear
from blockwright.blocks.memory.base import Memory, Table
from blockwright.blocks.norm import Norm
from blockwright.registry import BlockError, register
from blockwright.registry.ranges import Count


@register("memory", "per_layer_embedding")
class PerLayerEmbedding(Memory):
    """A narrow embedding of each token for each layer, which gates a bottleneck behind the feed-forward block.

    Gemma 3n and Gemma 4 (the E models; there is no paper). With a token's row E of this layer's table [V,P] and the
    input x₀ of the first layer: p = (√P · E + norm(W_p x₀/√D))/√2; x ← x + norm(W_o (gelu(W_g x) ⊙ p)).

    How this differs: Gemma stores the tables and W_p of all layers side by side, and has one norm of W_p x₀ for all
    layers. Of several streams each is read and written alone; Gemma 3n reads one and corrects the others.

    Args:
        embedded_norm: of W_p x₀
        output_norm: of what is added
        width: P, numbers of a row; 256 in Gemma
    """

    place: ClassVar[Literal["before", "after"]] = "after"
    silent: ClassVar[tuple[str, ...]] = ("output_norm.weight",)  # the norm's slope at 0 is 1/√ε
    conformance_settings: ClassVar[Mapping[str, Any]] = {"width": 10}
    residual_outputs: ClassVar[tuple[str, ...]] = ("output.weight",)

    def __init__(
        self, d_model: int, vocab_size: int, embedded_norm: Norm, output_norm: Norm, width: Count = 256
    ) -> None:
        super().__init__()
        self.table = Table(vocab_size, width)
        self.project, self.gate = (Linear(d_model, width, bias=False) for _ in range(2))
        self.output = Linear(width, d_model, bias=False)
        self.embedded_norm, self.output_norm = embedded_norm, output_norm

    @classmethod
    def child_context(cls, child: str, known: Mapping[str, Any]) -> Mapping[str, Any]:
        return {"dim": known["d_model"] if child == "output_norm" else known["width"]}

    def forward(self, x: Tensor, given: Pass) -> Tensor:
        if given.embedded is None:
            rule = "reads the input of the first layer, which this caller does not pass"
            raise BlockError("memory", "per_layer_embedding", rule, "Give Pass(embedded=…), as the decoder does")
        context = self.embedded_norm(self.project(given.embedded) * x.shape[-1] ** -0.5)
        rows = self.table(self.ids(given))
        p = (context + rows * rows.shape[-1] ** 0.5) * 2**-0.5
        p = p if x.ndim == 3 else p[:, :, None]
        return self.output_norm(self.output(F.gelu(self.gate(x), approximate="tanh") * p))
