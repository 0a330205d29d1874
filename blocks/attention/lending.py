"""Keys and values that cross depth: what an attention leaves for layers above, and reads of one below.

Which of both it does is decided by its child of kind ``kv_source``. What is left are tensors of the carry, one for each
slot of a cache. Without a cache they are of the tokens of the pass, as all that is carried. With one they are of all
tokens that the lending layer sees, so that a borrower needs no cache: its own counts tokens, in a slot of no width, for
masks, rows that join, and drafts. Where the tokens of a sequence are spread over ranks, what is carried is of this
rank's tokens, and each borrower gathers it again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn

from blockwright.blocks.attention.remembered import Held, side_by_side
from blockwright.blocks.forward_pass import Carry
from blockwright.blocks.kv_source import KVSource, Slots
from blockwright.registry import BlockError

if TYPE_CHECKING:
    from blockwright.blocks.attention.scored import Scored

COUNTED = "borrowed"  # the slot of a borrower's cache


def refuse_on_borrowed(source: KVSource | None, children: Mapping[str, nn.Module | None]) -> None:
    """Refuse a child that works on keys or values of the layer's own, in a layer that borrows them.

    Raises:
        BlockError
    """
    for name, child in children.items():
        if child is not None and source is not None and not source.makes:
            rule = "works on keys and values that the layer makes, and this one makes none: it borrows them"
            raise BlockError(name, type(child).__name__, rule, f"Set {name}: null in this layer's attention")


def line(block: Scored) -> str:
    """The name under which attentions lend to each other: of one window, and of what is remembered in equal shapes."""
    shapes = [f"{name} {'×'.join(map(str, shape))}" for name, shape in block.remembered().slots().items()]
    return f"window {block.window}, {', '.join(shapes)}"


def to_be_cached(x: Tensor, held: Held) -> tuple[Tensor, ...]:
    """What a cache stores of tokens x [B,T,D], without what a selector adds."""
    return tuple(map(side_by_side, held.values())) if held else (x[..., :0],)


def of_the_pass(block: Scored, x: Tensor, held: Held, carry: Carry | None) -> Held:
    """What is attended to of the tokens of a pass x [B,T,D], by name, where no cache holds others."""
    own = tuple(map(side_by_side, held.values()))
    found, layout = over_depth(block, x, own, carry, x.shape[1]), block.remembered()
    widths = layout.widths()
    return {
        name: slot.split(widths[name], -1) if name in widths else slot
        for name, slot in zip(layout.shapes, found, strict=True)
    }


def over_depth(block: Scored, x: Tensor, own: Sequence[Tensor], carry: Carry | None, S: int) -> Slots:
    """What is attended to of S tokens, slot by slot; it is left to layers above, if they may read it.

    Args:
        block: an attention with a child of kind ``kv_source``
        x: [B,T,D] of the pass
        own: [B,S,…] of what the attention makes; whatever a cache gives of one that makes nothing
        carry: of the layers below, to be added to
    """
    assert block.kv_source is not None
    carry, prefix = {} if carry is None else carry, line(block)
    names = [f"{prefix}: {name}" for name in block.remembered().shapes]
    below = tuple(carry[name] for name in names) if names[0] in carry else None
    if below is None and not block.kv_source.makes:
        below = _of_no_layer(block, x, S, prefix)
    found: Slots = block.kv_source(tuple(own) if block.kv_source.makes else None, below)
    if block.kv_source.lends:
        carry.update(zip(names, found, strict=True))
    return found


def _of_no_layer(block: Scored, x: Tensor, S: int, prefix: str) -> Slots:
    """Tensors without values, of which a layer alone is measured.

    Raises:
        BlockError: the layer computes with values, and no layer below lends any
    """
    if x.is_meta:
        shapes = block.remembered().slots().values()
        return tuple(x.new_empty(len(x), S, *shape, requires_grad=x.requires_grad) for shape in shapes)
    rule = f"reads keys and values of a layer below, and none below lends any ({prefix})"
    raise BlockError("kv_source", type(block.kv_source).__name__, rule, "Give a layer below kv_source: lent")
