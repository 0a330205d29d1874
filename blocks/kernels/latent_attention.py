"""Attention over latents that are never expanded: the decoding path of multi-head latent attention.

With W_kv_up = [U; V] by head, q_nope · (U c) = (Uᵀ q_nope) · c and Σ w (V c) = V Σ w c. So queries are mapped into the
latent space once, all heads score and average one shared sequence of latents, and the averages are mapped back
(DeepSeek-AI 2024, arXiv 2405.04434, appendix C). The reference is ``causal_attention`` on expanded keys and values.
"""

from __future__ import annotations

import torch
from torch import Tensor

from blockwright.blocks.kernels.products import multiplies_by_onednn, reads_fast
from blockwright.blocks.kernels.seam import kernel

FEW = 64  # rows; larger products are compute-bound
ALONE = 16  # rows from which one thread multiplies faster without swapping
LARGE = 2**21  # bytes of a row's cache; above, rows are computed one by one, to reuse the CPU's cache
PART = 256  # positions; MKL reads a long cache fastest as a batch of parts
# Where queries are fewer than keys, bytes of all heads' keys and values
KEPT = 2**26  # that are kept for the gradient; more are expanded again
EXPANDED = 2**28  # that are expanded at a time


def absorbs(T: int, S: int, latent: int, rope: int, nope: int, value: int) -> bool:
    """Whether T new tokens with S in total (themselves included) are cheaper absorbed than expanded.

    Multiplications per head. Expanded: S·C·(n + v) to expand, T·S·(n + R + v) to score and average. Absorbed:
    T·C·(n + v) to map queries and values, T·S·(2C + R) to score and average. One new token is nearly always cheaper
    absorbed, a whole prompt nearly always expanded; at C = 512 and n = v = 128, as in DeepSeek, they meet at T = 170.
    The absorbed way also materialises T·S scores, where the other one's kernel materialises none but S·(n + v) numbers
    are expanded: it must not need more memory.

    Args:
        latent, rope, nope, value: the widths C, R, n, v
    """
    expanded = S * latent * (nope + value) + T * S * (nope + rope + value)
    absorbed = T * latent * (nope + value) + T * S * (2 * latent + rope)
    return nope + value >= T and absorbed < expanded


def heads_together(n_heads: int, a_head: int) -> int:
    """The most heads, a divisor of all, whose keys and values of ``a_head`` bytes each fit ``EXPANDED``; at least 1."""
    return max(n for n in range(1, n_heads + 1) if n_heads % n == 0 and (n == 1 or n * a_head <= EXPANDED))


def key_multiple(dtype: torch.dtype, device: torch.device) -> int:
    """Multiple to which the number of keys should be rounded up.

    oneDNN, used for low precision on CPUs, and for fp32 where allowed, compiles code for every new shape, and each
    decoding step has one. MKL does not, so there rounding is only extra work.
    """
    return 256 if device.type == "cpu" and multiplies_by_onednn(dtype) else 1


def into_latents(q: Tensor, key_up: Tensor) -> Tensor:
    """Queries [B,T,N,n] through their heads' key matrices [N,n,C] → [B,T,N,C]."""
    rows = torch.bmm(q.flatten(0, 1).transpose(0, 1), key_up.to(q.dtype))
    return rows.transpose(0, 1).unflatten(0, q.shape[:2])


def out_of_latents(y: Tensor, value_up: Tensor) -> Tensor:
    """Averages of latents [B,T,N,C] through their heads' value matrices [N,v,C] → [B,T,N,v]."""
    rows = _times_rows(y.flatten(0, 1).transpose(0, 1), value_up.to(y.dtype))
    return rows.transpose(0, 1).unflatten(0, y.shape[:2])


def of_latents(expanded: Tensor, shared: Tensor, key: int, value: int) -> tuple[Tensor, Tensor]:
    """What all heads' matrices make of latents, [B,S,N·(n+v)], and a part of the keys that heads share, [B,S,R] → keys
    [B,S,N,n+R] and values [B,S,N,v]."""
    k, v = expanded.unflatten(-1, (-1, key + value)).split((key, value), -1)
    return torch.cat((k, shared[:, :, None].expand(-1, -1, k.shape[2], -1)), -1), v


def _times_rows(rows: Tensor, matrix: Tensor, parts: int = 1) -> Tensor:
    """[B,M,K] and [B,N,K] → [B,M,N], the products of each pair of rows; in parts, for a single matrix only.

    On a CPU oneDNN copies a transposed matrix, and MKL reads it with one thread: for few rows, where reading the matrix
    dominates, the operands are swapped.
    """
    most = ALONE - 1 if torch.get_num_threads() == 1 and reads_fast(rows) else FEW
    if rows.shape[1] > most or not rows.is_cpu:
        return torch.bmm(rows, matrix.transpose(1, 2))
    columns = rows.transpose(1, 2)
    if parts > 1:
        by_part = torch.bmm(matrix[0].unflatten(0, (parts, -1)), columns.expand(parts, -1, -1))
        return by_part.flatten(0, 1).t().contiguous()[None]
    return torch.bmm(matrix, columns).transpose(1, 2).contiguous()


@kernel("latent_attention", "absorbed", order=20)
def latent_attention(
    q: Tensor, memory: Tensor, n_keys: int, latent: int, scale: float, bias: Tensor | None = None
) -> Tensor:
    """Attention of the last T of S positions on latents shared by all heads, which are not copied.

    Args:
        q: [B,T,N,C+R], queries in latent space, followed by their rotated parts
        memory: [B,M,C+R], latents and rotated keys; entries from S on are finite padding
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
    """[B,M,S] and the first columns [B,S,C] of a memory → [B,M,C]; the sum over parts, for a single sequence only."""
    if len(weights) > 1:
        return torch.bmm(weights, latents)
    if parts == 1:  # oneDNN copies a column slice in a batch, even of one
        return torch.mm(weights[0], latents[0])[None]
    by_part = weights[0].unflatten(1, (parts, -1)).transpose(0, 1)
    return torch.bmm(by_part, latents[0].unflatten(0, (parts, -1))).sum(0, keepdim=True)


@kernel("latent_attention", "reference", automatic=False, order=30)
def latent_attention_reference(
    q: Tensor, memory: Tensor, n_keys: int, latent: int, scale: float, bias: Tensor | None = None
) -> Tensor:
    """The same as the definition: one key and value head of attention, shared by all query heads."""
    T, keys = q.shape[1], memory[:, :n_keys]
    scores = torch.einsum("btnc,bsc->bnts", q, keys) * scale
    scores = scores if bias is None else scores + bias
    later = torch.ones(T, n_keys, dtype=torch.bool, device=q.device).triu(n_keys - T + 1)
    wide = torch.promote_types(q.dtype, torch.float32)
    weights = scores.masked_fill(later, float("-inf")).softmax(-1, dtype=wide).to(memory.dtype)
    return torch.einsum("bnts,bsc->btnc", weights, keys[..., :latent])
