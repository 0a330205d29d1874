"""What an attention does for its selector: collect what it chooses from, and hide what it leaves out."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from blockwright.blocks.attention.biases import padding_bias
from blockwright.blocks.forward_pass import Carry, Pass
from blockwright.blocks.kernels.attention import visible
from blockwright.blocks.kernels.documents import is_real
from blockwright.blocks.kernels.scoring import Bias, dense
from blockwright.blocks.selector.base import Asked, Held, Selector
from blockwright.registry import BlockError

CHOSEN = "chosen"  # what layers above are given, [B,T,N|1,S]


def refuse_unlearnable(selector: Selector | None, scores: object | None) -> None:
    """Refuse an indexer beside ``scores`` of another kind than those it learns from.

    Raises:
        BlockError
    """
    if scores is not None and selector is not None and selector.learns:
        rule = f"learns from a plain softmax, and {type(scores).__name__} replaces it"
        raise BlockError("selector", type(selector).__name__, rule, "Leave out scores, or choose selector: block")


def selected(
    selector: Selector,
    asked: Asked,
    stored: Tensor,
    expand: Callable[[Tensor], Tensor],
    slots: tuple[Tensor, ...],
    segments: Tensor | None,
    given: Pass,
    bias: Bias,
    scale: float,
) -> Bias:
    """The bias of the scores with −∞ on keys that are not chosen; as it is where all are.

    Args:
        stored, expand, slots: as in ``Held``
        segments: [B,S] documents of the keys; None: each row is one
        given: whose cache has the new tokens; its losses are filled with those of the selector where it learns, and its
            ``carry`` has what the nearest layer below chose, and is left with what this one does
        bias, scale: of the scores
    """
    cache, carry, losses = given.cache, given.carry, given.losses
    learns = losses is not None and selector.training and torch.is_grad_enabled()
    takes_all, spread = selector.takes_all(stored.shape[1]), cache is not None and cache.spread
    if takes_all and not (learns or spread):
        _leave(carry, None, 0)
        return bias
    held = _held(asked, stored, expand, slots, segments, given)
    if carry is not None and CHOSEN in carry:
        held = held._replace(before=carry[CHOSEN][..., : stored.shape[1]].transpose(1, 2))
    chosen = None if takes_all else selector(asked, held)
    if losses is not None and learns:
        if segments is not None:
            asked = asked._replace(real=is_real(segments[:, -asked.x.shape[1] :]))
        losses |= selector.losses(asked, held, chosen, scale, dense(bias))
    if cache is not None and spread and not selector.reuses:  # parts of a sequence are joined, and so alike
        heads = asked.q.shape[2] if selector.per_head else 1
        left = held.seen[:, None] if chosen is None else chosen
        _leave(carry, left.expand(len(asked.q), heads, -1, -1), cache.room)
    elif not selector.reuses:
        _leave(carry, chosen, 0)
    return bias if chosen is None else _hide(chosen, dense(bias), asked.q)


def _leave(carry: Carry | None, chosen: Tensor | None, width: int) -> None:
    """Leave a choice to the layers above, of at least so many keys."""
    if carry is None:
        return
    carry.pop(CHOSEN, None)
    if chosen is not None:
        carry[CHOSEN] = F.pad(chosen, (0, max(0, width - chosen.shape[-1]))).transpose(1, 2)


def _held(
    asked: Asked,
    stored: Tensor,
    expand: Callable[[Tensor], Tensor],
    slots: tuple[Tensor, ...],
    segments: Tensor | None,
    given: Pass,
) -> Held:
    T, S, device, cache = asked.q.shape[1], stored.shape[1], stored.device, given.cache
    seen = visible(T, S, device, segments)[:, 0]
    positions = asked.positions if cache is None else cache.positions(device)
    if cache is not None and (padding := padding_bias(given)) is not None:
        seen = seen & (padding[:, 0] == 0)
    places = _places(S, segments, None if cache is None else cache.padding, device)
    return Held(stored, expand, slots, positions, places, seen, segments is not None)


def _places(S: int, segments: Tensor | None, padding: Tensor | None, device: torch.device) -> Tensor:
    """[B|1,S]: how many tokens of its document come before each token."""
    index = torch.arange(S, device=device)[None]
    if segments is not None:
        others = segments[:, 1:] != segments[:, :-1]
        starts = torch.cat((torch.ones_like(others[:, :1]), others), 1) if S > 1 else segments == segments
        return index - torch.where(starts, index, 0).cummax(1).values
    return index if padding is None else index - padding[:, None]


def _hide(chosen: Tensor, bias: Tensor | None, q: Tensor) -> Tensor:
    """The bias with −∞ where not chosen, [B,N|1,T,S]."""
    if bias is None:
        bias = torch.zeros((), dtype=q.dtype, device=q.device).expand(chosen.shape)
    return bias.masked_fill(~chosen, float("-inf"))
