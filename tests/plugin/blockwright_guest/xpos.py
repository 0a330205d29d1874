import torch
from torch import Tensor

from blockwright.blocks.kernels.elementwise import rotary_width
from blockwright.blocks.position.base import Position
from blockwright.registry import BlockError, register


@register("position", "xpos")
class XPos(Position):
    """RoPE whose pairs also fade with distance, the slow ones least.

    Sun et al. 2022, arXiv 2212.10554: with ζ_j = (2j/R + fade)/(1 + fade), queries are multiplied by ζ_j^(t/scale) and
    keys divided by it, so that a score shrinks by ζ_j^(distance/scale) in each pair.

    Args:
        theta: base of the frequencies
        fade: γ, 0 < γ; the larger, the less pairs differ in how fast they fade
        scale: tokens over which a pair fades by ζ_j
    """

    def __init__(self, head_dim: int, theta: float = 10000.0, fade: float = 0.4, scale: float = 512.0) -> None:
        super().__init__()
        if fade <= 0:
            raise BlockError("fade", fade, "must be greater than 0", "Use 0.4, as the paper does")
        self.width, self.theta, self.fade, self.scale = rotary_width(head_dim, 1.0), theta, fade, scale

    def rotate(self, q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        pairs = torch.arange(0, self.width, 2, device=q.device, dtype=torch.float32) / self.width
        angles = positions[..., None].float() * self.theta**-pairs
        zeta = ((pairs + self.fade) / (1 + self.fade)) ** (positions[..., None].float() / self.scale)
        cos, sin = angles.cos(), angles.sin()
        rotate = self.kernels.rotate
        return rotate(q, cos * zeta, sin * zeta, False), rotate(k, cos / zeta, sin / zeta, False)
