"""The recurrence over a few tokens, as in decoding, where torch's operators read a state several times for each.

``after_each`` is C (few_tokens.c): a head's state is read and written once a token, and what it is after each token is
kept, which checking drafts needs. The reference is ``recurrence_reference``. Small states and machines without a C
compiler use torch.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from blockwright.blocks.kernels.seam import kernel
from blockwright.plugins.fast_cpu.c_library import WIDE, loaded, takes

FEW = 8  # tokens
LEAST = 2**14  # numbers of a row's state; for smaller ones a compiler would take longer than it saves


def suits(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    beta: Tensor | None = None,
    state: Tensor | None = None,
    segments: Tensor | None = None,
    erase: Tensor | None = None,
    at: Tensor | None = None,
) -> bool:
    """Whether ``after_each`` takes these arguments of ``recurrence``, and all threads would compute."""
    if state is None or segments is not None or not 0 < v.shape[1] <= FEW or v.shape[-1] % WIDE:
        return False
    right = state[0].numel() >= LEAST and state.dtype == torch.float32 and v.dtype != torch.float64
    return right and takes("few_tokens", q, k, v, decay, state)


@kernel("recurrence", "few_tokens", devices=("cpu",), takes=suits, order=10)
def recurrence_of_few(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    beta: Tensor | None = None,
    state: Tensor | None = None,
    segments: Tensor | None = None,
    erase: Tensor | None = None,
    at: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``recurrence`` in C."""
    assert state is not None
    y, states = after_each(q, k, v, decay, beta, state, None, erase, at)
    return y, states[:, -1]


@kernel("recurrence_each", "few_tokens", devices=("cpu",), takes=suits, order=10)
def after_each(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    beta: Tensor | None,
    state: Tensor,
    segments: Tensor | None = None,
    erase: Tensor | None = None,
    at: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``recurrence`` in C: [B,T,N,V] in the dtype of v, and the state after each token, [B,T,N,K,V] in fp32."""
    library, (B, T, N, V), K = loaded("few_tokens"), v.shape, q.shape[-1]
    assert library is not None
    factors = decay.float().exp()
    given = [_numbers(t) for t in (q, k, v, factors)]
    optional = [None if t is None else _numbers(t) for t in (beta, erase, at)]
    before = _numbers(state)
    states, y = before.new_empty(B, T, N, K, V), before.new_empty(B, T, N, V)
    pointers = [ctypes.c_void_p(None if t is None else t.data_ptr()) for t in (*given, *optional, before, states, y)]
    sizes = map(ctypes.c_int64, (B, T, N, K, V, factors.shape[-1]))
    library.few_tokens(*pointers, *sizes, ctypes.c_int(torch.get_num_threads()))
    return y.to(v.dtype), states


def _numbers(t: Tensor) -> Tensor:
    """In fp32, side by side."""
    return t.float().contiguous()
