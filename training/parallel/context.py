"""Context parallelism: the tokens of a sequence are spread over ranks, by a cache that gathers.

An attention with a cache computes the last T of S positions, over keys that ``Cache.append`` returns. Here that cache
is ``Spread``: it gathers what the block appends on all ranks, and returns what comes before the end of this rank's
tokens. So any attention that keeps the contract becomes parallel as it is, and what it caches is what is sent: C + R
numbers a token for MLA, where keys and values of all heads would be 71 times as many in DeepSeek-V2. The gradient of
the gather is a sum over the ranks.

Sequences are cut into 2n chunks, of which rank r has r and 2n − 1 − r: in causal attention all ranks then have as much
to compute (Llama 3, arXiv 2407.21783, §3.3.2, which gathers keys and values too). The block is called once for
each. Everything around attention works on single tokens, but for memories and convolutions: they are given the last few
tokens before each chunk, which every rank sends (training/parallel/context.py).

Not supported: overlap of the gathers with computation, and rings of ranks (arXiv 2310.01889), which spread the keys
too: here each rank has what a layer caches of the whole sequence, and expands it itself.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from blockwright.blocks.attention.base import Attention
from blockwright.blocks.attention.scored import Scored
from blockwright.blocks.base import Block
from blockwright.blocks.cache.base import Cache
from blockwright.blocks.cache.fixed import Ring
from blockwright.blocks.depthwise import Stretch
from blockwright.blocks.forward_pass import Pass, Share, Tails, joined, split
from blockwright.blocks.kernels.scoring import is_real
from blockwright.blocks.memory import Memory
from blockwright.blocks.over_ranks import OverRanks
from blockwright.registry import BlockError, ConfigError
from blockwright.training.parallel.collectives import gather

# --- the inputs before the chunks of a rank, from the ranks that hold them: convolutions under context parallelism ---


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


class Context:
    """The ranks that share sequences.

    Args:
        group: their process group
        size: n, their number
        rank: r, of this one among them
    """

    def __init__(self, group: ProcessGroup, size: int, rank: int) -> None:
        self.group, self.size, self.rank = group, size, rank

    def share(self, length: int) -> HeadAndTail:
        """This rank's tokens of sequences of a length, which 2n divides."""
        if length % (2 * self.size):
            rule = f"is no multiple of {2 * self.size}, the chunks in which {self.size} ranks share a window"
            raise ConfigError("data.sequence_length", length, rule, "Use windows of such a length")
        return HeadAndTail(self, length // (2 * self.size))


class HeadAndTail(Share):
    """Chunks r and 2n − 1 − r of sequences of 2n chunks.

    Depths of multi-token prediction leave out the last tokens, fewer than a chunk: the tail of rank 0 is then shorter.

    Args:
        context: the ranks
        chunk: tokens of a chunk
    """

    def __init__(self, context: Context, chunk: int) -> None:
        self.context, self.chunk = context, chunk
        self._documents: dict[tuple[int, int, int], tuple[Tensor, Tensor]] = {}

    def take(self, whole: Tensor) -> Tensor:
        n, r, c = self.context.size, self.context.rank, self.chunk
        last = 2 * n - 1 - r
        return torch.cat((whole[:, r * c : (r + 1) * c], whole[:, last * c : (last + 1) * c]), 1)

    def tails(self, segments: Tensor | None) -> RankTails:
        return RankTails(self, segments)

    def attend(self, attention: Block, x: Tensor, given: Pass) -> Tensor:
        assert isinstance(attention, Attention)
        length = given.positions.shape[1]
        memory = Spread(self, given.positions, given.segments, _reach(attention, length))
        carried = split(given.carry or {}, self.chunk)
        places = self.take(given.positions).tensor_split([self.chunk], 1)
        tails = ChunkTails(self, given.segments)
        head, tail = (
            Pass(p, cache=memory, carry=part, losses={}, tails=tails) for p, part in zip(places, carried, strict=True)
        )
        halves = zip(x.tensor_split([self.chunk], 1), (head, tail), strict=True)
        y = torch.cat([attention(h, chunk) for h, chunk in halves], 1)
        if given.carry is not None:
            given.carry.update(joined(*carried))
        if given.losses is not None and head.losses and tail.losses:
            shares = self._shares(attention, x, given.segments, length)
            given.losses.update({n: shares[0] * value + shares[1] * tail.losses[n] for n, value in head.losses.items()})
        if memory.appends != 2:
            rule = "must append to its cache once in a pass, for its keys to be gathered from other ranks"
            raise BlockError("attention", type(attention).__name__, rule, "Train it without trainer.strategy.context")
        return y

    def recall(self, memory: Block, x: Tensor, given: Pass) -> Tensor:
        assert isinstance(memory, Memory)
        own = {name: t for name in ("embedded", "tokens") if (t := getattr(given, name)) is not None}
        starts = self.take(torch.arange(given.positions.shape[1])[None])[0, [0, self.chunk]].tolist()
        before = self._before(memory.reach or 0, {"x": x, **own})
        found = []
        for start, halo, *parts in zip(starts, before, *self._chunks(x, *own.values()), strict=True):
            part = {name: torch.cat((halo[name], t), 1) for name, t in zip(halo, parts, strict=True)}
            n = halo["x"].shape[1]
            places = slice(start - n, start + parts[0].shape[1])
            segments = None if given.segments is None else given.segments[:, places]
            read = Pass(given.positions[:, places], segments, tokens=part.get("tokens"), embedded=part.get("embedded"))
            found.append(memory(part["x"], read)[:, n:])
        return torch.cat(found, 1)

    def _chunks(self, *own: Tensor) -> list[tuple[Tensor, ...]]:
        """The head chunk and the tail chunk of each tensor."""
        return [t.tensor_split([self.chunk], 1) for t in own]

    def _before(self, reach: int, own: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
        """For the head chunk and the tail chunk, the ``reach`` tokens before it, of each tensor [B,t,…] by name."""
        n, r, c = self.context.size, self.context.rank, self.chunk
        places = r, 2 * n - 1 - r
        if not reach:
            return [{name: t[:, :0] for name, t in own.items()} for _ in places]
        ends: dict[str, list[Tensor]] = {}  # the last tokens of every chunk, in the order of the sequence
        for name, (head, tail) in zip(own, self._chunks(*own.values()), strict=True):
            last = torch.stack([_lengthened(t, c)[:, c - reach :] for t in (head, tail)])
            (every,) = gather(self.context.group, last)
            heads, tails = every.unflatten(0, (n, 2)).unbind(1)
            ends[name] = [*heads.unbind(), *tails.flip(0).unbind()]
        return [{name: end[i - 1] if i else end[0][:, :0] for name, end in ends.items()} for i in places]

    def _shares(self, attention: Attention, x: Tensor, segments: Tensor | None, length: int) -> Tensor:
        """The factors on the means of two chunks with which the mean over ranks is that over all tokens.

        A loss that ``OverRanks`` averages is a mean over the heads of all ranks, then over their tails. Another is a
        mean over this rank's.

        Args:
            attention: whose losses they are
            x: [B,t,D] of this rank's tokens
            segments: [B,T'] of the whole sequences; None: none is padding
            length: T'
        """
        real = x.new_ones(len(x), length, dtype=torch.bool) if segments is None else is_real(segments)
        own = torch.stack([part.sum() for part in self.take(real).tensor_split([self.chunk], 1)]).float()
        for block in attention.modules():
            if isinstance(block, OverRanks):
                every = block.batch_ranks.sum(own)
                return every / every.sum().clamp(min=1)
        return own * self.context.size / real.sum().clamp(min=1)

    def documents(self, segments: Tensor, start: int, end: int) -> Tensor:
        """Documents of some tokens; for all layers one tensor, by which kernels know what they have made of it."""
        key = id(segments), start, end
        if key not in self._documents:
            self._documents[key] = segments, segments[:, start:end]  # kept: its id is not another's meanwhile
        return self._documents[key][1]


class Spread(Cache):
    """The memory of one attention in one pass: appended to for the head chunk, then for the tail chunk.

    Args:
        share: of this rank
        positions, segments: [B|1,T'] and [B,T'] of the whole sequences
        reach: number of last tokens that a token sees; None for all
    """

    def __init__(self, share: HeadAndTail, positions: Tensor, segments: Tensor | None, reach: int | None) -> None:
        self.share, self.whole, self.ids, self.reach = share, positions, segments, reach
        self.room, self.length, self.spread, self.stores = positions.shape[1], 0, True, {}
        self.padding = None
        self.appends = 0
        self._first = 0  # index of the first token that ``append`` returned
        self._heads: list[Tensor] = []  # the first half of the sequence, [B,n·c,…] a slot

    def append(self, *new: Tensor, multiple: int = 1) -> tuple[Tensor, ...]:
        """Gather this rank's chunk, and those of the other ranks.

        Args:
            new: [B,c,…] for each slot; the last chunk of the sequence may be shorter
            multiple: ignored

        Returns:
            [B,S,…] for each slot: all tokens, or those within reach, up to the end of this rank's chunk
        """
        n, r, c = self.share.context.size, self.share.context.rank, self.share.chunk
        n_new, is_head = new[0].shape[1], not self.appends
        self.appends += 1
        own = [_lengthened(values, c) for values in new]
        # [n·B,c,…], rank by rank → [B,n,c,…]
        chunks = [t.unflatten(0, (n, -1)).transpose(0, 1) for t in gather(self.share.context.group, *own)]
        end = (r if is_head else 2 * n - 1 - r) * c + n_new
        self.length, self._first = end, 0 if self.reach is None else max(0, end - n_new - self.reach + 1)
        if is_head:
            self._heads = [t.flatten(1, 2) for t in chunks]
            return tuple(head[:, self._first : end] for head in self._heads)
        heads, self._heads = self._heads, []
        tails = [t.flip(1).flatten(1, 2) for t in chunks]  # the last rank's comes first
        both = zip(heads, tails, strict=True)
        begin = max(0, self._first - n * c)
        return tuple(torch.cat((head[:, self._first :], tail[:, begin : end - n * c]), 1) for head, tail in both)

    def indices(self, device: torch.device) -> Tensor:
        return torch.arange(self._first, self.length, device=device)

    def positions(self, device: torch.device) -> Tensor:
        return self.whole[:, self._first : self.length]

    def segments(self) -> Tensor | None:
        return None if self.ids is None else self.share.documents(self.ids, self._first, self.length)

    def padding_bias(self, n_new: int) -> Tensor | None:
        """As in ``Cache``, with −∞ on other documents: for blocks that do not ask for ``segments``."""
        ids = self.segments()
        if ids is None:
            return None
        hidden = ids[:, -n_new:, None] != ids[:, None]
        return torch.zeros_like(hidden, dtype=torch.float32).masked_fill_(hidden, float("-inf"))[:, None]


def _lengthened(values: Tensor, length: int) -> Tensor:
    """[B,t,…] with zeros behind, which no token sees, [B,length,…]."""
    missing = length - values.shape[1]
    return values if not missing else torch.cat((values, values.new_zeros(len(values), missing, *values.shape[2:])), 1)


def _reach(attention: Attention, length: int) -> int | None:
    """Number of last tokens that an attention keeps; None for all."""
    if isinstance(attention, Scored):
        return attention.window if attention.window is not None and attention.window < length else None
    kept = attention.new_cache(1, length, torch.float32, torch.device("meta"))
    return kept.room if isinstance(kept, Ring) else None
