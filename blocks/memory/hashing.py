"""Hashes of the last few tokens: multiplicative, one prime for each table (Engram, arXiv 2601.07372)."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

MASK = 2**64 - 1
GAMMA = 0x9E3779B97F4A7C15  # of SplitMix64
LAYER_STEP = 10007  # between the seeds of two layers, as transformers' qwen4_exp has it
WITNESSES = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37)  # decide primality below 3.3e24


def last_tokens(history: Tensor, segments: Tensor | None, n: int, end: int | None) -> list[Tensor]:
    """Each token and the n − 1 before it in its document: for each lag 0 … n − 1 the id, [B,T], −1 for none.

    Args:
        history: [B,n−1+T], 1 + the ids of the tokens and of the n − 1 before them; 0 for none
        segments: [B,T] document ids; the tokens before are of none
        n: longest n-gram
        end: id of the token that ends a document; None: only segments separate documents
    """
    past, T = n - 1, history.shape[1] - n + 1
    lagged, inside = [history[:, past:] - 1], torch.ones_like(history[:, past:], dtype=torch.bool)
    for lag in range(1, n):
        earlier = history[:, past - lag : past - lag + T]
        inside = inside & (earlier != 0)
        if end is not None:
            inside = inside & (earlier != end + 1)
        if segments is not None and lag < T:
            same = segments[:, lag:] == segments[:, :-lag]
            inside = inside & torch.cat((same.new_ones(len(same), lag), same), 1)
        lagged.append(torch.where(inside, earlier - 1, -1))
    return lagged


def rows_of_ngrams(lagged: Sequence[Tensor], multipliers: Sequence[int], primes: Sequence[int], filler: int) -> Tensor:
    """Rows of the tables of all n-grams of orders 2 … n, [B,T,tables]; the tables are stored one behind the other.

    An n-gram of ids v₀ (the last) … v_{n−1} has the hash m₀v₀ xor … xor m_{n−1}v_{n−1}, and in a table of p rows the
    row of that modulo p.

    Args:
        lagged: of each lag the ids [B,T], −1 for none
        multipliers: m, one for each lag
        primes: rows of the tables: first those of 2-grams, as many for each order
        filler: the id that stands for none
    """
    a_order = len(primes) // (len(lagged) - 1)
    first, *terms = (torch.where(ids < 0, filler, ids) * m for ids, m in zip(lagged, multipliers, strict=True))
    mixed, offset = first, 0
    rows: list[Tensor] = []
    for order, term in enumerate(terms):
        mixed = mixed ^ term
        for prime in primes[order * a_order : (order + 1) * a_order]:
            rows.append(mixed % prime + offset)
            offset += prime
    return torch.stack(rows, -1)


def multipliers(vocab_size: int, n: int, seed: int) -> tuple[int, ...]:
    """n odd numbers by which ids are multiplied without overflow, drawn by SplitMix64."""
    half = max(1, (2**63 - 1) // vocab_size // 2)
    return tuple(2 * (_split_mix(seed + GAMMA * (i + 1)) % half) + 1 for i in range(n))


def _split_mix(value: int) -> int:
    value = (value + GAMMA) & MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK
    return value ^ (value >> 31)


@functools.lru_cache(maxsize=256)
def primes_from(least: int, skipped: int, count: int) -> tuple[int, ...]:
    """``count`` consecutive primes of at least ``least``, after the first ``skipped`` ones."""
    found = _primes(least)
    for _ in range(skipped):
        next(found)
    return tuple(next(found) for _ in range(count))


def _primes(least: int) -> Iterator[int]:
    number = max(2, least)
    while True:
        if _is_prime(number):
            yield number
        number += 1


def _is_prime(number: int) -> bool:
    """Miller–Rabin with witnesses that decide all numbers of 64 bits."""
    if number in WITNESSES or any(number % p == 0 for p in WITNESSES):
        return number in WITNESSES
    twos = ((number - 1) & -(number - 1)).bit_length() - 1
    return all(_passes(pow(a, (number - 1) >> twos, number), number, twos) for a in WITNESSES)


def _passes(power: int, number: int, twos: int) -> bool:
    if power in (1, number - 1):
        return True
    return any((power := power * power % number) == number - 1 for _ in range(twos - 1))
