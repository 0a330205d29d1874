"""What every attention promises, and what each of them computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pairwise import each
from torch import Tensor, nn
from torch.nn import functional as F

from blockwright import registry
from blockwright.blocks.attention.base import Attention, even_heads
from blockwright.blocks.cache.base import Cache
from blockwright.blocks.forward_pass import Pass
from blockwright.registry import BlockError, ConfigError

B, T, D = 2, 63, 48
POSITIONS = ["none", "rope", "alibi"]
NODES: dict[str, dict[str, Any]] = {
    **{name: {"name": name} for name in registry.names("attention") if name != "none"},
    "gqa, odd widths": {"name": "gqa", "n_heads": 6, "n_kv_heads": 3, "head_dim": 10},
    "mha, biased": {"name": "mha", "n_heads": 3, "bias": True},
    "mla, odd widths": {
        "name": "mla",
        "n_heads": 5,
        "kv_lora_rank": 11,
        "qk_nope_head_dim": 7,
        "qk_rope_head_dim": 4,
        "v_head_dim": 9,
    },
}
NODES["mla, compressed queries"] = {**NODES["mla, odd widths"], "q_lora_rank": 13, "v_head_dim": 13}
PLACED = {a: "position" in registry.lookup("attention", node["name"]).schema.children for a, node in NODES.items()}
EVERY = [pytest.param(a, p, id=f"{a}+{p}") for a in NODES for p in (POSITIONS if PLACED[a] else ["none"])]
ONE_POSITION_EACH = list({row.values[0]: row for row in EVERY}.values())


@pytest.fixture(scope="module")
def make(make_block: Callable[..., Any]) -> Callable[..., Attention]:
    def build(attention: str | dict[str, Any], position: Any, dtype: torch.dtype = torch.float64) -> Attention:
        node = NODES[attention] if isinstance(attention, str) else attention
        return make_block("attention", node, dtype=dtype, around={"position": position})

    return build


def tokens(dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    return torch.randn(B, T, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def order(length: int = T) -> Tensor:
    return torch.arange(length)[None]


# --- with each position, in double precision; the rest of the contract is checked by blocks/conformance ---------------


@pytest.mark.parametrize(("name", "position"), EVERY)
@torch.no_grad()
def test_each_row_is_packed_in_its_own_way(make: Callable[..., Attention], name: str, position: str) -> None:
    attention, x = make(name, position), tokens()
    segments, positions = torch.zeros(B, T, dtype=torch.long), order().repeat(B, 1)
    segments[1, 30:], positions[1, 30:] = 1, order(T - 30)[0]
    packed = attention(x, Pass(positions, segments=segments))
    torch.testing.assert_close(packed[0], attention(x[:1], Pass(order()))[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(packed[1, 30:], attention(x[1:, 30:], Pass(order(T - 30)))[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize(("name", "position"), ONE_POSITION_EACH)
@torch.no_grad()
def test_pass_in_chunks_with_a_cache_equals_the_whole_pass(
    make: Callable[..., Attention], name: str, position: str
) -> None:
    attention, x, chunks = make(name, position), tokens(), [17, 1, 1, 29, 15]
    cache = attention.new_cache(B, T + 2, x.dtype, x.device)
    parts = [
        attention(part, Pass(where, cache=cache))
        for part, where in zip(x.split(chunks, 1), order().split(chunks, 1), strict=True)
    ]
    torch.testing.assert_close(torch.cat(parts, 1), attention(x, Pass(order())), rtol=0, atol=1e-12)
    assert cache.length == T


@pytest.mark.parametrize(("name", "position"), ONE_POSITION_EACH)
@torch.no_grad()
def test_single_precision_stays_near_double(make: Callable[..., Attention], name: str, position: str) -> None:
    single = make(name, position, torch.float32)
    double = make(name, position, torch.float32).double()
    y, expected = single(tokens(torch.float32), Pass(order())), double(tokens(torch.float32).double(), Pass(order()))
    assert (y.double() - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("name", [name for name in NODES if PLACED[name]])
def test_cache_bytes_do_not_depend_on_how_full_it_is_and_grow_by_token_and_row(
    make: Callable[..., Attention], name: str
) -> None:
    attention = make(name, "none")
    one = attention.new_cache(1, 1, torch.bfloat16, torch.device("meta")).nbytes
    assert one > 0
    assert attention.new_cache(3, 7, torch.bfloat16, torch.device("meta")).nbytes == 21 * one
    assert attention.new_cache(1, 1, torch.float32, torch.device("meta")).nbytes == 2 * one


@pytest.mark.parametrize(
    ("node", "numbers"),
    [
        ({"name": "mha", "n_heads": 6}, 2 * 6 * 8),
        ({"name": "mqa", "n_heads": 6}, 2 * 8),
        ({"name": "gqa", "n_heads": 6, "n_kv_heads": 2}, 2 * 2 * 8),
        ({"name": "gqa", "n_heads": 6, "n_kv_heads": 2, "head_dim": 10}, 2 * 2 * 10),
        ({"name": "mla", "n_heads": 6, "kv_lora_rank": 19, "qk_rope_head_dim": 4}, 19 + 4),
        ({"name": "mla", "n_heads": 6, "kv_lora_rank": 19, "qk_rope_head_dim": 4, "q_lora_rank": 7}, 19 + 4),
        ({"name": "mla", "n_heads": 6}, 4 * 8 + 4),  # 4.5 heads' worth, the paper's ratio
    ],
    ids=str,
)
def test_cache_holds_as_many_numbers_a_token_as_the_formula_says(
    make: Callable[..., Attention], node: dict[str, Any], numbers: int
) -> None:
    cache = make(node, "none").new_cache(2, 5, torch.float32, torch.device("cpu"))
    assert cache.nbytes == 2 * 5 * numbers * 4


# --- what each of them computes ---------------------------------------------------------------------------------------


def softmax_over_the_past(scores: Tensor) -> Tensor:
    return scores.masked_fill(~torch.ones_like(scores, dtype=torch.bool).tril(), float("-inf")).softmax(-1)


@pytest.mark.parametrize(("name", "n_kv_heads"), [("mha", 6), ("gqa", 2), ("mqa", 1)])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "biased"])
@torch.no_grad()
def test_heads_share_keys_and_values_in_neighbouring_groups(
    make: Callable[..., Attention], name: str, n_kv_heads: int, bias: bool
) -> None:
    node = {"name": name, "n_heads": 6, "bias": bias, **({"n_kv_heads": 2} if name == "gqa" else {})}
    attention, x = make(node, "none"), tokens()[0]
    q, k, v = (getattr(attention, p)(x) for p in ("query", "key", "value"))
    H = D // 6
    assert k.shape[-1] == v.shape[-1] == n_kv_heads * H
    heads = []
    for n in range(6):
        own, shared = slice(n * H, (n + 1) * H), slice(n // (6 // n_kv_heads) * H, (n // (6 // n_kv_heads) + 1) * H)
        heads.append(softmax_over_the_past(q[:, own] @ k[:, shared].t() / H**0.5) @ v[:, shared])
    expected = attention.output(torch.cat(heads, -1))
    torch.testing.assert_close(attention(x[None], Pass(order()))[0], expected, rtol=0, atol=1e-12)


def rotated(x: Tensor, theta: float = 10000.0) -> Tensor:
    """[T,R] turned pair by pair, (2j, 2j+1), each token by its place: the definition, one number at a time."""
    y = x.clone()
    for t in range(x.shape[0]):
        for j in range(x.shape[1] // 2):
            angle = torch.tensor(t, dtype=torch.float32) * torch.tensor(theta) ** -(
                torch.tensor(2.0 * j) / torch.tensor(float(x.shape[1]))
            )
            c, s = angle.cos().double(), angle.sin().double()
            a, b = x[t, 2 * j], x[t, 2 * j + 1]
            y[t, 2 * j], y[t, 2 * j + 1] = a * c - b * s, b * c + a * s
    return y


def norm(x: Tensor, gain: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * gain


def by_heads(m: nn.Module, x: Tensor) -> Tensor:
    """MLA of one row x [T,D] by the five steps of the paper, one head after another."""
    n, r, v, c = m.nope, m.rope, m.v_head_dim, m.latent
    if isinstance(m.query, nn.Linear):
        queries = x @ m.query.weight.t()
    else:
        down, gain, up = m.query[0].weight, m.query[1].weight, m.query[2].weight
        queries = norm(x @ down.t(), gain) @ up.t()
    compressed = x @ m.kv_down.weight.t()
    latent, k_rope = norm(compressed[:, :c], m.kv_norm.weight), rotated(compressed[:, c:])
    heads = []
    for h in range(m.n_heads):
        q = queries[:, h * (n + r) : (h + 1) * (n + r)]
        q_nope, q_rope = q[:, :n], rotated(q[:, n:])
        up = m.kv_up.weight[h * (n + v) : (h + 1) * (n + v)]
        k_nope, value = latent @ up[:n].t(), latent @ up[n:].t()
        scores = (q_nope @ k_nope.t() + q_rope @ k_rope.t()) / (n + r) ** 0.5
        heads.append(softmax_over_the_past(scores) @ value)
    return torch.cat(heads, -1) @ m.output.weight.t()


def absorbed(m: nn.Module, x: Tensor) -> Tensor:
    """MLA of one row as one shared head that is (C + R) wide: kv_up folded into the queries and the output."""
    n, r, v, c = m.nope, m.rope, m.v_head_dim, m.latent
    up = m.kv_up.weight.unflatten(0, (m.n_heads, n + v))
    q = m.query(x).unflatten(-1, (m.n_heads, n + r))
    q_latent = torch.einsum("thn,hnc->thc", q[..., :n], up[:, :n])
    q_rope = torch.stack([rotated(q[:, h, n:]) for h in range(m.n_heads)], 1)
    compressed = x @ m.kv_down.weight.t()
    key = torch.cat((m.kv_norm(compressed[:, :c]), rotated(compressed[:, c:])), -1)
    scores = torch.einsum("thc,sc->hts", torch.cat((q_latent, q_rope), -1), key) / (n + r) ** 0.5
    context = torch.einsum("hts,sc->thc", softmax_over_the_past(scores), key[:, :c])
    return m.output(torch.einsum("thc,hvc->thv", context, up[:, n:]).flatten(-2))


@pytest.mark.parametrize(
    ("name", "oracle"), each(["mla", "mla, odd widths", "mla, compressed queries"], [by_heads, absorbed])
)
@torch.no_grad()
def test_mla_follows_the_paper_step_by_step(make: Callable[..., Attention], name: str, oracle: Callable) -> None:
    attention, x = make(name, {"name": "rope", "pairing": "interleaved"}), tokens()
    expected = torch.stack([oracle(attention, row) for row in x])
    torch.testing.assert_close(attention(x, Pass(order())), expected, rtol=0, atol=1e-10)


@torch.no_grad()
def test_mla_caches_the_normalised_latent_and_the_turned_key(make: Callable[..., Attention]) -> None:
    attention, x = make("mla, odd widths", {"name": "rope", "pairing": "interleaved"}), tokens()
    cache = attention.new_cache(B, T, x.dtype, x.device)
    attention(x, Pass(order(), cache=cache))
    compressed = x[0] @ attention.kv_down.weight.t()
    (held,) = cache.buffers.values()
    latent, k_rope = held[0].split((11, attention.rope), -1)
    torch.testing.assert_close(latent, norm(compressed[:, :11], attention.kv_norm.weight), rtol=0, atol=1e-12)
    torch.testing.assert_close(k_rope, rotated(compressed[:, 11:]), rtol=0, atol=1e-12)


@torch.no_grad()
def test_softmax_scale_of_the_position_multiplies_the_scores(make: Callable[..., Attention]) -> None:
    sharp = {"name": "yarn", "factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707}
    plain = {**sharp, "mscale": 0.0, "mscale_all_dim": 0.0}
    for name, scale in (("gqa", (D // 8) ** -0.5), ("mla, odd widths", 11**-0.5)):
        assert make(name, plain).scale == pytest.approx(scale)
        assert make(name, sharp).scale == pytest.approx(1.5896261652 * scale)


def test_scale_of_deepseek_v2_is_the_published_one(make_block: Callable[..., Any]) -> None:
    yarn = {"name": "yarn", "factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707}
    node = {"name": "mla", "kv_lora_rank": 4, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 2}
    assert make_block("attention", node, around={"position": yarn}).scale == pytest.approx(0.1147213868, rel=1e-9)


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("node", "path"),
    [
        ({"name": "gqa", "n_heads": 7}, "model.attention.n_heads"),
        ({"name": "gqa", "n_heads": 8, "n_kv_heads": 3}, "model.attention.n_kv_heads"),
        ({"name": "gqa", "n_kv_heads": 0}, "model.attention.n_kv_heads"),
        ({"name": "gqa", "n_kv_heads": -2}, "model.attention.n_kv_heads"),
        ({"name": "gqa", "n_heads": 0, "head_dim": 6}, "model.attention.n_heads"),
        ({"name": "gqa", "n_heads": -8, "head_dim": 6}, "model.attention.n_heads"),
        ({"name": "gqa", "head_dim": 0}, "model.attention.head_dim"),
        ({"name": "gqa", "head_dim": -6}, "model.attention.head_dim"),
        ({"name": "mha", "n_heads": 0}, "model.attention.n_heads"),
        ({"name": "mqa", "head_dim": 0}, "model.attention.head_dim"),
        ({"name": "mla", "n_heads": 5}, "model.attention.n_heads"),
        ({**NODES["mla, odd widths"], "n_heads": 0}, "model.attention.n_heads"),
        ({**NODES["mla, odd widths"], "kv_lora_rank": 0}, "model.attention.kv_lora_rank"),
        ({**NODES["mla, odd widths"], "kv_lora_rank": -1}, "model.attention.kv_lora_rank"),
        ({**NODES["mla, odd widths"], "q_lora_rank": 0}, "model.attention.q_lora_rank"),
        ({**NODES["mla, odd widths"], "q_lora_rank": -1}, "model.attention.q_lora_rank"),
        ({**NODES["mla, odd widths"], "qk_nope_head_dim": 0}, "model.attention.qk_nope_head_dim"),
        ({**NODES["mla, odd widths"], "qk_rope_head_dim": 0}, "model.attention.qk_rope_head_dim"),
        ({**NODES["mla, odd widths"], "v_head_dim": 0}, "model.attention.v_head_dim"),
    ],
    ids=str,
)
def test_impossible_widths_are_refused_by_name(make: Callable[..., Attention], node: dict[str, Any], path: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make(node, "none")
    assert caught.value.path == path
    assert caught.value.value == node[path.rpartition(".")[2]]
    assert caught.value.rule and caught.value.remedy


def test_remedy_names_the_nearest_number_of_heads() -> None:
    with pytest.raises(BlockError, match="nearest number that does is 6"):
        even_heads(48, 7)
    assert even_heads(48, 6) == 8


@pytest.mark.parametrize("d_model", [10**9, 10**18])
def test_absurd_width_is_refused_at_once(d_model: int) -> None:
    with pytest.raises(BlockError):
        even_heads(d_model, 7)


def test_rope_of_an_odd_part_is_refused_where_it_is_written(make: Callable[..., Attention]) -> None:
    with pytest.raises(ConfigError) as caught:
        make({**NODES["mla, odd widths"], "qk_rope_head_dim": 5}, "rope")
    assert caught.value.path == "model.position.rotary_fraction" and "even" in caught.value.remedy


def test_bias_makes_every_projection_add_one(make: Callable[..., Attention]) -> None:
    names = {n for n, _ in make({"name": "gqa", "bias": True}, "none").named_parameters()}
    assert {f"{p}.bias" for p in ("query", "key", "value", "output")} <= names
    assert not any("bias" in n for n, _ in make({"name": "gqa"}, "none").named_parameters())


def test_cache_of_another_precision_converts_what_it_is_given() -> None:
    cache = Cache(1, 2, {"k": (3,)}, torch.bfloat16, torch.device("cpu"))
    (k,) = cache.append(torch.randn(1, 1, 3))
    assert k.dtype == torch.bfloat16


def test_fast_path_is_the_one_torch_has(make: Callable[..., Attention], monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    fast = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: calls.append(k) or fast(*a, **k))
    make("gqa", "rope")(tokens(), Pass(order()))
    assert [(c["is_causal"], c["attn_mask"], c["enable_gqa"]) for c in calls] == [(True, None, True)]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("output_bias", [None, False, True])
def test_plan_names_the_biases_that_are_there(
    make: Callable[..., Attention], bias: bool, output_bias: bool | None
) -> None:
    attention = make({"name": "gqa", "n_heads": 4, "bias": bias, "output_bias": output_bias}, "none")
    assert set(attention.parallel_plan()) == {name for name, _ in attention.named_parameters()}
