from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from blockwright.plugins.vision.images.base import Images, Pictures
from blockwright.plugins.vision.projector.base import Projector
from blockwright.plugins.vision.tiling.base import Tiling
from blockwright.plugins.vision.vision.base import Vision
from blockwright.registry import BlockError, register
from blockwright.registry.ranges import Whole

REMEDY = (
    "Write the id that the tokenizer gives <image>; or leave one free, e.g. data.tokenizer.vocab_size=258 with bytes"
)


@register("images", "early_fusion")
class EarlyFusion(Images):
    """Tiles → vision tower → projector → sequence, which the decoder reads among its tokens.

    As in LLaVA (Liu et al. 2023, arXiv 2304.08485) and DeepSeek-VL2 (arXiv 2412.10302). Positions run through image and
    text alike, attention stays causal, and a mixture of experts routes image places as any others.

    Args:
        image_token: id of the token that marks the places of an image; 128815 in DeepSeek-VL2 tiny and base, 100003 in
            small
        vision: encodes each tile
        projector: brings features to the decoder's width
        tiling: how an image is cut into tiles, and how their features become a sequence
    """

    conformance_settings: ClassVar[Mapping[str, Any]] = {
        "image_token": 60,
        "vision": {"name": "siglip", "tile": 16, "patch": 5, "width": 48, "depth": 1, "n_heads": 4},
        "projector": "downsample_mlp",
        "tiling": {"name": "grid_2d", "max_tiles": 4},
    }

    def __init__(
        self, vocab_size: int, vision: Vision, projector: Projector, tiling: Tiling, image_token: Whole
    ) -> None:
        super().__init__()
        if image_token >= vocab_size:
            rule = f"is the id of a token, so it is below vocab_size ({vocab_size})"
            raise BlockError("image_token", image_token, rule, REMEDY)
        self.vision, self.projector, self.tiling, self.image_token = vision, projector, tiling, image_token

    @classmethod
    def child_context(cls, child: str, known: Mapping[str, Any]) -> Mapping[str, Any]:
        if child == "projector":
            return {"width": known["vision"].width, "side": known["vision"].side}
        return {"tile": known["vision"].tile, "side": known["projector"].side_out} if child == "tiling" else {}

    def forward(self, content: Pictures) -> Tensor:
        return self.tiling(self.projector(self.vision(content.tiles)), content.grids)
