from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from blockwright.blocks.drawn import Drawn
from blockwright.blocks.kv_source.base import KVSource, Slots
from blockwright.registry import register


@register("kv_source", "borrowed")
class Borrowed(KVSource):
    """The keys and values of the nearest layer below that lends them: the layer has queries alone, and caches nothing.

    Brandon et al. 2024 (cross-layer attention), arXiv 2405.12981: k_l = k_{s(l)} and v_l = v_{s(l)}, with s(l) the
    last layer up to l that makes its own. Of ``mla`` the latents are borrowed; each layer expands them by its own
    matrices. A layer borrows of layers with its window and its shapes only, so windows share windows. Layouts:

    * CLA, two layers a cache: ``kv_source: lent borrowed``
    * YOCO, Sun et al. 2024, arXiv 2405.05254: ``attention: sliding_window*8 gqa*8`` with
      ``kv_source: own*8 lent borrowed*7`` and a variant ``own: null``
    * Gemma 4: ``kv_source: own*13 lent*2 borrowed*20``, over windows and full layers

    YOCO makes its shared keys of the lower half's output by a norm of their own; here the lending layer makes them of
    its normed input, and has queries and an output too.

    Raises:
        BlockError: no layer below lends keys and values of this layer's window and shapes
    """

    makes: ClassVar[bool] = False
    conformance_model: ClassVar[Mapping[str, Any]] = {"overrides": [{"layers": 0, "attention": {"kv_source": "lent"}}]}

    def drawn(self) -> Drawn:
        return super().drawn()._replace(lines=("of a layer below",))

    def forward(self, own: Slots | None, below: Slots | None) -> Slots:
        assert below is not None
        return below
