from __future__ import annotations

from blockwright.plugins.vision.projector.downsample_mlp import DownsampleMLP
from blockwright.registry import register


@register("projector", "linear", fixes={"ratio": 1, "depth": 1, "mlp_ratio": 1})
class LinearProjector(DownsampleMLP):
    """One linear layer on each feature, as in the first LLaVA, arXiv 2304.08485."""
