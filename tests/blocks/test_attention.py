"""Attentions in double precision with each position, and what those of scores and of latents compute."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pairwise import each
from torch import Tensor, nn
from torch.nn import functional as F

from blockwright import registry
from blockwright.blocks.forward_pass import Pass
from blockwright.blocks.kernels.attention import causal_attention_reference
from blockwright.blocks.kernels.scoring import Scoring
from tests.blocks.small import D, Make, drawn, near, order

T = 63
MLA = {"name": "mla", "n_heads": 5, "kv_lora_rank": 11, "qk_nope_head_dim": 7, "qk_rope_head_dim": 4, "v_head_dim": 9}
NODES: dict[str, dict[str, Any]] = {
    **{name: {"name": name} for name in registry.names("attention") if name != "none"},
    "gqa, odd widths": {"name": "gqa", "n_heads": 6, "n_kv_heads": 3, "head_dim": 10},
    "mha, biased": {"name": "mha", "n_heads": 3, "bias": True},
    "mla, odd widths": MLA,
    "mla, compressed queries": {**MLA, "q_lora_rank": 13, "v_head_dim": 13},
}
PAIRED = {"name": "rope", "pairing": "interleaved"}


@pytest.mark.parametrize(("name", "position"), each(list(NODES), ["none", "rope", "alibi", "rope"]))
@torch.no_grad()
def test_packed_rows_chunks_and_single_precision_are_one_pass(make_block: Make, name: str, position: str) -> None:
    attention, x = make_block("attention", NODES[name], around={"position": position}), drawn(2, T, D)
    whole, segments, positions = attention(x, Pass(order(T))), torch.zeros(2, T).long(), order(T).repeat(2, 1)
    segments[1, 30:], positions[1, 30:] = 1, order(T - 30)[0]  # each row is packed in its own way
    packed = attention(x, Pass(positions, segments=segments))
    near(packed[0], whole[0])
    near(packed[1, 30:], attention(x[1:, 30:], Pass(order(T - 30)))[0])
    cache = attention.new_cache(2, T + 2, x.dtype, x.device)
    parts = zip(*(t.split([17, 1, 1, 29, 15], 1) for t in (x, order(T))), strict=True)
    near(torch.cat([attention(part, Pass(where, cache=cache)) for part, where in parts], 1), whole)
    assert cache.length == T
    single = make_block("attention", NODES[name], around={"position": position}, dtype=torch.float32)
    y, right = single(x.float(), Pass(order(T))).double(), single.double()(x.float().double(), Pass(order(T)))
    assert (y - right).norm() < 1e-5 * right.norm()


@pytest.mark.parametrize(
    ("node", "numbers"),
    [
        ({"name": "mha"}, 2 * 6 * 8),
        ({"name": "mqa"}, 2 * 8),
        ({"name": "gqa", "n_kv_heads": 2}, 2 * 2 * 8),
        ({"name": "gqa", "n_kv_heads": 2, "head_dim": 10}, 2 * 2 * 10),
        ({"name": "mla", "kv_lora_rank": 19, "qk_rope_head_dim": 4, "q_lora_rank": 7}, 19 + 4),
        ({"name": "mla"}, 4 * 8 + 4),  # 4.5 heads' worth, the paper's ratio
    ],
    ids=str,
)
def test_cache_holds_as_many_numbers_a_token_as_the_formula_says(make_block: Make, node: Any, numbers: int) -> None:
    attention = make_block("attention", {"n_heads": 6, **node})
    for dtype, size in ((torch.float32, 4), (torch.bfloat16, 2)):
        assert attention.new_cache(2, 5, dtype, torch.device("cpu")).nbytes == 2 * 5 * numbers * size


def softmax_over_the_past(scores: Tensor) -> Tensor:
    return scores.masked_fill(~torch.ones_like(scores, dtype=torch.bool).tril(), float("-inf")).softmax(-1)


@pytest.mark.parametrize(
    ("name", "n_kv_heads", "bias"), [("mha", 6, True), ("gqa", 2, False), ("gqa", 2, True), ("mqa", 1, True)]
)
@torch.no_grad()
def test_heads_share_keys_and_values_in_neighbouring_groups(
    make_block: Make, name: str, n_kv_heads: int, bias: bool
) -> None:
    node = {"name": name, "n_heads": 6, "bias": bias, **({"n_kv_heads": 2} if name == "gqa" else {})}
    attention, x, H = make_block("attention", node), drawn(T, D), D // 6
    assert all((getattr(attention, n).bias is None) != bias for n in ("query", "key", "value", "output"))
    q, k, v = (getattr(attention, p)(x) for p in ("query", "key", "value"))
    assert k.shape[-1] == v.shape[-1] == n_kv_heads * H
    heads = []
    for n in range(6):
        own, shared = slice(n * H, (n + 1) * H), slice(n // (6 // n_kv_heads) * H, (n // (6 // n_kv_heads) + 1) * H)
        heads.append(softmax_over_the_past(q[:, own] @ k[:, shared].t() / H**0.5) @ v[:, shared])
    near(attention(x[None], Pass(order(T)))[0], attention.output(torch.cat(heads, -1)))


def test_fast_path_is_the_one_torch_has(make_block: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, fast = [], F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: calls.append(k) or fast(*a, **k))
    make_block("attention", "gqa", around={"position": "rope"})(drawn(2, T, D), Pass(order(T)))
    assert [(c["is_causal"], c["attn_mask"], c["enable_gqa"]) for c in calls] == [(True, None, True)]


def rotated(x: Tensor, theta: float = 10000.0) -> Tensor:
    """[T,R] turned pair by pair, (2j, 2j+1), each token by its place: the definition, one number at a time."""
    y, width = x.clone(), torch.tensor(float(x.shape[1]))
    for t in range(x.shape[0]):
        for j in range(x.shape[1] // 2):
            angle = torch.tensor(float(t)) * torch.tensor(theta) ** -(torch.tensor(2.0 * j) / width)
            c, s = angle.cos().double(), angle.sin().double()
            a, b = x[t, 2 * j], x[t, 2 * j + 1]
            y[t, 2 * j], y[t, 2 * j + 1] = a * c - b * s, b * c + a * s
    return y


def norm(x: Tensor, gain: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * gain


@pytest.mark.parametrize("name", ["mla", "mla, odd widths", "mla, compressed queries"])
@torch.no_grad()
def test_mla_follows_the_paper_step_by_step_and_caches_the_latent_and_the_turned_key(
    make_block: Make, name: str
) -> None:
    m, x = make_block("attention", NODES[name], around={"position": PAIRED}), drawn(T, D)
    n, r, v, c = m.nope, m.rope, m.v_head_dim, m.latent
    queries = x
    for part in [m.query] if isinstance(m.query, nn.Linear) else m.query:
        queries = queries @ part.weight.t() if isinstance(part, nn.Linear) else norm(queries, part.weight)
    compressed = x @ m.kv_down.weight.t()
    latent, k_rope, heads = norm(compressed[:, :c], m.kv_norm.weight), rotated(compressed[:, c:]), []
    for h in range(m.n_heads):
        q = queries[:, h * (n + r) : (h + 1) * (n + r)]
        up = m.kv_up.weight[h * (n + v) : (h + 1) * (n + v)]
        scores = (q[:, :n] @ (latent @ up[:n].t()).t() + rotated(q[:, n:]) @ k_rope.t()) / (n + r) ** 0.5
        heads.append(softmax_over_the_past(scores) @ (latent @ up[n:].t()))
    cache = m.new_cache(1, T, x.dtype, x.device)
    for given in (Pass(order(T)), Pass(order(T), cache=cache)):
        near(m(x[None], given)[0], torch.cat(heads, -1) @ m.output.weight.t(), 1e-10)
    (held,) = cache.buffers.values()
    near(held[0], torch.cat((latent, k_rope), -1))


def test_softmax_scale_of_the_position_multiplies_the_scores(make_block: Make) -> None:
    def scale(node: Any, mscale: float) -> float:
        yarn = {"name": "yarn", "factor": 40, "mscale": mscale, "mscale_all_dim": mscale}
        return make_block("attention", node, around={"position": yarn}).scale

    for name, plain in (("gqa", (D // 8) ** -0.5), ("mla, odd widths", 11**-0.5)):
        assert scale(NODES[name], 0.0) == pytest.approx(plain)
        assert scale(NODES[name], 0.707) == pytest.approx(1.5896261652 * plain)
    deepseek_v2 = {**MLA, "kv_lora_rank": 4, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64}
    assert scale(deepseek_v2, 0.707) == pytest.approx(0.1147213868, rel=1e-9)


GROUPED = ["mha", "gqa", "mqa", "sliding_window"]


@pytest.mark.parametrize(("attention", "name"), each(GROUPED, registry.names("qk_norm")))
def test_norm_of_queries_and_keys_makes_their_sizes_irrelevant(make_block: Make, attention: str, name: str) -> None:
    block = make_block("attention", {"name": attention, "n_heads": 4, "qk_norm": name})
    widths = {"per_head": (12, 12), "full": (48, 12 * {"mha": 4, "mqa": 1}.get(attention, 2))}[name]
    assert (len(block.qk_norm.q_norm.weight), len(block.qk_norm.k_norm.weight)) == widths
    y = block(drawn(2, 7, D), Pass(order(7)))
    block.query.weight.data *= 100
    block.key.weight.data *= 100
    near(block(drawn(2, 7, D), Pass(order(7))), y, 1e-4)  # but for eps


@pytest.mark.parametrize(("attention", "name"), each(GROUPED, ["elementwise", "per_head"]))
def test_open_gate_leaves_the_attention_as_it_was(make_block: Make, attention: str, name: str) -> None:
    plain = make_block("attention", attention)
    gated = make_block("attention", {"name": attention, "output_gate": name})
    missing = gated.load_state_dict(plain.state_dict(), strict=False).missing_keys
    assert missing == ["output_gate.project.weight"]
    gated.output_gate.project.weight.data.zero_()
    near(2 * gated(drawn(2, 7, D), Pass(order(7))), plain(drawn(2, 7, D), Pass(order(7))))


THEIRS = {  # of x-transformers' attention, with gates of low rank from its input and from its heads' outputs
    "query": "to_q",
    "key": "to_k",
    "value": "to_v",
    "output": "to_out",
    "output_gate.down": "to_v_gate.down",
    "output_gate.up": "to_v_gate.up",
    "output_gate.down_heads": "to_output_gate.down",
    "output_gate.up_heads": "to_output_gate.up",
}


@pytest.mark.slow
@torch.no_grad()
def test_hybrid_gate_is_that_of_x_transformers(make_block: Make) -> None:
    library = pytest.importorskip("x_transformers.x_transformers")
    gates = {"gate_values": True, "gate_values_rank": 5, "output_gate": True, "output_gate_rank": 5}
    theirs = library.Attention(dim=D, heads=6, dim_head=8, causal=True, **gates).double()
    node = {"name": "mha", "n_heads": 6, "head_dim": 8, "output_gate": {"name": "hybrid", "rank": 5}}
    ours = make_block("attention", node, around={"position": "none"})
    for name, their in THEIRS.items():
        theirs.get_parameter(f"{their}.weight").copy_(ours.get_parameter(f"{name}.weight"))
    x = drawn(2, T, D)
    near(ours(x, Pass(order(T))), theirs(x), 1e-6)  # their softmax is in single precision


@pytest.mark.parametrize("window", [{}, {"window": 3}], ids=["gqa", "sliding_window"])
@pytest.mark.parametrize("scores", ["softcap", "sinks"])
def test_scores_are_changed_at_the_scale_and_in_the_window_of_the_attention(
    make_block: Make, window: dict[str, int], scores: str
) -> None:
    node = {"name": scores, **({"cap": 2.0} if scores == "softcap" else {})}
    name = "sliding_window" if window else "gqa"
    block = make_block("attention", {"name": name, "n_heads": 4, "scores": node, "query_scale": 5.0, **window})
    x = drawn(2, 9, D)
    q, k, v = (p(x).unflatten(-1, (-1, 12)) for p in (block.query, block.key, block.value))
    extra = {"softcap": 2.0} if scores == "softcap" else {"sinks": block.scores.sinks}
    y, plain = (causal_attention_reference(q, k, v, Scoring(5.0**-0.5, **window, **more)) for more in (extra, {}))
    near(block(x, Pass(order(9))), block.output(y.flatten(-2)), 1e-6)
    assert (y - plain).abs().max() > 1e-3
