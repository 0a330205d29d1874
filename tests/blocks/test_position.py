"""Position blocks against their formulas, their published anchors and transformers' own code."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins.precision import HalfPrecision
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from blockwright import registry
from blockwright.blocks.compose import compose
from blockwright.blocks.forward_pass import Pass
from blockwright.blocks.kernels.scoring import dense
from blockwright.blocks.position.base import Position
from blockwright.blocks.position.boundaries import alike
from blockwright.blocks.position.rope import RoPE
from blockwright.blocks.remembering import Keys, Queries
from blockwright.registry import ConfigError

ROTARY = {
    "half split": {"name": "rope"},
    "interleaved": {"name": "rope", "pairing": "interleaved"},
    "partial": {"name": "rope", "rotary_fraction": 0.5},
    "yarn": {"name": "yarn", "factor": 8, "original_positions": 16},
    "yarn, scaled": {"name": "yarn", "factor": 8, "original_positions": 16, "mscale": 1.0, "mscale_all_dim": 0.0},
    "yarn, untruncated": {"name": "yarn", "factor": 8, "original_positions": 16, "truncate": False},
    "linear": {"name": "rope_linear", "factor": 3.0},
    "ntk": {"name": "rope_ntk", "factor": 3.0},
    "llama3": {"name": "rope_llama3", "factor": 3.0, "original_positions": 64},
    "longrope": {"name": "longrope", "factor": 3.0, "original_positions": 16, "turns": 0.5},
}


@pytest.fixture(scope="module")
def make(make_block: Callable[..., Any]) -> Callable[..., Position]:
    def build(node: dict[str, Any] | str, **context: Any) -> Position:
        return make_block("position", node, **{"d_model": 48, "head_dim": 12, "n_heads": 4, **context})

    return build


def heads(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def order(length: int, start: int = 0) -> Tensor:
    return torch.arange(start, start + length)[None]


def added(position: Position, x: Tensor, q: Tensor, queries: Tensor, keys: Tensor) -> Tensor | None:
    """The bias on scores of tokens x [B,T,D] with queries q, on keys without notes."""
    return dense(position.bias(Queries(x, q, queries), Keys(keys, keys[0])))


# --- what every position block promises -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", registry.names("position"))
def test_every_hook_keeps_shapes_and_precision(make: Callable[..., Position], name: str) -> None:
    position = make(name).to(torch.bfloat16)
    x, q, k = (torch.randn(2, 5, *s).bfloat16() for s in ((48,), (4, 12), (2, 12)))
    turned = position.rotate(q, k, order(5))
    bias = added(position, x, q, order(5), order(7))
    assert [(t.shape, t.dtype) for t in (*turned, position.embed(x, order(5)))] == [
        (t.shape, t.dtype) for t in (q, k, x)
    ]
    assert bias is None or torch.broadcast_to(bias, (2, 4, 5, 7)).shape == (2, 4, 5, 7)


@pytest.mark.parametrize("name", [n for n in registry.names("position") if not n.startswith("log_")])  # start late
def test_block_works_at_one_place_only(make: Callable[..., Position], name: str) -> None:
    position, x, q = make(name), heads(2, 5, 48), heads(2, 5, 4, 12)
    in_attention = added(position, x, q, order(5), order(5)) is not None or not torch.equal(
        position.rotate(q, q, order(5))[0], q
    )
    in_embedding = not torch.equal(position.embed(x, order(5)), x)
    assert (in_attention, in_embedding) == (
        (position.place == "attention" and name != "none"),
        position.place == "embedding",
    )


def test_none_does_nothing(make: Callable[..., Position]) -> None:
    position, x, q = make("none"), heads(2, 5, 48), heads(2, 5, 4, 12)
    assert position.embed(x, order(5)) is x and position.rotate(q, x, order(5)) == (q, x)
    assert added(position, x, q, order(5), order(5)) is None and position.softmax_scale == 1.0


# --- rotary -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("node", ROTARY.values(), ids=ROTARY)
def test_scores_depend_on_distances_only(make: Callable[..., Position], node: dict[str, Any]) -> None:
    position, q, k = make(node), heads(1, 1, 1, 12), heads(1, 1, 1, 12, seed=1)

    def score(i: int, j: int) -> float:
        return (position.rotate(q, q, order(1, i))[0] * position.rotate(k, k, order(1, j))[1]).sum().item()

    for distance in (0, 1, 5, 31):
        scores = [score(start + distance, start) for start in (0, 1, 7, 100)]
        assert max(scores) - min(scores) < 1e-4
    assert abs(score(3, 0) - score(0, 3)) > 1e-3
    assert abs(score(3, 0) - score(4, 0)) > 1e-3


@pytest.mark.parametrize("node", ROTARY.values(), ids=ROTARY)
def test_rows_may_stand_at_positions_of_their_own(make: Callable[..., Position], node: dict[str, Any]) -> None:
    position, q = make(node), heads(2, 5, 3, 12)
    where = torch.tensor([[0, 1, 2, 3, 4], [9, 0, 1, 7, 7]])
    together = position.rotate(q, q[:, :, :1], where)
    for row in range(2):
        for t in range(5):
            alone = position.rotate(
                q[row : row + 1, t : t + 1], q[row : row + 1, t : t + 1, :1], where[row, t].view(1, 1)
            )
            for one, other in zip(together, alone, strict=True):
                torch.testing.assert_close(one[row, t], other[0, 0], rtol=0, atol=1e-14)


@pytest.mark.parametrize("name", ["rope", "yarn"])
def test_interleaved_weights_become_half_split_ones_by_permuting_rows(make: Callable[..., Position], name: str) -> None:
    q, k = heads(1, 9, 4, 12), heads(1, 9, 2, 12, seed=1)
    p = [*range(0, 12, 2), *range(1, 12, 2)]
    paired = make({"name": name, "pairing": "interleaved"}).rotate(q, k, order(9))
    split = make({"name": name, "pairing": "half_split"}).rotate(q[..., p], k[..., p], order(9))
    for one, other in zip(paired, split, strict=True):
        torch.testing.assert_close(one[..., p], other, rtol=0, atol=1e-14)


def test_pairings_differ_on_the_same_weights(make: Callable[..., Position]) -> None:
    q = heads(1, 9, 4, 12)
    one, other = (make(ROTARY[n]).rotate(q, q, order(9))[0] for n in ("half split", "interleaved"))
    assert (one - other).abs().max() > 0.1


@pytest.mark.parametrize("name", ["rope", "yarn"])
@pytest.mark.parametrize(("fraction", "width"), [(0.25, 4), (0.5, 8), (1.0, 16)])
def test_fraction_leaves_the_back_of_the_head_alone(
    make: Callable[..., Position], name: str, fraction: float, width: int
) -> None:
    q = heads(1, 9, 4, 16)
    turned = make({"name": name, "rotary_fraction": fraction}, head_dim=16).rotate(q, q, order(9))[0]
    assert torch.equal(turned[..., width:], q[..., width:])
    assert (turned[:, 1:, :, :width] != q[:, 1:, :, :width]).all()
    whole = make(name, head_dim=width).rotate(q[..., :width], q[..., :width], order(9))[0]
    assert name != "rope" or (turned[..., :width] - whole).abs().max() < 1e-14  # as if the head were that narrow


def test_first_position_is_not_turned(make: Callable[..., Position]) -> None:
    q = heads(1, 1, 4, 12)
    assert torch.equal(make("rope").rotate(q, q, order(1))[0], q)


def test_theta_belongs_to_the_instance(make: Callable[..., Position]) -> None:
    slow, fast = make({"name": "rope", "theta": 10000.0}), make({"name": "rope", "theta": 100.0})
    cpu = torch.device("cpu")
    before = slow.frequencies(cpu)
    torch.testing.assert_close(fast.frequencies(cpu), torch.tensor([100.0 ** (-j / 6) for j in range(6)]))
    assert torch.equal(slow.frequencies(cpu), before)
    torch.testing.assert_close(before, torch.tensor([10000.0 ** (-j / 6) for j in range(6)]))


@pytest.mark.parametrize("name", ["rope", "yarn"])
def test_frequencies_stay_single_precision_when_the_model_does_not(make: Callable[..., Position], name: str) -> None:
    position = make(name).to(torch.bfloat16)
    assert position.frequencies(torch.device("cpu")).dtype == torch.float32
    assert not list(position.buffers()) and not list(position.parameters())


# --- YaRN -------------------------------------------------------------------------------------------------------------


def yarn(make: Callable[..., Position], **changes: Any) -> Position:
    return make({"name": "yarn", "factor": 40, "original_positions": 4096, **changes}, head_dim=64)


def test_yarn_frequencies_meet_the_published_anchors(make: Callable[..., Position]) -> None:
    frequencies = yarn(make).frequencies(torch.device("cpu")).tolist()
    anchors = {0: 1.0, 1: 0.7498942, 10: 0.056234129, 11: 0.039006926, 16: 0.0055, 22: 1.77828e-4, 23: 3.3338e-5}
    for j, value in {**anchors, 31: 3.33380e-6}.items():
        assert frequencies[j] == pytest.approx(value, rel=2e-5), j
    plain = [10000.0 ** (-2 * j / 64) for j in range(32)]
    for j in range(11):
        assert frequencies[j] == pytest.approx(plain[j], rel=1e-6)
    for j in range(23, 32):
        assert frequencies[j] == pytest.approx(plain[j] / 40, rel=1e-6)
    assert all(plain[j] / 40 < frequencies[j] < plain[j] for j in range(11, 23))


@pytest.mark.parametrize(
    ("mscale", "mscale_all_dim", "amplitude", "softmax_scale"),
    [
        (0.707, 0.707, 1.0, 1.5896261652),
        (1.0, 1.0, 1.0, 1.8738542071),
        (1.0, 0.0, 1.3688879454, 1.0),
        (0.707, 1.0, 1.2608037774 / 1.3688879454, 1.8738542071),
        (0.0, 0.0, 1.0, 1.0),
    ],
)
def test_yarn_scales_amplitude_and_softmax_as_published(
    make: Callable[..., Position], mscale: float, mscale_all_dim: float, amplitude: float, softmax_scale: float
) -> None:
    position = yarn(make, mscale=mscale, mscale_all_dim=mscale_all_dim)
    assert position.softmax_scale == pytest.approx(softmax_scale, rel=1e-9)
    q = heads(1, 3, 2, 64)
    turned = position.rotate(q, q, order(3, 1))[0]
    torch.testing.assert_close(turned.norm(dim=-1), amplitude * q.norm(dim=-1), rtol=1e-6, atol=0)


def test_yarn_of_factor_one_is_rope(make: Callable[..., Position]) -> None:
    position, q = yarn(make, factor=1), heads(1, 63, 2, 64)
    assert position.softmax_scale == 1.0
    rope = make({"name": "rope", "pairing": "interleaved"}, head_dim=64)
    torch.testing.assert_close(position.rotate(q, q, order(63))[0], rope.rotate(q, q, order(63))[0], rtol=0, atol=1e-5)


def test_yarn_steps_where_fast_and_slow_pairs_meet(make: Callable[..., Position]) -> None:
    """low = high: the ramp is a step, not a division by zero."""
    position = make({"name": "yarn", "factor": 4, "original_positions": 16, "beta_fast": 32, "beta_slow": 2.8})
    frequencies = position.frequencies(torch.device("cpu"))
    assert frequencies.isfinite().all() and (frequencies > 0).all()


# --- LongRoPE ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("theta", "width", "trained", "factor", "pair"), [(1e4, 96, 2048, 64, 25), (5e5, 128, 8192, 16, 30)]
)
def test_longropes_critical_pair_is_where_the_papers_search_found_it(
    make: Callable[..., Position], theta: float, width: int, trained: int, factor: int, pair: int
) -> None:
    node = {"name": "longrope", "theta": theta, "original_positions": trained, "factor": factor}
    factors = make(node, head_dim=width).long_factors
    assert factors[0] == 1 and sorted(factors) == factors and factors[pair + 1 :] == [factor] * (width // 2 - pair - 1)
    assert factors[pair] == pytest.approx(factor, rel=0.02) and factors[pair - 1] < 0.95 * factor


@pytest.mark.parametrize("length", [4096, 8193])
def test_longropes_angles_at_position_8192_do_not_depend_on_the_default_dtype(
    make: Callable[..., Position], length: int
) -> None:
    """Lightning's ``bf16-true`` lowers the default dtype in a training step, and not in an evaluation by itself: a
    divisor in bf16 would be up to 20 radians off."""
    longrope = make({"name": "longrope", "theta": 10000.0, "factor": 32.0, "original_positions": 4096}, head_dim=96)
    q, at = torch.ones(1, 1, 4, 96, dtype=torch.float32), order(1, 8192)
    evaluated = longrope.rotate_in(q, q, at, length)[0]
    with HalfPrecision("bf16-true").forward_context():
        assert torch.equal(longrope.rotate_in(q, q, at, length)[0], evaluated)
    a, b = evaluated[0, 0, 0].double().chunk(2)  # of a pair (1, 1), turned from 45 degrees
    factors = torch.tensor(longrope.long_factors if length > 4096 else longrope.short_factors, dtype=torch.float64)
    exact = 8192 * 10000.0 ** -(torch.arange(48, dtype=torch.float64) / 48) / factors
    torch.testing.assert_close((b.atan2(a) - math.pi / 4 - exact).cos(), torch.ones(48).double(), rtol=0, atol=1e-6)


def test_batches_that_are_rotated_alike_have_rows_on_one_side_of_every_boundary(make: Callable[..., Position]) -> None:
    longropes = [make({"name": "longrope", "original_positions": n}) for n in (16, 8)]
    lengths = [3, 16, 9, 40, 8, 16]
    batches = [[lengths[i] for i in rows] for rows in alike(nn.ModuleList(longropes), lengths, 2)]
    assert batches == [[40], [16, 16], [9], [8, 3]]
    fixed = make({"name": "longrope", "original_positions": 16, "length": 64})
    assert [[lengths[i] for i in rows] for rows in alike(fixed, lengths, 4)] == [[40, 16, 16, 9], [8, 3]]


def test_longrope_declares_short_and_long(make: Callable[..., Position]) -> None:
    """Up to the trained length all is as trained; beyond it, also the first tokens are rotated as the last will be."""
    q = heads(1, 5, 4, 12)
    longrope = make({"name": "longrope", "original_positions": 16}, max_positions=64)
    short, long = (longrope.rotate_in(q, q, order(5), length)[0] for length in (16, 17))
    assert torch.equal(short, make("rope").rotate(q, q, order(5))[0]) and (long - short).abs().max() > 0.1
    assert torch.equal(longrope.rotate(q, q, order(5))[0], long)  # of an attention that declares nothing: the model's
    for declared, expected in ((16, short), (64, long)):
        fixed = make({"name": "longrope", "original_positions": 16, "length": declared}, max_positions=64)
        assert torch.equal(fixed.rotate_in(q, q, order(5), 80 - declared)[0], expected)


@pytest.mark.parametrize("attention", ["mha", "mla", {"name": "sliding_window", "window": 6}], ids=str)
def test_chunks_and_decoded_tokens_are_rotated_as_the_whole_they_belong_to(
    make_block: Callable[..., Any], attention: Any
) -> None:
    """A cache made for more than the trained length is rotated for it from its first chunk on; one for less is not."""
    mix = make_block("attention", attention, around={"position": {"name": "longrope", "original_positions": 16}})
    plain = make_block("attention", attention, around={"position": {"name": "rope"}})
    x = heads(1, 40, 48)

    def chunked(block: Any, length: int) -> Tensor:
        cache, ends = block.new_cache(1, length, torch.float64, torch.device("cpu")), (8, 14, 15, 16, 33, length)
        starts = [0, *(end for end in ends if end < length)]
        parts = [(a, min(b, length)) for a, b in zip(starts, ends, strict=False) if a < length]
        return torch.cat([block(x[:, a:b], Pass(order(b - a, a), cache=cache)) for a, b in parts], 1)

    for length in (16, 40):
        whole = mix(x[:, :length], Pass(order(length)))
        torch.testing.assert_close(chunked(mix, length), whole, rtol=0, atol=1e-9)
        assert ((whole - plain(x[:, :length], Pass(order(length)))).abs().max() > 1e-3) == (length > 16)


# --- the others -------------------------------------------------------------------------------------------------------


def test_alibi_slopes_are_the_papers(make: Callable[..., Position]) -> None:
    def slopes(n: int) -> list[float]:
        return make("alibi", n_heads=n).slopes(torch.device("cpu")).tolist()

    eight = [2.0**-i for i in range(1, 9)]
    assert slopes(8) == eight
    assert slopes(12) == pytest.approx([*eight, *(2.0 ** (-0.5 * i) for i in (1, 3, 5, 7))])
    assert slopes(16) == pytest.approx([2.0 ** (-0.5 * i) for i in range(1, 17)])
    assert slopes(1) == [2.0**-8]


def test_alibi_takes_distance_times_slope_off_the_score(make: Callable[..., Position]) -> None:
    bias = added(make("alibi", n_heads=2), heads(1, 2, 48), heads(1, 2, 2, 12), order(2, 3), order(5))
    assert bias is not None
    slopes = [2.0**-4, 2.0**-8]
    for n in range(2):
        for t, i in enumerate((3, 4)):
            assert bias[0, n, t, : i + 1].tolist() == [-slopes[n] * (i - j) for j in range(i + 1)]


def test_alibi_is_told_the_heads_of_its_attention(make_block: Callable[..., Any]) -> None:
    for node, heads in (({"name": "gqa", "n_heads": 6}, 6), ({"name": "mla", "n_heads": 3}, 3), ("mha", 8)):
        attention = make_block("attention", node, around={"position": "alibi"})
        assert attention.position.n_heads == heads


def test_sinusoidal_adds_sines_and_cosines(make: Callable[..., Position]) -> None:
    x = heads(2, 63, 48)
    signal = make({"name": "sinusoidal", "scale": 0.5, "theta": 100}).embed(x, order(63)) - x
    for t in (0, 1, 17, 62):
        for j in range(24):
            angle = t / 100 ** (2 * j / 48)
            expected = [0.5 * math.sin(angle), 0.5 * math.cos(angle)]
            assert signal[0, t, 2 * j : 2 * j + 2].tolist() == pytest.approx(expected, abs=1e-5)
    assert torch.allclose(signal[0], signal[1], atol=1e-12)


def test_learned_adds_its_table(make: Callable[..., Position]) -> None:
    position, x = make("learned"), heads(2, 3, 48)
    assert position.embedding.weight.shape == (64, 48)
    where = torch.tensor([[0, 63, 5], [1, 1, 2]])
    assert torch.equal(position.embed(x, where), x + position.embedding.weight[where])


# --- other implementations --------------------------------------------------------------------------------------------


def test_rope_turns_as_transformers_llama_does(make: Callable[..., Position]) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    config = LlamaConfig(
        hidden_size=48, num_attention_heads=4, rope_parameters={"rope_type": "default", "rope_theta": 500.0}
    )
    q, k = heads(2, 63, 4, 12).float(), heads(2, 63, 2, 12, seed=1).float()
    cos, sin = LlamaRotaryEmbedding(config)(q, order(63, 5))
    theirs = apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
    ours = make({"name": "rope", "theta": 500.0}).rotate(q, k, order(63, 5))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.transpose(1, 2), other, rtol=0, atol=2e-5)


@pytest.mark.parametrize("mscales", [(0.707, 0.707), (1.0, 1.0), (1.0, 0.5)])
def test_yarn_turns_as_transformers_deepseek_does(make: Callable[..., Position], mscales: tuple[float, float]) -> None:
    from transformers import DeepseekV2Config
    from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2RotaryEmbedding, apply_rotary_emb

    yarn = {"factor": 8.0, "beta_fast": 32, "beta_slow": 1, "mscale": mscales[0], "mscale_all_dim": mscales[1]}
    rope = {"rope_type": "yarn", "rope_theta": 10000.0, "original_max_position_embeddings": 64, **yarn}
    config = DeepseekV2Config(qk_rope_head_dim=12, max_position_embeddings=512, rope_parameters=rope)
    q, k = heads(2, 63, 4, 12).float(), heads(2, 63, 1, 12, seed=1).float()
    freqs = DeepseekV2RotaryEmbedding(config)(q, order(63, 100))
    theirs = apply_rotary_emb(q.transpose(1, 2), k.transpose(1, 2), freqs)
    ours = make({"name": "yarn", "original_positions": 64, **yarn}).rotate(q, k, order(63, 100))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.transpose(1, 2), other, rtol=0, atol=1e-4)


@pytest.mark.parametrize("attention_factor", [None, 1.19])
def test_longropes_frequencies_are_transformers(make: Callable[..., Position], attention_factor: float | None) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    factors = {"short_factor": [1.0, 1.1, 1.2, 1.5, 1.7, 2.0], "long_factor": [1.0, 1.3, 2.5, 9.0, 30.0, 47.5]}
    rope = {"rope_type": "longrope", "rope_theta": 500.0, "original_max_position_embeddings": 64, **factors}
    rope |= {"factor": 32.0, "attention_factor": attention_factor}
    config = LlamaConfig(hidden_size=48, num_attention_heads=4, max_position_embeddings=2048, rope_parameters=rope)
    node = {"name": "longrope", "theta": 500.0, "factor": 32, "original_positions": 64, "long_mscale": attention_factor}
    ours = make({**node, **{f"{key}s": value for key, value in factors.items()}})
    for length in (64, 65):
        theirs, amplitude = ROPE_INIT_FUNCTIONS["longrope"](config, torch.device("cpu"), seq_len=length)
        torch.testing.assert_close(ours.frequencies(torch.device("cpu"), length), theirs, rtol=1e-6, atol=0)
        assert ours.long_mscale == pytest.approx(amplitude, rel=1e-6)
    q = heads(1, 3, 4, 12)
    for length, amplitude in ((64, 1.0), (65, ours.long_mscale)):
        turned = ours.rotate_in(q, q, order(3), length)[0]
        torch.testing.assert_close(turned.norm(dim=-1), amplitude * q.norm(dim=-1), rtol=1e-6, atol=0)


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("node", "path"),
    [
        ({"name": "rope", "theta": 0}, "model.position.theta"),
        ({"name": "rope", "theta": -1.0}, "model.position.theta"),
        ({"name": "rope", "theta": float("nan")}, "model.position.theta"),
        ({"name": "rope", "rotary_fraction": 0.0}, "model.position.rotary_fraction"),
        ({"name": "rope", "rotary_fraction": 1.1}, "model.position.rotary_fraction"),
        ({"name": "rope", "pairing": "halves"}, "model.position.pairing"),
        ({"name": "yarn", "factor": 0.5}, "model.position.factor"),
        ({"name": "yarn", "factor": float("nan")}, "model.position.factor"),
        ({"name": "yarn", "theta": 1.0}, "model.position.theta"),
        ({"name": "yarn", "original_positions": 0}, "model.position.original_positions"),
        ({"name": "yarn", "beta_slow": 0.0}, "model.position.beta_slow"),
        ({"name": "longrope", "long_factors": [1.0, 2.0]}, "model.position.long_factors"),
        ({"name": "longrope", "short_factors": [0, 1, 1, 1, 1, 1]}, "model.position.short_factors"),
        ({"name": "longrope", "original_positions": 1}, "model.position.original_positions"),
        ({"name": "sinusoidal", "theta": 0.0}, "model.position.theta"),
    ],
    ids=str,
)
def test_what_cannot_turn_is_refused(make: Callable[..., Position], node: dict[str, Any], path: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make(node)
    assert caught.value.path == path and caught.value.rule and caught.value.remedy


def test_odd_widths_are_refused(make: Callable[..., Position]) -> None:
    with pytest.raises(ConfigError, match="even width"):
        make("rope", head_dim=7)
    with pytest.raises(ConfigError, match="even d_model"):
        make("sinusoidal", d_model=47)


# --- stretched contexts, against transformers' own frequencies --------------------------------------------------------

STRETCHES = ("rope_linear", "rope_ntk", "rope_llama3")
STRETCHED: dict[str, tuple[dict[str, Any], dict[str, Any], int | None]] = {
    "linear": ({"name": "rope_linear", "factor": 8.0}, {"rope_type": "linear", "factor": 8.0}, None),
    # transformers' dynamic type with a sequence of twice the trained length has (4 · 2 − 3) in the factor's place
    "ntk": ({"name": "rope_ntk", "factor": 5.0}, {"rope_type": "dynamic", "factor": 4.0}, 2 * 4096),
    "llama3": (
        {"name": "rope_llama3", "theta": 10000.0, "factor": 8.0, "original_positions": 1024},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 1024,
        },
        None,
    ),
    "gpt-oss": (
        {"name": "yarn", "factor": 32.0, "mscale": 1.0, "mscale_all_dim": 0.0, "truncate": False},
        {
            "rope_type": "yarn",
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
        },
        None,
    ),
}


@pytest.mark.parametrize("case", STRETCHED)
def test_stretched_frequencies_are_those_of_transformers(make: Callable[..., Position], case: str) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    node, theirs, length = STRETCHED[case]
    parameters = {"rope_theta": 10000.0, **theirs}
    config = LlamaConfig(
        hidden_size=256, num_attention_heads=4, max_position_embeddings=4096, rope_parameters=parameters
    )
    expected, amplitude = ROPE_INIT_FUNCTIONS[theirs["rope_type"]](config, device="cpu", seq_len=length)
    position = make(node, head_dim=64)
    torch.testing.assert_close(position.frequencies(torch.device("cpu")), expected, rtol=2e-6, atol=0)
    assert getattr(position, "amplitude", 1.0) == pytest.approx(amplitude)
    assert position.softmax_scale == 1.0


@pytest.mark.parametrize("name", STRETCHES)
def test_factor_of_one_is_plain_rope(make: Callable[..., Position], name: str) -> None:
    plain, stretched = make({"name": "rope", "theta": 777.0}), make({"name": name, "factor": 1.0, "theta": 777.0})
    cpu = torch.device("cpu")
    torch.testing.assert_close(stretched.frequencies(cpu), plain.frequencies(cpu), rtol=1e-6, atol=0)


def test_ntk_stretches_the_slowest_pair_by_the_factor_and_the_fastest_not_at_all(make: Callable[..., Position]) -> None:
    plain, ntk = (make(n).frequencies(torch.device("cpu")) for n in ("rope", {"name": "rope_ntk", "factor": 4.0}))
    ratio = plain / ntk
    torch.testing.assert_close(ratio[[0, -1]], torch.tensor([1.0, 4.0]), rtol=1e-5, atol=0)
    assert (ratio.diff() > 0).all()


@pytest.mark.parametrize(
    ("node", "parameter"),
    [
        *[
            ({"name": n, "factor": f}, "factor")
            for n in ("rope_linear", "rope_ntk", "rope_llama3")
            for f in (0.5, -1.0)
        ],
        *[({"name": n, "theta": 0.0}, "theta") for n in STRETCHES],
        ({"name": "rope_llama3", "high_freq_factor": 1.0}, "high_freq_factor"),
        ({"name": "rope_llama3", "original_positions": 0}, "original_positions"),
        ({"name": "rope_ntk", "rotary_fraction": 0.2}, "rotary_fraction"),
    ],
    ids=str,
)
def test_impossible_stretches_are_refused(make: Callable[..., Position], node: dict[str, Any], parameter: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make(node)
    assert caught.value.path == f"model.position.{parameter}"


def test_slopes_of_alibi_are_not_copied_from_the_host(make: Callable[..., Position]) -> None:
    ran: list[str] = []

    class Operators(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            ran.append(func.name())
            return func(*args, **(kwargs or {}))

    with Operators():
        make("alibi", n_heads=12).slopes(torch.device("cpu"))
    assert "aten::arange.start" in ran and not any("lift_fresh" in name for name in ran)


def test_only_the_fastest_pairs_turn(make: Callable[..., Position]) -> None:
    """Angles t · theta^(−2j/H) over the full head, as ``proportional`` in Gemma-4, and none for the other pairs."""
    position, q = make({"name": "rope_fastest", "theta": 50.0, "rotary_fraction": 0.5}), heads(1, 9, 2, 12)
    angles = torch.arange(9)[:, None] * 50.0 ** (-torch.arange(6, dtype=torch.float64) / 6)
    cos, sin = (f(angles) * (torch.arange(6) < 3) + (0 if f is torch.sin else (torch.arange(6) >= 3).double())
                for f in (torch.cos, torch.sin))  # fmt: skip
    a, b = q.chunk(2, -1)
    cos, sin = cos[:, None], sin[:, None]
    expected = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
    torch.testing.assert_close(position.rotate(q, q, order(9))[0], expected, rtol=0, atol=1e-5)


def test_queries_grow_with_the_logarithm_of_their_position(make: Callable[..., Position]) -> None:
    q, k = heads(1, 9, 4, 12), heads(1, 9, 2, 12, seed=1)
    growth = torch.tensor([1 + 0.5 * math.log(1 + (t + 1) // 4) for t in range(9)], dtype=torch.float64)
    for inner in (None, "rope"):
        turned, same = make({"name": "log_temperature", "scale": 0.5, "every": 4, "inner": inner}).rotate(
            q, k, order(9)
        )
        right = (q, k) if inner is None else make("rope").rotate(q, k, order(9))
        torch.testing.assert_close(turned, right[0] * growth[:, None, None], rtol=0, atol=1e-6)
        assert torch.equal(same, right[1])


@pytest.mark.parametrize("name", [n for n in registry.names("position") if n != "log_temperature"])
def test_blocks_share_angles_only_if_every_setting_is_equal(make: Callable[..., Position], name: str) -> None:
    one, same, other = (make(name, head_dim=width) for width in (12, 12, 8))
    assert one.alike() == same.alike()
    if one.alike() is not None:
        assert one.alike() != other.alike() and one.alike() != make({"name": "rope", "theta": 3.0}).alike()
        assert all(torch.equal(a, b) for a, b in zip(one.angles(order(5)), same.angles(order(5)), strict=True))
        assert len({make(n).alike() for n in ("rope", "yarn", "rope_linear")}) == 3


@torch.no_grad()
def test_block_that_rotates_in_its_own_way_does_so_with_a_cache_too(make: Callable[..., Position]) -> None:
    class Backwards(RoPE):
        def rotate(self, q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
            return super().rotate(q, k, -positions)

    block, (q, k) = Backwards(12), (heads(1, 5, 2, 12, seed=s) for s in (0, 1))
    for own, right in zip(Pass(order(5), made={}).rotated(block, q, k), block.rotate(q, k, order(5)), strict=True):
        assert torch.equal(own, right)


@torch.no_grad()
def test_layers_that_rotate_in_other_ways_keep_their_own_angles() -> None:
    """With caches, where layers that rotate alike compute them once."""
    model: dict[str, Any] = {
        "vocab_size": 61,
        "d_model": 48,
        "n_layers": 4,
        "max_positions": 64,
        "init": {"std": 0.2},
        "norm": "rmsnorm",
        "residual": "prenorm",
        "ffn": {"name": "swiglu", "d_ff": 24},
        "position": "rope",
        "attention": "gqa",
        "variants": {"attention": {"slow": {"name": "gqa", "position": {"name": "rope", "theta": 1e6}}}},
        "layout": {"attention": "(attention slow)*"},
    }
    decoder, ids = compose(model, seed=1).double().eval(), torch.arange(23)[None] % 61
    caches = decoder.new_caches(1, 23)
    steps = torch.cat([decoder.hidden(part, caches=caches)[0] for part in ids.split([9, 1, 13], 1)], 1)
    torch.testing.assert_close(steps, decoder.hidden(ids)[0], rtol=0, atol=1e-9)
    same = compose({**model, "layout": {"attention": "attention*"}}, seed=1).double().eval()
    assert (same.hidden(ids)[0] - steps).abs().max() > 0.01
