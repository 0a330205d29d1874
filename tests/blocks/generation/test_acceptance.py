"""How many drafts of a trained model are right."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from blockwright.blocks.compose import compose
from blockwright.blocks.decoder import Decoder
from blockwright.blocks.generation.drafts import mtp
from blockwright.blocks.generation.drafts.base import Checked, draw_drafts
from blockwright.blocks.generation.drafts.mtp import MultiToken, MultiTokenDrafts
from blockwright.blocks.generation.draws import Draws
from blockwright.blocks.generation.sample import Sampling
from blockwright.blocks.generation.speculation import Speculation

V, LENGTH = 12, 400


class Draft(NamedTuple):
    """A draft, its distribution [V], and the number of tokens before its own."""

    token: int
    drawn_from: Tensor
    at: int


@pytest.fixture(scope="module")
def trained() -> Decoder:
    """A small model with one depth of multi-token prediction, trained on a random source of order 2."""
    config = {
        "vocab_size": V,
        "d_model": 32,
        "n_layers": 2,
        "max_positions": LENGTH,
        "attention": {"name": "gqa", "n_heads": 4, "n_kv_heads": 2},
        "position": {"name": "rope"},
        "ffn": {"name": "swiglu", "d_ff": 64},
        "norm": {"name": "rmsnorm"},
        "residual": {"name": "prenorm"},
        "mtp": {"depth": 1},
    }
    decoder, draws = compose(config, seed=0), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=1e-2)
    next_token = (2 * torch.randn(V, V, V, generator=draws)).softmax(-1)
    for _ in range(80):
        text = torch.randint(V, (16, 66), generator=draws)
        for i in range(2, text.shape[1]):
            text[:, i] = torch.multinomial(next_token[text[:, i - 2], text[:, i - 1]], 1, generator=draws)[:, 0]
        tokens, targets = text[:, :-1], text[:, 1:]
        hidden, _ = decoder.hidden(tokens)
        ((later, _),), _ = decoder.mtp_nll(hidden, tokens, targets)
        optimizer.zero_grad()
        ((decoder.nll(hidden, targets) + later) / tokens.numel()).backward()
        optimizer.step()
    return decoder.eval()


def drafts_of(decoder: Decoder, seed: int, monkeypatch: pytest.MonkeyPatch) -> tuple[list[int], list[Draft]]:
    """A text at temperature 1, and its drafts."""
    drawn_from, drafts, propose = list[Tensor](), list[Draft](), MultiTokenDrafts.propose

    def noted_draw(draws: Sequence[Draws], logits: Tensor) -> list[int]:
        drawn_from.append(logits[0].softmax(-1))
        return draw_drafts(draws, logits)

    def noted_propose(self: Any, checked: Checked, draws: Sequence[Draws], most: int) -> list[list[int]]:
        (proposed,) = propose(self, checked, draws, most)
        drafts.extend(Draft(token, drawn_from[-1], len(checked.texts[0])) for token in proposed)
        return [proposed]

    with monkeypatch.context() as patch:
        patch.setattr(mtp, "draw_drafts", noted_draw)
        patch.setattr(MultiTokenDrafts, "propose", noted_propose)
        prompt = [1, 2]
        rows = Speculation(decoder, [prompt], LENGTH - 2, Sampling(1.0), seed=seed, drafts=MultiToken(decoder))
        text = [*prompt, *(token for (token,) in rows if token is not None)]
    assert rows.acceptance.drafted == len(drafts)
    assert rows.acceptance.accepted == sum(text[draft.at] == draft.token for draft in drafts)
    return text, drafts


@pytest.mark.slow
@torch.no_grad()
def test_drafts_of_a_trained_model_are_right_as_often_as_coupling_promises(
    trained: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At least (1 − TV) / (1 + TV) of them at temperature 1, and at most 1 − TV, over the same steps: Daliri et al.
    2024, arXiv 2408.07978."""
    apart, right, by_chance = list[float](), 0, 0.0
    for seed in range(3):
        text, drafts = drafts_of(trained, seed, monkeypatch)
        model = trained(torch.tensor([text]))[0].softmax(-1)
        for draft in drafts:
            p = model[draft.at - 1]
            apart.append(float((p - draft.drawn_from).abs().sum() / 2))
            right += text[draft.at] == draft.token
            by_chance += float(p @ draft.drawn_from)
    n = len(apart)
    least, most = (sum(bound(t) for t in apart) / n for bound in (lambda t: (1 - t) / (1 + t), lambda t: 1 - t))
    error = 2.5 * math.sqrt(0.25 / n)
    assert by_chance / n < least - 3 * error  # so draws that are not coupled would be seen
    assert least - error <= right / n <= most + error
