"""Linear recurrences in chunks are those of the formula."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from blockwright.blocks.kernels.recurrence import recurrence, recurrence_reference
from tests.blocks.kernels.compared import drawn

T = 67


def unit(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return F.normalize(drawn(*shape, seed=seed), dim=-1).to(dtype)


def given(channels: int) -> list[Tensor]:
    q, k, v = (unit(2, T, 3, width, seed=i) for i, width in enumerate((5, 5, 7)))
    decay = -(3 * drawn(2, T, 3, channels, seed=3)).exp()  # up to −1000: e^{−G} alone would overflow
    return [q, k, v, decay, 2 * drawn(2, T, 3, seed=4).sigmoid(), drawn(2, 3, 5, 7, seed=5)]


@pytest.mark.parametrize("chunk", [1, 16, 64])
def test_chunks_of_any_length_compute_the_recurrence(chunk: int) -> None:
    documents = torch.arange(T)[None] // torch.tensor([[13], [T]])
    # What is erased, and where, has at most the length of the delta rule, so that the state stays bounded.
    erase, at = 2 * unit(2, T, 3, 5, seed=6), unit(2, T, 3, 5, seed=7)
    for channels, segments in ((1, documents), (5, None), (5, documents)):
        q, k, v, decay, strength, state = given(channels)
        for beta, *more in ((strength,), (None,), (None, erase, at), (None, erase, None)):
            found = recurrence(q, k, v, decay, beta, state, segments, *more, chunk=chunk)
            right = recurrence_reference(q, k, v, decay, beta, state, segments, *more)
            torch.testing.assert_close(found, right, rtol=0, atol=1e-9 if more else 1e-10)


def test_delta_rule_is_erasing_by_its_own_key_and_pieces_pass_their_state_on() -> None:
    q, k, v, decay, beta, state = given(5)
    whole, last = recurrence(q, k, v, decay, beta, state)
    for at in (None, k):
        erased = recurrence(q, k, v * beta[..., None], decay, None, state, None, k * beta[..., None], at)
        torch.testing.assert_close(erased, (whole, last), rtol=0, atol=1e-10)
    for piece in (1, 2, 3, 17, 63, 64, 65):
        found, carried = [], state
        for parts in zip(*(t.split(piece, 1) for t in (q, k, v, decay, beta)), strict=True):
            y, carried = recurrence(*parts, carried)
            found.append(y)
        torch.testing.assert_close((torch.cat(found, 1), carried), (whole, last), rtol=0, atol=1e-10)
