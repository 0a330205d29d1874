"""One stream: where its layers have their norms, and convolutions of what the blocks read and write."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from blockwright.blocks.base import Kind
from blockwright.blocks.convolution import Convolution, convolved
from blockwright.blocks.forward_pass import Pass
from blockwright.blocks.norm import Norm
from blockwright.blocks.precision import at_least_fp32, full_linear, unlowered
from blockwright.blocks.residual.base import Around, Mixer, Residual
from blockwright.registry import BlockError, register


@register("residual", "prenorm")
class PreNorm(Residual):
    """Norm before each mixer; the stream itself is never normalised.

    Xiong et al. 2020, arXiv 2002.04745: x ← x + attention(norm₁(x)); x ← x + ffn(norm₂(x)). Llama, DeepSeek, GPT-2.

    Args:
        attention_norm: norm before the attention
        ffn_norm: norm before the feed-forward block
    """

    adds_branches = True

    def __init__(self, attention_norm: Norm, ffn_norm: Norm) -> None:
        super().__init__()
        self.attention_norm = attention_norm
        self.ffn_norm = ffn_norm

    def forward(self, x: Tensor, attention: Mixer, ffn: Mixer, given: Pass) -> Tensor:
        x = x + attention(self.attention_norm(x))
        return x + ffn(self.ffn_norm(x))


@register("residual", "postnorm")
class PostNorm(Residual):
    """Norm after each addition: the stream is normalised at every step.

    Vaswani et al. 2017, arXiv 1706.03762: x ← norm₁(x + attention(x)); x ← norm₂(x + ffn(x)). Needs warm-up at depth.
    OLMo-2's "reordered norm", x + norm(f(x)), is not this: there the stream stays unnormalised.

    Args:
        attention_norm: norm after the attention has been added
        ffn_norm: norm after the feed-forward block has been added
    """

    def __init__(self, attention_norm: Norm, ffn_norm: Norm) -> None:
        super().__init__()
        self.attention_norm = attention_norm
        self.ffn_norm = ffn_norm

    def forward(self, x: Tensor, attention: Mixer, ffn: Mixer, given: Pass) -> Tensor:
        x = self.attention_norm(x + attention(x))
        return self.ffn_norm(x + ffn(x))


@register("residual", "pre_postnorm")
class PrePostNorm(Residual):
    """Norm before each mixer, and on the stream after each addition.

    Huginn, arXiv 2502.05171, whose code calls this a sandwich: x ← norm₂(x + attention(norm₁(x))), likewise for the
    ffn.
    ``sandwich`` is Gemma-2's, whose second norm is on the mixer's output, and whose stream stays unnormalised.

    Args:
        attention_norm: norm before the attention
        attention_sum_norm: norm after the attention has been added
        ffn_norm: norm before the feed-forward block
        ffn_sum_norm: norm after the feed-forward block has been added
    """

    def __init__(self, attention_norm: Norm, attention_sum_norm: Norm, ffn_norm: Norm, ffn_sum_norm: Norm) -> None:
        super().__init__()
        self.attention_norm = attention_norm
        self.attention_sum_norm = attention_sum_norm
        self.ffn_norm = ffn_norm
        self.ffn_sum_norm = ffn_sum_norm

    def forward(self, x: Tensor, attention: Mixer, ffn: Mixer, given: Pass) -> Tensor:
        x = self.attention_sum_norm(x + attention(self.attention_norm(x)))
        return self.ffn_sum_norm(x + ffn(self.ffn_norm(x)))


@register("residual", "reordered")
class Reordered(Residual):
    """Norm on the output of each mixer; neither its input nor the stream is normalised.

    OLMo-2, arXiv 2501.00656 ("reordered norm", after Swin v2): x ← x + norm₁(attention(x)); x ← x + norm₂(ffn(x)).
    OLMo-2 also has ``qk_norm: full``.

    Args:
        attention_norm: norm of the attention's output
        ffn_norm: norm of the feed-forward block's output
    """

    def __init__(self, attention_norm: Norm, ffn_norm: Norm) -> None:
        super().__init__()
        self.attention_norm = attention_norm
        self.ffn_norm = ffn_norm

    def forward(self, x: Tensor, attention: Mixer, ffn: Mixer, given: Pass) -> Tensor:
        x = x + self.attention_norm(attention(x))
        return x + self.ffn_norm(ffn(x))


@register("residual", "sandwich")
class Sandwich(Residual):
    """Norm before each mixer and on its output.

    Ding et al. 2021 (CogView), arXiv 2105.13290; Gemma-2: x ← x + norm₂(attention(norm₁(x))), likewise for the ffn.

    Args:
        attention_norm: norm before the attention
        attention_out_norm: norm of the attention's output
        ffn_norm: norm before the feed-forward block
        ffn_out_norm: norm of the feed-forward block's output
    """

    def __init__(self, attention_norm: Norm, attention_out_norm: Norm, ffn_norm: Norm, ffn_out_norm: Norm) -> None:
        super().__init__()
        self.attention_norm = attention_norm
        self.attention_out_norm = attention_out_norm
        self.ffn_norm = ffn_norm
        self.ffn_out_norm = ffn_out_norm

    def forward(self, x: Tensor, attention: Mixer, ffn: Mixer, given: Pass) -> Tensor:
        x = x + self.attention_out_norm(attention(self.attention_norm(x)))
        return x + self.ffn_out_norm(ffn(self.ffn_norm(x)))


@register("residual", "scaled_sandwich")
class ScaledSandwich(Sandwich):
    """``sandwich``, after which the whole stream is multiplied by a number of the layer.

    Gemma 4 (``layer_scalar``): x ← s (x + norm₂(attention(norm₁(x))) + …), after everything that the layer adds, its
    memory too. The number is a buffer, which training leaves alone; it starts at 1.

    Args:
        attention_norm: norm before the attention
        attention_out_norm: norm of the attention's output
        ffn_norm: norm before the feed-forward block
        ffn_out_norm: norm of the feed-forward block's output
    """

    scale: Tensor

    def __init__(self, attention_norm: Norm, attention_out_norm: Norm, ffn_norm: Norm, ffn_out_norm: Norm) -> None:
        super().__init__(attention_norm, attention_out_norm, ffn_norm, ffn_out_norm)
        self.register_buffer("scale", torch.ones(1, dtype=torch.float32))

    def reset_parameters(self) -> None:
        self.scale.fill_(1.0)

    def leave(self, x: Tensor) -> Tensor:
        return x * self.scale.to(x.dtype)


@register("residual", "parallel")
class Parallel(Residual):
    """Both mixers read the same normalised input, and their outputs are added together.

    Wang & Komatsuzaki 2021 (GPT-J); PaLM: h = norm(x); x ← x + attention(h) + ffn(h). One norm, as in GPT-J and PaLM;
    GPT-NeoX has two.

    Args:
        attention_norm: the one norm, before both mixers
    """

    adds_branches = True

    def __init__(self, attention_norm: Norm) -> None:
        super().__init__()
        self.attention_norm = attention_norm

    def forward(self, x: Tensor, attention: Mixer, ffn: Mixer, given: Pass) -> Tensor:
        h = self.attention_norm(x)
        return x + attention(h) + ffn(h)


@register("residual", "sigmoid_skip")
class SigmoidSkip(Residual):
    """Each token decides how much of a layer it takes.

    A soft form of mixture of depths, and a highway network (Srivastava et al. 2015, arXiv 1505.00387) that carries all:
    y = attention(norm₁(x)); x ← x + 2σ(w·x + b) (y + ffn(norm₂(x + y))). It begins as ``prenorm``: w and b are 0, hence
    the factor 2, which papers leave out. Every layer is computed for every token, so that nothing is saved; a token for
    which σ is near 0 shows where something could be. The gate is in fp32 at least.

    Args:
        attention_norm: norm before the attention
        ffn_norm: norm before the feed-forward block
    """

    weight_kinds: ClassVar[Mapping[str, Kind]] = {"weight": "matrix"}

    def __init__(self, d_model: int, attention_norm: Norm, ffn_norm: Norm) -> None:
        super().__init__()
        self.attention_norm = attention_norm
        self.ffn_norm = ffn_norm
        self.weight = nn.Parameter(torch.empty(1, d_model))
        self.bias = nn.Parameter(torch.empty(1))

    def reset_parameters(self) -> None:
        self.weight.zero_()
        self.bias.zero_()

    def forward(self, x: Tensor, attention: Mixer, ffn: Mixer, given: Pass) -> Tensor:
        y = attention(self.attention_norm(x))
        y = y + ffn(self.ffn_norm(x + y))
        return x + self._share(x) * y

    def _share(self, x: Tensor) -> Tensor:
        with unlowered(x):
            flat = full_linear(at_least_fp32(x.flatten(0, 1)), at_least_fp32(self.weight), at_least_fp32(self.bias))
            return (2 * flat.sigmoid()).to(x.dtype).view(*x.shape[:2], 1)


@register("residual", "normed_embeddings")
class NormedEmbeddings(Around):
    """Another residual block, whose stream begins with a norm of the embeddings.

    Inkling (Thinking Machines 2026); BLOOM, arXiv 2211.05100, with a layer norm. The first layer's block, which opens
    the stream, alone has the norm.

    Args:
        residual: connects the mixers; ``prenorm`` if none is named
        norm: of the embeddings
    """

    default_children: ClassVar[Mapping[str, Any]] = {"residual": {"name": "prenorm"}}

    def __init__(self, residual: Residual, norm: Norm, layer_idx: int) -> None:
        super().__init__(residual)
        self.norm = norm if layer_idx == 0 else None

    def open(self, x: Tensor) -> Tensor:
        return super().open(x if self.norm is None else self.norm(x))


@register("residual", "convolved")
class Convolved(Around):
    """Another residual block, whose mixers read and return what convolutions make of the last few tokens.

    Canon layers A and C (Allen-Zhu 2025, SSRN 5240330) are ``attention_conv`` and ``ffn_conv``: h ← conv(norm(x)), then
    the mixer reads h. Inkling's are ``attention_out_conv`` and ``ffn_out_conv``: x ← x + conv(mixer(norm(x))). Norms
    and streams are those of the inner block, which is any. Sparse experts read what ``ffn_conv`` gives, and have no
    convolution inside.

    Args:
        residual: connects the mixers; ``prenorm`` if none is named
        attention_conv: of what the attention reads, after its norm; null for none
        attention_out_conv: of what the attention returns; null for none
        ffn_conv: of what the feed-forward block reads, after its norm; null for none
        ffn_out_conv: of what the feed-forward block returns; null for none
    """

    default_children: ClassVar[Mapping[str, Any]] = {"residual": {"name": "prenorm"}}

    def __init__(
        self,
        residual: Residual,
        attention_conv: Convolution | None = None,
        attention_out_conv: Convolution | None = None,
        ffn_conv: Convolution | None = None,
        ffn_out_conv: Convolution | None = None,
    ) -> None:
        super().__init__(residual)
        self.attention_conv, self.attention_out_conv = attention_conv, attention_out_conv
        self.ffn_conv, self.ffn_out_conv = ffn_conv, ffn_out_conv
        after = (conv for conv in (attention_out_conv, ffn_out_conv) if conv is not None)
        self.adds_branches = residual.adds_branches and all(conv.scales for conv in after)
        if self.selects and (conv := ffn_conv or ffn_out_conv) is not None:
            rule = f"needs tokens side by side, and {type(residual).__name__} gives the feed-forward block some of them"
            name = "ffn_conv" if conv is ffn_conv else "ffn_out_conv"
            raise BlockError(name, type(conv).__name__, rule, "Leave it out; convolutions of the attention may stay")

    def forward(self, x: Tensor, attention: Mixer, ffn: Mixer, given: Pass) -> Tensor:
        def attend(h: Tensor, places: Tensor | None = None) -> Tensor:
            y = attention(convolved(self.attention_conv, h, given), places)
            return convolved(self.attention_out_conv, y, given)

        def feed(h: Tensor, places: Tensor | None = None) -> Tensor:
            return convolved(self.ffn_out_conv, ffn(convolved(self.ffn_conv, h, given), places), given)

        return super().forward(x, attend, feed, given)
