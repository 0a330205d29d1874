"""Long prompts: chunks whose keys are read from the cache in parts, and what prefill and decoding grow with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from pairwise import each
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from blockwright.blocks.attention import base
from blockwright.blocks.compose import compose
from blockwright.blocks.cost import cache_bytes
from blockwright.blocks.decoder import Decoder
from blockwright.blocks.generation.generate import prefill
from blockwright.blocks.kernels import long_attention

ATTENTIONS = ("mla", "gqa", {"name": "gqa", "qk_norm": "per_head"})


@pytest.fixture(autouse=True)
def short_is_long(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("SHORTEST", 8), ("LONGEST", 16), ("ROWS", 8), ("SCORES", 2**8), ("PARTS", (8, 16))):
        monkeypatch.setattr(long_attention, name, value)


@pytest.fixture
def make(tiny: Callable[..., Any], randomise: Callable[..., None]) -> Callable[..., Decoder]:
    def build(attention: Any, position: str = "rope", n_layers: int = 2) -> Decoder:
        decoder = compose(tiny(attention=attention, position=position, n_layers=n_layers)).eval().double()
        randomise(decoder)
        return decoder

    return build


@contextmanager
def whole(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Everything cached is read at once."""
    with monkeypatch.context() as patched:
        patched.setattr(long_attention, "LONGEST", 10**9)
        yield


def prompt(length: int, rows: int = 1) -> Tensor:
    return torch.randint(0, 61, (rows, length), generator=torch.Generator().manual_seed(0))


@torch.inference_mode()
def logits(decoder: Decoder, tokens: Tensor, chunk: int, bits: int | None, padding: Tensor | None = None) -> Tensor:
    caches = decoder.new_caches(*tokens.shape, bits, padding)
    return prefill(decoder, tokens, caches, chunk)


@pytest.mark.parametrize(
    ("attention", "position", "bits"), each(ATTENTIONS, ["rope", "alibi", "none"] * 2, [None, 6]), ids=str
)
def test_reading_in_parts_gives_what_reading_at_once_gives(
    make: Callable[..., Decoder], monkeypatch: pytest.MonkeyPatch, attention: Any, position: str, bits: int | None
) -> None:
    decoder, tokens, padding = make(attention, position), prompt(83, 2), torch.tensor([0, 37])
    for padded in (None, padding):
        got = logits(decoder, tokens, 20, bits, padded)
        with whole(monkeypatch):
            expected = logits(decoder, tokens, 20, bits, padded)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("attention", ["mla", "gqa"])
def test_parts_are_read_where_prompts_are_long_and_a_gradient_is_not_needed(
    make: Callable[..., Decoder], monkeypatch: pytest.MonkeyPatch, attention: str
) -> None:
    decoder, read = make(attention), base.Cache.append
    at_once: list[int] = []

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


@pytest.mark.parametrize(("attention", "bits"), [("mla", 6), ("mha", None)])
def test_no_tensor_of_prefill_grows_with_the_past(
    make: Callable[..., Decoder], attention: str, bits: int | None
) -> None:
    decoder = make(attention, n_layers=1)
    assert made(decoder, 4000, 32, bits).largest == made(decoder, 1000, 32, bits).largest


@pytest.mark.parametrize("bits", [None, 6])
@pytest.mark.parametrize("attention", ["mla", "mha", {"name": "sliding_window", "window": 64}], ids=str)
def test_numbers_of_a_decoding_step_are_linear_in_the_past(
    make: Callable[..., Decoder], attention: Any, bits: int | None
) -> None:
    decoder = make(attention, n_layers=1)
    one, two, three = (made(decoder, past, 1, bits).all for past in (2048, 4096, 6144))
    assert three - two == two - one
    assert two == one if isinstance(attention, dict) else two >= one  # torch's own attention makes none


# --- bytes at 128K ----------------------------------------------------------------------------------------------------

LENGTH = 131072
# Bytes per token and layer of 160 numbers of a latent and its keys, and of 2 heads of 64 keys and values, in bf16; with
# 6 bits three quarters of a byte each, and a scale of two bytes for at most 64 numbers.
SIZES = {
    ("mla", None): 2 * 160,
    ("mla", 6): 120 + 2 * 3,
    ("mla", 4): 80 + 2 * 3,
    ("gqa", None): 2 * 2 * 2 * 64,
    ("gqa", 6): 192 + 2 * 4,
    ("mha", None): 2 * 2 * 8 * 64,
    ("mqa", None): 2 * 2 * 64,
}


@pytest.mark.parametrize(("kind", "expected"), SIZES.items(), ids=str)
def test_bytes_of_caches_at_128k(tiny: Callable[..., Any], kind: tuple[str, int | None], expected: int) -> None:
    name, bits = kind
    sizes = {"kv_lora_rank": 128, "qk_rope_head_dim": 32} if name == "mla" else {"head_dim": 64}
    decoder = compose(tiny(d_model=512, attention={"name": name, "n_heads": 8, **sizes}), device="meta")
    assert cache_bytes(decoder, LENGTH, torch.bfloat16, bits) == 2 * LENGTH * expected


@pytest.mark.parametrize("bits", [None, 6])
def test_a_ring_keeps_its_window_at_any_length(tiny: Callable[..., Any], bits: int | None) -> None:
    attention = {"name": "sliding_window", "n_heads": 8, "head_dim": 64, "window": 1024}
    decoder = compose(tiny(d_model=512, attention=attention), device="meta")
    a_token = SIZES["gqa", bits]
    assert cache_bytes(decoder, LENGTH, torch.bfloat16, bits) == 2 * 1024 * a_token
