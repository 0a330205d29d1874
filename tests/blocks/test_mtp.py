"""Multi-token prediction against a plain reading of its formula; taking it off leaves the model as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from blockwright.blocks.compose import check, compose
from blockwright.blocks.cost import count_parameters
from blockwright.blocks.forward_pass import Pass
from tests.blocks.small import Make, order

T = 12


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(61, (2, T + 1), generator=torch.Generator().manual_seed(0))


def by_hand(decoder: Any, tokens: Tensor, hidden: Tensor, segments: Tensor | None) -> list[tuple[float, int]]:
    """Summed loss and number of targets of each depth, one token at a time from the concatenation on."""
    found = []
    states = {i: hidden[:, i] for i in range(T)}
    for k, depth in enumerate(decoder.mtp, start=1):
        rows = []
        for i in range(T - k):
            embedded = decoder.embedding(tokens[:, i + k])
            rows.append(depth.project(torch.cat((depth.embedding_norm(embedded), depth.hidden_norm(states[i])), -1)))
        given = Pass(order(T - k), None if segments is None else segments[:, : T - k], tokens=tokens[:, k:T])
        x = depth.norm(depth.layer(torch.stack(rows, 1), given)[0])
        states = {i: x[:, i] for i in range(T - k)}
        losses = []
        for i in range(T - k):
            for row in range(len(tokens)):
                if segments is None or segments[row, i] == segments[row, i + k]:
                    logits = decoder.output_weight @ x[row, i]
                    losses.append(float(F.cross_entropy(logits, tokens[row, i + k + 1])))
        found.append((sum(losses), len(losses)))
    return found


@pytest.mark.parametrize(("depth", "packed"), [(1, False), (3, True)])
@torch.no_grad()
def test_losses_are_those_of_the_formula(tiny: Make, randomise: Make, tokens: Tensor, depth: int, packed: bool) -> None:
    decoder = compose(tiny(moe=True, mtp={"depth": depth}))
    randomise(decoder)
    segments = (torch.arange(T) >= 7).long().expand(2, T) if packed else None
    positions = order(T)
    hidden, _ = decoder.hidden(tokens[:, :T], positions, segments)
    losses, routings = decoder.mtp_nll(hidden, tokens[:, :T], tokens[:, 1:], positions, segments)
    expected = by_hand(decoder, tokens, hidden, segments)
    assert [int(n) for _, n in losses] == [n for _, n in expected]
    assert [float(nll) for nll, _ in losses] == pytest.approx([nll for nll, _ in expected], rel=1e-5)
    assert len(routings) == depth and all(r is not None for r in routings)


def test_depth_beyond_the_end_of_a_short_sequence_predicts_nothing(tiny: Make, tokens: Tensor) -> None:
    decoder = compose(tiny(moe=True, mtp={"depth": 2}))
    assert type(decoder.mtp[0].layer.ffn) is type(decoder.layers[-1].ffn) is not type(decoder.layers[0].ffn)
    for length in (1, 2):
        x = tokens[:, :length]
        losses, routings = decoder.mtp_nll(decoder.hidden(x)[0], x, tokens[:, 1 : length + 1], order(length))
        assert [int(n) for _, n in losses] == [2 * (length - 1), 0]
        assert float(losses[1][0]) == 0 and [r is not None for r in routings] == [length == 2, False]


def test_concatenation_has_the_embedding_first(tiny: Make, tokens: Tensor) -> None:
    """As the released weights have it: with only the first half of the projection, states do not matter."""
    decoder = compose(tiny(mtp={"depth": 1}))
    with torch.no_grad():
        decoder.mtp[0].project.weight[:, 48:] = 0
    both = torch.randn(2, T, 48), torch.randn(2, T, 48)
    one, other = (decoder.mtp_nll(h, tokens[:, :T], tokens[:, 1:], order(T))[0][0][0] for h in both)
    assert torch.equal(one, other)


def test_model_beside_it_is_the_same_to_the_bit(tiny: Make, tokens: Tensor) -> None:
    plain, further = compose(tiny(moe=True)), compose(tiny(moe=True, mtp={"depth": 2}))
    assert torch.equal(plain(tokens), further(tokens))
    assert {n for n in further.state_dict() if not n.startswith("mtp.")} == set(plain.state_dict())
    assert check(tiny(mtp={"depth": 0}))["mtp"] is None


def test_v3_layer_has_the_published_size() -> None:
    from blockwright.training.configuration.composing import compose_config

    composed = compose_config(["model=deepseek_v3", "model.n_layers=5"]).model
    plain = count_parameters(compose(composed, device="meta")).total
    composed.mtp = {"depth": 1}
    assert count_parameters(compose(composed, device="meta")).total - plain == 11_610_067_968
