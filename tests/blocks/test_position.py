"""Position blocks against their formulas, their published anchors and transformers' own code, however one attends."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins.precision import HalfPrecision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from blockwright import registry
from blockwright.blocks.attention.scoring import score_bias
from blockwright.blocks.base import Keys, Placement, Queries
from blockwright.blocks.compose import compose
from blockwright.blocks.decoder import Decoder
from blockwright.blocks.forward_pass import Pass
from blockwright.blocks.kernels import attention as attending
from blockwright.blocks.kernels import long_attention
from blockwright.blocks.kernels.choice import Kernels
from blockwright.blocks.kernels.scoring import Band, Slopes, dense, part
from blockwright.blocks.position.base import Position, alike
from blockwright.blocks.position.rotary import RoPE
from blockwright.registry import BlockError, ConfigError, register
from tests.blocks.small import D, Make, V, drawn, in_parts, model, near, order, packed, rewind

CPU = torch.device("cpu")
YARN = {"name": "yarn", "factor": 8, "original_positions": 16}
LONG = {"name": "longrope", "original_positions": 16}
ROTARY: dict[str, dict[str, Any]] = {
    "half split": {"name": "rope"},
    "interleaved": {"name": "rope", "pairing": "interleaved"},
    "partial": {"name": "rope", "rotary_fraction": 0.5},
    "yarn": YARN,
    "yarn, scaled": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.0},
    "yarn, untruncated": {**YARN, "truncate": False},
    "linear": {"name": "rope_linear", "factor": 3.0},
    "ntk": {"name": "rope_ntk", "factor": 3.0},
    "llama3": {"name": "rope_llama3", "factor": 3.0, "original_positions": 64},
    "longrope": {**LONG, "factor": 3.0, "turns": 0.5},
}


@pytest.fixture
def make(make_block: Make) -> Make:
    def build(node: Any, **context: Any) -> Position:
        return make_block("position", node, **{"d_model": D, "head_dim": 12, "n_heads": 4, **context})

    return build


def added(position: Position, x: Tensor, q: Tensor, queries: Tensor, keys: Tensor) -> Any:
    """The bias on scores of tokens x [B,T,D] with queries q, on keys without notes."""
    return dense(position.bias(Queries(x, q, queries), Keys(keys, keys[0])))


def test_block_works_at_one_place_only(make: Make) -> None:
    x, q = drawn(2, 5, D), drawn(2, 5, 4, 12)
    for name in registry.names("position"):
        position, bias = make(name), added(make(name), x, q, order(5), order(5))
        turns = bias is not None or not torch.equal(position.rotate(q, q, order(5))[0], q)
        adds = not torch.equal(position.embed(x, order(5)), x)
        at = position.place == "attention" and name != "none", position.place == "embedding"
        assert (turns, adds) == at or name.startswith("log_"), name  # these start late
    none = make("none")
    assert none.embed(x, order(5)) is x and none.rotate(q, x, order(5)) == (q, x) and none.softmax_scale == 1.0


# --- rotary -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("node", ROTARY.values(), ids=ROTARY)
def test_scores_depend_on_distances_only(make: Make, node: dict[str, Any]) -> None:
    position, q, k = make(node), drawn(1, 1, 1, 12), drawn(1, 1, 1, 12, seed=1)

    def score(i: int, j: int) -> float:
        return (position.rotate(q, q, order(1, i))[0] * position.rotate(k, k, order(1, j))[1]).sum().item()

    for distance in (0, 1, 5, 31):
        scores = [score(start + distance, start) for start in (0, 1, 7, 100)]
        assert max(scores) - min(scores) < 1e-4
    assert abs(score(3, 0) - score(0, 3)) > 1e-3 and abs(score(3, 0) - score(4, 0)) > 1e-3
    if node == {"name": "rope"}:
        assert torch.equal(position.rotate(q, q, order(1))[0], q)  # the first position is not turned


@pytest.mark.parametrize("name", ["rope", "yarn"])
def test_pairings_and_fractions_turn_other_numbers_in_the_same_way(make: Make, name: str) -> None:
    q, k, p = drawn(1, 9, 4, 12), drawn(1, 9, 2, 12, seed=1), [*range(0, 12, 2), *range(1, 12, 2)]
    paired, split = (make({"name": name, "pairing": pairing}) for pairing in ("interleaved", "half_split"))
    turned = paired.rotate(q, k, order(9))
    near([t[..., p] for t in turned], list(split.rotate(q[..., p], k[..., p], order(9))), 1e-14)
    assert (turned[0] - split.rotate(q, k, order(9))[0]).abs().max() > 0.1
    q = drawn(1, 9, 4, 16)
    for fraction, width in ((0.25, 4), (0.5, 8), (1.0, 16)):
        some = make({"name": name, "rotary_fraction": fraction}, head_dim=16).rotate(q, q, order(9))[0]
        assert torch.equal(some[..., width:], q[..., width:])
        assert (some[:, 1:, :, :width] != q[:, 1:, :, :width]).all()
        whole = make(name, head_dim=width).rotate(q[..., :width], q[..., :width], order(9))[0]
        assert name != "rope" or (some[..., :width] - whole).abs().max() < 1e-14  # as if the head were that narrow


def test_frequencies_are_of_the_instances_theta_in_single_precision(make: Make) -> None:
    slow, fast = make({"name": "rope", "theta": 10000.0}), make({"name": "rope", "theta": 100.0})
    for position, theta in ((slow, 10000.0), (fast, 100.0), (slow, 10000.0)):
        torch.testing.assert_close(position.frequencies(CPU), torch.tensor([theta ** (-j / 6) for j in range(6)]))
    for name in ("rope", "yarn"):
        position = make(name).to(torch.bfloat16)
        assert position.frequencies(CPU).dtype == torch.float32
        assert not list(position.buffers()) and not list(position.parameters())


def test_only_the_fastest_pairs_turn(make: Make) -> None:
    """Angles t · theta^(−2j/H) over the full head, as ``proportional`` in Gemma-4, and none for the other pairs."""
    position, q = make({"name": "rope_fastest", "theta": 50.0, "rotary_fraction": 0.5}), drawn(1, 9, 2, 12)
    angles = torch.arange(9)[:, None] * 50.0 ** (-torch.arange(6, dtype=torch.float64) / 6) * (torch.arange(6) < 3)
    (a, b), cos, sin = q.chunk(2, -1), angles.cos()[:, None], angles.sin()[:, None]
    near(position.rotate(q, q, order(9))[0], torch.cat((a * cos - b * sin, b * cos + a * sin), -1), 1e-5)


def test_queries_grow_with_the_logarithm_of_their_position(make: Make) -> None:
    q, k = drawn(1, 9, 4, 12), drawn(1, 9, 2, 12, seed=1)
    growth = torch.tensor([1 + 0.5 * math.log(1 + (t + 1) // 4) for t in range(9)], dtype=torch.float64)
    for inner in (None, "rope"):
        position = make({"name": "log_temperature", "scale": 0.5, "every": 4, "inner": inner})
        turned, same = position.rotate(q, k, order(9))
        right = (q, k) if inner is None else make("rope").rotate(q, k, order(9))
        near(turned, right[0] * growth[:, None, None], 1e-6)
        assert torch.equal(same, right[1])


def test_blocks_share_angles_only_if_every_setting_is_equal(make: Make) -> None:
    for name in set(registry.names("position")) - {"log_temperature"}:
        one, same, other = (make(name, head_dim=width) for width in (12, 12, 8))
        assert one.alike() == same.alike(), name
        if one.alike() is not None:
            assert one.alike() != other.alike() and one.alike() != make({"name": "rope", "theta": 3.0}).alike(), name
            assert all(map(torch.equal, one.angles(order(5)), same.angles(order(5)))), name
    assert len({make(n).alike() for n in ("rope", "yarn", "rope_linear")}) == 3


@torch.no_grad()
def test_layers_and_blocks_that_rotate_in_their_own_way_do_so_with_a_cache_too() -> None:
    """Where layers that rotate alike compute their angles once."""

    class Backwards(RoPE):
        def rotate(self, q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
            return super().rotate(q, k, -positions)

    block, (q, k) = Backwards(12), (drawn(1, 5, 2, 12, seed=s) for s in (0, 1))
    assert all(map(torch.equal, Pass(order(5), made={}).rotated(block, q, k), block.rotate(q, k, order(5))))
    slow = {"attention": {"slow": {"name": "gqa", "n_heads": 4, "position": {"name": "rope", "theta": 1e6}}}}
    config, ids = model(n_layers=4, variants=slow), torch.arange(23)[None] % V
    mixed, same = (
        compose({**config, "layout": {"attention": layout}}, seed=1).double().eval()
        for layout in ("(attention slow)*", "attention*")
    )
    steps = in_parts(mixed, ids, [9, 1, 13])
    near(steps, mixed.hidden(ids)[0], 1e-9)
    assert (same.hidden(ids)[0] - steps).abs().max() > 0.01


# --- YaRN -------------------------------------------------------------------------------------------------------------


def yarn(make: Make, **changes: Any) -> Any:
    return make({"name": "yarn", "factor": 40, "original_positions": 4096, **changes}, head_dim=64)


def test_yarn_frequencies_meet_the_published_anchors(make: Make) -> None:
    frequencies, plain = yarn(make).frequencies(CPU).tolist(), [10000.0 ** (-2 * j / 64) for j in range(32)]
    anchors = {0: 1.0, 1: 0.7498942, 10: 0.056234129, 11: 0.039006926, 16: 0.0055, 22: 1.77828e-4, 23: 3.3338e-5}
    for j, value in {**anchors, 31: 3.33380e-6}.items():
        assert frequencies[j] == pytest.approx(value, rel=2e-5), j
    assert frequencies[:11] == pytest.approx(plain[:11], rel=1e-6)
    assert frequencies[23:] == pytest.approx([p / 40 for p in plain[23:]], rel=1e-6)
    assert all(plain[j] / 40 < frequencies[j] < plain[j] for j in range(11, 23))
    # low = high: the ramp is a step, not a division by zero.
    step = make({"name": "yarn", "factor": 4, "original_positions": 16, "beta_fast": 32, "beta_slow": 2.8})
    assert step.frequencies(CPU).isfinite().all() and (step.frequencies(CPU) > 0).all()


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
    make: Make, mscale: float, mscale_all_dim: float, amplitude: float, softmax_scale: float
) -> None:
    position, q = yarn(make, mscale=mscale, mscale_all_dim=mscale_all_dim), drawn(1, 3, 2, 64)
    assert position.softmax_scale == pytest.approx(softmax_scale, rel=1e-9)
    near(position.rotate(q, q, order(3, 1))[0].norm(dim=-1), amplitude * q.norm(dim=-1), 0, 1e-6)


def test_factors_of_one_are_plain_rope_and_ntk_stretches_the_slowest_pair_alone(make: Make) -> None:
    position, q = yarn(make, factor=1), drawn(1, 63, 2, 64)
    assert position.softmax_scale == 1.0
    rope = make({"name": "rope", "pairing": "interleaved"}, head_dim=64)
    near(position.rotate(q, q, order(63))[0], rope.rotate(q, q, order(63))[0], 1e-5)
    plain = make({"name": "rope", "theta": 777.0}).frequencies(CPU)
    for name in ("rope_linear", "rope_ntk", "rope_llama3"):
        near(make({"name": name, "factor": 1.0, "theta": 777.0}).frequencies(CPU), plain, 0, 1e-6)
    ratio = plain / make({"name": "rope_ntk", "factor": 4.0, "theta": 777.0}).frequencies(CPU)
    near(ratio[[0, -1]], torch.tensor([1.0, 4.0]), 0, 1e-5)
    assert (ratio.diff() > 0).all()


# --- LongRoPE ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("theta", "width", "trained", "factor", "pair"), [(1e4, 96, 2048, 64, 25), (5e5, 128, 8192, 16, 30)]
)
def test_longropes_critical_pair_is_where_the_papers_search_found_it(
    make: Make, theta: float, width: int, trained: int, factor: int, pair: int
) -> None:
    node = {"name": "longrope", "theta": theta, "original_positions": trained, "factor": factor}
    factors = make(node, head_dim=width).long_factors
    assert factors[0] == 1 and sorted(factors) == factors and factors[pair + 1 :] == [factor] * (width // 2 - pair - 1)
    assert factors[pair] == pytest.approx(factor, rel=0.02) and factors[pair - 1] < 0.95 * factor


@pytest.mark.parametrize("length", [4096, 8193])
def test_longropes_angles_at_position_8192_do_not_depend_on_the_default_dtype(make: Make, length: int) -> None:
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
    near((b.atan2(a) - math.pi / 4 - exact).cos(), torch.ones(48).double(), 1e-6)


def test_batches_that_are_rotated_alike_have_rows_on_one_side_of_every_boundary(make: Make) -> None:
    longropes, lengths = [make({**LONG, "original_positions": n}) for n in (16, 8)], [3, 16, 9, 40, 8, 16]
    batches = [[lengths[i] for i in rows] for rows in alike(nn.ModuleList(longropes), lengths, 2)]
    assert batches == [[40], [16, 16], [9], [8, 3]]
    fixed = make({**LONG, "length": 64})
    assert [[lengths[i] for i in rows] for rows in alike(fixed, lengths, 4)] == [[40, 16, 16, 9], [8, 3]]


def test_longrope_declares_short_and_long(make: Make) -> None:
    """Up to the trained length all is as trained; beyond it, also the first tokens are rotated as the last will be."""
    q, longrope = drawn(1, 5, 4, 12), make(LONG, max_positions=64)
    short, long = (longrope.rotate_in(q, q, order(5), length)[0] for length in (16, 17))
    assert torch.equal(short, make("rope").rotate(q, q, order(5))[0]) and (long - short).abs().max() > 0.1
    assert torch.equal(longrope.rotate(q, q, order(5))[0], long)  # of an attention that declares nothing: the model's
    for declared, expected in ((16, short), (64, long)):
        fixed = make({**LONG, "length": declared}, max_positions=64)
        assert torch.equal(fixed.rotate_in(q, q, order(5), 80 - declared)[0], expected)


@pytest.mark.parametrize("attention", ["mha", "mla", {"name": "sliding_window", "window": 6}], ids=str)
def test_chunks_and_decoded_tokens_are_rotated_as_the_whole_they_belong_to(make_block: Make, attention: Any) -> None:
    """A cache made for more than the trained length is rotated for it from its first chunk on; one for less is not."""
    mix, plain = (make_block("attention", attention, around={"position": p}) for p in (LONG, "rope"))
    for length, chunks in ((16, [8, 6, 1, 1]), (40, [8, 6, 1, 1, 17, 7])):
        x, cache = drawn(1, 40, D)[:, :length], mix.new_cache(1, length, torch.float64, CPU)
        whole, parts = mix(x, Pass(order(length))), zip(x.split(chunks, 1), order(length).split(chunks, 1), strict=True)
        near(torch.cat([mix(part, Pass(where, cache=cache)) for part, where in parts], 1), whole, 1e-9)
        assert ((whole - plain(x, Pass(order(length)))).abs().max() > 1e-3) == (length > 16)


# --- slopes and embeddings --------------------------------------------------------------------------------------------


def test_alibi_takes_distance_times_the_papers_slope_off_the_score(make: Make, make_block: Make) -> None:
    def slopes(n: int) -> list[float]:
        return make("alibi", n_heads=n).slopes(CPU).tolist()

    eight = [2.0**-i for i in range(1, 9)]
    assert slopes(8) == eight and slopes(1) == [2.0**-8]
    assert slopes(12) == pytest.approx([*eight, *(2.0 ** (-0.5 * i) for i in (1, 3, 5, 7))])
    assert slopes(16) == pytest.approx([2.0 ** (-0.5 * i) for i in range(1, 17)])
    bias = added(make("alibi", n_heads=2), drawn(1, 2, D), drawn(1, 2, 2, 12), order(2, 3), order(5))
    for n, slope in enumerate((2.0**-4, 2.0**-8)):
        for t, i in enumerate((3, 4)):
            assert bias[0, n, t, : i + 1].tolist() == [-slope * (i - j) for j in range(i + 1)]
    for node, heads in (({"name": "gqa", "n_heads": 6}, 6), ({"name": "mla", "n_heads": 3}, 3), ("mha", 8)):
        assert make_block("attention", node, around={"position": "alibi"}).position.n_heads == heads


def test_slopes_of_alibi_are_not_copied_from_the_host(make: Make) -> None:
    ran: list[str] = []

    class Operators(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            ran.append(func.name())
            return func(*args, **(kwargs or {}))

    with Operators():
        make("alibi", n_heads=12).slopes(CPU)
    assert "aten::arange.start" in ran and not any("lift_fresh" in name for name in ran)


def test_sinusoidal_and_learned_add_to_embeddings(make: Make) -> None:
    x = drawn(2, 63, D)
    signal = make({"name": "sinusoidal", "scale": 0.5, "theta": 100}).embed(x, order(63)) - x
    angles = order(63)[0, :, None] / 100 ** (torch.arange(24, dtype=torch.float64) / 24)
    near(signal, 0.5 * torch.stack((angles.sin(), angles.cos()), -1).flatten(1).expand(2, -1, -1), 1e-5)
    position, x, where = make("learned"), drawn(2, 3, D), torch.tensor([[0, 63, 5], [1, 1, 2]])
    assert position.embedding.weight.shape == (64, D)
    assert torch.equal(position.embed(x, where), x + position.embedding.weight[where])


# --- transformers' own code -------------------------------------------------------------------------------------------


def test_rope_turns_as_transformers_llama_does(make: Make) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    rope = {"rope_type": "default", "rope_theta": 500.0}
    config = LlamaConfig(hidden_size=48, num_attention_heads=4, rope_parameters=rope)
    q, k = drawn(2, 63, 4, 12).float(), drawn(2, 63, 2, 12, seed=1).float()
    theirs = apply_rotary_pos_emb(*(t.transpose(1, 2) for t in (q, k)), *LlamaRotaryEmbedding(config)(q, order(63, 5)))
    ours = make({"name": "rope", "theta": 500.0}).rotate(q, k, order(63, 5))
    near([t.transpose(1, 2) for t in ours], list(theirs), 2e-5)


@pytest.mark.parametrize("mscales", [(0.707, 0.707), (1.0, 0.5)])
def test_yarn_turns_as_transformers_deepseek_does(make: Make, mscales: tuple[float, float]) -> None:
    from transformers import DeepseekV2Config
    from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2RotaryEmbedding, apply_rotary_emb

    yarn = {"factor": 8.0, "beta_fast": 32, "beta_slow": 1, "mscale": mscales[0], "mscale_all_dim": mscales[1]}
    rope = {"rope_type": "yarn", "rope_theta": 10000.0, "original_max_position_embeddings": 64, **yarn}
    config = DeepseekV2Config(qk_rope_head_dim=12, max_position_embeddings=512, rope_parameters=rope)
    q, k = drawn(2, 63, 4, 12).float(), drawn(2, 63, 1, 12, seed=1).float()
    freqs = DeepseekV2RotaryEmbedding(config)(q, order(63, 100))
    theirs = apply_rotary_emb(q.transpose(1, 2), k.transpose(1, 2), freqs)
    ours = make({"name": "yarn", "original_positions": 64, **yarn}).rotate(q, k, order(63, 100))
    near([t.transpose(1, 2) for t in ours], list(theirs), 1e-4)


def theirs_of(kind: str, length: int | None, theta: float, width: int, longest: int, **rope: Any) -> tuple[Any, float]:
    """Frequencies and amplitude of transformers, for heads of a width."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = {"rope_type": kind, "rope_theta": theta, **rope}
    sizes = {"hidden_size": width * 4, "num_attention_heads": 4, "max_position_embeddings": longest}
    return ROPE_INIT_FUNCTIONS[kind](LlamaConfig(**sizes, rope_parameters=parameters), CPU, seq_len=length)


@pytest.mark.parametrize("attention_factor", [None, 1.19])
def test_longropes_frequencies_are_transformers(make: Make, attention_factor: float | None) -> None:
    factors = {"short_factor": [1.0, 1.1, 1.2, 1.5, 1.7, 2.0], "long_factor": [1.0, 1.3, 2.5, 9.0, 30.0, 47.5]}
    rope = {"factor": 32.0, "attention_factor": attention_factor, "original_max_position_embeddings": 64, **factors}
    node = {"name": "longrope", "theta": 500.0, "factor": 32, "original_positions": 64, "long_mscale": attention_factor}
    ours, q = make({**node, **{f"{key}s": value for key, value in factors.items()}}), drawn(1, 3, 4, 12)
    for length in (64, 65):
        theirs, amplitude = theirs_of("longrope", length, 500.0, 12, 2048, **rope)
        near(ours.frequencies(CPU, length), theirs, 0, 1e-6)
        assert ours.long_mscale == pytest.approx(amplitude, rel=1e-6)
        turned = ours.rotate_in(q, q, order(3), length)[0]
        near(turned.norm(dim=-1), (ours.long_mscale if length > 64 else 1.0) * q.norm(dim=-1), 0, 1e-6)


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 1024}
GPT_OSS = {"factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "original_max_position_embeddings": 4096}
STRETCHED: dict[str, tuple[dict[str, Any], str, dict[str, Any], int | None]] = {
    "linear": ({"name": "rope_linear", "factor": 8.0}, "linear", {"factor": 8.0}, None),
    # transformers' dynamic type with a sequence of twice the trained length has (4 · 2 − 3) in the factor's place
    "ntk": ({"name": "rope_ntk", "factor": 5.0}, "dynamic", {"factor": 4.0}, 2 * 4096),
    "llama3": (
        {"name": "rope_llama3", "theta": 10000.0, "factor": 8.0, "original_positions": 1024},
        "llama3",
        LLAMA3,
        None,
    ),
    "gpt-oss": (
        {"name": "yarn", "factor": 32.0, "mscale": 1.0, "mscale_all_dim": 0.0, "truncate": False},
        "yarn",
        {**GPT_OSS, "truncate": False},
        None,
    ),
}


@pytest.mark.parametrize("case", STRETCHED)
def test_stretched_frequencies_are_those_of_transformers(make: Make, case: str) -> None:
    node, kind, rope, length = STRETCHED[case]
    expected, amplitude = theirs_of(kind, length, 10000.0, 64, 4096, **rope)
    position = make(node, head_dim=64)
    near(position.frequencies(CPU), expected, 0, 2e-6)
    assert getattr(position, "amplitude", 1.0) == pytest.approx(amplitude) and position.softmax_scale == 1.0


# --- biases that depend on their query, or on what was noted of each key ----------------------------------------------

BANDED = {"name": "banded", "rank": 3, "extent": 9}
SCALED = {"name": "log_scaled", "floor": 5, "scale": 0.5, "inner": BANDED}


@pytest.fixture
def between(temporary_blocks: None) -> None:
    """A position that has a number remembered of each token: a bias of what lies between a key and its query."""

    @register("position", "between")
    class Between(Position):
        def __init__(self, d_model: int, n_heads: int) -> None:
            super().__init__()
            self.gate = nn.Linear(d_model, n_heads)

        def slots(self) -> dict[str, tuple[int, ...]]:
            return {"fade": (self.gate.out_features,)}

        def remember(self, x: Tensor, positions: Tensor, declared: int) -> tuple[Tensor, ...]:
            return (F.logsigmoid(self.gate(x)),)

        def bias(self, queries: Queries, keys: Keys) -> Tensor:
            at = keys.order.argsort()
            since = keys.noted[0][:, at].cumsum(1)
            own = since[:, since.shape[1] - queries.q.shape[1] :]
            return own.mT[..., None] - since[:, at.argsort()].mT[:, :, None]

        def parallel_plan(self) -> dict[str, Placement]:
            return {"gate.weight": "column", "gate.bias": "column"}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=str)
def test_band_is_that_of_transformers(make: Make, dtype: torch.dtype, tolerance: float) -> None:
    """Forward and gradients, of the last queries of longer keys too."""
    from transformers.models.inkling.modeling_inkling import InklingRelativeLogits

    ours, theirs = make(BANDED).to(dtype), InklingRelativeLogits(3, 9).to(dtype)
    theirs.proj.data.copy_(ours.bank.data)
    x, q = drawn(2, 13, D, dtype=dtype).requires_grad_(), drawn(2, 13, 4, 12, dtype=dtype)
    queries, keys = torch.arange(4, 17), torch.arange(17)
    found = dense(ours.bias(Queries(x, q, queries[None]), Keys(keys[None], keys)))
    right = theirs(ours.mixture(x).unflatten(-1, (4, 3)), queries, keys)
    near(found, right, tolerance)
    weigh = torch.randn_like(right)
    one = torch.autograd.grad((found * weigh).sum(), [x, ours.mixture.weight, ours.bank])
    other = torch.autograd.grad((right * weigh).sum(), [x, ours.mixture.weight, theirs.proj])
    near(one, other, 10 * tolerance, tolerance)


def test_scores_and_bias_grow_together_from_the_floor_on(make: Make) -> None:
    scaled, plain = make(SCALED), make(BANDED)
    plain.load_state_dict({n.removeprefix("inner."): t for n, t in scaled.state_dict().items()})
    x, q = drawn(1, 9, D), drawn(1, 9, 4, 12)
    growth = torch.tensor([1 + 0.5 * max(0.0, math.log((t + 1) / 5)) for t in range(9)], dtype=torch.float64)
    turned, key = scaled.rotate(q, q, order(9))
    near(turned, q * growth[None, :, None, None], 1e-6, 1e-6)
    assert torch.equal(key, q)
    found, right = (added(p, x, q, order(9), order(9)) for p in (scaled, plain))
    near(found, right * growth[:, None], 1e-6, 1e-6)


PLACES = torch.stack((torch.arange(13) % 5, torch.arange(13)))


@pytest.mark.parametrize(
    "formula",
    [Slopes(torch.randn(4), PLACES, PLACES), Band(torch.randn(2, 13, 4, 6), PLACES, PLACES)],
    ids=["slopes", "band"],
)
def test_a_part_of_a_formula_is_that_of_the_tensor(formula: Any) -> None:
    whole, parts = formula.dense(), (slice(1, 2), slice(1, 3), slice(4, 9), slice(2, 13))
    assert torch.equal(part(formula, *parts), whole[parts]) and torch.equal(part(whole, *parts), whole[parts])
    at = torch.meshgrid(*(torch.arange(n) for n in whole.shape), indexing="ij")
    torch.testing.assert_close(formula.added(2)(*at), whole)


T = 57
POSITIONS: dict[str, Any] = {"banded": BANDED, "scaled": SCALED, "between": "between", "rope": "rope"}
GQA, DSA = {"name": "gqa", "n_heads": 4, "n_kv_heads": 2}, {"name": "dsa", "top_k": 5}
ATTENTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "gqa": (GQA, "banded"),
    "mla": ({"name": "mla", "n_heads": 4}, "scaled"),
    "window": ({"name": "sliding_window", "n_heads": 4, "window": 7}, "between"),
    "selector": ({**GQA, "selector": DSA}, "banded"),
    "composed": ({**GQA, "scores": {"name": "dcmha", "rank": 1, "width": 5}}, "scaled"),
    "differential": ({"name": "differential", "n_heads": 2}, "between"),
    "mla, selector": ({"name": "mla", "n_heads": 4, "selector": DSA}, "rope"),
}


def placed(attention: str, position: str) -> Decoder:
    return compose(model(attention=ATTENTIONS[attention][0], position=POSITIONS[position]), seed=3).double().eval()


def tokens() -> Tensor:
    """None twice in a row: where nothing rotates, their keys are equal, and rounding decides which is chosen."""
    draw = torch.Generator().manual_seed(3)
    return torch.stack([torch.randperm(V, generator=draw)[:T] for _ in range(2)])


@pytest.mark.parametrize("attention", ATTENTIONS)
@torch.no_grad()
def test_caches_in_parts_equal_one_pass_in_every_way_of_attending(
    between: None, attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole, absorbed, some heads at a time, on few keys gathered, and part by part; and after a rewind."""
    made, ids = placed(attention, ATTENTIONS[attention][1]), tokens()
    right = made.hidden(ids)[0]
    of_latents = ("absorbed", "one head at a time") if attention.startswith("mla") else ()
    for way in ("plain", *of_latents, "few keys", "part by part"):
        with monkeypatch.context() as patch:
            patch.setattr(attending, "absorbs", lambda *_, way=way: way == "absorbed")
            if way == "one head at a time":
                patch.setattr(attending, "KEPT", 0)
                patch.setattr(attending, "EXPANDED", 1)
            for name in ("PART", "PART_OF_SEVERAL", "LEAST") if way == "few keys" else ():
                patch.setattr(long_attention, name, 1)
            if way == "part by part":
                made.choose_kernels({"attention": "blocked"})
                patch.setattr(long_attention, "suits", lambda T, S: 1 < T < S)
                patch.setattr(long_attention, "PARTS", (5, 11))
                patch.setattr(long_attention, "ROWS", 4)
            caches = made.new_caches(2, T)
            found = in_parts(made, ids[:, :34], [20, 13, 1], caches)
            marks = [cache.mark(4) for cache in caches]
            made.hidden(ids[:, 40:44], caches=caches)
            rewind(caches, marks)
            found = torch.cat((found, in_parts(made, ids[:, 34:], [1, 22], caches)), 1)
        torch.testing.assert_close(found, right, rtol=0, atol=1e-9, msg=lambda m, way=way: f"{way}: {m}")


@torch.no_grad()
def test_kernels_agree_on_packed_documents(between: None) -> None:
    for position in ("banded", "scaled", "between"):
        made, documents = placed("window", position), packed(20, 20, 17, rows=2)
        right = made.choose_kernels({"attention": "reference"}).hidden(tokens(), *documents)[0]
        for kernel in ("blocked", "sdpa"):
            near(made.choose_kernels({"attention": kernel}).hidden(tokens(), *documents)[0], right, 1e-9)


def test_long_sequences_make_no_bias_of_all_pairs_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """By blocks of queries, of which each has its part of the bias."""
    made, largest, of_part = placed("gqa", "banded").float(), list[int](), Band.dense
    made.layers[0].attention.kernels = Kernels(attention="blocked")
    monkeypatch.setattr(Band, "dense", lambda self: largest.append((found := of_part(self)).shape[2]) or found)
    with torch.no_grad():
        made.layers[0].attention(torch.randn(1, 400, D), Pass(order(400)))
    assert max(largest) == 128 and len(largest) == 4


def test_attention_that_keeps_no_notes_of_means_is_named(between: None, make_block: Make, make: Make) -> None:
    x, q = torch.randn(1, 5, D), torch.randn(1, 5, 4, 12)
    with pytest.raises(BlockError, match="keeps no notes"):
        score_bias(make("between"), Queries(x, q, order(5)), Pass(order(5)))
    node = {"name": "shared_kv", "n_heads": 4, "position": "between", "compressor": None}
    assert make_block("attention", node).new_cache(1, 8, torch.float32, CPU)
    with pytest.raises(ConfigError) as refused:
        make_block("attention", {**node, "compressor": {"name": "hca"}})
    assert refused.value.path == "model.attention.position"
