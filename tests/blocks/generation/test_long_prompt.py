"""Prompts that are read in parts, of whose last layer the last token alone is computed; and what costs grow with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pairwise import each
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from blockwright.blocks.attention import base
from blockwright.blocks.cache.base import Cache
from blockwright.blocks.compose import compose
from blockwright.blocks.cost import cache_bytes
from blockwright.blocks.decoder import Decoder
from blockwright.blocks.ffn import SwiGLU
from blockwright.blocks.forward_pass import Pass
from blockwright.blocks.generation.generate import prefill
from blockwright.blocks.kernels import long_attention
from blockwright.registry import register


@pytest.fixture
def short_is_long(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("SHORTEST", 8), ("LONGEST", 16), ("ROWS", 8), ("SCORES", 2**8), ("PARTS", (8, 16))):
        monkeypatch.setattr(long_attention, name, value)


def prompt(length: int, rows: int = 1) -> Tensor:
    return torch.randint(0, 61, (rows, length), generator=torch.Generator().manual_seed(0))


@torch.inference_mode()
def logits(decoder: Decoder, tokens: Tensor, chunk: int, bits: int | None, padding: Tensor | None = None) -> Tensor:
    return prefill(decoder, tokens, decoder.new_caches(*tokens.shape, bits, padding), chunk)


@pytest.mark.usefixtures("short_is_long")
@pytest.mark.parametrize(
    ("attention", "position", "bits"),
    each(["mla", "gqa", {"name": "gqa", "qk_norm": "per_head"}], ["rope", "alibi", "none"], [None, 6, None]),
    ids=str,
)
def test_reading_in_parts_gives_what_reading_at_once_gives(
    make: Callable[..., Decoder], monkeypatch: pytest.MonkeyPatch, attention: Any, position: str, bits: int | None
) -> None:
    decoder, tokens = make(attention=attention, position=position), prompt(83, 2)
    for padded in (None, torch.tensor([0, 37])):
        got = logits(decoder, tokens, 20, bits, padded)
        with monkeypatch.context() as whole:
            whole.setattr(long_attention, "LONGEST", 10**9)
            torch.testing.assert_close(got, logits(decoder, tokens, 20, bits, padded), rtol=0, atol=1e-9)


@pytest.mark.usefixtures("short_is_long")
@pytest.mark.parametrize("attention", ["mla", "gqa"])
def test_parts_are_read_where_prompts_are_long_and_a_gradient_is_not_needed(
    make: Callable[..., Decoder], monkeypatch: pytest.MonkeyPatch, attention: str
) -> None:
    decoder, read, at_once = make(attention=attention), base.Cache.append, list[int]()

    def append(cache: Any, *new: Tensor, multiple: int = 1) -> tuple[Tensor, ...]:
        at_once.append(cache.length + new[0].shape[1])
        return read(cache, *new, multiple=multiple)

    monkeypatch.setattr(base.Cache, "append", append)
    logits(decoder, prompt(64), 16, None)
    assert at_once == [16, 16]  # the first chunk of both layers, which has no past
    at_once.clear()
    caches = decoder.new_caches(1, 64)
    for part in prompt(64).split(16, 1):
        decoder(part, caches=caches)
    assert len(at_once) == 8


# --- growth -----------------------------------------------------------------------------------------------------------


class Numbers(TorchDispatchMode):
    """How many numbers the operations make, and the most of one; views make none."""

    def __init__(self) -> None:
        super().__init__()
        self.largest, self.all = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        held = {t.untyped_storage().data_ptr() for t in args if isinstance(t, Tensor)}
        for t in found if isinstance(found, tuple | list) else (found,):
            if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in held:
                self.largest, self.all = max(self.largest, t.numel()), self.all + t.numel()
        return found


def made(decoder: Decoder, past: int, new: int, bits: int | None) -> Numbers:
    """The numbers made by ``new`` tokens after ``past`` ones, beside the caches."""
    caches = decoder.new_caches(1, past + new, bits)
    for cache in caches:
        cache.length = past  # zeros
    with torch.inference_mode(), Numbers() as numbers:
        prefill(decoder, prompt(new), caches)
    return numbers


@pytest.mark.usefixtures("short_is_long")
@pytest.mark.parametrize(
    ("attention", "bits"), [("mla", 6), ("mha", None), ({"name": "sliding_window", "window": 64}, None)], ids=str
)
def test_no_tensor_of_prefill_grows_with_the_past_and_a_step_is_linear_in_it(
    make: Callable[..., Decoder], attention: Any, bits: int | None
) -> None:
    decoder = make(attention=attention, n_layers=1)
    assert made(decoder, 1500, 32, bits).largest == made(decoder, 500, 32, bits).largest
    one, two, three = (made(decoder, past, 1, bits).all for past in (2048, 4096, 6144))
    assert three - two == two - one
    assert two == one if isinstance(attention, dict) else two >= one  # torch's own attention makes none


# Bytes per token and layer of 160 numbers of a latent and its keys, and of 2 heads of 64 keys and values, in bf16; with
# 6 bits three quarters of a byte each, and a scale of two bytes for at most 64 numbers.
LENGTH = 131072
SIZES = {
    ("mla", None): 2 * 160,
    ("mla", 6): 120 + 2 * 3,
    ("mla", 4): 80 + 2 * 3,
    ("gqa", None): 2 * 2 * 2 * 64,
    ("gqa", 6): 192 + 2 * 4,
    ("mha", None): 2 * 2 * 8 * 64,
    ("mqa", None): 2 * 2 * 64,
    ("sliding_window", None): 2 * 2 * 2 * 64,
    ("sliding_window", 6): 192 + 2 * 4,
}


def test_bytes_of_caches_at_128k(tiny: Callable[..., Any]) -> None:
    more: dict[str, dict[str, int]] = {"mla": {"kv_lora_rank": 128, "qk_rope_head_dim": 32}}
    more["sliding_window"] = {"head_dim": 64, "window": 1024}  # a ring, of any length
    for (name, bits), a_token in SIZES.items():
        attention = {"name": name, "n_heads": 8, **more.get(name, {"head_dim": 64})}
        decoder = compose(tiny(d_model=512, attention=attention), device="meta")
        held = 1024 if name == "sliding_window" else LENGTH
        assert cache_bytes(decoder, LENGTH, torch.bfloat16, bits) == 2 * held * a_token, (name, bits)


# --- the last layer ---------------------------------------------------------------------------------------------------

DSA = {"name": "dsa", "n_heads": 2, "head_dim": 8, "top_k": 4}
AROUND: dict[str, Any] = {"vocab_size": 61, "d_model": 48, "n_layers": 2, "max_positions": 64, "init": {"std": 0.2}}
AROUND |= {"position": "rope", "norm": "rmsnorm", "residual": "prenorm", "ffn": {"name": "swiglu", "d_ff": 24}}
HASHED = {"ffn": {"name": "moe", "n_experts": 4}, "gating": {"name": "hash", "top_k": 2}}
MODELS: dict[str, dict[str, Any]] = {
    "latents": {"attention": "mla"},
    "window": {"attention": {"name": "sliding_window", "window": 5}},
    "values and a gate": {"attention": "gqa", "values": "value_residual", "output_gate": "per_head"},
    "over depth": {"attention": "depth"},
    "chosen": {"attention": {"name": "mla", "selector": DSA}},
    "chosen below": {"attention": {"name": "gqa", "selector": {"name": "shared", "every": 2, "of": DSA}}},
    "a state": {"attention": "gated_delta"},
    "streams": {"attention": "differential", "residual": "mhc"},
    "routed by id": {"attention": "gqa", **HASHED, "experts": {"name": "swiglu", "d_ff": 8}},
    "ffn that reads below": {"attention": "gqa", "ffn": "reading"},
}


@pytest.fixture(scope="module")
def reading(blocks_of_the_module: None) -> None:
    @register("ffn", "reading")
    class Reading(SwiGLU):
        """Adds the input of the first layer's."""

        def forward(self, x: Tensor, given: Pass | None = None) -> tuple[Tensor, None]:
            first = x if given is None or given.carry is None else given.carry.setdefault("first", x)
            return super().forward(x + first)[0], None


@pytest.mark.usefixtures("reading")
@pytest.mark.parametrize(
    ("name", "bits", "padding"), each(list(MODELS), [None, 4, None, 4], [None, (0, 9), (0, 9), None])
)
@torch.no_grad()
def test_logits_and_caches_are_those_of_the_whole(name: str, bits: int | None, padding: Any) -> None:
    decoder = compose({**AROUND, **MODELS[name]}, seed=2).double().eval()
    ids, rows = prompt(41, 2), None if padding is None else torch.tensor(padding)
    ours, right = (decoder.new_caches(2, 41, bits, rows) for _ in range(2))
    for part in ids.split([20, 1, 13, 7], 1):
        wanted = decoder.logits(decoder.hidden(part, caches=right)[0][:, -1]).float()
        torch.testing.assert_close(prefill(decoder, part, ours), wanted, rtol=0, atol=1e-5)
    for mine, other in zip(ours, right, strict=True):
        assert mine.length == other.length == 41
        for buffer, expected in zip(mine.buffers.values(), other.buffers.values(), strict=True):
            torch.testing.assert_close(buffer.double(), expected.double(), rtol=0, atol=1e-9)


def test_cache_that_hides_padding_in_its_own_way_shares_no_mask() -> None:
    class Seeing(Cache):
        def padding_bias(self, n_new: int) -> Tensor | None:
            found = super().padding_bias(n_new)
            return None if found is None else torch.zeros_like(found)

    caches = [cls(2, 8, {"k": (3,)}, torch.float32, torch.device("cpu")) for cls in (Cache, Seeing)]
    assert [cache.alike() is None for cache in caches] == [False, True]
