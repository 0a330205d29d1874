"""Attention to the few keys that each query sees of many: they are gathered, and no other scores are computed.

A selector leaves a query 2,048 of 131,072 tokens, say. Gathering costs a copy of K keys for every query, all scores
cost S products: so K must be a small part of S. The reference is the same attention on all keys, with a bias of −∞ on
those that are not seen. Without gradient only: keys that many queries share would each have their gradients summed up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

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
