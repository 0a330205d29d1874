"""Permutations that are computed place by place: a Feistel network, without a table of what it permutes.

``numpy.random.permutation`` of the windows of 10¹² tokens needs 1.9 GB on every rank; this needs none, and is the same
in every version of numpy. Luby and Rackoff 1988; cycle walking after Black and Rogaway 2002.
"""

from __future__ import annotations

import hashlib
import json

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Bits = npt.NDArray[np.uint64]

ROUNDS = 6
STEP = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio: makes the keys of the rounds differ
MULTIPLIERS = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))  # of splitmix64
SHIFTS = (np.uint64(30), np.uint64(27), np.uint64(31))


def draw(*parts: str | int) -> tuple[int, int]:
    """Two independent numbers in [0, 2^64) that are a function of the parts: the first half of their SHA-256."""
    digest = hashlib.sha256(json.dumps(parts).encode()).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:16], "little")


def permuted(places: npt.ArrayLike, n: npt.ArrayLike, keys: npt.ArrayLike) -> Ints:
    """Where keyed permutations of [0, n) send places. The arguments are broadcast against each other.

    Args:
        places: in [0, n)
        n: lengths of what is permuted, from 1 to 2^53
        keys: of the permutations, in [0, 2^64)

    Returns:
        the new places, in [0, n); for equal n and key no two places share one
    """
    whole = np.broadcast_arrays(places, n, np.asarray(keys, np.uint64))
    x, lengths, keys = (each.astype(np.uint64).ravel() for each in whole)
    halves = _halves(lengths)
    x = _network(x, halves, keys)
    while (beyond := x >= lengths).any():  # the network permutes up to 4n places: walk its cycle back into [0, n)
        x[beyond] = _network(x[beyond], halves[beyond], keys[beyond])
    return x.astype(np.int64).reshape(whole[0].shape)


def _halves(n: Bits) -> Bits:
    """Half of the bits of the places of [0, n), rounded up, at least 1."""
    bits = np.frexp((n - np.uint64(1)).astype(np.float64))[1]
    return np.maximum(1, -(-bits // 2)).astype(np.uint64)


def _network(x: Bits, halves: Bits, keys: Bits) -> Bits:
    """The Feistel network: a permutation of [0, 4^halves)."""
    mask = (np.uint64(1) << halves) - np.uint64(1)
    left, right = x >> halves, x & mask
    for _ in range(ROUNDS):
        keys = keys + STEP
        left, right = right, left ^ (_mixed(right + keys) & mask)
    return (left << halves) | right


def _mixed(x: Bits) -> Bits:
    """The finaliser of splitmix64: every bit of the result depends on every bit of x."""
    for shift, multiplier in zip(SHIFTS, MULTIPLIERS, strict=False):
        x = (x ^ (x >> shift)) * multiplier
    return x ^ (x >> SHIFTS[-1])
