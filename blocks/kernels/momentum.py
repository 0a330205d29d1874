"""The delta rule with momentum, in chunks of tokens.

For a head, states S and M [K,V] that begin at 0, and tokens t with α = e^g and μ = e^h:

    M ← μ_t M + η_t k_t (Sᵀ α_t k_t − v_t)ᵀ;   S ← α_t S − β_t M;   y_t = Sᵀ q_t

A step of gradient descent on ½ |Sᵀ k − v|² with momentum M, and with the decay of S (Momentum DeltaNet, arXiv
2605.05838). With u_t = v_t − Sᵀ α_t k_t, what token j has written arrives in S_t by the weight

    W_tj = Σ_{i = j…t} e^{G_t − G_i} β_i e^{H_i − H_j},   G and H the sums of g and h from the chunk's start,

a product of two triangular matrices whose entries lie in [0, 1], which the paper computes by logarithms of cumulative
sums instead. In a chunk, with W' of i < t in place of i ≤ t, d_t = Σ_i e^{G_t − G_i} β_i e^{H_i}, d' likewise and
A_tj = W'_tj η_j k_t·k_j, (I + A) U = V − (K ⊙ e^G) S + (K ⊙ d') M, and

    Y = (Q ⊙ e^G) S − (Q ⊙ d) M + (W ⊙ Q (η ⊙ K)ᵀ) U;   S' = e^{G_c} S − d_c M + (W_c ⊙ η ⊙ K)ᵀ U;
    M' = e^{H_c} M − (e^{H_c − H} ⊙ η ⊙ K)ᵀ U.

S and M are one state, one below the other, of 2K rows.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

from blockwright.blocks.kernels.recurrence import CHUNK, Documents, Result, chunked, solve


def momentum_recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    decay_of_momentum: Tensor,
    rate: Tensor,
    strength: Tensor,
    state: Tensor | None = None,
    segments: Tensor | None = None,
    *,
    chunk: int = CHUNK,
) -> Result:
    """The recurrence over T tokens, in fp32 (fp64 for fp64).

    Args:
        q, k: [B,T,N,K]; normalised and scaled by the caller
        v: [B,T,N,V]
        decay: [B,T,N], g ≤ 0
        decay_of_momentum: [B,T,N], h ≤ 0
        rate: [B,T,N], η, of what momentum takes from a token
        strength: [B,T,N], β, of what the state takes from momentum
        state: [B,N,2K,V] before the first token, S above M; None for zeros
        segments: [B,T] document ids; the state is of one document
        chunk: c, tokens computed together, a power of two

    Returns:
        [B,T,N,V] in the dtype of v, and the state after the last token in fp32
    """
    known = torch.amp.is_autocast_available(v.device.type)  # autocast would round some operands and not others
    with torch.autocast(v.device.type, enabled=False) if known else nullcontext():
        return _in_chunks(q, k, v, (decay, decay_of_momentum, rate, strength), state, segments, chunk)


def _in_chunks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    numbers: tuple[Tensor, Tensor, Tensor, Tensor],
    state: Tensor | None,
    segments: Tensor | None,
    chunk: int,
) -> Result:
    B, T, N, V = v.shape
    wide, c = torch.promote_types(v.dtype, torch.float32), min(chunk, 1 << (T - 1).bit_length())
    if state is None:
        state = v.new_zeros(B, N, 2 * k.shape[-1], V, dtype=wide)
    q, k, values = (chunked(t, c, wide) for t in (q, k, v))  # [n,B,N,c,·]
    decay, of_momentum, rate, strength = (chunked(t[..., None], c, wide) for t in numbers)  # [n,B,N,c,1]
    same = None if segments is None else Documents(segments, c)
    G, H = decay.cumsum(-2), of_momentum.cumsum(-2)
    kept, carried = _kept(G, same), _kept(H, same)
    read, keep, keep_momentum = G.exp(), G[..., -1:, :].exp(), H[..., -1:, :].exp()
    from_momentum = strength * H.exp()
    if same is not None:
        read, from_momentum = read * same.reads, from_momentum * same.reads
        keep, keep_momentum = keep * same.keeps, keep_momentum * same.keeps
    taken = strength * carried
    weights, before = kept @ taken, kept.tril(-1) @ taken
    moved, moved_before = kept @ from_momentum, kept.tril(-1) @ from_momentum
    U, of_S, of_M = solve(before * rate.mT * (k @ k.mT), values, k * read, k * moved_before)
    reads = torch.cat((of_S, -of_M), -1)
    learned = rate * k
    written = torch.cat((weights[..., -1:, :].mT * learned, -carried[..., -1:, :].mT * learned), -1)
    states, new = [], []
    for i in range(len(U)):
        states.append(state)
        new.append(U[i] - reads[i] @ state)
        S, M = state.chunk(2, -2)
        decayed = torch.cat((keep[i] * S - moved[i, ..., -1:, :] * M, keep_momentum[i] * M), -2)
        state = decayed + written[i].mT @ new[i]
    attended = weights * rate.mT * (q @ k.mT)
    y = torch.cat((q * read, -q * moved), -1) @ torch.stack(states) + attended @ torch.stack(new)
    return y.permute(1, 0, 3, 2, 4).flatten(1, 2)[:, :T].to(v.dtype), state


def _kept(G: Tensor, same: Documents | None) -> Tensor:
    """e^{G_t − G_j} for j ≤ t of a document, else 0: [n,B,N,c,c]."""
    earlier = torch.ones(G.shape[-2], G.shape[-2], dtype=torch.bool, device=G.device).tril()
    earlier = earlier if same is None else earlier & same.pairs
    return (G - G.mT).masked_fill(~earlier, float("-inf")).exp()
