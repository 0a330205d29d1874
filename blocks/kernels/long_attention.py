"""Attention to a long cache without all of its scores: part by part, or to few keys that are gathered.

Causal attention on a CPU reads a part of the cache at a time, so memory does not grow with its length. The softmax is
online, over parts of the keys (Milakov & Gimelshein 2018, arXiv 1805.02867), as in FlashAttention (Dao et al. 2022,
arXiv 2205.14135). Keys and values come from a function that is asked for those of some tokens, and may expand latents
or dequantise codes. Unlike torch's flash kernel for CPUs it needs no mask where queries are the last of more keys,
takes values narrower than keys as they are (MLA), and computes low precision's products in that precision, its softmax
in fp32. The reference is ``causal_attention`` on all of them.

A selector leaves a query 2,048 of 131,072 tokens, say. Gathering costs a copy of K keys for every query, all scores
cost S products: so K must be a small part of S. The reference is the same attention on all keys, with a bias of −∞ on
those that are not seen.

Both are without gradient: keys that many queries share would each have their gradients summed up. The largest scores
of heads, which a callback may ask for, are noted beside the kernel that attends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from blockwright.blocks.base import Block
from blockwright.blocks.kernels.attention import visible
from blockwright.blocks.kernels.choice import Kernels
from blockwright.blocks.kernels.scoring import Scoring, is_real

Read = Callable[[slice], tuple[Tensor, ...]]
Bias = Callable[[slice, slice], Tensor | None]

# Tokens. Between them a CPU attends in blocks; beyond, torch's own attention does where it needs no mask (see
# implementation ``blocked``), and this where keys are cached.
SHORTEST, LONGEST = 128, 4096
ROWS = 256  # queries of a block
SCORES = 2**21  # of a block of queries on a part of the keys, all heads'
PARTS = (256, 2048)  # the fewest and the most keys of a part


def suits(T: int, S: int) -> bool:
    """Whether T new tokens, with S in total, are many on a long past, and nothing needs a gradient."""
    return SHORTEST <= T < S > LONGEST and not torch.is_grad_enabled() and not torch.compiler.is_compiling()


def attention_in_parts(q: Tensor, n_keys: int, read: Read, scale: float, bias: Bias | None = None) -> Tensor:
    """Attention of the last T of S positions on all previous ones.

    Args:
        q: [B,T,N,H]
        n_keys: S
        read: keys [B,n,K,H] and values [B,n,K,V] of n of the S tokens; N is a multiple of K
        scale: multiplies q·k
        bias: of some of the T queries on some of the S keys, [B|1,N|1,t,n], added to the scaled scores

    Returns:
        [B,T,N,V]
    """
    B, T, N, _ = q.shape
    past, part = n_keys - T, min(max(SCORES // (B * N * min(T, ROWS)), PARTS[0]), PARTS[1])
    queries = (q * scale).transpose(1, 2)
    running: _Running | None = None
    for start in range(0, n_keys, part):
        keys = slice(start, min(start + part, n_keys))
        k, v = (t.transpose(1, 2).contiguous() for t in read(keys))
        running = running or _Running(queries, v)
        for row in range(max(0, start - past) // ROWS * ROWS, T, ROWS):
            rows = slice(row, min(row + ROWS, T))
            seen = slice(start, min(keys.stop, past + rows.stop))  # by the last of these queries
            n = seen.stop - seen.start
            scores = _per_kv_head(queries[:, :, rows], k[:, :, :n].transpose(2, 3)).to(running.total.dtype)
            added = None if bias is None else bias(rows, seen)
            if added is not None:
                scores += added
            if seen.stop > past + row + 1:
                later = torch.ones(scores.shape[2:], dtype=torch.bool).triu_(past + row - start + 1)
                scores.masked_fill_(later, float("-inf"))
            running.add(rows, scores, v[:, :, :n])
    assert running is not None
    return (running.y / running.total).to(q.dtype).transpose(1, 2)


class _Running:
    """Softmax-weighted sums of the values seen so far: of each query the largest score, the sum of weights relative to
    it, and that of weighted values, [B,N,T,·] in fp32 or more."""

    def __init__(self, queries: Tensor, v: Tensor) -> None:
        wide = torch.promote_types(queries.dtype, torch.float32)
        # Finite: a query may see none of the first keys, and −∞ − −∞ is no number.
        self.top = torch.full((*queries.shape[:3], 1), torch.finfo(wide).min, dtype=wide)
        self.total = torch.zeros_like(self.top)
        self.y = torch.zeros(*queries.shape[:3], v.shape[-1], dtype=wide)

    def add(self, rows: slice, scores: Tensor, v: Tensor) -> None:
        """Add values [B,K,n,V] by scores [B,N,t,n] of some queries; the scores are overwritten."""
        top = torch.maximum(self.top[:, :, rows], scores.amax(-1, keepdim=True))
        weights = scores.sub_(top).exp_()
        kept = (self.top[:, :, rows] - top).exp_()
        self.total[:, :, rows] = self.total[:, :, rows] * kept + weights.sum(-1, keepdim=True)
        self.y[:, :, rows] = self.y[:, :, rows] * kept + _per_kv_head(weights.to(v.dtype), v)
        self.top[:, :, rows] = top


def _per_kv_head(rows: Tensor, matrix: Tensor) -> Tensor:
    """[B,N,t,a] times [B,K,a,b] → [B,N,t,b]; each KV head serves N/K adjacent query heads."""
    B, N, t, _ = rows.shape
    K = matrix.shape[1]
    product = torch.bmm(rows.reshape(B * K, N // K * t, -1), matrix.flatten(0, 1))
    return product.view(B, N, t, -1)


# Keys to one that is seen, from which on they are gathered: of one query, and of several, whose products on keys of
# their own are of fewer rows than on common ones. Latents are wide, and all heads read them: PART for several too.
PART, PART_OF_SEVERAL = 8, 32
LEAST = 1024  # keys in all
GATHERED = {"cpu": 2**23, "cuda": 2**28}  # bytes in memory at a time: a CPU's cache holds them

Attend = Callable[[tuple[Tensor, ...], tuple[Tensor, ...], Tensor], Tensor]


def few(seen: Tensor, part: int | None = None) -> Tensor | None:
    """The keys that queries see, of seen [B,T,S]: indices [B,T,K], the K of the query that sees most; a query that sees
    fewer has some that it does not see. None where they are not few, one of ``part`` keys at most, or something needs a
    gradient."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or seen.is_meta or type(seen) is not Tensor:
        return None
    T, S = seen.shape[1:]
    if S < LEAST:
        return None
    numbers = seen.view(torch.uint8)  # whose sum is several times as fast
    most = int(numbers.sum(-1, dtype=torch.int32).amax())
    part = part or (PART if T == 1 else PART_OF_SEVERAL)
    if most * part > S - T // 2:  # of later keys no scores are computed
        return None
    return numbers.topk(most, -1, sorted=False).indices


def taken(of_keys: Tensor, index: Tensor) -> Tensor:
    """[B|1,S,…] and indices [B,T,K] → [B·T,K,…]."""
    if len(of_keys) == 1:
        return of_keys[0].index_select(0, index.flatten()).unflatten(0, index.shape).flatten(0, 1)
    made = of_keys.new_empty(len(index), index[0].numel(), *of_keys.shape[2:])
    for keys, own, row in zip(of_keys, index, made, strict=True):  # several times as fast as indexing by both
        torch.index_select(keys, 0, own.flatten(), out=row)
    return made.unflatten(1, index.shape[1:]).flatten(0, 1)


def pieces(n: int, a_query: int, device: torch.device) -> Iterator[slice]:
    """Some of n queries at a time, for each of which so many bytes are gathered."""
    together = max(1, GATHERED.get(device.type, 2**26) // max(1, a_query))
    return (slice(start, min(start + together, n)) for start in range(0, n, together))


def attend_few(
    attend: Attend, queries: tuple[Tensor, ...], stored: tuple[Tensor, ...], bias: Tensor, part: int | None = None
) -> Tensor | None:
    """Attention of queries to the keys that a bias leaves them.

    Args:
        attend: what there is of queries [b,1,…] and stored of keys [b,K,…], bias [b,N|1,1,K] → [b,1,N,V]
        queries: [B,T,…] each
        stored: [B,S,…] each
        bias: [B|1,N|1,T,S], −∞ on keys that are not seen; no head sees later ones
        part: as for ``few``

    Returns:
        [B,T,N,V]; None where ``few`` is
    """
    (B, T), S = queries[0].shape[:2], bias.shape[-1]
    index = few((bias > float("-inf")).any(1).expand(B, T, S), part)
    if index is None:
        return None
    parts, bias = [], bias.expand(B, -1, T, S)
    a_query = index[:, 0].numel() * sum(each[0, 0].numel() * each.element_size() for each in stored)
    for rows in pieces(T, a_query, bias.device):
        own = index[:, rows]
        biases = bias[:, :, rows].gather(-1, own[:, None].expand(-1, bias.shape[1], -1, -1))  # [B,N|1,t,K]
        biases = biases.transpose(1, 2).flatten(0, 1)[:, :, None]
        some = tuple(each[:, rows].flatten(0, 1)[:, None] for each in queries)
        y = attend(some, tuple(taken(each, own) for each in stored), biases)
        parts.append(y[:, 0].unflatten(0, own.shape[:2]))
    return torch.cat(parts, 1)


HELD = 2**22  # scores held at a time


class LargestScores:
    """Notes the largest scores of an attention, in passes for a gradient, until kernels are chosen again."""

    def __init__(self, attention: nn.Module) -> None:
        self._found: Tensor | None = None
        for block in attention.modules():  # a child may attend in its place
            if isinstance(block, Block):
                block.kernels = self._beside(block.kernels)

    def take(self) -> Tensor | None:
        """Those since the last call, [N], fp32 (fp64 for fp64); None if nothing has attended."""
        found, self._found = self._found, None
        return found

    def _beside(self, kernels: Kernels) -> Kernels:
        """The same kernels, with attention that also notes its scores."""

        def attend(q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> Tensor:
            if torch.is_grad_enabled():  # not in a validation, nor while tokens are sampled
                self._note(q.detach(), k.detach(), scoring)
            return kernels.attend(q, k, v, scoring)

        return kernels.attending_by(attend)

    @torch.no_grad()
    def _note(self, q: Tensor, k: Tensor, scoring: Scoring) -> None:
        found = largest_scores(q, k, scoring)
        self._found = found if self._found is None else torch.maximum(self._found, found)


def largest_scores(q: Tensor, k: Tensor, scoring: Scoring) -> Tensor:
    """max over queries t, without padding, and keys s that t sees of scale · q_t·k_s, before a softcap and a bias.

    Args:
        q, k, scoring: as in ``blockwright.blocks.kernels.attention.causal_attention``; a bias of −∞ hides a key

    Returns:
        [N], in fp32 (fp64 for fp64)
    """
    known = torch.amp.is_autocast_available(q.device.type)  # which would round the operands of the product
    with torch.autocast(q.device.type, enabled=False) if known else nullcontext():
        return _largest(q, k, scoring)


def _largest(q: Tensor, k: Tensor, scoring: Scoring) -> Tensor:
    (B, T, N, _), (S, K) = q.shape, k.shape[1:3]
    wide = torch.promote_types(q.dtype, torch.float32)
    keys = k.to(wide).permute(0, 2, 3, 1)  # [B,K,H,S]
    bias = scoring.bias if isinstance(scoring.bias, Tensor) else None  # a formula hides nothing
    rows, found = max(1, HELD // (B * N * S)), []
    for first in range(0, T, rows):
        last = min(first + rows, T)
        seen = S - T + last  # keys up to the last of these queries
        some = q[:, first:last].to(wide).transpose(1, 2).unflatten(1, (K, -1)).flatten(2, 3)
        scores = (some @ keys[..., :seen]).view(B, N, last - first, seen)
        ids = None if scoring.segments is None else scoring.segments[:, :seen]
        mask = visible(last - first, seen, q.device, ids, scoring.window)
        if ids is not None:
            mask = mask & is_real(ids)[:, None, None]  # padding sees padding alone
        if bias is not None:
            mask = mask & (bias[:, :, first:last, :seen] > float("-inf"))
        found.append(scores.masked_fill_(~mask, float("-inf")).amax((0, 2, 3)))
    return torch.stack(found).amax(0) * scoring.scale
