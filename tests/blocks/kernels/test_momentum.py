"""The delta rule with momentum in chunks is that of the formula."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from blockwright.blocks.kernels.momentum import momentum_recurrence
from tests.blocks.kernels.compared import drawn

T = 67


def given() -> tuple[list[Tensor], Tensor]:
    q, k, v = (F.normalize(drawn(2, T, 3, width, seed=i), dim=-1) for i, width in enumerate((5, 5, 7)))
    decays = [-(2 * drawn(2, T, 3, seed=i)).exp() for i in (3, 4)]  # down to −300: e^{−G} alone would overflow
    numbers = [drawn(2, T, 3, seed=i).sigmoid() for i in (5, 6)]
    return [q, k, v, *decays, *numbers], drawn(2, 3, 10, 7, seed=7)


def by_formula(parts: list[Tensor], state: Tensor, segments: Tensor) -> tuple[Tensor, Tensor]:
    q, k, v, g, h, eta, beta = parts
    (S, M), outputs = state.chunk(2, -2), []
    for t in range(v.shape[1]):
        if t:
            S, M = (x * (segments[:, t] == segments[:, t - 1])[:, None, None, None] for x in (S, M))
        alpha, mu, rate, strength = (x[:, t, :, None, None] for x in (g.exp(), h.exp(), eta, beta))
        error = (alpha * k[:, t, :, None]) @ S - v[:, t, :, None]
        M = mu * M + rate * k[:, t, ..., None] * error
        S = alpha * S - strength * M
        outputs.append((q[:, t, :, None] @ S)[..., 0, :])
    return torch.stack(outputs, 1), torch.cat((S, M), -2)


@pytest.mark.parametrize("chunk", [1, 8, 64])
def test_chunks_of_any_length_and_documents_compute_the_formula(chunk: int) -> None:
    parts, state = given()
    for documents in (torch.zeros(2, T), torch.arange(T)[None] // torch.tensor([[13], [40]])):
        found = momentum_recurrence(*parts, state, documents, chunk=chunk)
        torch.testing.assert_close(found, by_formula(parts, state, documents), rtol=0, atol=1e-12)


def test_pieces_pass_their_state_on() -> None:
    parts, state = given()
    right, found, carried = by_formula(parts, state, torch.zeros(2, T)), [], state
    for piece in zip(*(x.split(17, 1) for x in parts), strict=True):
        y, carried = momentum_recurrence(*piece, carried)
        found.append(y)
    torch.testing.assert_close((torch.cat(found, 1), carried), right, rtol=0, atol=1e-12)
