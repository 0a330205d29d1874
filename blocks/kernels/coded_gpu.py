"""``coded_attention`` on a GPU, by two Triton kernels (triton_products.py).

Not run on a GPU by this project so far: Triton's interpreter computes them on a CPU, and they are compiled for A100,
H100 and B200.
"""

from __future__ import annotations

from torch import Tensor

from blockwright.blocks.kernels import coded_attention
from blockwright.blocks.kernels.coded_attention import Products, attend_by
from blockwright.blocks.kernels.quantise import Codes
from blockwright.blocks.kernels.scoring import Scoring
from blockwright.blocks.kernels.seam import kernel

MOST = 64  # rows of a head, whose products with a block of tokens are held in registers


def suits(q: Tensor, keys: Codes, values: Codes, scoring: Scoring) -> bool:
    """Whether ``parts`` could compute it, the rows of a head are not too many, and a sequence not too long."""
    rows = q.shape[1] * q.shape[2] // keys.n_heads
    near = all(of.codes[0].numel() < 2**31 for of in (keys, values))  # of which the kernels count 32 bits
    return near and rows <= MOST and coded_attention.suits(q, keys, values, scoring)


@kernel("coded_attention", "triton", devices=("cuda",), capability=(8, 0), needs="triton", takes=suits, order=10)
def triton_attention(q: Tensor, keys: Codes, values: Codes, scoring: Scoring) -> Tensor:
    """The same by Triton."""
    from blockwright.blocks.kernels.triton_products import averages, scores

    return attend_by(Products(scores, averages), q, keys, values, scoring)
