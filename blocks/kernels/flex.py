"""Causal attention by FlexAttention, for cases without a fused scaled-dot-product kernel on a GPU.

Dong et al. 2024, arXiv 2412.05496. Scores may have a bias, a soft cap and sinks; windows and document borders become a
block mask, whose empty blocks are skipped. Not yet run on a GPU by this project: parity is tested in eager mode on a
CPU, where it materialises all scores and is of no other use.

Not supported: gradients of a bias that is a tensor of all pairs. Those of a formula's tensors are torch's: they are
summed up where scores are computed again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from blockwright.blocks.kernels.scoring import Bias, Scoring, of_any_length, once, starts
from blockwright.blocks.kernels.seam import kernel

KEPT = 16  # block masks of shapes and windows that are remembered
BLOCK = 128  # queries, and keys, of a block of the mask
GRAPHS = 64  # compiled graphs: lengths are dynamic, so that few are needed; beyond, all scores would be held


def is_special(q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> bool:
    """Whether scores are formed in a way that torch's fused attention does not know, and no bias of all pairs is to be
    learnt."""
    learns_pairs = scoring.learns_bias and isinstance(scoring.bias, Tensor)
    return not (scoring.plain or learns_pairs or q.shape[1] == 1)


@kernel("attention", "flex", devices=("cuda", "cpu"), takes=is_special, automatic=("cuda",), order=10)
def flex_causal_attention(q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> Tensor:
    """Attention of the last T of S positions on all previous ones; arguments as in ``causal_attention``.

    A sink is a key without a value: with L the log of the sum of a query's exponentials, all weights are scaled by
    exp(L) / (exp(L) + exp(sink)) = sigmoid(L − sink).
    """
    return _attend(q, k, v, scoring, _options(q, scoring.bias))


def is_special_half(q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> bool:
    """As ``is_special``, in half precision."""
    return q.dtype.itemsize == 2 and is_special(q, k, v, scoring)


@kernel(
    "attention",
    "flex_flash",
    devices=("cuda",),
    capability=(9, 0),
    needs="flash_attn",
    takes=is_special_half,
    automatic=False,
)
def flex_flash_attention(q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> Tensor:
    """The same through FlashAttention 4's kernels (package flash_attn, ``cute``), which torch fills in.

    Experimental in torch; not run by this project so far, for want of a GPU.
    """
    return _attend(q, k, v, scoring, {"BACKEND": "FLASH"})


def _attend(q: Tensor, k: Tensor, v: Tensor, scoring: Scoring, options: dict[str, Any]) -> Tensor:
    scale, bias, segments, window, sinks, softcap = scoring
    T, S, V = q.shape[1], k.shape[1], v.shape[-1]
    if q.shape[-1] < V:  # the kernels need values no wider than keys
        q, k = F.pad(q, (0, V - q.shape[-1])), F.pad(k, (0, V - k.shape[-1]))
    found = _flex(q.device)(
        *(of_any_length(t.transpose(1, 2), 2) for t in (q, k, v)),
        score_mod=_score_mod(
            _added(bias, len(q)),
            None if softcap is None else torch.full((), softcap, dtype=torch.float32, device=q.device),
        ),
        block_mask=_block_mask(T, S, q.device, segments, window),
        scale=scale,
        enable_gqa=k.shape[2] != q.shape[2],
        kernel_options=options,
        **({} if sinks is None else _returning_norm()),
    )
    if sinks is None:
        return found.transpose(1, 2)
    y, norm = found
    return (y * torch.sigmoid(norm.lse - sinks.to(norm.lse.dtype)[:, None])[..., None].to(y.dtype)).transpose(1, 2)


def _options(q: Tensor, bias: Bias) -> dict[str, Any]:
    """What is chosen for the kernels in place of torch, by their machine code alone: no time was measured.

    The gradients of keys and values of wide heads are summed in registers, of which four warps have too few: at a width
    of 256, 116,908 bytes are spilled on an A100; with eight warps, 1,204. A bias of T × S that is read ahead fills
    shared memory: backward would take 264,192 bytes of a B200's 232,448, and forward of wide heads 167,936 of an A100's
    166,912.
    """
    wide = q.shape[-1] > 128
    options: dict[str, Any] = {}
    if wide and q.dtype.itemsize == 2:
        options["bwd_num_warps"] = 8
    if isinstance(bias, Tensor):
        options |= {"bwd_num_stages": 1, **({"fwd_num_stages": 2} if wide else {})}
    return options


def _returning_norm() -> dict[str, Any]:
    """Asked for with sinks only: it is one more output with a gradient."""
    from torch.nn.attention.flex_attention import AuxRequest

    return {"return_aux": AuxRequest(lse=True)}


@functools.lru_cache(maxsize=2)
def _compiled(backend: Any = "inductor") -> Callable[..., Any]:
    import torch._dynamo.config as dynamo
    from torch.nn.attention.flex_attention import flex_attention

    dynamo.recompile_limit = max(dynamo.recompile_limit, GRAPHS)
    return torch.compile(flex_attention, backend=backend)


def _flex(device: torch.device) -> Callable[..., Any]:
    """The operator: compiled where it is fused; uncompiled inside another compilation, or where nothing fuses it."""
    from torch.nn.attention.flex_attention import flex_attention

    if device.type == "cuda" and not torch.compiler.is_compiling():
        return _compiled()
    return flex_attention


def _added(bias: Bias, rows: int) -> Callable[..., Tensor] | None:
    """What a bias adds to a score at (b, h, t, s), for that many rows; of a formula, no tensor of T × S is made."""
    if bias is None:
        return None
    if not isinstance(bias, Tensor):
        return bias.added(rows)
    dense = bias.expand(rows, -1, -1, -1)
    return lambda b, h, t, s: dense[b, h, t, s]


def _score_mod(added: Callable[..., Tensor] | None, softcap: Tensor | None) -> Callable[..., Tensor] | None:
    """Modification of a score: the cap (a tensor, since each number would be compiled separately), then what is added
    to it."""
    if added is None and softcap is None:
        return None

    def changed(score: Tensor, b: Tensor, h: Tensor, t: Tensor, s: Tensor) -> Tensor:
        score = score if softcap is None else softcap * torch.tanh(score / softcap)
        return score if added is None else score + added(b, h, t, s)

    return changed


def _block_mask(T: int, S: int, device: torch.device, segments: Tensor | None, window: int | None) -> Any:
    """The pairs that may see each other; those of documents are made once a batch and window."""
    if segments is None:
        return _shared_mask(T, S, window, device)
    return once(segments, ("flex", T, window), lambda ids: _make_mask(T, S, window, device, ids))


@functools.lru_cache(maxsize=KEPT)
def _shared_mask(T: int, S: int, window: int | None, device: torch.device) -> Any:
    return _make_mask(T, S, window, device)


def _make_mask(T: int, S: int, window: int | None, device: torch.device, ids: Tensor | None = None) -> Any:
    """A block mask from where each query's keys begin, without the T × S booleans of torch's ``create_block_mask``.

    The keys of a query are all from there to itself, and both ends move on with the queries. So the key blocks that a
    block of queries sees are neighbours, those that all of it sees are too, and the same holds the other way round.
    """
    from torch.nn.attention.flex_attention import BlockMask

    past, rows, columns = S - T, -(-T // BLOCK), -(-S // BLOCK)
    t = torch.arange(T, device=device)
    begin = torch.zeros_like(t)[None] if ids is None else starts(ids)[:, past:]
    first = torch.arange(rows, device=device) * BLOCK
    last = (first + BLOCK - 1).clamp(max=T - 1)
    low, high = begin[:, first] // BLOCK, ((last + past) // BLOCK + 1).expand(len(begin), -1)
    full_low = -(-begin[:, last] // BLOCK)
    if window is not None:  # divided before the maximum is taken: Inductor stops at the quotient of a maximum
        low = torch.maximum(low, (first + past - window + 1) // BLOCK)
        full_low = torch.maximum(full_low, -(-(last + past - window + 1) // BLOCK))
    full_high = torch.maximum(full_low, (first + past + 1) // BLOCK)
    whole = T // BLOCK  # rows; of one that is cut short, no block counts as seen whole

    def seen_by(ends: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
        """The query blocks whose range of key blocks, from ``starts`` to before ``ends``, holds each key block."""
        j = torch.arange(columns, device=device).expand(len(begin), -1).contiguous()
        return torch.searchsorted(ends.contiguous(), j, right=True), torch.searchsorted(
            starts.contiguous(), j, right=True
        )

    by_query = _indices(low, high, full_low, torch.cat((full_high[:, :whole], full_low[:, whole:]), 1), columns)
    full_rows = seen_by(full_high[:, :whole], full_low[:, :whole])
    by_key = _indices(*seen_by(high, low), full_rows[0], torch.maximum(*full_rows), rows)
    reach = None if window is None else torch.full((), window, device=device, dtype=torch.int64)
    mod = _mask_mod(torch.full((), past, device=device, dtype=torch.int64), reach, ids)
    found = dict(zip((*_parts("kv"), *_parts("q")), (*by_query, *by_key), strict=True))
    return BlockMask((T, S), **found, BLOCK_SIZE=(BLOCK, BLOCK), mask_mod=mod)  # type: ignore[arg-type]


def _parts(side: str) -> list[str]:
    """The arguments of ``BlockMask`` that ``_indices`` gives, of one side."""
    return [f"{whole}{side}_{part}" for whole in ("", "full_") for part in ("num_blocks", "indices")]


def _indices(low: Tensor, high: Tensor, full_low: Tensor, full_high: Tensor, n: int) -> tuple[Tensor, ...]:
    """Ranges of blocks [B,R] → how many are seen in part, which, how many whole, which: [B,1,R] and [B,1,R,n] int32."""
    p = torch.arange(n, device=low.device)
    whole = (full_high - full_low)[..., None]
    part = (high - low)[..., None] - whole
    before = torch.where(whole > 0, full_low[..., None] - low[..., None], part)
    partial = low[..., None] + p + torch.where(p >= before, whole, 0)
    made = part[..., 0], partial.clamp(max=n - 1), whole[..., 0], (full_low[..., None] + p).clamp(max=n - 1)
    return tuple(of_any_length(t[:, None].to(torch.int32), *range(2, t.ndim + 1)) for t in made)


def _mask_mod(past: Tensor, window: Tensor | None, ids: Tensor | None) -> Callable[..., Tensor]:
    """mask_mod: query t, which stands at S − T + t, sees keys up to itself, of its document, no further back than the
    window. Numbers come as tensors: each would be compiled for otherwise."""

    def seen(b: Tensor, h: Tensor, t: Tensor, s: Tensor) -> Tensor:
        mask = s <= t + past
        mask = mask if window is None else mask & (s > t + past - window)
        return mask if ids is None else mask & (ids[b, t + past] == ids[b, s])

    return seen
