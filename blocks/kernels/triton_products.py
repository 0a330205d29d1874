"""Products of rows with the codes of a cache on a GPU, in Triton. Imported where they are computed."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from blockwright.blocks.kernels.coded_attention import Codes

TOKENS = tl.constexpr(32)  # of a block
WIDTH = tl.constexpr(64)  # numbers of a head at a time
LEAST = 16  # rows of a matrix unit
PROGRAMS = 1024  # that keep a large GPU busy


class Stored(NamedTuple):
    """Codes, as the kernels take them.

    codes, scales: [B,S,·]
    group_of: the group of each number of a head
    tokens: S
    size: numbers of a head
    width: of them, how many are read
    code_row, code_token, scale_row, scale_token: strides
    groups: of a head
    n_heads: of a token
    """

    codes: Any
    scales: Any
    group_of: Any
    tokens: Any
    size: Any
    width: Any
    code_row: Any
    code_token: Any
    scale_row: Any
    scale_token: Any
    groups: Any
    n_heads: Any


@triton.jit
def _numbers(of, row, head, tokens, numbers, here, BITS: tl.constexpr):  # type: ignore[no-untyped-def] # Triton's types
    """[tokens,numbers] of a head of a row of the batch, dequantised; 0 where not here."""
    at = head * of.size + numbers
    rows = of.codes + row.to(tl.int64) * of.code_row + tokens[:, None] * of.code_token
    if BITS == 8:
        code = tl.load(rows + at[None], mask=here, other=128).to(tl.int32)
    elif BITS == 4:
        run = (of.n_heads * of.size + 1) // 2
        both = tl.load(rows + (at % run)[None], mask=here, other=136).to(tl.int32)
        code = tl.where((at < run)[None], both & 15, both >> 4)
    else:
        run = (of.n_heads * of.size + 3) // 4
        last = (at >= 3 * run)[None]
        low = tl.load(rows + at[None], mask=here & ~last, other=32).to(tl.int32) & 63
        high = rows + (at - 3 * run)[None]
        a = tl.load(high, mask=here & last, other=0).to(tl.int32) >> 6
        b = tl.load(high + run, mask=here & last, other=0).to(tl.int32) >> 6
        c = tl.load(high + 2 * run, mask=here & last, other=0).to(tl.int32) >> 6
        code = tl.where(last, a | b << 2 | c << 4, low)
    group = head * of.groups + tl.load(of.group_of + numbers, mask=numbers < of.size, other=0)
    scales = of.scales + row.to(tl.int64) * of.scale_row + tokens[:, None] * of.scale_token
    scale = tl.load(scales + group[None], mask=here, other=0.0).to(tl.float32)
    return (code - (1 << (BITS - 1))).to(tl.float32) * scale


@triton.jit
def _scores(q, of, out, m, BITS: tl.constexpr, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
    """q [B,K,m,width] → out [B,K,m,S]: a block of tokens, of one head of a row of the batch."""
    own, row, head = tl.program_id(0).to(tl.int64), tl.program_id(0) // of.n_heads, tl.program_id(0) % of.n_heads
    tokens, rows = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS), tl.arange(0, ROWS)
    found = tl.zeros((ROWS, TOKENS), tl.float32)
    for first in range(0, of.width, WIDTH):
        numbers = first + tl.arange(0, WIDTH)
        here = (tokens < of.tokens)[:, None] & (numbers < of.width)[None]
        k = _numbers(of, row, head, tokens, numbers, here, BITS)
        mask = (rows < m)[:, None] & (numbers < of.width)[None]
        part = tl.load(q + (own * m + rows)[:, None] * of.width + numbers[None], mask=mask, other=0.0)
        found = tl.dot(part, tl.trans(k), found, input_precision="tf32x3")
    mask = (rows < m)[:, None] & (tokens < of.tokens)[None]
    tl.store(out + (own * m + rows)[:, None] * of.tokens + tokens[None], found, mask=mask)


@triton.jit
def _averages(w, of, out, m, together, BITS: tl.constexpr, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
    """w [B,K,m,S] → out [parts,B,K,m,width]: some numbers of a head, summed over the ``together`` tokens of a part."""
    own, row, head = tl.program_id(0).to(tl.int64), tl.program_id(0) // of.n_heads, tl.program_id(0) % of.n_heads
    numbers, rows = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH), tl.arange(0, ROWS)
    start = tl.program_id(2) * together
    found = tl.zeros((ROWS, WIDTH), tl.float32)
    for first in range(start, min(start + together, of.tokens), TOKENS):
        tokens = first + tl.arange(0, TOKENS)
        here = (tokens < of.tokens)[:, None] & (numbers < of.width)[None]
        v = _numbers(of, row, head, tokens, numbers, here, BITS)
        mask = (rows < m)[:, None] & (tokens < of.tokens)[None]
        weights = tl.load(w + (own * m + rows)[:, None] * of.tokens + tokens[None], mask=mask, other=0.0)
        found = tl.dot(weights, v, found, input_precision="tf32x3")
    mask = (rows < m)[:, None] & (numbers < of.width)[None]
    at = (tl.program_id(2) * tl.num_programs(0) + own) * m + rows
    tl.store(out + at[:, None] * of.width + numbers[None], found, mask=mask)


def scores(q: Tensor, keys: Codes) -> Tensor:
    """q [B,K,m,H] and keys → [B,K,m,S]."""
    B, K, m, _ = q.shape
    S = keys.codes.shape[1]
    found = q.new_empty(B, K, m, S)
    _scores[B * K, -(-S // TOKENS.value)](q.contiguous(), _stored(keys), found, m, BITS=keys.bits, ROWS=_rows(m))
    return found


def averages(weights: Tensor, values: Codes) -> Tensor:
    """Weights [B,K,m,S] and values → [B,K,m,width]."""
    B, K, m, S = weights.shape
    columns, blocks = -(-values.width // WIDTH.value), -(-S // TOKENS.value)
    parts = min(blocks, max(1, PROGRAMS // (B * K * columns)))
    together = -(-blocks // parts) * TOKENS.value
    found = weights.new_empty(parts, B, K, m, values.width)
    given = weights.contiguous(), _stored(values), found, m, together
    _averages[B * K, columns, parts](*given, BITS=values.bits, ROWS=_rows(m))
    return found.sum(0)


def _stored(of: Codes) -> Stored:
    own = of.sizes[: len(of.sizes) // of.n_heads]
    return Stored(
        of.codes,
        of.scales,
        _group_of(own, of.codes.device),
        tokens=of.codes.shape[1],
        size=of.head,
        width=of.width,
        code_row=of.codes.stride(0),
        code_token=of.codes.stride(1),
        scale_row=of.scales.stride(0),
        scale_token=of.scales.stride(1),
        groups=len(own),
        n_heads=of.n_heads,
    )


@cache
def _group_of(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """The group of each number of a head."""
    groups = [group for group, size in enumerate(sizes) for _ in range(size)]
    return torch.tensor(groups, dtype=torch.int32, device=device)


def _rows(m: int) -> int:
    return max(LEAST, triton.next_power_of_2(m))
