from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from blockwright.blocks.base import Drawn
from blockwright.blocks.compressor.base import (
    Compressor,
    Entries,
    Means,
    Pool,
    Rotate,
    WindowedCache,
    Windows,
    windows_of,
)
from blockwright.blocks.compressor.csa import Index, refuse_narrow
from blockwright.blocks.forward_pass import Pass
from blockwright.blocks.linear import Linear
from blockwright.blocks.norm import Norm
from blockwright.blocks.selector.base import Asked, highest
from blockwright.registry import register
from blockwright.registry.ranges import Count, Positive, Whole

# What crosses depth, by name: keys [B,n,H], index keys [B,n,I], what queries see [B,T,n], and among what they choose.
KEYS, INDEX, CHOSEN, AMONG = "keys", "index", "chosen", "among"


@register("compressor", "csa2")
class CSA2(Compressor):
    """Compressed sparse attention whose keys and choices several layers share.

    DeepSeek-AI 2026 (DeepSeek-V4.1-Flash), by the formulas of transformers (``DeepseekV41Attention``). With
    u = W_value x and z = W_gate x, the latent of window w is c_w = norm(Σ_j softmax_j(z_j) ⊙ u_j) over its tokens j; of
    a window of one token it is norm(u). Its key is rot(c_w) at the position of its first token. The index scores it as
    that of ``csa`` does, by a key of its own, rot(norm(W_k c_w)). Windows do not overlap, and places have no biases.

    One layer of ``keys`` makes keys, and those above it read them; one of ``choices`` has an index, whose choice those
    above it reuse. Both are counted from layer ``first``. A layer that makes nothing has no parameters here, and caches
    nothing. The released model is an encoder of 20 layers with windows of 2 tokens, with new keys every six, and a
    decoder of 20 with windows of one token, whose layers all read what the first one makes of the encoder's output, and
    choose again every four.

    With ``blocks``, the layers above one that makes keys choose among the windows of its highest blocks alone, each
    block by its highest score, so that they need score few. Equal scores go to the later window. FP4 and FP8 of the
    released caches are left out. The index learns as ``csa``'s does, each from its own layer; how the released one was
    trained is not published.

    Args:
        norm: norm of the latents
        index_norm: norm of the index's keys
        every: tokens of a window
        keys: layers to a set of keys
        choices: layers to a choice
        first: index of the layer at which both begin; those before it make their own
        n_heads: J, index heads
        head_dim: I, width of an index head
        top_k: windows that a query sees
        blocks: blocks among whose windows layers above choose; null: they choose among all
        block_size: windows of a block
        dense: whether every query sees all windows, while the index learns
        loss_weight: weight of the index's loss

    Raises:
        BlockError: a layer is to read keys, and none below it makes such
    """

    conformance_settings: ClassVar[Mapping[str, Any]] = {
        "every": 2,
        "keys": 2,
        "n_heads": 2,
        "head_dim": 8,
        "top_k": 2,
        "blocks": 2,
        "block_size": 2,
    }

    def __init__(
        self,
        d_model: int,
        layer_idx: int,
        kv_dim: int,
        rope_dim: int,
        latent_dim: int,
        attention_heads: int,
        norm: Norm,
        index_norm: Norm,
        every: Count = 2,
        keys: Count = 1,
        choices: Count = 1,
        first: Whole = 0,
        n_heads: Count = 32,
        head_dim: Count = 128,
        top_k: Count = 512,
        blocks: Count | None = None,
        block_size: Count = 8,
        dense: bool = False,
        loss_weight: Positive = 1.0,
    ) -> None:
        super().__init__()
        refuse_narrow(head_dim, rope_dim)
        place = layer_idx - first
        self.makes = place < 0 or place % keys == 0
        self.every, self.width, self.index_width = every, kv_dim, head_dim
        self.blocks, self.block_size = blocks, block_size
        self.norm, self.index_norm = (norm if self.makes else None), (index_norm if self.makes else None)
        self.pool = Pool(d_model, kv_dim, every, overlapping=False, places=False) if self.makes else None
        self.index_key = Linear(kv_dim, head_dim, bias=False) if self.makes else None
        sizes = d_model, latent_dim, attention_heads, n_heads, head_dim
        chooses = self.makes or place % choices == 0
        self.index = Index(*sizes, top_k, dense, loss_weight) if chooses else None

    @classmethod
    def child_context(cls, child: str, known: Mapping[str, Any]) -> Mapping[str, Any]:
        return {"dim": known["kv_dim" if child == "norm" else "head_dim"]}

    def drawn(self) -> Drawn:
        whose = () if self.makes else ("of a layer below" if self.index is None else "keys of a layer below",)
        return super().drawn()._replace(lines=whose)

    def lends(self) -> str | None:
        return self._line if self.makes else None

    def borrows(self) -> str | None:
        return None if self.makes else self._line

    @property
    def _line(self) -> str:
        """The name under which layers lend to each other: of equal windows, and keys of equal widths."""
        return f"windows of {self.every}, {self.width} wide, index {self.index_width}"

    def pools(self) -> dict[str, Pool]:
        return {} if self.pool is None else {"key": self.pool}

    def held(self) -> dict[str, Means]:
        return {**super().held(), "index": Means(self.index_width, 0, self.every)} if self.makes else {}

    def finish(self, means: tuple[Tensor, ...], positions: Tensor, rotate: Rotate) -> tuple[Tensor, ...]:
        assert self.norm is not None and self.index_norm is not None and self.index_key is not None
        latent = self.norm(means[0])
        index = self.index_norm(self.index_key(latent.detach()))
        return tuple(rotate(keys[:, :, None], positions)[:, :, 0] for keys in (latent, index))

    def forward(self, asked: Asked, given: Pass, cache: WindowedCache | None, scale: float, rotate: Rotate) -> Entries:
        windows = windows_of(self.every, asked, given.segments, cache)
        B, T = asked.x.shape[:2]
        asked = asked._replace(rotate=rotate)
        carry = {} if given.carry is None else given.carry
        if self.makes:
            kept = self.keep(asked, windows, cache, rotate)
            self._leave(carry, dict(zip((KEYS, INDEX), kept, strict=True)))
        else:
            widths = (KEYS, self.width), (INDEX, self.index_width)
            kept = tuple(self._below(carry, name, asked.x, (B, windows.n, width)) for name, width in widths)
        if self.index is None:
            chosen = self._below(carry, CHOSEN, asked.x, (B, T, windows.n))
        else:
            chosen = self._choose(self.index, asked, given, windows, kept, scale)
            self._leave(carry, {CHOSEN: chosen.expand(B, -1, -1)})
        return Entries(kept[0], windows.positions, lambda rows: chosen[:, rows, : windows.most(rows)])

    def _choose(
        self, index: Index, asked: Asked, given: Pass, windows: Windows, kept: tuple[Tensor, ...], scale: float
    ) -> Tensor:
        """Which windows each query sees, [B|1,T,n]."""
        carry = {} if given.carry is None else given.carry
        closed = windows.closed(slice(0, asked.x.shape[1]))
        if self.makes:
            self._leave(carry, {AMONG: self._highest(index, asked, closed, kept[1], windows.number)})
        elif (among := carry.get(self._name(AMONG))) is not None:
            closed = closed & among
        chosen = index.among(asked, kept, closed)
        if given.losses is not None and self.training and torch.is_grad_enabled():
            given.losses.update(index.learnt(asked, kept, closed, chosen, scale))
        return chosen

    @torch.no_grad()
    def _highest(self, index: Index, asked: Asked, closed: Tensor, keys: Tensor, number: Tensor) -> Tensor | None:
        """The windows [B,T,n] of the highest blocks; None: all of them."""
        n = closed.shape[-1]
        if self.blocks is None or n <= self.blocks * self.block_size:
            return None
        found = [
            highest_blocks(index.scores(asked.rows(rows), keys), closed[:, rows], number, self.blocks, self.block_size)
            for rows in index.rows(asked, n)
        ]
        return torch.cat(found, 1)

    def _leave(self, carry: dict[str, Tensor], tensors: Mapping[str, Tensor | None]) -> None:
        """Leave tensors to the layers above; what is None is left no more."""
        for name, tensor in tensors.items():
            carry.pop(self._name(name), None)
            carry.update({} if tensor is None else {self._name(name): tensor})

    def _below(self, carry: Mapping[str, Tensor], name: str, like: Tensor, shape: tuple[int, ...]) -> Tensor:
        """What a layer below left; on the meta device, where a layer is measured alone, an empty one."""
        if like.is_meta and self._name(name) not in carry:
            dtype = torch.bool if name == CHOSEN else like.dtype
            return like.new_empty(shape, dtype=dtype, requires_grad=like.requires_grad and name != CHOSEN)
        return carry[self._name(name)]

    def _name(self, name: str) -> str:
        return f"{self._line}: {name}"


def highest_blocks(scores: Tensor, closed: Tensor, number: Tensor, blocks: int, size: int) -> Tensor:
    """The windows in the highest blocks of ``size`` windows of a document, by the highest score in each; [B,t,n].

    A query's newest window is in one of them, whatever its score.

    Args:
        scores: [B,t,n] in fp32 or more
        closed: [B|1,t,n]
        number: [B|1,n], of the windows in their documents
        blocks: how many a query has
    """
    starts = (number % size == 0).long().cumsum(-1)
    block = (starts - starts[:, :1])[:, None].expand(scores.shape)
    of_blocks = torch.full_like(scores, float("-inf"))
    of_blocks = of_blocks.scatter_reduce(-1, block, scores.masked_fill(~closed, float("-inf")), "amax")
    newest = block.where(closed, -1).amax(-1, keepdim=True)
    own = torch.arange(scores.shape[-1], device=scores.device) == newest
    return highest(of_blocks.masked_fill(own, float("inf")), blocks).gather(-1, block) & closed
