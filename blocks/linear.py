"""The linear layer of every block."""

from __future__ import annotations

from torch import Tensor, nn

from blocks.kernels.few_rows import linear


class Linear(nn.Linear):
    """``torch.nn.Linear`` with faster decoding on some processors: see blocks/kernels/few_rows.py."""

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:  # where there is nothing to draw, and drawing it takes most of a model's assembly
            super().reset_parameters()

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)
