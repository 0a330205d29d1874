"""Attention over latents that are never expanded: the decoding path of multi-head latent attention.

With W_kv_up = [U; V] by head, q_nope · (U c) = (Uᵀ q_nope) · c and Σ w (V c) = V Σ w c. So queries are taken into the
latent's space once, all heads score and average one shared sequence of latents, and what they find is taken out again
(DeepSeek-AI 2024, arXiv 2405.04434, appendix C). Expanding, ``causal_attention`` is the reference.
"""

from __future__ import annotations

import torch
from torch import Tensor

from blocks.kernels.few_rows import reads_fast

FEW = 64  # rows; a product of more is bound by its arithmetic
LARGE = 2**21  # bytes of a row's memory; beyond, rows go one by one: what scores read, values find in a CPU's cache
PART = 256  # positions; MKL reads a long memory fastest as a batch of its parts, one token's queries against each


def absorbs(T: int, S: int, latent: int, rope: int, nope: int, value: int) -> bool:
    """Whether T new tokens on S in all (themselves included) cost less absorbed than with keys and values expanded.

    Multiplications a head. Expanded: S·C·(n + v) to expand, T·S·(n + R + v) to score and average. Absorbed: T·C·(n + v)
    to take queries in and values out, T·S·(2C + R) to score and average. One new token is nearly always cheaper
    absorbed, a whole prompt nearly always expanded; at C = 512 and n = v = 128, as in DeepSeek, they meet at T = 170.
    And the absorbed way holds T·S scores where the other, whose kernel holds none, expands S·(n + v) numbers: it must
    not hold more.

    Args:
        latent, rope, nope, value: C, R, n, v, the widths
    """
    expanded = S * latent * (nope + value) + T * S * (nope + rope + value)
    absorbed = T * latent * (nope + value) + T * S * (2 * latent + rope)
    return nope + value >= T and absorbed < expanded


def key_multiple(dtype: torch.dtype, device: torch.device) -> int:
    """What the number of keys is to be rounded up to.

    oneDNN, which multiplies low precision on CPUs, and fp32 too where it is allowed to, compiles code for every new
    shape, and each step of decoding has one. MKL does not, and there rounding is only more work.
    """
    exact = torch.backends.mkldnn.matmul.fp32_precision in ("ieee", "none")  # type: ignore[attr-defined]
    onednn = dtype != torch.float64 and (dtype != torch.float32 or not exact)
    return 256 if device.type == "cpu" and onednn else 1


def into_latents(q: Tensor, key_up: Tensor) -> Tensor:
    """Queries [B,T,N,n] through their heads' key matrices [N,n,C] → [B,T,N,C]."""
    rows = torch.bmm(q.flatten(0, 1).transpose(0, 1), key_up.to(q.dtype))
    return rows.transpose(0, 1).unflatten(0, q.shape[:2])


def out_of_latents(y: Tensor, value_up: Tensor) -> Tensor:
    """Averages of latents [B,T,N,C] through their heads' value matrices [N,v,C] → [B,T,N,v]."""
    rows = _times_rows(y.flatten(0, 1).transpose(0, 1), value_up.to(y.dtype))
    return rows.transpose(0, 1).unflatten(0, y.shape[:2])


def _times_rows(rows: Tensor, matrix: Tensor, parts: int = 1) -> Tensor:
    """[B,M,K] and [B,N,K] → [B,M,N], the products of each pair of rows; by part, which only one matrix has.

    On a CPU oneDNN copies a matrix that it is given transposed, and MKL reads it with one thread only: where rows are
    few, and reading the matrix is all there is to it, they are turned round instead.
    """
    if rows.shape[1] > FEW or not rows.is_cpu:
        return torch.bmm(rows, matrix.transpose(1, 2))
    columns = rows.transpose(1, 2)
    if parts > 1:
        by_part = torch.bmm(matrix[0].unflatten(0, (parts, -1)), columns.expand(parts, -1, -1))
        return by_part.flatten(0, 1).t().contiguous()[None]
    return torch.bmm(matrix, columns).transpose(1, 2).contiguous()


def latent_attention(
    q: Tensor, memory: Tensor, n_keys: int, latent: int, *, scale: float, bias: Tensor | None = None
) -> Tensor:
    """Attention of the last T of S positions on latents that all heads share. No copy of the latents is made.

    Args:
        q: [B,T,N,C+R], queries in the latent's space and, behind, their turned parts
        memory: [B,M,C+R], latents and turned keys; those from S on are no tokens, and finite
        n_keys: S
        latent: C
        scale: multiplies q·k
        bias: [B|1,N|1,T,S] added to the scaled scores

    Returns:
        [B,T,N,C], each head's average of latents
    """
    if memory.is_cpu and len(q) > 1 and memory[0].nbytes > LARGE:
        biases = [None] * len(q) if bias is None else bias.expand(len(q), -1, -1, -1).split(1)
        each = zip(q.split(1), memory.split(1), biases, strict=True)
        return torch.cat([latent_attention(q, m, n_keys, latent, scale=scale, bias=b) for q, m, b in each])
    (T, N), M = q.shape[1:3], memory.shape[1]
    parts = M // PART if len(q) == T == 1 and reads_fast(q) and not M % PART else 1
    scores = _times_rows((q * scale).flatten(1, 2), memory, parts).unflatten(1, (T, N))
    if bias is not None:
        scores[..., :n_keys] += bias.transpose(1, 2)
    if n_keys < M:
        scores[..., n_keys:] = float("-inf")
    if T > 1:
        later = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)[:, None]
        scores[..., n_keys - T : n_keys].masked_fill_(later, float("-inf"))
    wide = torch.promote_types(q.dtype, torch.float32)
    weights, latents = scores.softmax(-1, dtype=wide).to(memory.dtype).flatten(1, 2), memory[..., :latent]
    return _average(weights, latents, parts).unflatten(1, (T, N))


def _average(weights: Tensor, latents: Tensor, parts: int) -> Tensor:
    """[B,M,S] and the first columns [B,S,C] of a memory → [B,M,C]; of parts, which only one sequence has, the sum."""
    if len(weights) > 1:
        return torch.bmm(weights, latents)
    if parts == 1:  # of some columns oneDNN makes a copy if there is a batch, even of one
        return torch.mm(weights[0], latents[0])[None]
    by_part = weights[0].unflatten(1, (parts, -1)).transpose(0, 1)
    return torch.bmm(by_part, latents[0].unflatten(0, (parts, -1))).sum(0, keepdim=True)
