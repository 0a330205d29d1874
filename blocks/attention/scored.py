from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from blockwright.blocks.attention import attending
from blockwright.blocks.attention.base import Attention
from blockwright.blocks.attention.remembered import COUNTED, Held, Layout, Memory, line, parts, slots
from blockwright.blocks.cache.base import Cache
from blockwright.blocks.cache.fixed import Ring
from blockwright.blocks.convolution import Convolution
from blockwright.blocks.forward_pass import Pass
from blockwright.blocks.kv_source import KVSource
from blockwright.blocks.output_gate import OutputGate
from blockwright.blocks.position.base import Position
from blockwright.blocks.readout import Readout
from blockwright.blocks.scores import Scores
from blockwright.blocks.selector.base import Selector
from blockwright.registry import BlockError


@dataclass(frozen=True)
class Changes:
    """Blocks that change an attention by scores, whichever it is. A subclass of ``Scored`` takes all of them as one
    parameter, ``changes: Changes = Changes()``, and passes it to ``Scored.take``; in a configuration each has its own
    name. An attention that offers more derives from this class, as ``gqa`` does.

    Args:
        kv_source: lends what is remembered to layers above, or borrows that of a layer below; null for neither
        query_conv: convolves queries over the last few tokens, before norms and rotation; null for none
        readout: changes each head's sum over values; null for none
        selector: chooses which keys a query sees, without a window; null for none
        output_gate: gates the heads' outputs; null for none
    """

    kv_source: KVSource | None = None
    query_conv: Convolution | None = None
    readout: Readout | None = None
    selector: Selector | None = None
    output_gate: OutputGate | None = None

    @property
    def makes(self) -> bool:
        """Whether the layer makes what it remembers; it borrows that of another otherwise, and needs no weights."""
        return self.kv_source is None or self.kv_source.makes

    def left(self, n_heads: int) -> int:
        """Heads of N whose sums the output projection reads."""
        return n_heads if self.readout is None else self.readout.heads(n_heads)


# Of all kinds of changes, in which their parameters are registered; further ones follow.
ORDER = ("selector", "qk_norm", "output_gate", "scores", "readout", "values", "kv_source", "query_conv")
OF_OWN = ("readout", "values", "key_conv", "value_conv", "latent_conv")  # work on what a layer makes to be remembered


class Scored(Attention):
    """Attention by scores and a softmax: the shared base of ``gqa``, ``mla`` and others.

    A subclass has ``mix``, which calls ``attend`` once, with queries and what is to be remembered of each token; and
    ``expand``, where that is not keys and values as they are. Caches, prompts of unequal length and in parts, packed
    documents, selectors and tokens spread over ranks follow from these (blocks/attention/attending.py), and so does
    what ``Changes`` changes after the softmax. One that takes ``Changes`` convolves its queries, and makes nothing to
    remember if it ``borrows``: it then gives ``attend`` an empty ``held``.

    Attributes, to be set by the subclass:
        position: biases scores
        scale: multiplies q·k
        window: number of last tokens a query sees, itself included; None, the default, for all
        scores: replaces the plain softmax; None, the default, for none
    """

    residual_outputs: ClassVar[tuple[str, ...]] = ("output.weight",)
    position: Position
    selector: Selector | None
    scale: float

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.d_model = d_model
        self.window: int | None = None
        self.scores: Scores | None = None  # not of the class, which would hide a submodule of that name
        self.register_module("selector", None)  # its parameters come first
        self.kv_source: KVSource | None = None
        self.query_conv: Convolution | None = None
        self.readout: Readout | None = None
        self.output_gate: OutputGate | None = None

    def take(self, position: Position, changes: Changes) -> None:
        """Make these its children.

        Raises:
            BlockError: one works on keys or values of the layer's own, and it borrows them; or an indexer would learn
                from a softmax that ``scores`` replaces
        """
        self.position = position
        names = [f.name for f in fields(changes)]
        for name in sorted(names, key=lambda name: ORDER.index(name) if name in ORDER else len(ORDER)):
            child = getattr(changes, name)
            if child is not None and not changes.makes and name in OF_OWN:
                rule = "works on keys and values that the layer makes, and this one makes none: it borrows them"
                raise BlockError(name, type(child).__name__, rule, f"Set {name}: null in this layer's attention")
            setattr(self, name, child)
        if self.scores is not None and self.selector is not None and self.selector.learns:
            rule = f"learns from a plain softmax, and {type(self.scores).__name__} replaces it"
            remedy = "Leave out scores, or choose selector: block"
            raise BlockError("selector", type(self.selector).__name__, rule, remedy)

    @classmethod
    def child_context(cls, child: str, known: Mapping[str, Any]) -> Mapping[str, Any]:
        """Of every child; of a convolution's ``dim``, a subclass overrides it. ``known`` has the heads' width, or they
        divide d_model."""
        n_heads, readout = known.get("n_heads", 1), known.get("readout")
        context = {**super().child_context(child, known), "latent_dim": known["d_model"], "attention_heads": n_heads}
        if child == "query_conv":
            return {**context, "dim": n_heads * context["head_dim"]}
        if child == "output_gate" and readout is not None:
            return {**context, "n_heads": readout.heads(n_heads)}
        return context

    def mix(self, x: Tensor, given: Pass) -> Tensor:
        """x [B,T,D] → [B,T,D], by one call of ``attend``."""
        raise NotImplementedError

    def expand(self, held: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Keys [B,S,K,H] and values [B,S,K,V] of what is remembered of S tokens, the parts in the order in which they
        are given to ``attend``; by default they are these. K divides N."""
        k, v = held
        return k, v

    def keys(self, held: Sequence[Tensor]) -> Tensor:
        """The keys of what is remembered under the first of several names, or of averages of it; by default it is
        these. Not asked where there is one name: ``expand`` gives them."""
        return held[0]

    def memory(self) -> Memory:
        """Name → shapes of the parts of what is remembered of a token: ``{"k": [(K, H)], "v": [(K, H)]}``."""
        raise NotImplementedError(f"{type(self).__name__} declares no memory(): the shapes of what it gives to attend")

    def up(self) -> Tensor | None:
        """Matrices [N,n+V,C], where a latent c [B,S,C] and a part r [B,S,R] that all heads share are remembered as one,
        and a head with matrix [K; V] has the key [K c; r] and the value V c; n = H − R. None where it is not so."""
        return None

    def remembers_heads(self) -> bool:
        """Whether two names are remembered, whose one part each is the keys and the values as they are."""
        layout = self.remembered()
        return type(self).expand is Scored.expand and len(layout.shapes) == 2 and not layout.widths()

    def attend(self, x: Tensor, given: Pass, q: Tensor, held: Held, latent: Tensor | None = None) -> Tensor:
        """Attention of the tokens of a pass to all that they see; they are remembered, where there is a cache.

        Args:
            x, given: of ``mix``
            q: [B,T,N,H], rotated
            held: name → what is remembered of each token, [B,T,…], rotated. The parts [B,T,·] of a tuple are kept side
                by side, and share no quantisation scale. Empty where the block ``borrows``
            latent: [B,T,L], what queries are made from; x by default

        Returns:
            [B,T,N,V], gated; of a ``readout`` that joins heads, fewer
        """
        y = attending.attend(self, x, given, q, held, x if latent is None else latent)
        y = self.read_out(y, x, held)
        return y if self.output_gate is None else self.output_gate(x, y)

    def read_out(self, y: Tensor, x: Tensor, held: Held) -> Tensor:
        """The sums over values [B,T,N,V], as the ``readout`` changes them; arguments as of ``attend``."""
        return y if self.readout is None else self.readout(y, self.expand(parts(held))[1], x)

    def forward(self, x: Tensor, given: Pass) -> Tensor:
        return self.mix(x, given)

    def new_cache(
        self, batch: int, length: int, dtype: torch.dtype, device: torch.device, bits: int | None = None
    ) -> Cache:
        layout = self.remembered()
        own = layout.slots() if self.borrows() is None else {COUNTED: (0,)}
        stored = own | slots(self)
        if self.window is None or self.window >= length:
            return Cache(batch, length, stored, dtype, device, bits=bits, parts=layout.widths())
        ring = Ring(batch, self.window, stored, dtype, device, bits=bits, parts=layout.widths())
        ring.declared = length
        return ring

    def lends(self) -> str | None:
        return line(self) if self.kv_source is not None and self.kv_source.lends else None

    def borrows(self) -> str | None:
        return line(self) if self.kv_source is not None and not self.kv_source.makes else None

    def remembered(self) -> Layout:
        """What is remembered of a token."""
        return Layout(self.memory())
