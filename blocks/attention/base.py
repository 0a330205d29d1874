"""The contract of ``attention``: mix tokens over time, causally, by scores or by a recurrence."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from blockwright.blocks.base import Block
from blockwright.blocks.cache.base import Cache
from blockwright.blocks.forward_pass import Pass
from blockwright.registry import BlockError, family

# --- rows of weights that scores are proportional to, which QK-clip scales --------------------------------------------


class ScoreRows(NamedTuple):
    """Rows of a weight or a bias that hold one head after the other.

    name: of the parameter in the attention, e.g. ``query.weight``
    height: rows of a head
    side: ``query`` or ``key``, if a head has both; ``alone``, if what the rows are multiplied with is shared by heads
    part: which rows of each head make its scores
    """

    name: str
    height: int
    side: Literal["query", "key", "alone"]
    part: slice = slice(None)


def row_factors(rows: ScoreRows, total: int, factor: Tensor, alpha: float) -> Tensor:
    """The factor on each of ``total`` rows that multiplies the scores of groups of heads by ``factor``, [K].

    A group has one key head. Of a factor, α falls to the queries (factor^α) and 1 − α to the keys.
    """
    heads = total // rows.height
    power = {"query": alpha, "key": 1 - alpha, "alone": 1.0}[rows.side]
    factors = factor.new_ones(heads, rows.height)
    factors[:, rows.part] = factor.repeat_interleave(heads // len(factor))[:, None] ** power
    return factors.flatten()


@family("attention")
class Attention(Block):
    """Causal mixing of tokens: the base class of every attention. Take ``position: Position`` to use positions.

    ``child_context`` gives the position child the width of the queries and keys that it rotates, and the number of
    heads whose scores it may bias. A block whose rotated width is not ``head_dim`` overrides it, as ``mla`` does.
    """

    counted_as: ClassVar[str | None] = "attention"

    @classmethod
    def child_context(cls, child: str, known: Mapping[str, Any]) -> Mapping[str, Any]:
        return {"head_dim": known.get("head_dim") or even_heads(known["d_model"], known.get("n_heads", 1))}

    def forward(self, x: Tensor, given: Pass) -> Tensor:
        """Mix tokens x [B,T,D], of which ``given`` tells positions, documents and the cache of those before them.

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

    def lends(self) -> str | None:
        """The name of the keys and values that it leaves to layers above (blocks/kv_source); None: it leaves none."""
        return None

    def borrows(self) -> str | None:
        """The name of those that it reads of a layer below, and has no own; None: it makes its own."""
        return None

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


def even_heads(d_model: int, n_heads: int, parts: int = 1) -> int:
    """Width of a part of a head when d_model is divided evenly.

    Raises:
        BlockError: n_heads, times the parts of each, does not divide d_model
    """
    if n_heads < 1 or d_model % (n_heads * parts):
        around = range(max(1, n_heads - 1000), n_heads + 1000)  # bounds the search for an absurd width
        near = min((n for n in around if d_model % (n * parts) == 0), key=lambda n: abs(n - n_heads), default=1)
        rule = f"{'' if parts == 1 else f'times {parts} '}must divide d_model ({d_model})"
        raise BlockError("n_heads", n_heads, rule, f"The nearest number that does is {near}; or set the head's width")
    return d_model // (n_heads * parts)


def check_groups(n_heads: int, n_kv_heads: int) -> None:
    """Refuse query heads that cannot share heads of keys and values evenly.

    Raises:
        BlockError
    """
    if n_heads % n_kv_heads:
        rule = f"must divide n_heads ({n_heads})"
        raise BlockError("n_kv_heads", n_kv_heads, rule, "Use 1 for one shared head, n_heads for none shared")


def rotated_part(head: int, rope: int | None) -> int:
    """Width of the part of a head that is rotated: half of it, or the even number below, unless it is given.

    Raises:
        BlockError: it is wider than the head
    """
    rope = rope or max(2, head // 4 * 2)
    if rope > head:
        raise BlockError("rope_head_dim", rope, f"is a part of head_dim ({head})", "Lower it, or widen the head")
    return rope
