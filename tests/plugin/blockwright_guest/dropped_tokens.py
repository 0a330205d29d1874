import torch

from blockwright import Residual, register
from blockwright.blocks.norm import Norm


@register("residual", "dropped_tokens")
class DroppedTokens(Residual):
    """In training, tokens drawn by lot skip the feed-forward block of a layer.

    After Yao et al. 2022 (random-LTD), arXiv 2211.11586, where they skip the attention too.

    Args:
        kept: share of the tokens that do not skip it
    """

    selects = True

    def __init__(self, d_model: int, attention_norm: Norm, ffn_norm: Norm, kept: float = 0.5) -> None:
        super().__init__()
        self.attention_norm, self.ffn_norm, self.kept = attention_norm, ffn_norm, kept

    def forward(self, x, attention, ffn, given):
        x = x + attention(self.attention_norm(x))
        if not self.training:
            return x + ffn(self.ffn_norm(x))
        drawn = torch.rand(x.shape[:2], device=x.device).topk(max(1, int(self.kept * x.shape[1])), 1).indices
        places = drawn.sort(1).values
        at = places[..., None].expand(-1, -1, x.shape[2])
        return x.scatter_add(1, at, ffn(self.ffn_norm(x.gather(1, at)), places))
