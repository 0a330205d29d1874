from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from blockwright.plugins.vision.vision.transformer import VisionTransformer
from blockwright.registry import register

FIXED = {"class_token": True, "patch_bias": True, "pre_norm": False, "final_norm": True}


@register("vision", "dinov2", fixes=FIXED)
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
