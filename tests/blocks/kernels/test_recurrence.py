"""Linear recurrences in chunks against the recurrence itself. Gradients and precisions: ``kernel_cases``."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from blockwright.blocks.kernels.recurrence import recurrence, recurrence_reference

T = 67


def given(channels: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    q, k, v = (torch.nn.functional.normalize(draw(2, T, 3, width), dim=-1) for width in (5, 5, 7))
    decay = -(3 * draw(2, T, 3, channels)).exp()  # up to −1000: e^{−G} alone would overflow
    return [q, k, v, decay, 2 * draw(2, T, 3).sigmoid(), draw(2, 3, 5, 7)]


@pytest.mark.parametrize("chunk", [1, 4, 16, 64])
@pytest.mark.parametrize("channels", [1, 5])
def test_chunks_of_any_length_compute_the_recurrence(channels: int, chunk: int) -> None:
    documents = torch.arange(T)[None] // torch.tensor([[13], [T]])
    for segments in (None, documents):
        q, k, v, decay, strength, state = given(channels)
        for beta in (strength, None):
            right, last = recurrence_reference(q, k, v, decay, beta, state, segments)
            y, final = recurrence(q, k, v, decay, beta, state, segments, chunk=chunk)
            torch.testing.assert_close(y, right, rtol=0, atol=1e-10)
            torch.testing.assert_close(final, last, rtol=0, atol=1e-10)


def erasing() -> list[Tensor]:
    """What is erased, and where; of the length that the delta rule has at most, so that the state stays bounded."""
    generator = torch.Generator().manual_seed(1)
    e, a = (torch.nn.functional.normalize(torch.randn(2, T, 3, 5, generator=generator, dtype=torch.float64), dim=-1)
            for _ in range(2))  # fmt: skip
    return [2 * e, a]


@pytest.mark.parametrize("chunk", [1, 16])
@pytest.mark.parametrize("channels", [1, 5])
def test_chunks_erase_apart_from_writing(channels: int, chunk: int) -> None:
    documents = torch.arange(T)[None] // torch.tensor([[13], [T]])
    erase, at = erasing()
    for segments in (None, documents):
        q, k, v, decay, _, state = given(channels)
        for place in (at, None):
            right, last = recurrence_reference(q, k, v, decay, None, state, segments, erase, place)
            y, final = recurrence(q, k, v, decay, None, state, segments, erase, place, chunk=chunk)
            torch.testing.assert_close(y, right, rtol=0, atol=1e-9)
            torch.testing.assert_close(final, last, rtol=0, atol=1e-9)


def test_delta_rule_is_erasing_by_its_own_key() -> None:
    q, k, v, decay, beta, state = given(5)
    right = recurrence(q, k, v, decay, beta, state)
    erase = k * beta[..., None]
    for at in (None, k):
        found = recurrence(q, k, v * beta[..., None], decay, None, state, None, erase, at)
        for got, wanted in zip(found, right, strict=True):
            torch.testing.assert_close(got, wanted, rtol=0, atol=1e-10)


@pytest.mark.parametrize("piece", [1, 2, 3, 17, 63, 64, 65])
def test_pieces_that_pass_their_state_on_equal_one_pass(piece: int) -> None:
    q, k, v, decay, beta, state = given(5)
    whole, last = recurrence(q, k, v, decay, beta, state)
    found = []
    for parts in zip(*(t.split(piece, 1) for t in (q, k, v, decay, beta)), strict=True):
        y, state = recurrence(*parts, state)
        found.append(y)
    torch.testing.assert_close(torch.cat(found, 1), whole, rtol=0, atol=1e-10)
    torch.testing.assert_close(state, last, rtol=0, atol=1e-10)
