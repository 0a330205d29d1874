"""Implementations of kernels: who may add one, which is asked when, and that all compute the same."""

from __future__ import annotations

import copy
import inspect
import itertools
import pickle
import sys
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from blockwright.blocks.base import Block
from blockwright.blocks.compose import compose
from blockwright.blocks.conformance import KernelCase, kernel_cases
from blockwright.blocks.decoder import Decoder
from blockwright.blocks.kernels import attention, by_name, products, seam
from blockwright.blocks.kernels.attention import (
    causal_attention,
    causal_attention_reference,
    latent_attention_reference,
)
from blockwright.blocks.kernels.choice import KERNELS, Kernels, check, choose, names
from blockwright.blocks.kernels.grouped_matmul import Choices
from blockwright.blocks.kernels.recurrence import recurrence_reference
from blockwright.blocks.kernels.scoring import Scoring
from blockwright.blocks.kernels.seam import EVERY, chain, implementations, kernel
from blockwright.registry import ConfigError, RegistrationError
from tests.blocks.kernels.compared import spy

HOPPER, AMPERE = (9, 0), (8, 0)


@pytest.fixture
def restored() -> Iterator[None]:
    before = {name: dict(known) for name, known in seam._known.items()}
    yield
    seam._known.clear()
    seam._known.update(before)
    chain.cache_clear()


def here(kernels: Sequence[str] = KERNELS) -> list[tuple[str, str]]:
    """Kernels, and their implementations that run on a CPU."""
    return [(k, name) for k in kernels for name, one in implementations(k).items() if one.runs_on("cpu", (0, 0))]


def failing(cases: list[KernelCase]) -> dict[str, str]:
    return {str(case): found.reason for case in cases if (found := case.outcome()).status == "failed"}


# Long recurrences whose reference is dear, and of which another case has the same options.
DEAR = {f"decay by {each}" for each in ("head", "head, erasing", "head, erasing elsewhere, packed")}
DEAR |= {f"decay by {each}" for each in ("channel", "channel, erasing", "channel, no delta rule")}


def test_every_implementation_that_runs_here_agrees_with_its_reference() -> None:
    """In single precision; flex, which compiles for each call, has tests of its own."""
    cases = [c for c in kernel_cases() if c.dtype == torch.float32 and c.name != "flex"]
    assert not failing([c for c in cases if c.kernel != "recurrence" or c.call not in DEAR])


@pytest.mark.slow
def test_every_implementation_that_runs_here_agrees_in_every_precision_and_a_wrong_one_is_found(restored: None) -> None:
    products.use(products.Choice(few_rows={8: ("few_rows",)}))  # which those of experts follow
    outcomes = {case: case.outcome() for case in kernel_cases()}
    assert not {str(case): found.reason for case, found in outcomes.items() if found.status == "failed"}
    passed = {(c.kernel, c.name) for c, found in outcomes.items() if c.call != "causal" and found.status == "passed"}
    assert passed == set(here(EVERY))

    @kernel("attention", "wrong", devices=("cpu",))
    def wrong(q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> Tensor:
        return causal_attention(q, k, v, scoring._replace(window=None))

    failed = {c.call for c in kernel_cases("attention/wrong") if c.outcome().status == "failed"}
    assert failed == {"131 tokens, window", "131 tokens, band in a window", "last tokens, window"}


MODEL: dict[str, Any] = {"vocab_size": 61, "d_model": 24, "n_layers": 2, "attention": {"name": "mla", "n_heads": 2}}
MODEL |= {"ffn": {"name": "moe", "n_experts": 5, "shared": {"name": "swiglu", "d_ff": 10}}, "norm": "rmsnorm"}
MODEL |= {"gating": {"name": "softmax_topk", "top_k": 2}, "experts": {"name": "swiglu", "d_ff": 9}}
MODEL |= {"position": "rope", "residual": "prenorm"}


def loss_and_gradients(decoder: Decoder) -> list[Tensor]:
    tokens = torch.randint(61, (2, 131), generator=torch.Generator().manual_seed(0))
    loss = decoder.nll(decoder.hidden(tokens[:, :-1])[0], tokens[:, 1:])
    return [loss, *torch.autograd.grad(loss, list(decoder.parameters()))]


@pytest.mark.slow
def test_every_implementation_gives_the_same_loss_and_gradients() -> None:
    decoder = compose(MODEL).double()
    expected = loss_and_gradients(decoder)
    for kind, name in here():
        other = copy.deepcopy(decoder).choose_kernels({kind: name})
        assert getattr(other.kernels, kind) == name
        for one, right in zip(loss_and_gradients(other), expected, strict=True):
            torch.testing.assert_close(one, right, rtol=1e-9, atol=1e-9, msg=lambda m, k=kind, n=name: f"{k}={n}: {m}")


def test_choice_is_made_for_the_device_reaches_every_block_and_follows_the_weights() -> None:
    decoder = compose(MODEL)
    assert decoder.kernels == choose(torch.device("cpu")) and decoder.kernels.experts == "compiled"
    blocks = [m for m in decoder.modules() if isinstance(m, Block)]
    assert len(blocks) > 10 and all(b.kernels is decoder.kernels for b in blocks)
    decoder.choose_kernels({"attention": "sdpa"}).to("meta")
    assert (decoder.kernels.experts, decoder.kernels.attention) == ("grouped", "sdpa")
    assert all(b.kernels is decoder.kernels for b in decoder.modules() if isinstance(b, Block))
    assert copy.deepcopy(decoder).kernels == decoder.kernels


def test_implementation_asked_for_is_the_one_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = spy(monkeypatch, "experts")
    choices = Choices(torch.tensor([[0], [1], [0]]), torch.ones(3, 1))
    for kernels in (Kernels(), Kernels(experts="grouped"), Kernels(experts="segments")):
        kernels.swiglu_experts(torch.randn(3, 4), choices, torch.randn(2, 6, 4), torch.randn(2, 4, 3))
    chain.cache_clear()
    assert [name for name, _ in calls] == ["segments", "grouped", "segments"]


def test_override_that_is_unknown_or_not_installed_is_refused() -> None:
    path = "task.kernels"
    wrong: dict[str, Any] = {f"{path}.atention": {"atention": "sdpa"}, f"{path}.experts": {"experts": "lop"}, path: 5}
    for at, overrides in {**wrong, f"{path}.cross_entropy": {"cross_entropy": "liger"}}.items():
        with pytest.raises(ConfigError) as caught:
            check(overrides, path)
        assert caught.value.path == at
    assert "liger_kernel" in str(caught.value)  # the package
    assert check(dict.fromkeys(KERNELS, "auto"), path) == dict.fromkeys(KERNELS, "auto")


GPU = "flex cudnn sdpa"
ORDERS: list[tuple[str, str, tuple[int, int], str | None, str]] = [
    ("attention", "cpu", (0, 0), None, "blocked compiled few_queries sdpa"),
    ("attention", "cuda", AMPERE, None, "flex sdpa"),
    ("attention", "cuda", HOPPER, None, GPU),
    ("attention", "cuda", HOPPER, "fa4", GPU),  # not installed
    ("attention", "meta", (0, 0), None, "sdpa"),
    ("experts", "cuda", HOPPER, None, "grouped loop"),
    ("experts", "cuda", AMPERE, None, "loop"),
    ("experts", "cpu", (0, 0), None, "compiled segments"),
    ("latent_attention", "cuda", HOPPER, None, "absorbed"),
    ("latent_attention", "cpu", (0, 0), None, "compiled absorbed"),
    ("recurrence", "cpu", (0, 0), None, "few_tokens torch"),
    ("recurrence", "cuda", HOPPER, None, "torch"),
    ("recurrence_each", "cpu", (0, 0), None, "few_tokens one_by_one"),
    ("linear", "cpu", (0, 0), None, "torch"),
    ("linear", "cpu", (0, 0), "mkl", "mkl torch"),
    ("linear", "cuda", HOPPER, None, "torch"),
    ("coding", "cpu", (0, 0), None, "compiled torch"),
    ("coded_attention", "cpu", (0, 0), None, "compiled parts whole"),
    ("coded_attention", "meta", (0, 0), None, "whole"),
]
INSTALLED = [
    ("attention", "cuda", HOPPER, "fa4", f"fa4 {GPU}"),
    ("attention", "cuda", AMPERE, "fa4", "flex sdpa"),
    ("coded_attention", "cuda", HOPPER, None, "triton whole"),
    ("latent_attention", "cuda", HOPPER, "flash_mla", "flash_mla absorbed"),
    ("recurrence", "cuda", AMPERE, "fla", "fla torch"),
    ("recurrence", "cuda", HOPPER, None, "torch"),
]


def test_what_is_asked_depends_on_the_device_its_capability_and_what_is_installed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def wrong(rows: list[Any]) -> list[Any]:
        chain.cache_clear()
        return [row for row in rows if [one.name for one in chain(row[0], row[3], *row[1:3])] != row[4].split()]

    assert not wrong(ORDERS)
    monkeypatch.setattr(seam.importlib.util, "find_spec", lambda name: object())
    assert not wrong(INSTALLED)
    chain.cache_clear()


def test_first_that_takes_the_call_computes_and_the_card_shows_the_order(restored: None) -> None:
    ran: list[int] = []

    @kernel("attention", "short", devices=("cpu",), takes=lambda q, k, v, scoring: q.shape[1] <= 8)
    def short(q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> Tensor:
        ran.append(q.shape[1])
        return causal_attention_reference(q, k, v, scoring)

    chosen = choose(torch.device("cpu"))
    assert names(chosen)["attention"] == "short, else blocked, else compiled, else few_queries, else sdpa"
    for kernels in (chosen, Kernels(), pickle.loads(pickle.dumps(chosen))):
        ran.clear()
        for length in (7, 9, 130):
            q = torch.randn(1, length, 2, 8)
            torch.testing.assert_close(
                kernels.attend(q, q, q, Scoring(0.3)), causal_attention_reference(q, q, q, Scoring(0.3))
            )
        assert ran == [7]
    named = choose(torch.device("cpu"), {"attention": "sdpa"})
    assert names(named)["attention"] == "sdpa"


def test_unknown_kernel_and_a_name_that_is_taken_are_refused_and_a_broken_plug_in_warns(
    restored: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> None:
        raise ImportError("no such library")

    with pytest.raises(RegistrationError, match="'atention'"):
        kernel("atention", "mine")(broken)
    with pytest.raises(RegistrationError, match=r"blockwright\.blocks\.kernels\.attention"):
        kernel("attention", "sdpa")(broken)
    monkeypatch.setattr(seam, "entry_points", lambda group: [SimpleNamespace(name="theirs", load=broken)])
    with pytest.warns(UserWarning, match="'theirs'"):
        seam._load.__wrapped__()


# Libraries for GPUs: their calls, with the arithmetic done by the reference. The signatures are those of the libraries.


def liger_rms_norm(X, W, eps, offset=0.0, casting_mode="llama", in_place=True):
    assert (offset, casting_mode, in_place) == (0.0, "gemma", False)
    return F.rms_norm(X, W.shape, W, eps)


def flash_mla_with_kvcache(
    q, k_cache, block_table, cache_seqlens, head_dim_v, tile_scheduler_metadata, num_splits=None, softmax_scale=None,
    causal=False, is_fp8_kvcache=False, indices=None, attn_sink=None,
):  # fmt: skip
    """FlashMLA, 2025: pages that a table names, one length a row."""
    assert causal and tile_scheduler_metadata == "plan" and k_cache.shape[1:] == (64, 1, 576)
    assert block_table.dtype == cache_seqlens.dtype == torch.int32
    rows = [k_cache[table].flatten(0, 1)[:, 0] for table in block_table]
    parts = zip(q.split(1), rows, cache_seqlens.tolist(), strict=True)
    return torch.cat([latent_attention_reference(p, m[None], n, head_dim_v, softmax_scale) for p, m, n in parts]), None


def chunk_gated_delta_rule(
    q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False, use_qk_l2norm_in_kernel=False,
    use_beta_sigmoid_in_kernel=False, allow_neg_eigval=False, state_v_first=False, cu_seqlens=None, cu_seqlens_cpu=None,
    chunk_indices=None, cp_context=None, **kwargs,
):  # fmt: skip
    """fla-core 0.6: a decay by head [B,T,N]; where sequences have borders, they are one row with a state each."""
    assert scale == 1.0 and output_final_state and not kwargs and q.dtype == k.dtype == v.dtype
    assert g.shape == beta.shape == v.shape[:3]
    return _by_borders(q, k, v, g[..., None], beta, initial_state, cu_seqlens)


def chunk_kda(
    q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False, use_qk_l2norm_in_kernel=False,
    use_gate_in_kernel=False, use_beta_sigmoid_in_kernel=False, allow_neg_eigval=False, safe_gate=False,
    lower_bound=None, disable_recompute=False, return_intermediate_states=False, state_v_first=False, cu_seqlens=None,
    cu_seqlens_cpu=None, cp_context=None, use_graph=False, max_num_seqs=None, **kwargs,
):  # fmt: skip
    """fla-core 0.6: a decay by channel [B,T,N,K], and states in fp32."""
    assert scale == 1.0 and output_final_state and not kwargs and q.dtype == k.dtype == v.dtype
    assert g.shape == q.shape and (initial_state is None or initial_state.dtype == torch.float32)
    return _by_borders(q, k, v, g, beta, initial_state, cu_seqlens)


def chunk_simple_gla(
    q, k, v, g=None, g_gamma=None, scale=None, initial_state=None, output_final_state=False, state_v_first=False,
    cu_seqlens=None, cu_seqlens_cpu=None, **kwargs,
):  # fmt: skip
    """fla-core 0.6: no delta rule."""
    assert scale == 1.0 and output_final_state and not kwargs and g_gamma is None and g.shape == v.shape[:3]
    return _by_borders(q, k, v, g[..., None], None, initial_state, cu_seqlens)


def fused_recurrent_gated_delta_rule(q, k, v, g=None, gk=None, gv=None, beta=None, scale=None, **others):
    assert v.shape[1] == 1 and gk is gv is None and not torch.is_grad_enabled()  # no gradient
    return chunk_gated_delta_rule(q, k, v, g, beta, scale, **others)


def fused_recurrent_kda(q, k, v, g, beta, A_log=None, dt_bias=None, scale=None, **others):
    assert v.shape[1] == 1 and A_log is dt_bias is None and not torch.is_grad_enabled()
    return chunk_kda(q, k, v, g, beta, scale, **others)


def fused_recurrent_simple_gla(q, k, v, g=None, g_gamma=None, scale=None, **others):
    assert v.shape[1] == 1
    return chunk_simple_gla(q, k, v, g, g_gamma, scale, **others)


def _by_borders(q, k, v, decay, beta, state, borders):
    given = [q, k, v, decay, *(() if beta is None else (beta,))]
    if borders is None:
        return recurrence_reference(*given[:4], beta, state)
    assert len(v) == 1 and borders.dtype == torch.int64 and (state is None or len(state) == len(borders) - 1)
    found = []
    for i, (begin, end) in enumerate(itertools.pairwise(borders.tolist())):
        parts = [t[:, begin:end] for t in given]
        own = None if state is None else state[i : i + 1]
        found.append(recurrence_reference(*parts[:4], None if beta is None else parts[4], own))
    return torch.cat([y for y, _ in found], 1), torch.cat([last for _, last in found])


@pytest.fixture
def libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    functional = SimpleNamespace(liger_rms_norm=liger_rms_norm, liger_swiglu=lambda a, b: F.silu(a) * b)
    plan = {"get_mla_metadata": lambda lengths, rows, heads: ("plan", None)}
    recurrences = {
        "gated_delta_rule": (chunk_gated_delta_rule, fused_recurrent_gated_delta_rule),
        "kda": (chunk_kda, fused_recurrent_kda),
        "simple_gla": (chunk_simple_gla, fused_recurrent_simple_gla),
    }
    parts = {
        **{f"fla.ops.{n}": SimpleNamespace(**{f.__name__: f for f in both}) for n, both in recurrences.items()},
        "liger_kernel": SimpleNamespace(),
        "liger_kernel.transformers": SimpleNamespace(),
        "liger_kernel.transformers.functional": functional,
        "flash_mla": SimpleNamespace(flash_mla_with_kvcache=flash_mla_with_kvcache, **plan),
    }
    for name, module in parts.items():
        monkeypatch.setitem(sys.modules, name, module)


def test_liger_is_called_as_it_wants_to_be(libraries: None) -> None:
    x, weight = torch.randn(3, 8), torch.randn(8)
    torch.testing.assert_close(by_name.liger_rms_norm(x, weight, 1e-5), F.rms_norm(x, (8,), weight, 1e-5))
    torch.testing.assert_close(by_name.liger_gated_silu(x, x + 1), F.silu(x) * (x + 1))


@pytest.mark.parametrize("tokens", [1, 3])
def test_flash_mla_is_given_pages_and_reads_what_the_reference_does(libraries: None, tokens: int) -> None:
    q, memory = (torch.randn(2, n, *w, 576, dtype=torch.bfloat16) for n, w in ((tokens, (4,)), (128, ())))
    with torch.no_grad():
        assert by_name.flash_mla_takes(q, memory, 99, 512, 0.1)
        got = by_name.flash_mla(q, memory, 99, 512, 0.1)
        torch.testing.assert_close(got, latent_attention_reference(q, memory, 99, 512, 0.1))
        assert not by_name.flash_mla_takes(q, memory[:, :64], 64, 512, 0.1)  # rows that do not follow each other
        assert not by_name.flash_mla_takes(q, memory[:, :100].contiguous(), 99, 512, 0.1)
        assert not by_name.flash_mla_takes(q, memory, 99, 512, 0.1, torch.zeros(1, 1, tokens, 99))
        assert not by_name.flash_mla_takes(q.float(), memory.float(), 99, 512, 0.1)
    assert not by_name.flash_mla_takes(q, memory, 99, 512, 0.1)  # its gradient


@pytest.mark.parametrize("tokens", [1, 13])
def test_fla_is_given_documents_and_reads_what_the_reference_does(libraries: None, tokens: int) -> None:
    draw, ids = torch.Generator().manual_seed(0), torch.arange(tokens)[None] // torch.tensor([[4], [tokens]])
    for channels, delta in ((1, True), (5, True), (1, False)):
        q, k, v = (torch.randn(2, tokens, 3, width, generator=draw) for width in (5, 5, 7))
        decay = -torch.rand(2, tokens, 3, channels, generator=draw)
        beta = torch.rand(2, tokens, 3, generator=draw) if delta else None
        for state in (None, torch.randn(2, 3, 5, 7, generator=draw)):
            for segments in (None, ids):
                given = q, k, v, decay, beta, state, segments
                with torch.no_grad():
                    torch.testing.assert_close(by_name.fla(*given), recurrence_reference(*given), rtol=0, atol=1e-5)


def test_fla_takes_what_may_be_rounded_and_what_it_has() -> None:
    def taken(dtype: torch.dtype, width: int = 8, channels: int = 1, beta: bool = True) -> bool:
        q, v = torch.empty(1, 4, 2, width), torch.empty(1, 4, 2, 8, dtype=dtype)
        return by_name.fla_takes(q, q, v, torch.empty(1, 4, 2, channels), torch.empty(1, 4, 2) if beta else None)

    assert taken(torch.bfloat16) and taken(torch.float16, channels=8) and taken(torch.bfloat16, beta=False)
    assert not taken(torch.float32) and not taken(torch.float64)
    assert not taken(torch.bfloat16, width=257) and not taken(torch.bfloat16, channels=8, beta=False)
    torch.set_float32_matmul_precision("high")
    assert taken(torch.float32) and not taken(torch.float64)


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("packed", [True, False])
def test_varlen_is_given_the_borders_of_documents(
    packed: bool, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.nn.attention import varlen

    signature = inspect.signature(varlen.varlen_attn)

    def by_document(*positional: Any, **named: Any) -> Tensor:
        given = signature.bind(*positional, **named).arguments
        left, right = given["window_size"]
        assert right == 0 and given["cu_seq_q"].dtype == torch.int32 and given["enable_gqa"]
        borders, parts = given["cu_seq_q"].tolist(), []
        for begin, end in itertools.pairwise(borders):
            q, k, v = (given[name][None, begin:end] for name in ("query", "key", "value"))
            scoring = Scoring(given["scale"], window=None if left < 0 else left + 1)
            parts.append(causal_attention_reference(q, k, v, scoring)[0])
        return torch.cat(parts)

    monkeypatch.setattr(varlen, "varlen_attn", by_document)
    ids = torch.tensor([[0] * 5 + [1] * 8, [0] * 13]) if packed else None
    q, k = torch.randn(2, 13, 4, 8), torch.randn(2, 13, 2, 8)
    scoring = Scoring(0.3, segments=ids, window=window)
    torch.testing.assert_close(
        by_name.varlen_attention(q, k, k, scoring), causal_attention_reference(q, k, k, scoring), rtol=1e-5, atol=1e-5
    )
    half = (t.bfloat16() for t in (q, k, k))
    assert by_name.is_packed(*half, scoring) == (packed or window is not None)
    assert not by_name.is_packed(q, k, k, scoring)


@pytest.mark.parametrize(("attend", "name"), [(by_name.flash_attention_3, "FA3"), (by_name.flash_attention_4, "FA4")])
def test_flash_attention_is_activated_once_through_torch(
    attend: Callable[..., Tensor], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.nn import attention as theirs

    assert name in theirs.list_flash_attention_impls()
    activated: list[str] = []
    monkeypatch.setattr(theirs, "activate_flash_attention_impl", activated.append)
    by_name._activate.cache_clear()
    q = torch.randn(1, 5, 2, 8)
    for _ in range(2):
        torch.testing.assert_close(attend(q, q, q, Scoring(0.3)), causal_attention(q, q, q, Scoring(0.3)))
    assert activated == [name]
    by_name._activate.cache_clear()


def test_last_tokens_on_a_gpu_get_no_mask_of_all_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    class SeenError(Exception):
        pass

    def sdpa(q: Tensor, k: Tensor, v: Tensor, attn_mask: Any, **options: Any) -> Tensor:
        raise SeenError(attn_mask)

    lower_right = attention._lower_right
    monkeypatch.setattr(attention, "_lower_right", lambda *size: size)
    monkeypatch.setattr(F, "scaled_dot_product_attention", sdpa)
    with FakeTensorMode(), torch.no_grad(), pytest.raises(SeenError) as seen:
        q, k = torch.empty(1, 3, 2, 8, device="cuda"), torch.empty(1, 11, 2, 8, device="cuda")
        causal_attention(q, k, k, Scoring(0.3))
    assert seen.value.args == ((3, 11),)
    here = torch.device("cpu")
    assert torch.equal(lower_right(3, 11)._materialize(here), attention.visible(3, 11, here)[0, 0])


def test_cudnn_gets_values_that_are_not_padded_where_torch_says_that_it_takes_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    q, v = torch.randn(1, 5, 2, 24), torch.randn(1, 5, 2, 16)
    assert not attention.cudnn_takes(q, q, v, Scoring(0.3))
    monkeypatch.setattr(torch.backends.cuda, "can_use_cudnn_attention", lambda params: params.value.shape[-1] == 16)
    assert attention.cudnn_takes(q, q, v, Scoring(0.3))
    assert not attention.cudnn_takes(q, q, v, Scoring(0.3, window=3))
    assert not attention.cudnn_takes(q[:, 3:], q, v, Scoring(0.3))  # the last of more tokens: its mask would differ
    seen: list[int] = []
    sdpa = F.scaled_dot_product_attention
    monkeypatch.setattr(attention, "sdpa_kernel", lambda backend: torch.no_grad())
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda q, k, v, **o: seen.append(v.shape[-1]) or sdpa(q, k, v, **o)
    )
    torch.testing.assert_close(
        attention.cudnn_attention(q, q, v, Scoring(0.3)), causal_attention_reference(q, q, v, Scoring(0.3))
    )
    assert seen == [16]


@pytest.mark.parametrize(
    ("gpu", "triton", "fla_core", "said"),
    [
        (HOPPER, "3.6.0", "0.6.0", "3.7.1"),
        (HOPPER, "3.7.1", "0.6.0", None),
        (HOPPER, "3.3.1", "0.6.0", None),
        (AMPERE, "3.6.0", "0.5.1", None),
        ((10, 0), "3.5.1", "0.6.0", "3.6"),
        ((10, 0), "3.9.0", "0.5.1", "0.6"),
        ((12, 0), "3.9.0", "0.6.1", None),
    ],
)
def test_versions_of_fla_that_are_wrong_on_a_gpu_are_refused_by_name(
    gpu: tuple[int, int], triton: str, fla_core: str, said: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(by_name, "version", {"triton": triton, "fla-core": fla_core}.__getitem__)
    monkeypatch.setattr(seam.Implementation, "is_installed", True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: gpu)
    if said is None:
        assert check({"recurrence": "fla"}, "task.kernels") == {"recurrence": "fla"}
        return
    with pytest.raises(ConfigError) as caught:
        check({"recurrence": "fla"}, "task.kernels")
    assert caught.value.path == "task.kernels.recurrence" and caught.value.rule.endswith(f"{said} is fixed")
