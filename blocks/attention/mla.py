from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from blockwright.blocks.attention.base import ScoreRows, even_heads
from blockwright.blocks.attention.remembered import Memory, refuse_on_borrowed
from blockwright.blocks.attention.scored import Scored
from blockwright.blocks.base import Drawn, Placement, number
from blockwright.blocks.convolution import Convolution, convolved
from blockwright.blocks.forward_pass import Pass
from blockwright.blocks.kernels.latent_attention import of_latents
from blockwright.blocks.kv_source import KVSource
from blockwright.blocks.linear import Linear
from blockwright.blocks.norm import Norm
from blockwright.blocks.output_gate import OutputGate
from blockwright.blocks.position.base import Position
from blockwright.blocks.readout import Readout
from blockwright.blocks.selector.base import Selector
from blockwright.registry import register
from blockwright.registry.ranges import Count


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
    absorbed (the paper's appendix C; blocks/kernels/latent_attention.py): W_kv_up is folded into query and output, and
    nothing is expanded. Many are computed as in the formula, expanding the cached latents each time, some heads at a
    time if the keys are many more.

    Args:
        n_heads: N, heads
        kv_lora_rank: C, width of the key-value latent; null is 4 head widths, the paper's ratio
        q_lora_rank: width of the query latent; null leaves queries uncompressed, as in V2-Lite
        qk_nope_head_dim: width of a head's part without position; null is d_model / n_heads
        qk_rope_head_dim: R, width of a head's part with position; null is half a head width, the paper's ratio
        v_head_dim: width of a head's value; null is d_model / n_heads
        q_norm: norm of the query latent, used with q_lora_rank
        kv_norm: norm of the key-value latent
        position: rotates the rope parts, or biases scores
        kv_source: lends latents to layers above, or borrows those of a layer below, which this layer's matrices expand;
            null for neither
        query_conv: convolves queries over the last few tokens, before rotation; null for none
        latent_conv: convolves latents and rope parts of keys, before kv_norm; null for none
        readout: changes each head's sum over values; null for none
        selector: chooses which keys a query sees; null for none
        output_gate: gates the heads' outputs; null for none
    """

    residual_outputs: ClassVar[tuple[str, ...]] = ("output.weight",)

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
        qk_rope_head_dim: Count | None = None,
        v_head_dim: Count | None = None,
        kv_source: KVSource | None = None,
        query_conv: Convolution | None = None,
        latent_conv: Convolution | None = None,
        readout: Readout | None = None,
        selector: Selector | None = None,
        output_gate: OutputGate | None = None,
    ) -> None:
        super().__init__(d_model)
        widths = _widths(d_model, n_heads, qk_nope_head_dim, qk_rope_head_dim, v_head_dim, kv_lora_rank)
        self.n_heads, self.position, self.selector, self.kv_source = n_heads, position, selector, kv_source
        self.output_gate = output_gate
        self.nope, self.rope, self.v_head_dim, self.latent = widths
        queries = n_heads * (self.nope + self.rope)
        if q_lora_rank is None:
            self.query: nn.Module = Linear(d_model, queries, bias=False)
        else:
            down, up = Linear(d_model, q_lora_rank, bias=False), Linear(q_lora_rank, queries, bias=False)
            self.query = nn.Sequential(down, q_norm, up)
        makes = kv_source is None or kv_source.makes
        self.kv_down = Linear(d_model, self.latent + self.rope, bias=False) if makes else None
        self.kv_norm = kv_norm if makes else None
        self.kv_up = Linear(self.latent, n_heads * (self.nope + self.v_head_dim), bias=False)
        self.readout = readout
        left = n_heads if readout is None else readout.heads(n_heads)
        self.output = Linear(left * self.v_head_dim, d_model, bias=False)
        self.query_conv, self.latent_conv = query_conv, latent_conv
        refuse_on_borrowed(kv_source, {"latent_conv": latent_conv, "readout": readout})
        if latent_conv is not None:
            latent_conv.placement = "replicate"  # all heads read the whole latent
        self.scale = position.softmax_scale / (self.nope + self.rope) ** 0.5

    @classmethod
    def child_context(cls, child: str, known: Mapping[str, Any]) -> Mapping[str, Any]:
        given = ("d_model", "n_heads", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "kv_lora_rank")
        nope, rope, value, latent = _widths(*(known[name] for name in given))
        if child == "selector":
            return {"latent_dim": known["q_lora_rank"] or known["d_model"], "attention_heads": known["n_heads"]}
        if child == "readout":
            return {"head_dim": value, "n_kv_heads": known["n_heads"]}
        if child == "output_gate":
            readout = known.get("readout")
            return {
                "head_dim": value,
                "n_heads": known["n_heads"] if readout is None else readout.heads(known["n_heads"]),
            }
        dims = {"q_norm": known["q_lora_rank"] or 1, "kv_norm": latent}
        dims |= {"query_conv": known["n_heads"] * (nope + rope), "latent_conv": latent + rope}
        return {"dim": dims[child]} if child in dims else {"head_dim": rope}

    def mix(self, x: Tensor, given: Pass) -> Tensor:
        compressed, q = self._queries(x)
        q = convolved(self.query_conv, q, given)
        q_nope, q_rope = q.unflatten(-1, (-1, self.nope + self.rope)).split((self.nope, self.rope), -1)
        latent, k_rope = self._latents(x, given)
        q_rope, k_rope = given.rotated(self.position, q_rope, k_rope)
        held = {} if latent is None else {"latent": (latent, k_rope.squeeze(2))}
        y = self.attend(x, given, torch.cat((q_nope, q_rope), -1), held, compressed)
        y = y if self.output_gate is None else self.output_gate(x, y)
        return self.output(y.flatten(-2))

    def _latents(self, x: Tensor, given: Pass) -> tuple[Tensor | None, Tensor]:
        """Latents [B,T,C] and the rope part of keys [B,T,1,R] before rotation; None and no head, if it borrows."""
        if self.kv_down is None or self.kv_norm is None:
            return None, x.new_empty(*x.shape[:2], 0, self.rope)
        latent, k_rope = convolved(self.latent_conv, self.kv_down(x), given).split((self.latent, self.rope), -1)
        return self.kv_norm(latent), k_rope[:, :, None]

    def _queries(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What queries are made from, [B,T,L], and the queries, [B,T,N·(nope+R)]."""
        if not isinstance(self.query, nn.Sequential):
            return x, self.query(x)
        compressed = self.query[1](self.query[0](x))
        return compressed, self.query[2](compressed)

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
        query = "query.weight" if isinstance(self.query, nn.Linear) else "query.2.weight"
        height, content = self.nope + self.rope, slice(0, self.nope)
        return (
            ScoreRows(query, height, "query", content),
            ScoreRows(query, height, "alone", slice(self.nope, height)),  # its key is shared by all heads
            ScoreRows("kv_up.weight", self.nope + self.v_head_dim, "key", content),
        )

    def parallel_plan(self) -> dict[str, Placement]:
        query = "query.weight" if isinstance(self.query, nn.Linear) else "query.2.weight"
        return {query: "column", "kv_up.weight": "column", "output.weight": "row"}


def _widths(
    d_model: int, n_heads: int, nope: int | None, rope: int | None, value: int | None, latent: int | None
) -> tuple[int, int, int, int]:
    """The four widths; those not given follow the paper's ratios to a head of d_model / n_heads."""
    if nope and rope and value and latent:
        return nope, rope, value, latent
    head = even_heads(d_model, n_heads)
    return nope or head, rope or max(2, head // 4 * 2), value or head, latent or 4 * head
