"""Draw a part of a tensor's normal numbers without the rest, bit-identical to the whole draw.

On a CPU torch draws from a Mersenne Twister (Matsumoto and Nishimura 1998, MT19937), one 32-bit word per number, and
converts each 16 consecutive words to 16 normal numbers. A rank with a part of a weight therefore starts at the words of
of that part. The words n … n+623 are sums, over GF(2), of the first 20,560 ones, by the coefficients of tⁿ modulo the
generator's characteristic polynomial (Haramoto et al. 2008, "Efficient jump ahead for F2-linear random number
generators").
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor

BLOCK = 16  # numbers converted together by torch
_N, _M, _TWIST = 624, 397, 0x9908B0DF  # of MT19937, as _DEGREE = 32 · 624 − 31 is
_DEGREE = 19937
_HEAD = 24  # bytes of a generator's state before its words: seed, places
_CHUNK = 2**22  # numbers per draw when not all are kept


def draw_part(part: Tensor, shape: torch.Size, offset: tuple[int, ...], std: float, seed: int) -> None:
    """Fill ``part`` with the numbers that ``torch.empty(shape).normal_(0, std)`` with this seed has there.

    Args:
        part: any dtype, on any device
        shape: of the whole tensor
        offset: of the part in it, one number per dimension
        std: standard deviation
        seed: of the generator
    """
    generator, row = torch.Generator().manual_seed(seed), shape[1:].numel()
    inner = tuple(slice(o, o + n) for o, n in zip(offset[1:], part.shape[1:], strict=True))
    if part.shape == shape or row % BLOCK or not _skips():
        whole = torch.empty(shape, dtype=torch.float32).normal_(0.0, std, generator=generator)
        part.copy_(whole[(slice(offset[0], offset[0] + len(part)), *inner)])
        return
    skip(generator, offset[0] * row)
    for some in part.split(max(1, _CHUNK // row)):
        drawn = torch.empty(len(some), *shape[1:], dtype=torch.float32).normal_(0.0, std, generator=generator)
        some.copy_(drawn[(slice(None), *inner)])


def skip(generator: torch.Generator, n: int) -> None:
    """Advance a freshly seeded CPU generator by n words."""
    if n:
        state = generator.get_state()
        words = state.numpy()[_HEAD : _HEAD + 8 * _N].view(np.uint64)
        ahead = np.lib.stride_tricks.sliding_window_view(_sequence(words.astype(np.uint32)), _N)
        words[:] = np.bitwise_xor.reduce(ahead[_terms(n)])
        generator.set_state(state)


def _sequence(first: np.ndarray) -> np.ndarray:
    """The generator's words 0 … 20,560 before tempering, from the first 624."""
    x = np.concatenate((first, np.empty(_DEGREE, np.uint32)))
    for i in range(_N, len(x), _N - _M):
        end = min(i + _N - _M, len(x))
        a, b, c = (x[i - back : end - back] for back in (_N, _N - 1, _N - _M))
        both = a & np.uint32(1 << 31) | b & np.uint32((1 << 31) - 1)
        x[i:end] = c ^ both >> np.uint32(1) ^ (both & np.uint32(1)) * np.uint32(_TWIST)
    return x


@cache
def _terms(n: int) -> np.ndarray:
    """The powers of t whose sum is tⁿ modulo the characteristic polynomial."""
    modulus, power = _characteristic(), 1
    for bit in f"{n:b}":
        power = int("0".join(f"{power:b}"), 2) << int(bit)  # over GF(2), a square is its terms squared
        while (excess := power.bit_length() - modulus.bit_length()) >= 0:
            power ^= modulus << excess
    return np.array([i for i, bit in enumerate(reversed(f"{power:b}")) if bit == "1"])


@cache
def _characteristic() -> int:
    """Bit i is the coefficient of tⁱ; Matsumoto and Nishimura 1998, appendix A."""
    found = 1
    for i in range(31):
        found = found << _N - 1 ^ found << _M - 1 ^ _TWIST >> i & 1
    return found << _N ^ found << _M ^ _TWIST >> 31


@cache
def _skips() -> bool:
    """Whether torch draws as assumed here; another version might not."""
    one, other = (torch.Generator().manual_seed(1) for _ in range(2))
    skip(one, 3 * BLOCK)
    return torch.equal(
        torch.randn(BLOCK, generator=one, dtype=torch.float32),
        torch.randn(4 * BLOCK, generator=other, dtype=torch.float32)[-BLOCK:],
    )
