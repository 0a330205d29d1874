"""The contract of ``attention``: mix tokens over time, causally, by scores or by a recurrence."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from blocks.attention.score_rows import ScoreRows
from blocks.base import Block
from blocks.cache import Cache
from blocks.kernels.choice import Kernels
from blocks.kernels.long_attention import Bias, Read, attention_in_parts, suits
from blocks.kernels.scoring import Slopes, dense
from blocks.position.base import Position
from registry import BlockError, family


@family("attention")
class Attention(Block):
    """Causal mixing of tokens: the base class of every attention. Take ``position: Position`` to use positions.

    ``child_context`` gives the position child the width of the queries and keys that it rotates, and the number of
    heads whose scores it may bias. A block whose rotated width is not ``head_dim`` overrides it, as ``mla`` does.

    A block whose ``forward`` also names ``carry`` is given what crosses depth (blocks/carry.py).
    """

    @classmethod
    def child_context(cls, child: str, known: Mapping[str, Any]) -> Mapping[str, Any]:
        return {"head_dim": known.get("head_dim") or even_heads(known["d_model"], known.get("n_heads", 1))}

    def forward(
        self, x: Tensor, positions: Tensor, *, segments: Tensor | None = None, cache: Cache | None = None
    ) -> Tensor:
        """Mix tokens.

        Args:
            x: [B,T,D]
            positions: [B|1,T] of each token in its document
            segments: [B,T] document ids of packed sequences; tokens of different documents never see each other
            cache: keys and values of the tokens before these T, which are appended to it

        A block may also take ``losses: dict[str, Tensor] | None``, to be filled in training with losses of its own:
        name → scalar, a mean over tokens, already weighted.

        Returns:
            [B,T,D]
        """
        raise NotImplementedError

    def new_cache(
        self, batch: int, length: int, dtype: torch.dtype, device: torch.device, bits: int | None = None
    ) -> Cache:
        """An empty cache for ``length`` tokens; its bytes are the KV cost of this attention.

        Args:
            bits: 8, 6 or 4 bits per number instead of ``dtype``. A plug-in may omit this parameter: its caches are
                then exact only
        """
        raise NotImplementedError

    def score_rows(self) -> tuple[ScoreRows, ...]:
        """The rows of its weights that each head's scores are proportional to, for ``callbacks.qk_clip``.

        None, the default, leaves it out: it has no scores, or something bounds them. One that names rows attends by
        ``self.kernels.attend`` with all of its heads.
        """
        return ()


def empty_cache(
    attention: Attention, batch: int, length: int, dtype: torch.dtype, device: torch.device, bits: int | None
) -> Cache:
    """``new_cache`` of any attention, also of a plug-in's without the parameter ``bits``.

    Raises:
        BlockError: bits are requested from an attention without them
    """
    if bits is None:
        return attention.new_cache(batch, length, dtype, device)
    if "bits" not in inspect.signature(attention.new_cache).parameters:
        rule = f"{type(attention).__name__}.new_cache takes no bits: this attention keeps exact caches only"
        raise BlockError("bits", bits, rule, "Leave bits out")
    return attention.new_cache(batch, length, dtype, device, bits)


def takes_losses(attention: nn.Module) -> bool:
    """Whether an attention's ``forward`` names ``losses``."""
    return "losses" in inspect.signature(type(attention).forward).parameters


def rotated(position: Position, q: Tensor, k: Tensor, positions: Tensor, cache: Cache | None) -> tuple[Tensor, Tensor]:
    """Queries [B,T,N,H] and keys [B,T,K,H] at positions [B|1,T], rotated for the sequence's declared length."""
    declared = positions.shape[1] if cache is None else cache.declared or cache.room
    return position.rotate_in(q, k, positions, declared)


def score_bias(position: Position, positions: Tensor, cache: Cache | None) -> Tensor | None:
    """Additive score bias [B|1,N|1,T,S]: the position's bias, and −∞ on a cache's padding and on other documents of a
    cache that has several; None if there is nothing.

    Args:
        positions: [B|1,T] of the queries
        cache: the cache whose last ``append`` gave the keys; None if the keys are those of the queries' tokens
    """
    padding = None if cache is None else cache.padding_bias(positions.shape[1])
    return dense(_padded(_position_bias(position, positions, cache), padding))


def score_terms(
    position: Position, positions: Tensor, segments: Tensor | None, cache: Cache | None
) -> tuple[Tensor | Slopes | None, Tensor | None]:
    """``bias`` and ``segments`` of a ``Scoring``: those of ``score_bias``, but a cache's documents are not in the bias,
    and slopes stay what they are: a tensor of either is as large as all scores.

    Args:
        positions, segments: of the queries, [B|1,T] and [B,T]
        cache: as in ``score_bias``
    """
    bias = _position_bias(position, positions, cache)
    if cache is None:
        return bias, segments
    documents = cache.segments()
    return (bias if documents is not None else _padded(bias, cache.padding_bias(positions.shape[1]))), documents


def _padded(bias: Tensor | Slopes | None, padding: Tensor | None) -> Tensor | Slopes | None:
    if padding is None:
        return bias
    found = dense(bias)
    return padding if found is None else found + padding


def _position_bias(position: Position, positions: Tensor, cache: Cache | None) -> Tensor | Slopes | None:
    if cache is None:
        return position.bias(positions, positions)
    shifts = type(position).bias is not Position.bias  # avoids a tensor as long as the cache
    return position.bias(positions, cache.positions(positions.device)) if shifts else None


def reads_in_parts(kernels: Kernels, cache: Cache, T: int) -> bool:
    """Whether T new tokens should attend to a cache part by part: many on a long past, where the kernel is ours for
    CPUs, and a cache that keeps every token in order."""
    in_order = type(cache).append is Cache.append and type(cache).indices is Cache.indices
    return kernels.attention == "blocked" and in_order and suits(T, cache.length + T)


def attend_in_parts(
    position: Position,
    positions: Tensor,
    cache: Cache,
    q: Tensor,
    new: tuple[Tensor, ...],
    scale: float,
    read: Read | None = None,
) -> Tensor:
    """Store T new tokens and attend to a cache part by part, where ``reads_in_parts``.

    Args:
        positions: [B|1,T] of the new tokens
        q: [B,T,N,H]
        new: what the cache stores of them
        scale: multiplies q·k
        read: keys and values of some tokens; default: what is stored

    Returns:
        [B,T,N,V]
    """
    cache.store(*new)
    bias = _part_bias(position, positions, cache)
    return attention_in_parts(q, cache.length, read or cache.read, scale, bias)


def _part_bias(position: Position, positions: Tensor, cache: Cache) -> Bias | None:
    """``score_bias`` as a function of some of the new tokens and some of the stored ones."""
    shifts = type(position).bias is not Position.bias
    if not shifts and cache.padding is None:
        return None
    indices, places = cache.indices(positions.device), cache.positions(positions.device)

    def bias(rows: slice, keys: slice) -> Tensor | None:
        own = dense(position.bias(positions[:, rows], places[:, keys])) if shifts else None
        if cache.padding is None:
            return own
        hidden = cache.hide_padding(indices[-positions.shape[1] :][rows], indices[keys])
        return hidden if own is None else own + hidden

    return bias


def even_heads(d_model: int, n_heads: int) -> int:
    """Width of a head when d_model is divided evenly.

    Raises:
        BlockError: n_heads does not divide d_model
    """
    if n_heads < 1 or d_model % n_heads:
        around = range(max(1, n_heads - 1000), n_heads + 1000)  # bounds the search for an absurd width
        near = min((n for n in around if d_model % n == 0), key=lambda n: abs(n - n_heads), default=1)
        rule = f"must divide d_model ({d_model})"
        raise BlockError("n_heads", n_heads, rule, f"The nearest number that does is {near}; or set the head's width")
    return d_model // n_heads
