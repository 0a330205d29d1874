"""The contract of ``kv_source``: where the keys and values that an attention reads come from, over depth."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from blockwright.blocks.base import Block, Drawn
from blockwright.registry import family, register

Slots = tuple[Tensor, ...]


@family("kv_source")
class KVSource(Block):
    """A child of attention. Without one, an attention makes its own keys and values, and no other layer reads them.

    Layers share where they have one window and remember tensors of the same shapes: a layer reads those that the
    nearest such layer below lends. A cache stores them once, in the layer that makes them.

    Class attributes:
        makes: whether the attention makes keys and values of its tokens. One that does not has no projections for
            them, and its cache holds nothing
        lends: whether layers above may read what ``forward`` returns
    """

    makes: ClassVar[bool] = True
    lends: ClassVar[bool] = False

    def __init__(self) -> None:
        super().__init__()

    def drawn(self) -> Drawn:
        return Drawn(acts="keys seen")

    def forward(self, own: Slots | None, below: Slots | None) -> Slots:
        """What the attention reads of S tokens, of its cache or of the pass; it changes no tensor in place.

        Args:
            own: [B,S,…] for each slot of a cache: keys and values, or latents. None where ``makes`` is false
            below: the same of the nearest layer below that lends them; None where there is none, which is refused for
                a block that does not make its own

        Returns:
            tensors of these shapes
        """
        raise NotImplementedError


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
