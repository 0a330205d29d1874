from __future__ import annotations

from blockwright.blocks.attention.grouped import GroupedAttention
from blockwright.blocks.base import Drawn
from blockwright.registry import register


@register("attention", "sliding_window", fixes={"selector": None})
class SlidingWindow(GroupedAttention):
    """Grouped-query attention that sees only the last ``window`` tokens.

    Beltagy et al. 2020 (Longformer), arXiv 2004.05150; Mistral 7B, arXiv 2310.06825: ``gqa`` in which token t sees
    t − window + 1 … t. Stacked layers see further: each passes on what the one below saw.

    For a model that alternates window and full attention (Gemma-2, gpt-oss), use this block everywhere with a variant
    ``{window: null}`` for the full layers. The window counts tokens of the sequence, as in transformers; in packed
    sequences it also ends at the document's start. The cache is a ring of the last ``window`` tokens.
    """

    def drawn(self) -> Drawn:
        of = super().drawn()
        return of if self.window is not None else of._replace(lines=(*(of.lines or ()), "no window"))
