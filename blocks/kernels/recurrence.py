"""Linear recurrences with decay, plain or with the delta rule, in chunks of tokens and token by token.

For a head with keys of width K and values of width V, a state S [K,V] and tokens t:

    S ← Diag(e^{g_t}) S;   S ← S + k_t β_t (v_t − Sᵀ k_t)ᵀ;   y_t = Sᵀ q_t       (delta rule)
    S ← Diag(e^{g_t}) S;   S ← S − a_t (Sᵀ e_t)ᵀ + k_t v_tᵀ;  y_t = Sᵀ q_t       (erasing apart from writing)
    S ← Diag(e^{g_t}) S;   S ← S + k_t v_tᵀ;                  y_t = Sᵀ q_t       (without either)

g is one number a head (Gated DeltaNet, arXiv 2412.06464; Mamba-2, arXiv 2405.21060) or one a channel (Kimi Delta
Attention, arXiv 2510.26692). The delta rule is the second form with e = βk, a = k and values βv. Gated DeltaNet-2
(arXiv 2605.22791) erases by another vector, RWKV-7 (arXiv 2503.14456) also at another key. In a chunk of c tokens, with
G the sum of g from the chunk's start, A_ij = Σ_d e_id k_jd e^{G_id − G_jd} for j < i, (I + A)[U|W] = [V | E⊙e^G], and
a = k:

    N = U − WS;   S' = Diag(e^{G_c}) S + (K⊙e^{G_c − G})ᵀN;   y = (Q⊙e^G) S + PN,   P_ij = Σ_d q_id k_jd e^{G_id − G_jd}

With another a, N is what each token takes away, −(Sᵀe): (I + A^a)[U|W] = [A^k V | E⊙e^G], N = −U − WS. Keys are then
those of a and of k, one below the other, and their values N and V.

All but N and S is computed for all chunks at once, and these by two products a chunk in each direction. Differences
of G are formed before the exponential and are never positive: e^{−G} alone overflows. In a decay by channel they are
formed around the middle of each half of a chunk, then of each quarter and so on: log₂ c products, where the tensor of
all differences would be c times as large as the keys (as in fla's and transformers' plain versions, which also solve
row by row and multiply a chunk's outputs one after the other).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from blockwright.blocks.kernels.seam import compute, kernel

CHUNK = 64  # tokens; a power of two

Result = tuple[Tensor, Tensor]


@kernel("recurrence", "torch", order=20)
def recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    beta: Tensor | None = None,
    state: Tensor | None = None,
    segments: Tensor | None = None,
    erase: Tensor | None = None,
    at: Tensor | None = None,
    *,
    chunk: int = CHUNK,
) -> Result:
    """The recurrence over T tokens, in fp32 (fp64 for fp64).

    Args:
        q, k: [B,T,N,K]; normalised and scaled by the caller
        v: [B,T,N,V]
        decay: [B,T,N,1] or [B,T,N,K], g ≤ 0
        beta: [B,T,N], strength of the delta rule; None for none
        state: [B,N,K,V] before the first token; None for zeros
        segments: [B,T] document ids; the state is of one document
        erase: [B,T,N,K], e, which reads what is erased, in place of beta; None for none
        at: [B,T,N,K], a, the key where it is erased; None for k
        chunk: c, tokens computed together, a power of two

    Returns:
        [B,T,N,V] in the dtype of v, and the state after the last token in fp32
    """
    # Autocast would round the operands of some products and not of others; meta tensors have none.
    known = torch.amp.is_autocast_available(v.device.type)
    with torch.autocast(v.device.type, enabled=False) if known else nullcontext():
        return _recurrence(q, k, v, decay, beta, state, segments, erase, at, chunk)


@kernel("recurrence_each", "one_by_one", order=20)
def recurrence_each(*given: Any) -> Result:
    """The recurrence over a few tokens of one document, as a draft's, with the state after each, [B,T,N,K,V]: one token
    after the other, by the automatic choice of ``recurrence``."""
    return one_by_one(partial(compute, "recurrence"), *given)


def one_by_one(
    step: Callable[..., Result],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    beta: Tensor | None,
    state: Tensor | None,
    segments: Tensor | None = None,
    erase: Tensor | None = None,
    at: Tensor | None = None,
) -> Result:
    """``recurrence_each`` by a ``recurrence`` that is called for one token after the other."""
    outputs, states = [], []
    for t in range(v.shape[1]):
        token = slice(t, t + 1)
        strength, erased, place = (None if x is None else x[:, token] for x in (beta, erase, at))
        now = q[:, token], k[:, token], v[:, token], decay[:, token], strength
        y, state = step(*now, state, None, erased, place)
        outputs.append(y)
        states.append(state)
    return torch.cat(outputs, 1), torch.stack(states, 1)


def _recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    beta: Tensor | None,
    state: Tensor | None,
    segments: Tensor | None,
    erase: Tensor | None,
    at: Tensor | None,
    chunk: int,
) -> Result:
    B, T, N, V = v.shape
    wide = torch.promote_types(v.dtype, torch.float32)
    if state is None:
        state = v.new_zeros(B, N, k.shape[-1], V, dtype=wide)
    if T == 1:
        values, q, k, decay = (t[:, 0].to(wide) for t in (v, q, k, decay))
        beta, erase, at = (None if t is None else t[:, 0].to(wide) for t in (beta, erase, at))
        y, state = _step(q, k, values, decay, beta, erase, at, state)
        return y[:, None].to(v.dtype), state
    c = min(chunk, 1 << (T - 1).bit_length())
    q, k, values, decay = (chunked(t, c, wide) for t in (q, k, v, decay))
    erase, at = (None if t is None else chunked(t, c, wide) for t in (erase, at))
    if beta is not None:
        strength = chunked(beta[..., None], c, wide)
        erase, values = k * strength, values * strength
    documents = None if segments is None else Documents(segments, c)
    y, state = _in_chunks(q, k, values, decay, erase, at, state, documents)
    return y.permute(1, 0, 3, 2, 4).flatten(1, 2)[:, :T].to(v.dtype), state


def recurrence_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    beta: Tensor | None = None,
    state: Tensor | None = None,
    segments: Tensor | None = None,
    erase: Tensor | None = None,
    at: Tensor | None = None,
) -> Result:
    """``recurrence`` token by token, as in the formula."""
    wide = torch.promote_types(v.dtype, torch.float32)
    q, k, values, decay = (t.to(wide) for t in (q, k, v, decay))
    S = values.new_zeros(*v[:, 0].shape[:2], k.shape[-1], v.shape[-1]) if state is None else state
    outputs = []
    for t in range(v.shape[1]):
        if segments is not None and t:
            S = S * (segments[:, t] == segments[:, t - 1])[:, None, None, None]
        strength, erased, place = (None if x is None else x[:, t].to(wide) for x in (beta, erase, at))
        y, S = _step(q[:, t], k[:, t], values[:, t], decay[:, t], strength, erased, place, S)
        outputs.append(y)
    return torch.stack(outputs, 1).to(v.dtype), S


def _step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    beta: Tensor | None,
    erase: Tensor | None,
    at: Tensor | None,
    state: Tensor,
) -> Result:
    """One token: q, k, erase, at [B,N,K], v [B,N,V], decay [B,N,1|K], beta [B,N] → [B,N,V] and the new state."""
    state = state * decay.exp()[..., None]
    if beta is not None:
        v = (v - _read(state, k)) * beta[..., None]
    elif erase is not None and at is None:
        v = v - _read(state, erase)
    elif erase is not None:
        state = state - at[..., None] * _read(state, erase)[..., None, :]  # type: ignore[index]
    state = state + k[..., None] * v[..., None, :]
    return _read(state, q), state


def _read(state: Tensor, key: Tensor) -> Tensor:
    """Sᵀ key: [B,N,V]."""
    return (key[..., None, :] @ state)[..., 0, :]


def chunked(x: Tensor, c: int, dtype: torch.dtype) -> Tensor:
    """[B,T,N,·] → [n,B,N,c,·], zeros behind the last token: they write nothing and do not decay."""
    missing = -x.shape[1] % c
    x = F.pad(x, (0, 0, 0, 0, 0, missing)) if missing else x
    return x.unflatten(1, (-1, c)).permute(1, 0, 3, 2, 4).to(dtype, memory_format=torch.contiguous_format)


class Documents:
    """Which tokens of a chunk share a document with each other, with the state before the chunk, and with its end."""

    def __init__(self, segments: Tensor, c: int) -> None:
        missing = -segments.shape[1] % c
        ids = torch.cat((segments, segments[:, -1:].expand(-1, missing)), 1).unflatten(1, (-1, c))
        ids = ids.transpose(0, 1)[:, :, None, :, None]  # [n,B,1,c,1]
        end = ids[..., -1:, :]
        carried = torch.cat((ids[:1, ..., :1, :], end[:-1]))
        self.pairs = ids == ids.mT
        self.reads, self.writes, self.keeps = ids == carried, ids == end, end == carried


def _in_chunks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    erase: Tensor | None,
    at: Tensor | None,
    state: Tensor,
    same: Documents | None,
) -> Result:
    """Chunks [n,B,N,c,·] → outputs [n,B,N,c,V] and the state after the last."""
    G = decay.cumsum(-2)
    last = G[..., -1:, :]
    earlier = torch.ones(G.shape[-2], G.shape[-2], dtype=torch.bool, device=G.device).tril()
    read, write, keep = G.exp(), (last - G).exp(), last.exp()
    if same is not None:
        earlier = earlier & same.pairs
        read, write, keep = read * same.reads, write * same.writes, keep * same.keeps
    pairs = _pairs_by_head if G.shape[-1] == 1 else _pairs_by_channel
    moved, written = None, k * write
    if erase is None:
        (attended,) = pairs((q,), k, G, earlier)
    elif at is None:
        attended, within = pairs((q, erase), k, G, earlier)
        v, moved = solve(within, v, erase * read)
    else:
        attended, within = pairs((q, erase), k, G, earlier)
        of_erased, among = pairs((q, erase), at, G, earlier)
        taken, moved = solve(among, within.tril(-1) @ v, erase * read)
        v, moved = torch.cat((-taken, v), -2), torch.cat((moved, torch.zeros_like(moved)), -2)
        attended, written = torch.cat((of_erased, attended), -1), torch.cat((at * write, written), -2)
    states, new, state = _Scan.apply(v, moved, written, keep.mT, state)
    return attended @ new + (q * read) @ states, state


def solve(A: Tensor, *sides: Tensor) -> tuple[Tensor, ...]:
    """(I + A)⁻¹ R of A [...,c,c], of which the part below the diagonal is read, for each right side R [...,c,·]."""
    found: Tensor = _Solve.apply(A, torch.cat(sides, -1))
    return found.split([R.shape[-1] for R in sides], -1)


class _Solve(torch.autograd.Function):
    """(I + A)⁻¹ R of strictly lower A [...,c,c] and R [...,c,·]; what A has on and above the diagonal is not read.

    The inverse is put together from those of halves, quarters, …: products of matrices, where a batch of small
    triangular solves takes several times as long on a CPU.
    """

    @staticmethod
    def forward(ctx: Any, A: Tensor, R: Tensor) -> Tensor:
        inverse = _inverse(A)
        X = inverse @ R
        ctx.save_for_backward(inverse, X)
        return X

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        inverse, X = ctx.saved_tensors
        grad_R = inverse.mT @ grad
        return (grad_R @ X.mT).tril_(-1).neg_(), grad_R


def _inverse(A: Tensor) -> Tensor:
    """(I + A)⁻¹ of A [...,c,c], c a power of two, of which the part below the diagonal is read."""
    c, h = A.shape[-1], 1
    inverse = torch.eye(c, dtype=A.dtype, device=A.device).expand(A.shape).contiguous()
    while h < c:
        known, given = _diagonal(inverse, 2 * h), _diagonal(A, 2 * h)
        across = given[..., h:, :h] @ known[..., :h, :h]
        known[..., h:, :h] = -(known[..., h:, h:] @ across)
        h *= 2
    return inverse


def _diagonal(A: Tensor, h: int) -> Tensor:
    """The blocks [...,c/h,h,h] on the diagonal of A [...,c,c]: a view."""
    blocks = A.unflatten(-2, (-1, h)).unflatten(-1, (-1, h))
    return blocks.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)


class _Scan(torch.autograd.Function):
    """N_i = U_i − W_i S_i, S_{i+1} = E_i S_i + K̃_iᵀ N_i over chunks i; without W, N = U.

    Args:
        U: [n,B,N,c,V]; c is twice the chunk where it erases at other keys than it writes
        W: [n,B,N,c,K], or None
        K: K̃ [n,B,N,c,K]
        keep: E [n,B,N,1|K,1]
        state: [B,N,K,V]

    Returns:
        the state before each chunk [n,B,N,K,V], N, and the state after the last
    """

    @staticmethod
    def forward(
        ctx: Any, U: Tensor, W: Tensor | None, K: Tensor, keep: Tensor, state: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        n, B, N = U.shape[:3]
        states = U.new_empty(n + 1, B * N, K.shape[-1], U.shape[-1])
        states[0] = state.flatten(0, 1)
        # Contiguous, whatever the strides of U are, as those of one row: the compiler writes into nothing else.
        new = U.flatten(1, 2) if W is None else U.new_empty(U.shape).flatten(1, 2)
        u, k, e = (t.flatten(1, 2) for t in (U, K, keep))
        w = None if W is None else W.flatten(1, 2)
        for i in range(n):
            if w is not None:
                torch.baddbmm(u[i], w[i], states[i], alpha=-1, out=new[i])
            torch.baddbmm(states[i] * e[i], k[i].mT, new[i], out=states[i + 1])
        ctx.save_for_backward(states, new, w, k, e)
        states, new = states.unflatten(1, (B, N)), new.unflatten(1, (B, N))
        return states[:-1], new if W is not None else new.clone(), states[-1].clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_states: Tensor, grad_new: Tensor, grad_last: Tensor) -> tuple[Tensor | None, ...]:
        states, new, w, k, e = ctx.saved_tensors
        n, B, N = grad_new.shape[:3]
        after, grad = torch.empty_like(states[1:]), new.new_empty(new.shape)  # of S_{i+1} and of N_i
        carried, from_states, from_new = grad_last.flatten(0, 1), grad_states.flatten(1, 2), grad_new.flatten(1, 2)
        for i in reversed(range(n)):
            after[i] = carried
            torch.baddbmm(from_new[i], k[i], carried, out=grad[i])
            carried = torch.addcmul(from_states[i], e[i], carried)
            if w is not None:
                carried = carried.baddbmm_(w[i].mT, grad[i], alpha=-1)
        before = states[:-1]
        grad_e = (after * before).sum(-1, keepdim=True)
        grad_e = grad_e.sum(-2, keepdim=True) if e.shape[-2] == 1 else grad_e
        grads = (grad, None if w is None else -(grad @ before.mT), new @ after.mT, grad_e)
        return (*(None if g is None else g.unflatten(1, (B, N)) for g in grads), carried.unflatten(0, (B, N)))


def _pairs_by_head(rows: tuple[Tensor, ...], k: Tensor, G: Tensor, earlier: Tensor) -> list[Tensor]:
    """Σ_d a_id k_jd e^{G_i − G_j} of each of the rows a for j ≤ i in a document, else 0: [n,B,N,c,c]."""
    weights = (G - G.mT).masked_fill(~earlier, float("-inf")).exp()
    return [a @ k.mT * weights for a in rows]


def _pairs_by_channel(rows: tuple[Tensor, ...], k: Tensor, G: Tensor, earlier: Tensor) -> list[Tensor]:
    """``_pairs_by_head`` with a decay for each d."""
    A = torch.cat(rows, -1).unflatten(-1, (len(rows), -1))  # [n,B,N,c,a,K]
    found = (A * k[..., None, :]).sum(-1)[..., None, None, :].movedim(-1, -3)  # [n,B,N,m,a,h,h], from h = 1 up
    c, h = k.shape[-2], 1
    while h < c:
        halves = [t.unflatten(-2, (-1, 2, h)) for t in (k, G)]
        middle = halves[1][..., 1, :1, :]  # [n,B,N,m,1,K]
        late = A.unflatten(-3, (-1, 2, h))[..., 1, :, :, :] * (halves[1][..., 1, :, :] - middle).exp()[..., None, :]
        early = halves[0][..., 0, :, :] * (middle - halves[1][..., 0, :, :]).exp()
        across = (late.flatten(-3, -2) @ early.mT).unflatten(-2, (h, -1)).transpose(-3, -2)
        first, second = found.unflatten(3, (-1, 2)).unbind(4)
        above = torch.cat((first, torch.zeros_like(first)), -1)
        found, h = torch.cat((above, torch.cat((across, second), -1)), -2), 2 * h
    return [a.masked_fill(~earlier, 0.0) for a in found[:, :, :, 0].unbind(3)]
