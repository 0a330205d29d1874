from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Ge
from torch import Tensor

from blockwright.blocks.compressor.base import Compressor, Losses, Pool, Rotate
from blockwright.blocks.linear import Linear
from blockwright.blocks.norm import Norm
from blockwright.blocks.precision import at_least_fp32
from blockwright.blocks.selector.base import Asked, Held
from blockwright.blocks.selector.dsa import Candidates, Indexer, relu_scores
from blockwright.registry import BlockError, register
from blockwright.registry.ranges import Count, Positive


def refuse_narrow(head_dim: int, rope_dim: int) -> None:
    """Refuse heads of an index that the attention's rotation does not fit in.

    Raises:
        BlockError
    """
    if head_dim < rope_dim:
        rule = f"is narrower than the part that the attention rotates ({rope_dim})"
        raise BlockError("head_dim", head_dim, rule, f"Write at least {rope_dim}, or lower rope_head_dim")


@register("compressor", "csa")
class CSA(Compressor):
    """Compressed sparse attention: one key of each 4 tokens, of which every query sees the highest that an index finds.

    DeepSeek-AI 2026 (DeepSeek-V4), §2.3.1. Keys are made as in ``hca``, but with two values and gates of a token: the
    key of window w is over the first ones of window w − 1 and the second ones of window w. The index has keys of its
    own, I wide, made alike of the same windows, and scores them as ``dsa`` does: with J index heads and the attention's
    compressed query c, q_j = rot(W_q,j c), w = W_w x / √J, I_tw = Σ_j w_tj relu(q_tj · k_w) / √I.

    How V4's index was trained is not published; here it learns as ``dsa`` does, from the attention's weights on the
    windows, and nothing else follows its loss. Equal scores go to the later window, where other implementations leave
    it to the sort. Scores are fp32.

    Args:
        norm: norm of the means that become keys
        index_norm: norm of the index's own
        every: tokens of a window
        n_heads: J, index heads
        head_dim: I, width of an index head
        top_k: windows that a query sees
        dense: whether every query sees all windows, while the index learns
        loss_weight: weight of the index's loss
    """

    conformance_settings: ClassVar[Mapping[str, Any]] = {"every": 2, "n_heads": 2, "head_dim": 8, "top_k": 2}

    def __init__(
        self,
        d_model: int,
        kv_dim: int,
        rope_dim: int,
        latent_dim: int,
        attention_heads: int,
        norm: Norm,
        index_norm: Norm,
        every: Annotated[int, Ge(2)] = 4,
        n_heads: Count = 64,
        head_dim: Count = 128,
        top_k: Count = 512,
        dense: bool = False,
        loss_weight: Positive = 1.0,
    ) -> None:
        super().__init__()
        refuse_narrow(head_dim, rope_dim)
        self.every, self.norm, self.index_norm = every, norm, index_norm
        self.pool = Pool(d_model, kv_dim, every, overlapping=True)
        self.index_pool = Pool(d_model, head_dim, every, overlapping=True, apart=True)
        self.index = Index(d_model, latent_dim, attention_heads, n_heads, head_dim, top_k, dense, loss_weight)

    @classmethod
    def child_context(cls, child: str, known: Mapping[str, Any]) -> Mapping[str, Any]:
        return {"dim": known["kv_dim" if child == "norm" else "head_dim"]}

    def pools(self) -> dict[str, Pool]:
        return {"key": self.pool, "index": self.index_pool}

    def finish(self, means: tuple[Tensor, ...], positions: Tensor, rotate: Rotate) -> tuple[Tensor, ...]:
        normed = self.norm(means[0]), self.index_norm(means[1])
        return tuple(rotate(keys[:, :, None], positions)[:, :, 0] for keys in normed)

    def choose(self, asked: Asked, kept: tuple[Tensor, ...], closed: Tensor, rotate: Rotate) -> Tensor:
        return self.index.among(asked._replace(rotate=rotate), kept, closed)

    def losses(
        self, asked: Asked, kept: tuple[Tensor, ...], closed: Tensor, chosen: Tensor, scale: float, rotate: Rotate
    ) -> Losses:
        return self.index.learnt(asked._replace(rotate=rotate), kept, closed, chosen, scale)


class Index(Indexer):
    """What chooses windows; arguments as in ``CSA``."""

    def __init__(
        self,
        d_model: int,
        latent_dim: int,
        attention_heads: int,
        n_heads: int,
        head_dim: int,
        top_k: int,
        dense: bool,
        loss_weight: float,
    ) -> None:
        super().__init__()
        self.n_heads, self.head_dim, self.attention_heads = n_heads, head_dim, attention_heads
        self.top_k, self.dense, self.loss_weight = top_k, dense, loss_weight
        self.query = Linear(latent_dim, n_heads * head_dim, bias=False)
        self.weights = Linear(d_model, n_heads, bias=False)

    def among(self, asked: Asked, kept: tuple[Tensor, ...], closed: Tensor) -> Tensor:
        """Which of the windows that are ``closed`` to each query it sees, [B|1,T,n]; ``kept`` are their keys [B,n,H]
        and index keys [B,n,I]."""
        return closed if self.takes_all(closed.shape[-1]) else self(asked, _held(kept, closed))[:, 0]

    def learnt(
        self, asked: Asked, kept: tuple[Tensor, ...], closed: Tensor, chosen: Tensor, scale: float
    ) -> dict[str, Tensor]:
        """The losses of a choice of ``among``."""
        held = _held((kept[0].detach(), kept[1]), closed)
        return self.losses(asked, held, chosen[:, None], scale, None)

    def candidates(self, asked: Asked, held: Held) -> Candidates:
        return Candidates(held.slots[0])

    def scores(self, asked: Asked, keys: Tensor) -> Tensor:
        assert asked.rotate is not None
        q = asked.rotate(self.query(asked.latent).unflatten(-1, (self.n_heads, -1)), asked.positions)
        return relu_scores(q, keys, at_least_fp32(self.weights(asked.x)) * self.n_heads**-0.5)


def _held(kept: tuple[Tensor, ...], seen: Tensor) -> Held:
    """Windows as what can be chosen: keys [B,n,H] and index keys [B,n,I]."""
    keys, index = kept
    none = torch.zeros(1, keys.shape[1], dtype=torch.long, device=keys.device)
    return Held(keys, lambda stored: stored[:, :, None], (index,), none, none, seen, segments=False)


@register("compressor", "hca")
class HCA(Compressor):
    """Heavily compressed attention: one key of each 128 tokens, and every query sees all of them.

    DeepSeek-AI 2026 (DeepSeek-V4), §2.3.2. With u = W_value x, z = W_gate x and biases b of the places in a window:
    key_w = rot(norm(Σ_j softmax_j(z_j + b_j) ⊙ u_j)) over the tokens j of window w, at the position of its first one.

    Args:
        norm: norm of the means
        every: tokens of a window
    """

    conformance_settings: ClassVar[Mapping[str, Any]] = {"every": 3}

    def __init__(self, d_model: int, kv_dim: int, norm: Norm, every: Annotated[int, Ge(2)] = 128) -> None:
        super().__init__()
        self.every, self.norm = every, norm
        self.pool = Pool(d_model, kv_dim, every, overlapping=False)

    @classmethod
    def child_context(cls, child: str, known: Mapping[str, Any]) -> Mapping[str, Any]:
        return {"dim": known["kv_dim"]}

    def pools(self) -> dict[str, Pool]:
        return {"key": self.pool}

    def finish(self, means: tuple[Tensor, ...], positions: Tensor, rotate: Rotate) -> tuple[Tensor, ...]:
        return (rotate(self.norm(means[0])[:, :, None], positions)[:, :, 0],)
