"""What a decoding step computes beside its matrices, in C: attention of a few queries to a cache, and norms.

A step has a few numbers for each, so that by torch most of its time is that of launching operators, seven for a norm.
Attention reads the keys and values of a cache once, at the speed of the memory; its result does not depend on the
threads, nor that of a row on the other rows. All are of fp32. decoding.c says how, and where there is no compiler,
torch computes the same.
"""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from torch import Tensor

from blockwright.blocks.kernels.products import is_plain
from blockwright.blocks.kernels.scoring import Scoring, dense
from blockwright.blocks.kernels.seam import kernel
from blockwright.plugins.fast_cpu.batched_attention import FEW, suits_few
from blockwright.plugins.fast_cpu.c_library import WIDE, loaded, takes

LEAST = 128  # numbers; for narrower models a compiler would take longer than it saves
MOST = 2**15  # numbers; a thread takes longer over more than several need
PART = 512  # keys that are read at a time
A_THREAD = 2**14  # numbers of a cache that a thread reads in less time than it takes to start
QUERIES = 16  # of a head of keys; more of them are faster in a product
WIDEST = 1024  # numbers of a head, which the queries have on the stack


class _Asked(ctypes.Structure):
    """``struct asked`` of decoding.c."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "bias", "y", "parts")),
        *((name, ctypes.c_int64) for name in (*"BTNKSHV", "part")),
        *((name, ctypes.c_int64) for name in ("q_row", "q_token", "q_head", "k_row", "k_token", "k_head")),
        *((name, ctypes.c_int64) for name in ("v_row", "v_token", "v_head", "bias_row", "bias_head", "bias_token")),
        ("scale", ctypes.c_float),
    ]


@cache
def _library() -> ctypes.CDLL:
    library, floats, count, number = loaded("decoding"), ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    assert library is not None
    library.attend.argtypes = (ctypes.POINTER(_Asked), number)
    library.normalise.argtypes = (floats, floats, ctypes.c_float, floats, count, count)
    return library


def _fits(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the widths are right, and the numbers of a head of a token lie side by side."""
    (T, N, H), (K, V) = q.shape[1:], v.shape[2:]
    if N * H < LEAST or H % WIDE or V % WIDE or max(H, V) > WIDEST or N // K * T > QUERIES:
        return False
    return q.stride(3) == k.stride(3) == v.stride(3) == 1 and takes("decoding", q, k, v)


def suits(q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> bool:
    """Whether ``attend`` takes a few queries of a cache."""
    return suits_few(q, k, v, scoring) and _fits(q, k, v)


@kernel("attention", "compiled", devices=("cpu",), takes=suits, order=11)
def attend(q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> Tensor:
    """``causal_attention`` of q [B,T,N,H], of a few T, in C."""
    return _attend(q, k, v, scoring.scale, dense(scoring.bias))


def suits_latents(
    q: Tensor, memory: Tensor, n_keys: int, latent: int, scale: float, bias: Tensor | None = None
) -> bool:
    """Whether ``attend_latents`` takes a few queries of a cache."""
    k = memory[:, :, None]
    return q.shape[1] <= FEW and is_plain(q) and _fits(q, k, k[..., :latent])


@kernel("latent_attention", "compiled", devices=("cpu",), takes=suits_latents, order=10)
def attend_latents(
    q: Tensor, memory: Tensor, n_keys: int, latent: int, scale: float, bias: Tensor | None = None
) -> Tensor:
    """``latent_attention`` of a few tokens in C: all heads share one of keys, the first of whose numbers are values."""
    k = memory[:, :n_keys, None]
    return _attend(q, k, k[..., :latent], scale, bias)


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None) -> Tensor:
    (B, T, N, H), S, K, V = q.shape, k.shape[1], k.shape[2], v.shape[3]
    if bias is not None:
        bias = bias.float().expand(B, N, T, S)
        bias = bias if bias.stride(3) == 1 else bias.contiguous()
    y, parts = q.new_empty(B, T, N, V), q.new_empty(B * N * T * -(-S // PART) * (V + 2))
    tensors = (None if t is None else t.data_ptr() for t in (q, k, v, bias, y, parts))
    strides = *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *((0, 0, 0) if bias is None else bias.stride()[:3])
    threads = min(torch.get_num_threads(), 1 + B * S * K * (H + V) // A_THREAD)
    _library().attend(_Asked(*tensors, B, T, N, K, S, H, V, PART, *strides, scale), threads)
    return y


def suits_norm(x: Tensor, weight: Tensor, eps: float) -> bool:
    """Whether ``normalise`` takes a few tokens."""
    D, few = weight.shape[0], LEAST <= x.numel() <= MOST
    if not few or D % WIDE or x.shape[-1] != D or not weight.is_contiguous():
        return False
    return x.dtype == weight.dtype == torch.float32 and takes("decoding", x, weight)


@kernel("rms_norm", "compiled", devices=("cpu",), takes=suits_norm, order=9)
def normalise(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``rms_norm`` in C."""
    x, D = x.contiguous(), weight.shape[0]
    y = torch.empty_like(x)
    _library().normalise(x.data_ptr(), weight.data_ptr(), eps, y.data_ptr(), x.numel() // D, D)
    return y
