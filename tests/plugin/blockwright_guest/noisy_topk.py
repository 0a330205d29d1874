import torch
from torch import Tensor, nn

from blockwright.blocks.balance import Balance
from blockwright.blocks.gating.base import LinearGating
from blockwright.registry import BlockError, register


@register("gating", "noisy_topk")
class NoisyTopK(LinearGating):
    """Softmax over the k highest logits, which noise of a learned size has shaken during training.

    Shazeer et al. 2017, arXiv 1701.06538, eq. 3–5: h_i = (W x)_i + ε · noise · softplus(b_i), ε ~ N(0, 1);
    g = softmax of the k highest h_i. The paper's noise depends on the token; here it is one number an expert.

    Args:
        top_k: k, experts a token
        noise: factor on the noise; 0 for none
        balance: losses that even out the load; null for none
    """

    def __init__(
        self, d_model: int, n_experts: int, top_k: int = 2, noise: float = 1.0, balance: list[Balance] | None = None
    ) -> None:
        super().__init__(d_model, n_experts, top_k, balance)
        if noise < 0:
            raise BlockError("noise", noise, "must not be negative", "Use 0 for none")
        self.noise = noise
        self.noise_bias = nn.Parameter(torch.empty(n_experts))

    def choose(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.training:
            logits = logits + torch.randn_like(logits) * self.noise * nn.functional.softplus(self.noise_bias)
        highest, experts = logits.topk(self.top_k)
        return experts, highest.softmax(-1), logits.softmax(-1)

    def parallel_plan(self):
        return {**super().parallel_plan(), "noise_bias": "replicate"}
