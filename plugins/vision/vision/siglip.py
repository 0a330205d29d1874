from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from blockwright.plugins.vision.vision.transformer import VisionTransformer
from blockwright.registry import register

FIXED = {
    "class_token": False,
    "registers": 0,
    "patch_bias": True,
    "pre_norm": False,
    "final_norm": True,
    "layer_scale": None,
}


@register("vision", "siglip", fixes=FIXED)
class SigLIP(VisionTransformer):
    """The vision tower of SigLIP: patches alone, features after the last block and a final norm.

    Zhai et al. 2023, arXiv 2303.15343. The defaults are SO400M with patches of 14 at 384 pixels, the tower of
    DeepSeek-VL2: norm ``{name: layernorm, eps: 1e-6}``, ffn ``{name: gelu, d_ff: 4304, bias: true}``, whose GELU is the
    tanh approximation. The pooling head, which DeepSeek-VL2 does not run, is left out. vLLM and SGLang pad 384 pixels
    to 392, interpolate positions and compute the exact GELU, hence other numbers.
    """

    conformance_settings: ClassVar[Mapping[str, Any]] = {"tile": 16, "patch": 5, "width": 48, "depth": 1, "n_heads": 4}
