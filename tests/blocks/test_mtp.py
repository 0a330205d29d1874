"""Multi-token prediction against a plain reading of its formula; taking it off leaves the model as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from blockwright.blocks.compose import check, compose
from blockwright.blocks.cost import count_parameters
from blockwright.blocks.forward_pass import Pass
from blockwright.registry import ConfigError

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
        x, *_ = depth.layer(
            torch.stack(rows, 1),
            Pass(
                torch.arange(T - k)[None],
                None if segments is None else segments[:, : T - k],
                tokens=tokens[:, k:T],
            ),
        )
        x = depth.norm(x)
        states = {i: x[:, i] for i in range(T - k)}
        losses = []
        for i in range(T - k):
            for row in range(len(tokens)):
                if segments is None or segments[row, i] == segments[row, i + k]:
                    logits = decoder.output_weight @ x[row, i]
                    losses.append(float(F.cross_entropy(logits, tokens[row, i + k + 1])))
        found.append((sum(losses), len(losses)))
    return found


@pytest.mark.parametrize("packed", [False, True], ids=["one document", "packed"])
@pytest.mark.parametrize("depth", [1, 3])
@torch.no_grad()
def test_losses_are_those_of_the_formula(
    tiny: Callable[..., Any], randomise: Callable[..., None], tokens: Tensor, depth: int, packed: bool
) -> None:
    decoder = compose(tiny(moe=True, mtp={"depth": depth}))
    randomise(decoder)
    segments = (torch.arange(T) >= 7).long().expand(2, T) if packed else None
    positions = torch.arange(T)[None]
    hidden, _ = decoder.hidden(tokens[:, :T], positions, segments)
    losses, routings = decoder.mtp_nll(hidden, tokens[:, :T], tokens[:, 1:], positions, segments)
    expected = by_hand(decoder, tokens, hidden, segments)
    assert [int(n) for _, n in losses] == [n for _, n in expected]
    assert [float(nll) for nll, _ in losses] == pytest.approx([nll for nll, _ in expected], rel=1e-5)
    assert len(routings) == depth and all(r is not None for r in routings)


@pytest.mark.parametrize("length", [1, 2])
def test_depth_beyond_the_end_of_a_short_sequence_predicts_nothing(
    tiny: Callable[..., Any], tokens: Tensor, length: int
) -> None:
    decoder, x = compose(tiny(moe=True, mtp={"depth": 2})), tokens[:, :length]
    hidden, _ = decoder.hidden(x)
    losses, routings = decoder.mtp_nll(hidden, x, tokens[:, 1 : length + 1], torch.arange(length)[None])
    assert [int(n) for _, n in losses] == [2 * (length - 1), 0]
    assert float(losses[1][0]) == 0 and [r is not None for r in routings] == [length == 2, False]


def test_concatenation_has_the_embedding_first(tiny: Callable[..., Any], tokens: Tensor) -> None:
    """As the released weights have it: with only the first half of the projection, states do not matter."""
    decoder = compose(tiny(mtp={"depth": 1}))
    with torch.no_grad():
        decoder.mtp[0].project.weight[:, 48:] = 0
    hidden, positions = torch.randn(2, T, 48), torch.arange(T)[None]
    one, other = (
        decoder.mtp_nll(h, tokens[:, :T], tokens[:, 1:], positions)[0][0][0] for h in (hidden, hidden.flip(0))
    )
    assert torch.equal(one, other)


def test_model_beside_it_is_the_same_to_the_bit(tiny: Callable[..., Any], tokens: Tensor) -> None:
    plain, further = compose(tiny(moe=True)), compose(tiny(moe=True, mtp={"depth": 2}))
    assert torch.equal(plain(tokens), further(tokens))
    names = set(plain.state_dict())
    assert {n for n in further.state_dict() if not n.startswith("mtp.")} == names


def test_layer_is_built_as_the_last_one(tiny: Callable[..., Any]) -> None:
    decoder = compose(tiny(moe=True, mtp={"depth": 1}))
    assert type(decoder.mtp[0].layer.ffn) is type(decoder.layers[-1].ffn) is not type(decoder.layers[0].ffn)


def test_v3_layer_has_the_published_size() -> None:
    from blockwright.training.configuration.composing import compose_config

    composed = compose_config(["model=deepseek_v3", "model.n_layers=5"]).model
    plain = count_parameters(compose(composed, device="meta")).total
    composed.mtp = {"depth": 1}
    assert count_parameters(compose(composed, device="meta")).total - plain == 11_610_067_968


@pytest.mark.parametrize(
    ("mtp", "path"),
    [
        ({"depht": 1}, "model.mtp.depht"),
        ({"depth": -1}, "model.mtp.depth"),
        ({"depth": 1.5}, "model.mtp.depth"),
        ({"loss_weight": -0.1}, "model.mtp.loss_weight"),
        ({"loss_weight": "much"}, "model.mtp.loss_weight"),
    ],
)
def test_impossible_settings_are_refused(tiny: Callable[..., Any], mtp: dict[str, Any], path: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check(tiny(mtp=mtp))
    assert caught.value.path == path and caught.value.remedy


def test_no_depth_is_no_prediction(tiny: Callable[..., Any]) -> None:
    assert check(tiny(mtp={"depth": 0}))["mtp"] is None
