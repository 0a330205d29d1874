from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from blockwright.blocks.attention.base import ScoreRows, even_heads
from blockwright.blocks.attention.remembered import Memory
from blockwright.blocks.attention.scored import Changes, Scored
from blockwright.blocks.base import Drawn, Placement, number
from blockwright.blocks.convolution import Convolution, convolved
from blockwright.blocks.forward_pass import Pass
from blockwright.blocks.kernels.attention import of_latents
from blockwright.blocks.linear import Linear
from blockwright.blocks.norm import Norm
from blockwright.blocks.position.base import Position
from blockwright.registry import BlockError, register
from blockwright.registry.ranges import Count, Whole


@dataclass(frozen=True)
class OfLatents(Changes):
    """Those of an attention that remembers latents.

    Args:
        latent_conv: convolves latents and rope parts of keys, before kv_norm; null for none
    """

    latent_conv: Convolution | None = None


@register("attention", "mla")
class MLA(Scored):
    """Multi-head latent attention: keys and values are expanded from one small latent, the only thing cached.

    DeepSeek-AI 2024 (DeepSeek-V2), arXiv 2405.04434, §2.1. With heads n of N:
    [c; k_rope] = W_kv_down x, [k_n; v_n] = W_kv_up,n norm(c), [q_n; q_rope,n] = W_q,n x (or, compressed,
    W_q_up,n norm(W_q_down x)); k_n ← [k_n; rot(k_rope)], q_n ← [q_n; rot(q_rope,n)];
    y = W_o [softmax(q_n k_nᵀ / √(nope + rope)) v_n]_n.

    Position is decoupled: it rotates a separate part of each query and one key part shared by all heads, so the latent
    stays position-free. The norms on the two latents are in the paper's text but not in its equations, and in every
    released checkpoint. The order inside heads and projections is that of the checkpoints: [nope | rope],
    [latent | rope], [k | v]. With position blocks that do not rotate, the rope part is plain extra width.
    The cache holds C + R numbers per token, 4.5 heads' worth in the paper. Few new tokens on a long past are computed
    absorbed (the paper's appendix C; blocks/kernels/attention.py): W_kv_up is folded into query and output, and
    nothing is expanded. Many are computed as in the formula, expanding the cached latents each time, some heads at a
    time if the keys are many more.

    Args:
        n_heads: N, heads
        kv_lora_rank: C, width of the key-value latent; null is 4 head widths, the paper's ratio
        q_lora_rank: width of the query latent; null leaves queries uncompressed, as in V2-Lite
        qk_nope_head_dim: width of a head's part without position; null is d_model / n_heads
        qk_rope_head_dim: R, width of a head's part with position; null is half a head width, the paper's ratio; 0 for
            none, as in GLM-5.3-Flash
        v_head_dim: width of a head's value; null is d_model / n_heads
        q_norm: norm of the query latent, used with q_lora_rank
        kv_norm: norm of the key-value latent
        position: rotates the rope parts, or biases scores
    """

    latent_conv: Convolution | None

    def __init__(
        self,
        d_model: int,
        position: Position,
        q_norm: Norm,
        kv_norm: Norm,
        n_heads: Count = 8,
        kv_lora_rank: Count | None = None,
        q_lora_rank: Count | None = None,
        qk_nope_head_dim: Count | None = None,
        qk_rope_head_dim: Whole | None = None,
        v_head_dim: Count | None = None,
        changes: OfLatents = OfLatents(),
    ) -> None:
        super().__init__(d_model)
        self.nope, self.rope, self.v_head_dim, self.latent = _widths(
            d_model, n_heads, qk_nope_head_dim, qk_rope_head_dim, v_head_dim, kv_lora_rank
        )
        if not self.rope and type(position).rotate is not Position.rotate:
            rule = f"leaves {type(position).__name__} nothing to rotate"
            raise BlockError("qk_rope_head_dim", qk_rope_head_dim, rule, "Use 2 or more, or position: none")
        self.take(position, changes)
        self.n_heads, queries = n_heads, n_heads * (self.nope + self.rope)
        if q_lora_rank is None:
            self.query: nn.Module = Linear(d_model, queries, bias=False)
        else:
            down, up = Linear(d_model, q_lora_rank, bias=False), Linear(q_lora_rank, queries, bias=False)
            self.query = nn.Sequential(down, q_norm, up)
        self.kv_down = Linear(d_model, self.latent + self.rope, bias=False) if changes.makes else None
        self.kv_norm = kv_norm if changes.makes else None
        self.kv_up = Linear(self.latent, n_heads * (self.nope + self.v_head_dim), bias=False)
        self.output = Linear(changes.left(n_heads) * self.v_head_dim, d_model, bias=False)
        if self.latent_conv is not None:
            self.latent_conv.placement = "replicate"  # all heads read the whole latent
        self.scale = position.softmax_scale / (self.nope + self.rope) ** 0.5

    @classmethod
    def child_context(cls, child: str, known: Mapping[str, Any]) -> Mapping[str, Any]:
        given = ("d_model", "n_heads", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "kv_lora_rank")
        nope, rope, value, latent = _widths(*(known[name] for name in given))
        of_query = known["q_lora_rank"]
        dims = {"q_norm": of_query or 1, "kv_norm": latent, "latent_conv": latent + rope}
        head = {"query_conv": nope + rope, "readout": value, "output_gate": value}.get(child, rope)
        context = super().child_context(child, {**known, "head_dim": head})
        context = {**context, "n_kv_heads": known["n_heads"], "latent_dim": of_query or known["d_model"]}
        return {**context, "dim": dims[child]} if child in dims else context

    def mix(self, x: Tensor, given: Pass) -> Tensor:
        compressed, q = x, self.query
        if isinstance(q, nn.Sequential):
            compressed, q = q[1](q[0](x)), q[2]
        q = convolved(self.query_conv, q(compressed), given).unflatten(-1, (-1, self.nope + self.rope))
        q_nope, q_rope = q.split((self.nope, self.rope), -1)
        if self.kv_down is None or self.kv_norm is None:  # it borrows
            latent, k_rope = None, x.new_empty(*x.shape[:2], 0, self.rope)
        else:
            latent, k_rope = convolved(self.latent_conv, self.kv_down(x), given).split((self.latent, self.rope), -1)
            latent, k_rope = self.kv_norm(latent), k_rope[:, :, None]
        q_rope, k_rope = given.rotated(self.position, q_rope, k_rope)
        held = {} if latent is None else {"latent": (latent, k_rope.squeeze(2))}
        return self.output(self.attend(x, given, torch.cat((q_nope, q_rope), -1), held, compressed).flatten(-2))

    def expand(self, held: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        latent, k_rope = held
        return of_latents(self.kv_up(latent), k_rope, self.nope, self.v_head_dim)

    def memory(self) -> Memory:
        return {"latent": [(self.latent,), (self.rope,)]}

    def drawn(self) -> Drawn:
        compressed = self.query[0] if isinstance(self.query, nn.Sequential) else None
        latent = (f"query latent {number(compressed.out_features)}",) if isinstance(compressed, nn.Linear) else ()
        heads = f"{self.n_heads} heads of {self.nope} + {self.rope}"
        return Drawn((heads, f"values {self.v_head_dim}", *latent, f"key-value latent {number(self.latent)}"))

    def up(self) -> Tensor | None:
        if not isinstance(self.kv_up, nn.Linear):  # wrapped by another library
            return None
        return self.kv_up.weight.unflatten(0, (-1, self.nope + self.v_head_dim))

    def score_rows(self) -> tuple[ScoreRows, ...]:
        if any(conv is not None and not conv.scales for conv in (self.query_conv, self.latent_conv)):
            return ()
        height, content = self.nope + self.rope, slice(0, self.nope)
        return (
            ScoreRows(self._queries, height, "query", content),
            ScoreRows(self._queries, height, "alone", slice(self.nope, height)),  # its key is shared by all heads
            ScoreRows("kv_up.weight", self.nope + self.v_head_dim, "key", content),
        )

    def head_rows(self) -> dict[str, tuple[int, ...]]:
        return {self._queries: (self.nope + self.rope,), "kv_up.weight": (self.nope, self.v_head_dim)}

    def parallel_plan(self) -> dict[str, Placement]:
        return {self._queries: "column", "kv_up.weight": "column", "output.weight": "row"}

    @property
    def _queries(self) -> str:
        return "query.weight" if isinstance(self.query, nn.Linear) else "query.2.weight"


def _widths(
    d_model: int, n_heads: int, nope: int | None, rope: int | None, value: int | None, latent: int | None
) -> tuple[int, int, int, int]:
    """The four widths; those not given follow the paper's ratios to a head of d_model / n_heads."""
    if nope and rope is not None and value and latent:
        return nope, rope, value, latent
    head = even_heads(d_model, n_heads)
    rope = max(2, head // 4 * 2) if rope is None else rope
    return nope or head, rope, value or head, latent or 4 * head
