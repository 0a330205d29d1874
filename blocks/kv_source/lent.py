from __future__ import annotations

from typing import ClassVar

from blockwright.blocks.drawn import Drawn
from blockwright.blocks.kv_source.base import KVSource, Slots
from blockwright.registry import register


@register("kv_source", "lent")
class Lent(KVSource):
    """An attention's own keys and values, which layers above may borrow.

    It changes nothing in its own layer. See ``borrowed`` for layouts.
    """

    lends: ClassVar[bool] = True

    def drawn(self) -> Drawn:
        return super().drawn()._replace(lines=("for layers above",))

    def forward(self, own: Slots | None, below: Slots | None) -> Slots:
        assert own is not None
        return own
