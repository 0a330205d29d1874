"""FlexAttention, run as written on the CPU, computes what the reference does, for every option and their mixtures."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pairwise import pairs
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.nn.attention.flex_attention import create_block_mask
from torch.utils._python_dispatch import TorchDispatchMode

from blockwright.blocks.forward_pass import Pass
from blockwright.blocks.kernels import flex, scoring
from blockwright.blocks.kernels.attention import causal_attention_reference
from blockwright.blocks.kernels.choice import Kernels
from blockwright.blocks.kernels.flex import flex_causal_attention
from blockwright.blocks.kernels.scoring import Band, Scoring, Slopes

B, T, N, H = 2, 13, 4, 8
GENERATOR = torch.Generator().manual_seed(0)


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=GENERATOR)


SEGMENTS = torch.tensor([[0] * 5 + [1] * 8, [0] * 13])
PLACES = torch.stack((torch.tensor([*range(5), *range(8)]), torch.arange(3, 3 + T)))
SLOPES = Slopes(draw(N), PLACES, PLACES)
ALL: dict[str, Any] = {"window": 6, "segments": SEGMENTS, "sinks": draw(N), "softcap": 3.0}
BAND = {"bias": Band(draw(B, T, N, 5), PLACES, PLACES)}
OPTIONS: dict[str, dict[str, Any]] = {  # each by itself: the cases of every implementation, in test_seam.py
    "all, band": ALL | BAND,
    "all": ALL | {"bias": draw(1, N, T, T)},
    "all, slopes": ALL | {"bias": SLOPES},
    "bias of each row": {"bias": draw(B, N, T, T)},
}


@pytest.fixture
def backwards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch refuses its backward pass on a CPU, where the operator run as written has one."""
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *tensors: None)


SLOW = [*((name, 2, 8) for name in list(OPTIONS)[1:]), ("all", 4, 8), ("all", 1, 4), ("all", 4, 12)]


@pytest.mark.parametrize(
    ("name", "kv_heads", "width"),
    [("all, band", 2, 8), *(pytest.param(*row, marks=pytest.mark.slow) for row in SLOW)],
)
def test_result_and_gradients_equal_the_reference(backwards: None, name: str, kv_heads: int, width: int) -> None:
    given = [draw(B, T, N, H), draw(B, T, kv_heads, H), draw(B, T, kv_heads, width)]
    weigh, sides = draw(B, T, N, width), []
    for attend in (flex_causal_attention, causal_attention_reference):
        options = {k: v.clone() if isinstance(v, Tensor) else v for k, v in OPTIONS[name].items()}
        learnt = [t.clone().requires_grad_() for t in given]
        if "sinks" in options:
            learnt.append(options["sinks"].requires_grad_())
        if isinstance(band := options.get("bias"), Band):
            learnt.append(band.profiles.clone().requires_grad_())
            options["bias"] = band._replace(profiles=learnt[-1])
        y = attend(*learnt[:3], Scoring(0.3, **options))
        sides.append([y, *torch.autograd.grad((y * weigh).sum(), learnt)])
    for got, right in zip(*sides, strict=True):
        torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_last_tokens_see_all_that_came_before() -> None:
    q, k, v = draw(B, 9, N, H), draw(B, T, N, H), draw(B, T, N, H)
    options = {**ALL, "bias": draw(1, N, 9, T)}
    got, right = (f(q, k, v, Scoring(0.3, **options)) for f in (flex_causal_attention, causal_attention_reference))
    torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-5)


def test_mask_is_made_once_for_a_shape_and_window_and_once_for_a_batch_of_documents(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[Any] = []
    make = flex._make_mask
    monkeypatch.setattr(flex, "_make_mask", lambda *given: made.append(given) or make(*given))
    flex._shared_mask.cache_clear()
    cpu = torch.device("cpu")
    for _ in range(2):  # batches
        ids = SEGMENTS.clone()
        for window in (None, None, 4, 4):  # layers
            flex._block_mask(T, T, cpu, ids, window)
            flex._block_mask(T, T, cpu, None, window)
    assert len(made) == 2 + 2 * 2
    made.clear()
    gone = weakref.ref(ids)
    del ids
    assert gone() is None and not scoring._made


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else [out]:
            if isinstance(t, Tensor) and not any(t is a for a in args):
                self.bytes = max(self.bytes, t.untyped_storage().nbytes())
        return out


def test_mask_of_packed_documents_of_128k_tokens_is_small() -> None:
    length = 131072
    ids = (torch.arange(length) // 1500)[None]
    with Largest() as largest:
        mask = flex._make_mask(length, length, None, torch.device("cpu"), ids)
    held = sum(t.nbytes for t in vars(mask).values() if isinstance(t, Tensor))
    assert held < 20e6 and largest.bytes < 10e6
    assert mask.sparsity() > 99


@pytest.mark.parametrize("name", ["mha", "mla"])
def test_slopes_of_alibi_make_no_tensor_of_all_pairs(
    name: str, make_block: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flex, "_flex", lambda _: lambda q, k, v, **options: v)
    attention = make_block("attention", {"name": name, "n_heads": 4}, around={"position": "alibi"}).float()
    attention.kernels = Kernels(attention="flex")
    length = 512
    with Largest() as largest:
        attention(draw(1, length, 48), Pass(torch.arange(length)[None]))
    assert largest.bytes < length * length < 4 * length * length  # a byte a pair; the bias would be 4 heads of fp32


SIZES = [(5, 517), (128, 128), (300, 300), (513, 1024), (1024, 1024)]


@pytest.mark.parametrize(("window", "size", "packed"), pairs([None, 1, 128, 400], SIZES, [False, True]))
def test_blocks_are_those_that_torch_finds_by_looking_at_every_pair(
    window: int | None, size: tuple[int, int], packed: bool
) -> None:
    length, keys = size
    if packed and length != keys:
        return
    generator = torch.Generator().manual_seed(length)
    ids = (torch.rand(2, length, generator=generator) < 0.006).cumsum(1) if packed else None
    mine = flex._make_mask(length, keys, window, torch.device("cpu"), ids)
    theirs = create_block_mask(mine.mask_mod, 2 if packed else None, None, length, keys, device="cpu")
    for side, n in (("kv", -(-keys // 128)), ("q", -(-length // 128))):
        for whole in ("", "full_"):
            sets = []
            for mask in (mine, theirs):
                counts, which = (getattr(mask, f"{whole}{side}_{part}") for part in ("num_blocks", "indices"))
                used = torch.arange(which.shape[-1]) < counts[..., None]
                chosen = torch.where(used, which.long(), n)
                sets.append(torch.zeros(*which.shape[:-1], n + 1).scatter_(-1, chosen, 1)[..., :n])
            assert torch.equal(*sets), (side, whole)


@pytest.mark.slow
@pytest.mark.parametrize("windowed", [False, True])
def test_twelve_lengths_take_at_most_three_graphs(windowed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    counter = CompileCounter()
    flex._compiled.cache_clear()
    compiled = flex._compiled(counter)
    monkeypatch.setattr(flex, "_flex", lambda device: compiled)
    for length in range(130, 130 + 12 * 57, 57):
        q, past = draw(1, length, 2, 8), 20 * (length % 3)
        k = draw(1, length + past, 2, 8)
        scoring = Scoring(0.3, window=100 + length % 7) if windowed else Scoring(0.3)
        with torch.no_grad():
            y = flex_causal_attention(q, k, k, scoring)
        torch.testing.assert_close(y, causal_attention_reference(q, k, k, scoring), rtol=1e-4, atol=1e-5)
    assert 1 <= counter.frame_count <= 3


def test_kernels_that_would_not_fit_are_made_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, int]] = []
    stub = lambda q, k, v, **options: asked.append(options["kernel_options"]) or v  # noqa: E731
    monkeypatch.setattr(flex, "_flex", lambda _: stub)
    bias, single, half = draw(1, N, T, T), torch.float32, torch.bfloat16
    for width, dtype, given, expected in (
        (128, half, None, {}),
        (192, half, None, {"bwd_num_warps": 8}),
        (256, single, None, {}),
        (128, single, bias, {"bwd_num_stages": 1}),
        (256, half, bias, {"bwd_num_warps": 8, "bwd_num_stages": 1, "fwd_num_stages": 2}),
        (128, half, SLOPES, {}),
    ):
        q = draw(B, T, N, width).to(dtype)
        flex_causal_attention(q, q, q, Scoring(0.3, bias=given))
        assert asked.pop() == expected


@pytest.mark.slow
def test_log_of_the_sum_is_asked_for_with_sinks_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    operator = flex._flex(torch.device("cpu"))
    monkeypatch.setattr(flex, "_flex", lambda _: lambda *a, **k: asked.append("return_aux" in k) or operator(*a, **k))
    q = draw(B, T, N, H)
    for sinks in (None, draw(N)):
        flex_causal_attention(q, q, q, Scoring(0.3, sinks=sinks))
    assert asked == [False, True]


def test_flashs_kernels_are_asked_for_by_a_name_that_torch_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked of torch is all that differs, and torch refuses it where it is not installed."""
    from typing import get_args

    from torch.nn.attention.flex_attention import _Backend

    asked: list[dict[str, Any]] = []
    plain = flex._flex

    def recorded(device: torch.device) -> Callable[..., Any]:
        def call(*given: Any, kernel_options: dict[str, Any], **options: Any) -> Any:
            asked.append(kernel_options)
            return plain(device)(*given, **options)  # run as written, its stats are not those of these kernels

        return call

    monkeypatch.setattr(flex, "_flex", recorded)
    q, k = draw(B, T, N, H), draw(B, T, N, H)
    scoring = Scoring(0.3, segments=SEGMENTS, sinks=draw(N))
    expected = causal_attention_reference(q, k, k, scoring)
    torch.testing.assert_close(flex.flex_flash_attention(q, k, k, scoring), expected, rtol=1e-5, atol=1e-5)
    assert asked == [{"BACKEND": "FLASH"}] and "FLASH" in get_args(_Backend)
    assert flex.is_special_half(q.half(), k.half(), k.half(), scoring)
    assert not flex.is_special_half(q, k, k, scoring)
    assert not flex.is_special_half(q.half(), k.half(), k.half(), Scoring(0.3))
