"""The inputs before the chunks of a rank, from the ranks that hold them: convolutions under context parallelism.

Of each chunk its last inputs are gathered, a few tokens: every rank then has the end of every chunk, and takes what
precedes its own. The gradient of the gather is a sum over the ranks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from blockwright.blocks.depthwise import Stretch
from blockwright.blocks.forward_pass import Tails
from blockwright.training.parallel.collectives import gather

if TYPE_CHECKING:
    from blockwright.training.parallel.context import HeadAndTail


class ChunkTails(Tails):
    """Of a block that is called for the head chunk, then for the tail chunk, as attention is.

    Args:
        share: of this rank
        segments: [B,T'] of the whole sequences; None: each is one document
    """

    def __init__(self, share: HeadAndTail, segments: Tensor | None) -> None:
        self.share, self.segments = share, segments
        self._ends: dict[str, Tensor] = {}  # of the first half of the sequence, chunk by chunk, [B,n·m,W]

    def before(self, place: str, u: Tensor, past: int) -> list[Stretch]:
        n, r, c = self.share.context.size, self.share.context.rank, self.share.chunk
        heads = self._ends.pop(place, None)
        chunk = r if heads is None else 2 * n - 1 - r
        ends = self._gathered(u, min(past, c))
        if heads is None:
            self._ends[place] = torch.cat(ends, 1)
        earlier = ends[:r] if heads is None else (heads, *ends[:r:-1])
        missing, no_token = u.new_zeros(len(u), past, u.shape[2]), ends[0][:, :0]  # so that all ranks have its gradient
        inputs = torch.cat((torch.cat((missing, *earlier, no_token), 1)[:, -past:], u), 1)
        return [Stretch(inputs, self._documents(chunk * c, u.shape[1], past))]

    def _gathered(self, u: Tensor, kept: int) -> tuple[Tensor, ...]:
        """The last inputs [B,kept,W] of the chunk of each rank. The last chunk may be shorter: none follows it."""
        own = torch.cat((u.new_zeros(len(u), kept, u.shape[2]), u), 1)[:, -kept:]
        (ends,) = gather(self.share.context.group, own)
        return ends.chunk(self.share.context.size)

    def _documents(self, start: int, length: int, past: int) -> Tensor | None:
        """[B,past+length], of a chunk and of the inputs before it."""
        if self.segments is None:
            return None
        ids = self.segments[:, max(0, start - past) : start + length]
        return torch.cat((ids[:, :1].expand(-1, past + length - ids.shape[1]), ids), 1)


class RankTails(Tails):
    """Of a block that is called once, for both chunks of a rank.

    Args:
        share, segments: as of ``ChunkTails``
    """

    def __init__(self, share: HeadAndTail, segments: Tensor | None) -> None:
        self.chunks, self.chunk = ChunkTails(share, segments), share.chunk

    def before(self, place: str, u: Tensor, past: int) -> list[Stretch]:
        head, tail = u.tensor_split([self.chunk], 1)
        return [*self.chunks.before(place, head, past), *self.chunks.before(place, tail, past)]
