"""What a decoding step computes in C is what the formulas say."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pairwise import pairs
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from blockwright.blocks.cache.base import Cache
from blockwright.blocks.compose import compose
from blockwright.blocks.kernels import elementwise, products
from blockwright.blocks.kernels.attention import causal_attention_reference, latent_attention_reference
from blockwright.blocks.kernels.grouped_matmul import Choices
from blockwright.blocks.kernels.scoring import Scoring
from blockwright.blocks.kernels.seam import compute
from blockwright.plugins.fast_cpu import c_library, decoding, few_rows
from blockwright.plugins.fast_cpu.grouped_swiglu import few_swiglu
from tests.blocks.kernels.compared import single, spy, threads

CPU = torch.device("cpu")
MODEL = {"vocab_size": 50, "d_model": 256, "n_layers": 2, "norm": "rmsnorm", "residual": "prenorm", "position": "rope"}
pytestmark = pytest.mark.skipif(c_library.loaded("decoding") is None, reason="no C compiler here")


def cached(B: int, T: int, S: int, N: int, K: int, H: int, V: int) -> tuple[Tensor, Tensor, Tensor]:
    """T queries, a slice of something wider, and S tokens of a cache with room for more."""
    cache = Cache(B, S + 3, {"k": (K, H), "v": (K, V)}, torch.float32, CPU)
    return single(B, T, N + 1, H)[:, :, 1:], *cache.append(single(B, S, K, H), single(B, S, K, V))


@torch.no_grad()
def test_attention_is_the_formula(vectors: None) -> None:
    # tokens that end within a vector, a tile and a part, or at its end
    sizes = [(1, 1, 1), (2, 1, 7), (1, 3, 64), (3, 1, 65), (1, 2, 512), (2, 5, 513), (1, 8, 1100)]
    heads = [(16, 16, 16, 32), (8, 4, 48, 16), (16, 8, 16, 80), (32, 32, 16, 16)]
    for (B, T, S), (N, K, H, V), biased in pairs(sizes, heads, [None, "rows", "heads", "shared"]):
        q, k, v = cached(B, T, S, N, K, H, V)
        shape = {"rows": (B, 1, T, S), "heads": (1, N, 1, S), "shared": (S,)}.get(biased or "")
        hidden = (torch.arange(S) % 3 == 1) & (torch.arange(S) < S - T)  # each query sees itself
        bias = None if shape is None else single(*shape).masked_fill(hidden, -math.inf)
        scoring = Scoring(0.3, bias)
        assert decoding.suits(q, k, v, scoring)
        exact = Scoring(0.3, None if bias is None else bias.double())
        right = causal_attention_reference(q.double(), k.double(), v.double(), exact)
        with threads(1 + S % 2):
            found = decoding.attend(q, k, v, scoring)
        torch.testing.assert_close(found.double(), right, rtol=0, atol=2e-6)


@torch.no_grad()
def test_attention_on_latents_is_the_formula(vectors: None) -> None:
    sizes = [(1, 1, 1), (2, 1, 70), (1, 2, 513), (3, 3, 40)]
    for (B, T, S), N, biased in pairs(sizes, [4, 5], [False, True]):
        q, memory = single(B, T, N, 80), single(B, S + 5, 80)
        bias = single(B, 1, T, S) if biased else None
        assert decoding.suits_latents(q, memory, S, 48, 0.2, bias)
        found = decoding.attend_latents(q, memory, S, 48, 0.2, bias)
        exact = None if bias is None else bias.double()
        right = latent_attention_reference(q.double(), memory.double(), S, 48, 0.2, exact)
        torch.testing.assert_close(found.double(), right, rtol=0, atol=2e-6)


@torch.no_grad()
def test_no_row_and_no_number_of_threads_changes_a_result() -> None:
    q, k, v = cached(3, 2, 1300, 16, 4, 32, 32)
    with threads(1):
        alone = torch.cat([decoding.attend(*(t[i : i + 1] for t in (q, k, v)), Scoring(0.2)) for i in range(3)])
    with threads(3):
        assert torch.equal(decoding.attend(q, k, v, Scoring(0.2)), alone)


@torch.no_grad()
def test_scores_without_a_number_or_a_key_give_none() -> None:
    q, k, v = cached(1, 1, 130, 16, 16, 16, 16)
    nothing = decoding.attend(q, k, v, Scoring(0.2, torch.full((130,), -math.inf)))
    k[0, 30, 3] = math.nan
    broken = decoding.attend(q, k, v, Scoring(0.2))
    hidden = torch.zeros(130).masked_fill((torch.arange(130) < 64) & (torch.arange(130) != 30), -math.inf)
    alone = decoding.attend(q, k, v, Scoring(0.2, hidden))  # the only score of its tile
    for found in (nothing, broken[:, :, 3], alone[:, :, 3]):
        assert found.isnan().all()
    assert not broken[:, :, :3].isnan().any()
    k[0, 30, 3] = 0.0
    hidden = torch.zeros(130).masked_fill(torch.arange(130) < 100, -math.inf)  # all of the first tile
    right = causal_attention_reference(q, k, v, Scoring(0.2, hidden))
    torch.testing.assert_close(decoding.attend(q, k, v, Scoring(0.2, hidden)), right, rtol=0, atol=2e-6)


@torch.no_grad()
def test_norms_are_the_formula(vectors: None) -> None:
    for shape in ((1, 1, 256), (3, 5, 64), (7, 16 * 9), (2, 1, 1024)):
        x, weight = single(*shape, 2)[..., 0], single(shape[-1])
        assert decoding.suits_norm(x, weight, 1e-5)
        right = elementwise.rms_norm_reference(x.double(), weight.double(), 1e-5)
        torch.testing.assert_close(decoding.normalise(x, weight, 1e-5).double(), right, rtol=2e-6, atol=1e-6)


@torch.no_grad()
def test_experts_of_few_tokens_are_the_formula(vectors: None) -> None:
    products.use(products.Choice(few_rows={8: ("few_rows",)}))
    for (T, k), E, (D, F_), n in pairs([(1, 1), (1, 4), (8, 3), (5, 2)], [5, 9], [(256, 16), (272, 48)], [1, 3]):
        chosen = torch.stack([torch.randperm(E + 1, generator=torch.Generator().manual_seed(t))[:k] for t in range(T)])
        choices = Choices(chosen, single(T, k).abs())  # E is no expert
        x, gate_up, down = single(T, D), single(E, 2 * F_, D), single(E, D, F_)
        assert few_rows.suits_experts(x, choices, gate_up, down)
        wide = (t.double() for t in (choices.weights, gate_up, down))
        right = few_swiglu(x.double(), chosen, *wide)
        with threads(n):
            found = few_rows.experts(x, choices, gate_up, down)
        torch.testing.assert_close(found.double(), right, rtol=1e-5, atol=1e-4 * float(right.abs().max() + 1e-9))


@torch.no_grad()
def test_whatever_else_is_torchs() -> None:
    q, k, v = cached(1, 1, 20, 16, 4, 32, 32)
    norm = single(2, 256), single(256), 1e-5
    products.use(products.Choice(few_rows={8: ("few_rows",)}))
    choices = Choices(torch.tensor([[0, 1]]), torch.ones(1, 2))
    experts = single(1, 256), choices, single(4, 32, 256), single(4, 256, 16)
    taken: dict[str, tuple[Callable[..., bool], tuple[Any, ...]]] = {
        "attention": (decoding.suits, (q, k, v, Scoring(0.3))),
        "latents": (decoding.suits_latents, (single(1, 1, 4, 80), single(1, 30, 80), 20, 48, 0.2)),
        "norm": (decoding.suits_norm, norm),
        "experts": (few_rows.suits_experts, experts),
    }
    assert all(suits(*given) for suits, given in taken.values())
    for suits, given in taken.values():
        wide = tuple(t.double() if isinstance(t, Tensor) else t for t in given)
        wide = (wide[0], choices, *wide[2:]) if suits is few_rows.suits_experts else wide
        with torch.enable_grad():
            assert not suits(*given)
        with torch.autocast("cpu", torch.bfloat16):  # which casts products, and no norm
            assert suits(*given) is (suits is decoding.suits_norm)
        with FlopCounterMode(display=False):  # which would miss it
            assert not suits(*given)
        assert not suits(*wide)
    several = cached(1, 8, 20, 16, 4, 32, 32)
    refused: list[tuple[Callable[..., bool], tuple[Any, ...]]] = [
        (decoding.suits, (*several, Scoring(0.3))),  # 32 queries of a head of keys
        (decoding.suits, (*cached(1, 1, 20, 16, 4, 24, 32), Scoring(0.3))),
        (decoding.suits, (*cached(1, 1, 20, 2, 2, 32, 32), Scoring(0.3))),  # a narrow model
        (decoding.suits, (q, k, v, Scoring(0.3, softcap=2.0))),
        (decoding.suits_latents, (single(1, 1, 4, 80), single(1, 30, 80), 20, 40, 0.2)),
        (decoding.suits_norm, (single(1, 112), single(112), 1e-5)),
        (decoding.suits_norm, (single(2, 264), single(264), 1e-5)),
        (decoding.suits_norm, (single(200, 256), single(256), 1e-5)),
        (few_rows.suits_experts, (experts[0], Choices(torch.zeros(1, 65).long(), torch.ones(1, 65)), *experts[2:])),
    ]
    assert not [given for suits, given in refused if suits(*given)]
    products.use(products.Choice())  # nothing was chosen for few rows
    assert not few_rows.suits_experts(*experts)


@torch.no_grad()
def test_transforms_of_functions_reach_what_is_compiled() -> None:
    x, weight = single(3, 2, 256), single(256)
    norm = lambda x: compute("rms_norm", x, weight, 1e-5)  # noqa: E731
    assert decoding.suits_norm(x, weight, 1e-5)
    torch.testing.assert_close(torch.vmap(norm)(x), norm(x))
    right = torch.func.jvp(lambda x: elementwise.rms_norm_reference(x, weight, 1e-5), (x,), (x.cos(),))[1]
    torch.testing.assert_close(torch.func.jvp(norm, (x,), (x.cos(),))[1], right)
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(norm(forward_ad.make_dual(x, x.cos()))).tangent
    torch.testing.assert_close(found, right)


def test_a_model_decodes_in_c_what_one_pass_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    products.use(products.Choice(few_rows={8: ("few_rows",)}))
    latent = {"name": "mla", "n_heads": 4, "kv_lora_rank": 128, "qk_rope_head_dim": 32}
    grouped = {"name": "gqa", "n_heads": 4, "n_kv_heads": 2}
    routed = {
        "name": "moe",
        "n_experts": 4,
        "gating": {"name": "topk_softmax", "top_k": 2},
        "experts": {"name": "swiglu", "d_ff": 32},
    }
    for mixer, kernel, ffn in ((grouped, "attention", {"name": "swiglu"}), (latent, "latent_attention", routed)):
        calls = spy(monkeypatch, kernel, "rms_norm", "experts")
        made = compose({**MODEL, "attention": mixer, "ffn": ffn}).choose_kernels().eval()
        tokens = torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(0))
        caches = made.new_caches(2, 9)
        with torch.inference_mode():
            right = made.hidden(tokens)[0]
            calls.clear()
            found = torch.cat([made.hidden(tokens[:, i : i + 1], caches=caches)[0] for i in range(9)], 1)
        torch.testing.assert_close(found, right, rtol=0, atol=2e-5)
        each = 3 + 2 * (kernel == "latent_attention")  # two norms, attention; a norm of latents, experts
        assert {name for name, _ in calls} == {"compiled"} and len(calls) > 9 * 2 * each
