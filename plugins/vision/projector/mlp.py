from __future__ import annotations

from blockwright.plugins.vision.projector.downsample_mlp import DownsampleMLP
from blockwright.registry import register


@register("projector", "mlp", fixes={"ratio": 1})
class MLP(DownsampleMLP):
    """An MLP on each feature, with as many embeddings as features.

    LLaVA-1.5 (Liu et al. 2024, arXiv 2310.03744) with the defaults, ``mlp_gelu`` of DeepSeek-VL2's code.
    """
