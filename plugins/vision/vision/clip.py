from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from blockwright.plugins.vision.vision.transformer import VisionTransformer
from blockwright.registry import register

FIXED = {
    "class_token": True,
    "registers": 0,
    "patch_bias": False,
    "pre_norm": True,
    "final_norm": False,
    "layer_scale": None,
}


@register("vision", "clip", fixes=FIXED)
class CLIP(VisionTransformer):
    """The vision tower of CLIP: a class token, a norm before the first block, features before any final norm.

    Radford et al. 2021, arXiv 2103.00020. Its own final norm is of the class token alone, which is not returned. LLaVA
    takes the features before the last block: ViT-L/14 at 336 pixels is then ``tile: 336, width: 1024, depth: 23``, with
    norm ``{name: layernorm, eps: 1e-5}``, ffn ``{name: gelu, d_ff: 4096, bias: true, approximate: sigmoid}``.
    """

    mean = (0.48145466, 0.4578275, 0.40821073)
    std = (0.26862954, 0.26130258, 0.27577711)
    conformance_settings: ClassVar[Mapping[str, Any]] = {"tile": 16, "patch": 5, "width": 48, "depth": 1, "n_heads": 4}
