"""``coded_attention`` by products in C (coded_library.py); where no compiler is found, ``parts`` computes."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from blockwright.blocks.kernels import coded_attention
from blockwright.blocks.kernels.coded_attention import Products, attend_by
from blockwright.blocks.kernels.coded_library import LANES, described, in_reach, library
from blockwright.blocks.kernels.quantise import Codes
from blockwright.blocks.kernels.scoring import Scoring
from blockwright.blocks.kernels.seam import kernel


def suits(q: Tensor, keys: Codes, values: Codes, scoring: Scoring) -> bool:
    """Whether ``parts`` could compute it, the library reaches the codes, and there is a compiler."""
    near = in_reach(keys) and in_reach(values)
    return near and coded_attention.suits(q, keys, values, scoring) and library() is not None


@kernel("coded_attention", "compiled", devices=("cpu",), takes=suits, order=10)
def compiled_attention(q: Tensor, keys: Codes, values: Codes, scoring: Scoring) -> Tensor:
    """The same by products in C."""
    return attend_by(Products(_scores, _averages), q, keys, values, scoring)


def _scores(q: Tensor, keys: Codes) -> Tensor:
    made = library()
    assert made is not None
    B, K, m, H = q.shape
    rows = F.pad(q, (0, -H % LANES)) if H % LANES else q.contiguous()
    y = q.new_empty(B, K, m, keys.codes.shape[1])
    made.scores(described(keys), rows.data_ptr(), m, y.data_ptr(), torch.get_num_threads())
    return y


def _averages(weights: Tensor, values: Codes) -> Tensor:
    made, threads = library(), torch.get_num_threads()
    assert made is not None
    (B, K, m, _), weights = weights.shape, weights.contiguous()
    parts = -(-threads // B)
    y = weights.new_zeros(parts, B, K, m, -(-values.width // LANES) * LANES)
    made.averages(described(values), weights.data_ptr(), m, y.data_ptr(), parts, threads)
    return (y[0] if parts == 1 else y.sum(0))[..., : values.width]
