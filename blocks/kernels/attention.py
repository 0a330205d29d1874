"""Scaled-dot-product attention, causal and of all on all: torch's kernels and references; and over MLA's latents.

Decoding with multi-head latent attention expands no latent. With W_kv_up = [U; V] by head, q_nope · (U c) = (Uᵀ q_nope)
· c and Σ w (V c) = V Σ w c. So queries are mapped into the latent space once, all heads score and average one shared
sequence of latents, and the averages are mapped back (DeepSeek-AI 2024, arXiv 2405.04434, appendix C). The reference is
``causal_attention`` on expanded keys and values.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.backends.cuda import SDPAParams
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from blockwright.blocks.kernels.products import multiplies_by_onednn, reads_fast
from blockwright.blocks.kernels.scoring import Scoring, dense
from blockwright.blocks.kernels.seam import kernel


@kernel("attention", "sdpa", order=20)
def causal_attention(q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> Tensor:
    """Attention of the last T of S positions on all previous ones.

    Args:
        q: [B,T,N,H]
        k: [B,S,K,H], S ≥ T; N is a multiple of K, and each KV head serves N/K adjacent query heads
        v: [B,S,K,V]
        scoring: computation of the scores

    Returns:
        [B,T,N,V]
    """
    if scoring.softcap is not None:  # not supported by torch's fused kernels
        return causal_attention_reference(q, k, v, scoring)
    y = as_called(q, k, v, scoring, on_gpu=q.is_cuda).compute()
    return (y.transpose(1, 2) if q.shape[1] > 1 else y.flatten(1, 2)[:, None])[..., : v.shape[-1]]


class Called(NamedTuple):
    """What torch's ``scaled_dot_product_attention`` is called with. By it torch chooses a fused kernel, or MATH, which
    holds all scores.

    q: [B,N,T,H]; k: [B,K,S,H]; v: [B,K,S,V]
    mask: a tensor, which few kernels take; None where ``seen`` says all
    seen: ``all`` keys, those up to the query (``square``, T = S), or the same for the ``last`` T of S
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    seen: Literal["all", "square", "last"]
    scale: float

    @property
    def grouped(self) -> bool:
        return self.k.shape[1] != self.q.shape[1]

    def compute(self) -> Tensor:
        mask: Any = _lower_right(self.q.shape[2], self.k.shape[2]) if self.seen == "last" else self.mask
        causal = self.seen == "square"
        return F.scaled_dot_product_attention(
            *self[:3], attn_mask=mask, is_causal=causal, scale=self.scale, enable_gqa=self.grouped
        )


def as_called(q: Tensor, k: Tensor, v: Tensor, scoring: Scoring, on_gpu: bool) -> Called:
    """What torch is called with: its fused kernels on a GPU take fewer cases than those of a CPU.

    Args:
        q, k, v, scoring: as of ``causal_attention``, without a softcap
        on_gpu: whether for a GPU, where flash attention alone takes groups of heads and any width
    """
    scale, _, segments, window, sinks, _ = scoring
    T, S, V, bias = q.shape[1], k.shape[1], v.shape[-1], dense(scoring.bias)
    # Flash kernels need equal widths: zero columns change neither scores nor, once removed, the result. A cost, which
    # is measured on the meta device, has none: kernels that take unequal widths make no products with them.
    if q.shape[-1] > V and (on_gpu or not q.is_meta):
        v = F.pad(v, (0, q.shape[-1] - V))
    elif q.shape[-1] < V and (on_gpu or not q.is_meta):
        q, k = F.pad(q, (0, V - q.shape[-1])), F.pad(k, (0, V - k.shape[-1]))
    window = None if window is None or window >= S else window
    plain = scoring._replace(window=window).plain
    mask: Tensor | None = None
    seen: Literal["all", "square", "last"] = "all"
    if T == 1 and bias is not None and segments is None and window is None and sinks is None:
        mask, bias = bias.to(q.dtype), None  # one query sees every key
    elif plain and 1 < T < S and on_gpu:
        seen = "last"
    elif not plain or 1 < T < S:
        mask = visible(T, S, q.device, segments, window)
    elif T > 1:
        seen = "square"
    if bias is not None:
        assert mask is not None
        mask = bias.to(q.dtype).masked_fill(~mask, float("-inf"))
    if sinks is not None and not q.is_meta:  # one more key and value, of zeros, whose score is the sink
        k, v, mask = F.pad(k, (0, 0, 0, 0, 0, 1)), F.pad(v, (0, 0, 0, 0, 0, 1)), _with_sinks(mask, sinks, q)
    call = Called(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask, seen, scale)
    return as_efficient_takes(call) if on_gpu and not flash_takes(call) else call


def flash_takes(call: Called) -> bool:
    """Whether torch's flash attention takes a call, on GPUs of compute capability 8.0 and up."""
    H, V = call.q.shape[-1], call.v.shape[-1]
    return call.mask is None and call.q.dtype.itemsize == 2 and H == V <= 256


def as_efficient_takes(call: Called) -> Called:
    """The same for torch's memory-efficient attention: widths that are multiples of 8, and no groups of heads, but one
    query of each head of a group as several of one head, or a copy of keys and values for each head."""
    q, k, v, mask = call[:4]
    q, k, v = (F.pad(t, (0, -t.shape[-1] % 8)) for t in (q, k, v))
    (_, N, T, _), K = q.shape, k.shape[1]
    if T > 1 and K < N:
        k, v = (t.repeat_interleave(N // K, 1) for t in (k, v))
    elif K < N:
        q = q.reshape(len(q), K, N // K, -1)
        mask = mask.reshape(len(mask), K, N // K, -1) if mask is not None and mask.shape[1] == N else mask
    return call._replace(q=q, k=k, v=v, mask=mask)


def cudnn_takes(q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> bool:
    """Whether cuDNN takes keys wider than values (MLA) as they are, by torch's own account; else values are padded."""
    if not scoring.plain or q.shape[-1] <= v.shape[-1] or q.shape[1] != k.shape[1] or torch.compiler.is_compiling():
        return False
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    if q.is_meta:  # a forecast
        return cudnn_takes_widths(q.shape[-1], v.shape[-1], q.dtype)
    return torch.backends.cuda.can_use_cudnn_attention(SDPAParams(q, k, v, None, 0.0, True, k.shape[1] != q.shape[1]))


def cudnn_takes_widths(H: int, V: int, dtype: torch.dtype) -> bool:
    """Whether cuDNN takes widths of keys and values in torch 2.10, on GPUs of compute capability 9 and 10; newer take
    more."""
    fits = max(H, V) <= 128 or (H, V) == (192, 128)
    return fits and dtype.itemsize == 2 and H % 8 == V % 8 == 0


@kernel("attention", "cudnn", devices=("cuda",), capability=(9, 0), takes=cudnn_takes, order=15)
def cudnn_attention(q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> Tensor:
    """The same by cuDNN, of whole sequences, with values that are not padded. Not run by this project so far."""
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        grouped = k.shape[1] != q.shape[1]
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scoring.scale, enable_gqa=grouped)
    return y.transpose(1, 2)


def _lower_right(T: int, S: int) -> Any:
    """The mask of the last T of S positions as torch's fused kernels know it, with no tensor of T × S."""
    from torch.nn.attention.bias import causal_lower_right  # brings the compiler along, which takes seconds

    return causal_lower_right(T, S)


def _with_sinks(mask: Tensor | None, sinks: Tensor, q: Tensor) -> Tensor:
    """Additive scores [B|1,N,T,S+1] with the sinks as last column."""
    assert mask is not None
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill(~mask, float("-inf"))
    B, _, T, S = mask.shape
    N = q.shape[2]
    column = sinks.to(q.dtype)[None, :, None, None].expand(B, N, T, 1)
    return torch.cat((mask.expand(B, N, T, S), column), -1)


def visible(T: int, S: int, device: torch.device, segments: Tensor | None = None, window: int | None = None) -> Tensor:
    """Which keys each query may see: [1,1,T,S] or, with segments [B,S], [B,1,T,S] booleans."""
    queries, keys = torch.arange(S - T, S, device=device)[:, None], torch.arange(S, device=device)
    mask = (keys <= queries)[None, None]
    if window is not None:
        mask = mask & (keys > queries - window)
    if segments is not None:
        mask = mask & (segments[:, None, S - T :, None] == segments[:, None, None, :])
    return mask


@kernel("attention", "reference", automatic=False, order=30)
def causal_attention_reference(q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> Tensor:
    """The definition: scores, mask, softmax, average; one KV head copied for each query head."""
    scale, _, segments, window, sinks, softcap = scoring
    bias = dense(scoring.bias)
    groups = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)
    scores = torch.einsum("btnh,bsnh->bnts", q, k) * scale
    scores = scores if softcap is None else softcap * (scores / softcap).tanh()
    scores = scores if bias is None else scores + bias
    scores = scores.masked_fill(~visible(q.shape[1], k.shape[1], q.device, segments, window), float("-inf"))
    if sinks is not None:
        B, N, T, _ = scores.shape
        scores = torch.cat((scores, sinks.to(scores.dtype)[None, :, None, None].expand(B, N, T, 1)), -1)
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(v.dtype)
    return torch.einsum("bnts,bsnv->btnv", weights[..., : v.shape[1]], v)


# --- attention of all positions on all, as in encoders: fast implementations and a reference ---


@kernel("encoder_attention", "sdpa", order=20)
def encoder_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """softmax(q kᵀ · scale) v without a mask.

    Args:
        q, k, v: [B,T,N,H]
        scale: multiplies q·k

    Returns:
        [B,T,N,H]
    """
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)


@kernel("encoder_attention", "reference", automatic=False, order=30)
def encoder_attention_reference(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """The definition."""
    scores = torch.einsum("btnh,bsnh->bnts", q, k) * scale
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(v.dtype)
    return torch.einsum("bnts,bsnv->btnv", weights, v)


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
    return _average_latents(weights, latents, parts).unflatten(1, (T, N))


def _average_latents(weights: Tensor, latents: Tensor, parts: int) -> Tensor:
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
