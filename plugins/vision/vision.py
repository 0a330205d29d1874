"""The contract of ``vision``: turn square tiles of an image into a grid of features."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from blockwright.blocks.base import Block, Placement
from blockwright.blocks.ffn import FFN
from blockwright.blocks.gating.base import Gating
from blockwright.blocks.linear import Linear
from blockwright.blocks.norm import Norm
from blockwright.registry import BlockError, family, register
from blockwright.registry.ranges import Count, Positive, Whole


@family("vision", in_layers=False)
class Vision(Block):
    """Encodes tiles of P × P pixels, each by itself, as S × S features of width W.

    Class attributes:
        mean, std: by which red, green and blue, between 0 and 1, are normalised

    Attributes:
        tile: P, pixels a side
        side: S, features a side
        width: W
    """

    catalogue_example: ClassVar[Any] = {"name": "siglip", "tile": 28, "patch": 7, "width": 64, "depth": 2, "n_heads": 4}

    mean: ClassVar[tuple[float, float, float]] = (0.5, 0.5, 0.5)
    std: ClassVar[tuple[float, float, float]] = (0.5, 0.5, 0.5)
    counted_as: ClassVar[str | None] = "vision"
    # Pixels have no gradient: of the product that embeds patches only that of its weight is computed.
    flops_within: ClassVar[float | None] = 0.03
    tile: int
    side: int
    width: int

    @property
    def stack(self) -> list[nn.Module]:
        """Its blocks, if it is a stack of them: they are sharded and recomputed one by one."""
        return list(getattr(self, "layers", ()))

    def forward(self, tiles: Tensor) -> Tensor:
        """Tiles [N,3,P,P] uint8 → features [N,S,S,W]."""
        raise NotImplementedError

    def normalised(self, tiles: Tensor, dtype: torch.dtype) -> Tensor:
        """Tiles [N,3,P,P] uint8 → the same in a dtype, normalised in at least fp32."""
        wide = torch.promote_types(dtype, torch.float32)
        mean, std = (torch.tensor(x, dtype=wide, device=tiles.device)[:, None, None] for x in (self.mean, self.std))
        return ((tiles.to(wide) / 255 - mean) / std).to(dtype)


class PatchEmbedding(Block):
    """Patches of pixels, and further tokens before them, as the input of a vision transformer.

    Pixels on the right and below that fill no patch are not seen: 6 of 384 with patches of 14.

    Args:
        side: S, patches a side
        patch: pixels a side of a patch
        width: W
        class_token: whether a learned token stands first
        registers: learned tokens between it and the patches, which have no position
        bias: of the projection
    """

    def __init__(self, side: int, patch: int, width: int, class_token: bool, registers: int, bias: bool) -> None:
        super().__init__()
        self.side, self.patch, self.class_token = side, patch, class_token
        self.project = Linear(3 * patch * patch, width, bias=bias)
        self.n_further = class_token + registers
        self.position = _table(side * side + class_token, width)
        self.further = _table(self.n_further, width) if self.n_further else None

    def reset_parameters(self) -> None:
        for table in self.parameters():
            if table is not self.project.weight and table is not self.project.bias:
                table.normal_(0.0, table.shape[1] ** -0.5)

    def forward(self, pixels: Tensor) -> Tensor:
        """[N,3,P,P] → [N, further tokens + S², W], the patches row by row."""
        S, p, first = self.side, self.patch, int(self.class_token)
        pixels = pixels[:, :, : S * p, : S * p].unflatten(3, (S, p)).unflatten(2, (S, p))  # [N,3,S,p,S,p]
        patches = self.project(pixels.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2))
        positions = self.position.weight
        patches = patches + positions[first:]
        if self.further is None:
            return patches
        further = torch.cat((self.further.weight[:first] + positions[:first], self.further.weight[first:]))
        return torch.cat((further.expand(len(patches), -1, -1), patches), 1)


def _table(rows: int, width: int) -> nn.Embedding:
    return nn.Embedding.from_pretrained(torch.empty(rows, width), freeze=False)  # nothing to draw on the meta device


class EncoderAttention(Block):
    """Multi-head attention of all tokens of a tile on all."""

    residual_outputs: ClassVar[tuple[str, ...]] = ("output.weight",)

    def __init__(self, width: int, n_heads: int) -> None:
        super().__init__()
        self.head_dim = width // n_heads
        self.query, self.key, self.value, self.output = (Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """[N,T,W] → [N,T,W]."""
        q, k, v = (project(x).unflatten(-1, (-1, self.head_dim)) for project in (self.query, self.key, self.value))
        return self.output(self.kernels.attend_all(q, k, v, self.head_dim**-0.5).flatten(-2))

    def parallel_plan(self) -> dict[str, Placement]:
        split = {f"{n}.{leaf}": "column" for n in ("query", "key", "value") for leaf in ("weight", "bias")}
        return {**split, "output.weight": "row"}  # type: ignore[dict-item]


class Gain(Block):
    """A learned factor per feature: LayerScale, Touvron et al. 2021, arXiv 2103.17239."""

    def __init__(self, width: int, initial: float) -> None:
        super().__init__()
        self.initial, self.weight = initial, nn.Parameter(torch.empty(width))

    def reset_parameters(self) -> None:
        self.weight.fill_(self.initial)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class EncoderLayer(nn.Module):
    """x + g attention(norm x), then x + g ffn(norm x), with gains g where there are any."""

    def __init__(self, width: int, n_heads: int, norm: Norm, ffn: FFN, layer_scale: float | None) -> None:
        super().__init__()
        self.attention_norm, self.ffn_norm, self.ffn = (copy.deepcopy(m) for m in (norm, norm, ffn))
        self.attention = EncoderAttention(width, n_heads)
        gains = [nn.Identity() if layer_scale is None else Gain(width, layer_scale) for _ in range(2)]
        self.attention_gain, self.ffn_gain = gains

    def forward(self, x: Tensor) -> Tensor:
        """[N,T,W] → [N,T,W]."""
        x = x + self.attention_gain(self.attention(self.attention_norm(x)))
        return x + self.ffn_gain(self.ffn(self.ffn_norm(x))[0])


class VisionTransformer(Vision):
    """A vision transformer, Dosovitskiy et al. 2021, arXiv 2010.11929: the shared base of ``siglip``, ``clip`` and
    ``dinov2``. It returns the features of the patches; a class token and registers are only computed with.

    Its norm and feed-forward network are written in its own node. Left out, they are the language model's, if dense.

    Args:
        tile: P, pixels a side of a tile
        patch: pixels a side of a patch
        width: W, of a feature
        depth: number of blocks
        n_heads: heads of the attention; divides width
        norm: before attention and feed-forward network of each block
        ffn: feed-forward network of each block, without experts
        class_token: whether a learned token stands before the patches
        registers: further learned tokens, Darcet et al. 2024, arXiv 2309.16588
        patch_bias: whether the projection of patches adds a bias
        pre_norm: whether tokens are normalised before the first block
        final_norm: whether features are normalised after the last block
        layer_scale: initial gain of each branch; null for no gains
    """

    def __init__(
        self,
        norm: Norm,
        ffn: FFN,
        tile: Count = 384,
        patch: Count = 14,
        width: Count = 1152,
        depth: Count = 27,
        n_heads: Count = 16,
        class_token: bool = False,
        registers: Whole = 0,
        patch_bias: bool = True,
        pre_norm: bool = False,
        final_norm: bool = True,
        layer_scale: Positive | None = None,
    ) -> None:
        super().__init__()
        if patch > tile:
            raise BlockError("patch", patch, f"must not be larger than the tile ({tile})", "Use e.g. 14 with 384")
        if width % n_heads:
            rule = f"must divide width ({width})"
            raise BlockError("n_heads", n_heads, rule, "Use e.g. 16 with 1152, or change the width")
        if any(isinstance(m, Gating) for m in ffn.modules()):
            rule = "a tower's feed-forward network is dense, and this one routes to experts"
            remedy = "Write one in the tower's node: ffn: {name: gelu, d_ff: 4304, bias: true}"
            raise BlockError("ffn", type(ffn).__name__, rule, remedy)
        self.tile, self.side, self.width = tile, tile // patch, width
        self.patches = PatchEmbedding(self.side, patch, width, class_token, registers, patch_bias)
        self.pre_norm = copy.deepcopy(norm) if pre_norm else nn.Identity()
        self.layers = nn.ModuleList(EncoderLayer(width, n_heads, norm, ffn, layer_scale) for _ in range(depth))
        self.norm = norm if final_norm else nn.Identity()

    @classmethod
    def child_context(cls, child: str, known: Mapping[str, Any]) -> Mapping[str, Any]:
        return {"d_model": known["width"], "dim": known["width"], "n_layers": known["depth"]}

    def forward(self, tiles: Tensor) -> Tensor:
        x = self.pre_norm(self.patches(self.normalised(tiles, self.patches.position.weight.dtype)))
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)[:, self.patches.n_further :].unflatten(1, (self.side, self.side))


OF_CLIP = {
    "class_token": True,
    "registers": 0,
    "patch_bias": False,
    "pre_norm": True,
    "final_norm": False,
    "layer_scale": None,
}


@register("vision", "clip", fixes=OF_CLIP)
class CLIP(VisionTransformer):
    """The vision tower of CLIP: a class token, a norm before the first block, features before any final norm.

    Radford et al. 2021, arXiv 2103.00020. Its own final norm is of the class token alone, which is not returned. LLaVA
    takes the features before the last block: ViT-L/14 at 336 pixels is then ``tile: 336, width: 1024, depth: 23``, with
    norm ``{name: layernorm, eps: 1e-5}``, ffn ``{name: gelu, d_ff: 4096, bias: true, approximate: sigmoid}``.
    """

    mean = (0.48145466, 0.4578275, 0.40821073)
    std = (0.26862954, 0.26130258, 0.27577711)
    conformance_settings: ClassVar[Mapping[str, Any]] = {"tile": 16, "patch": 5, "width": 48, "depth": 1, "n_heads": 4}


OF_DINOV2 = {"class_token": True, "patch_bias": True, "pre_norm": False, "final_norm": True}


@register("vision", "dinov2", fixes=OF_DINOV2)
class DINOv2(VisionTransformer):
    """The vision tower of DINOv2: a class token, optional registers, gains on each branch, a final norm.

    Oquab et al. 2024, arXiv 2304.07193; registers: Darcet et al. 2024, arXiv 2309.16588. Base is ``tile: 518,
    width: 768, depth: 12, n_heads: 12, layer_scale: 1.0``, with norm ``{name: layernorm, eps: 1e-6}``, ffn
    ``{name: gelu, d_ff: 3072, bias: true, approximate: none}``. Positions are those of one tile size: they are not
    interpolated.
    """

    mean = (0.485, 0.456, 0.406)
    std = (0.229, 0.224, 0.225)
    conformance_settings: ClassVar[Mapping[str, Any]] = {"tile": 16, "patch": 5, "width": 48, "depth": 1, "n_heads": 4}


OF_SIGLIP = {
    "class_token": False,
    "registers": 0,
    "patch_bias": True,
    "pre_norm": False,
    "final_norm": True,
    "layer_scale": None,
}


@register("vision", "siglip", fixes=OF_SIGLIP)
class SigLIP(VisionTransformer):
    """The vision tower of SigLIP: patches alone, features after the last block and a final norm.

    Zhai et al. 2023, arXiv 2303.15343. The defaults are SO400M with patches of 14 at 384 pixels, the tower of
    DeepSeek-VL2: norm ``{name: layernorm, eps: 1e-6}``, ffn ``{name: gelu, d_ff: 4304, bias: true}``, whose GELU is the
    tanh approximation. The pooling head, which DeepSeek-VL2 does not run, is left out. vLLM and SGLang pad 384 pixels
    to 392, interpolate positions and compute the exact GELU, hence other numbers.
    """

    conformance_settings: ClassVar[Mapping[str, Any]] = {"tile": 16, "patch": 5, "width": 48, "depth": 1, "n_heads": 4}
