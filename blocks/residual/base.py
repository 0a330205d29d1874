"""The contract of ``residual``: how a layer's mixers and norms are connected to the residual stream."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor

from blockwright.blocks.base import Block
from blockwright.blocks.closing import Closing
from blockwright.blocks.forward_pass import Losses, Pass
from blockwright.registry import family


class Mixer(Protocol):
    """What a layer gives its residual block to call: its attention, and its feed-forward block."""

    def __call__(self, x: Tensor, /, places: Tensor | None = None) -> Tensor:
        """x [B,T,D] → [B,T,D].

        Args:
            places: [B,k], where x is of some tokens only, [B,k,D], their places in their rows. The feed-forward block
                alone takes them, in a pass without caches
        """


@family("residual")
class Residual(Block):
    """Owns the layer's norms (children of kind ``norm``) and calls the mixers.

    What passes from layer to layer is [B,T,D], or several streams [B,T,M,D]: then a block says so by ``streams``,
    ``open`` and ``close``. ``open`` is called on the block of the first layer, ``close`` on that of the last.

    Class attributes:
        streams: M, which is the same in all layers of a model; None for [B,T,D], 0 if it grows with the depth
        adds_branches: whether x ← x + mixer(norm(x)) for each mixer, so that a factor on what a mixer writes is one on
            its branch; rules of depth need it
        selects: whether it gives the feed-forward block some of the tokens only, ``places``; one that reads others than
            the token itself is then refused
    """

    streams: int | None = None
    adds_branches: bool = False
    selects: bool = False

    @classmethod
    def child_context(cls, child: str, known: Mapping[str, Any]) -> Mapping[str, Any]:
        return {"dim": known["d_model"]}

    def open(self, x: Tensor) -> Tensor:
        """Input of the first layer, [B,T,D] → what its residual block reads."""
        return x

    def leave(self, x: Tensor) -> Tensor:
        """What a layer passes on of the stream, after all that is added to it."""
        return x

    def close(self, x: Tensor, given: Pass) -> Tensor:
        """What the last layer's residual block gives → [B,T,D], the input of the final norm."""
        return x

    @property
    def reshapes(self) -> bool:
        """Whether ``open`` or ``close`` does anything: between layers the stream is another than at the ends."""
        return (type(self).open, type(self).close) != (Residual.open, Residual.close)

    def losses(self, x: Tensor, real: Tensor | None) -> Losses:
        """Name → further loss of the layer in training, a mean over tokens (``OverRanks.mean``), already weighted.

        Args:
            x: what ``forward`` reads
            real: [B,T], which tokens are no padding; None: all
        """
        return {}

    def forward(self, x: Tensor, attention: Mixer, ffn: Mixer, given: Pass) -> Tensor:
        """x [B,T,D] → [B,T,D], or the same of streams; ``attention`` and ``ffn`` map [B,T,D] to [B,T,D] and are each
        called once. ``given`` is the layer's: its ``carry`` has what the residual blocks below left there."""
        raise NotImplementedError


class Around(Residual):
    """A residual block around another, whose hooks it passes on.

    Args:
        residual: the other one
    """

    def __init__(self, residual: Residual) -> None:
        super().__init__()
        self.residual, self.streams = residual, residual.streams
        self.adds_branches, self.selects = residual.adds_branches, residual.selects

    def open(self, x: Tensor) -> Tensor:
        return self.residual.open(x)

    def leave(self, x: Tensor) -> Tensor:
        return self.residual.leave(x)

    def close(self, x: Tensor, given: Pass) -> Tensor:
        return self.residual.close(x, given)

    @property
    def reshapes(self) -> bool:
        own = (type(self).open, type(self).close) != (Around.open, Around.close)
        return own or self.residual.reshapes

    def losses(self, x: Tensor, real: Tensor | None) -> Losses:
        return self.residual.losses(x, real)

    def forward(self, x: Tensor, attention: Mixer, ffn: Mixer, given: Pass) -> Tensor:
        return self.residual(x, attention, ffn, given)


class Streams(Residual):
    """Several residual streams, opened as M copies: the shared base of ``mhc``, ``hyper_connections`` and others.

    Attributes:
        closing: a child that makes one of them again, for a block without a ``close`` of its own
    """

    streams: int
    closing: Closing

    def open(self, x: Tensor) -> Tensor:
        return x[:, :, None].expand(-1, -1, self.streams, -1)

    def close(self, x: Tensor, given: Pass) -> Tensor:
        return self.closing(x)
