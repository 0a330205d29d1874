"""Generation: the cached loop gives what recomputing everything gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pairwise import each
from torch import Tensor

from blockwright.blocks.decoder import Decoder
from blockwright.blocks.generation import generate as generation
from blockwright.blocks.generation.generate import Continuations, generate
from blockwright.blocks.generation.sample import Sampling
from blockwright.registry import BlockError

GREEDY = Sampling(temperature=0)
RAGGED = [[5, 9, 2, 30, 11, 7, 8, 40, 3], [17], [4, 4, 60, 1]]
PROMPT = torch.randint(0, 61, (3, 5), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def greedy(decoder: Decoder, tokens: Tensor, new: int) -> Tensor:
    for _ in range(new):
        tokens = torch.cat((tokens, decoder(tokens)[:, -1:].argmax(-1)), 1)
    return tokens


def continued(decoder: Decoder, prompts: list[list[int]], n: int, **options: Any) -> list[list[int | None]]:
    """The tokens of each row."""
    rows = Continuations(decoder, prompts, n, **{"sampling": GREEDY, **options})
    return [list(row) for row in zip(*rows, strict=True)]


# One of each kind of cache: that of every attention is checked against its one pass by the conformance kit.
CACHED = ["gqa", "mla", "gated_delta", "shared_kv", "depth", {"name": "sliding_window", "window": 3}]
SCORED = [{"name": "gqa", "scores": scores} for scores in ("sinks", "softcap")]


@pytest.mark.parametrize(
    ("attention", "position"), each([*CACHED, *SCORED], ["learned", "yarn", "rope", "alibi"]), ids=str
)
def test_greedy_decoding_of_ragged_rows_equals_recomputing_each_alone(
    make: Callable[..., Decoder], attention: Any, position: str
) -> None:
    decoder = make(attention=attention, position=position, moe=attention in CACHED)
    for prompt, got in zip(RAGGED, continued(decoder, RAGGED, 8), strict=True):
        assert got == greedy(decoder, torch.tensor([prompt]), 8)[0, len(prompt) :].tolist()


def test_prompt_stays_one_candidate_is_greedy_and_chunks_change_nothing(make: Callable[..., Decoder]) -> None:
    decoder = make(attention="mla", moe=True)
    out = greedy(decoder, PROMPT, 12)
    assert torch.equal(generate(decoder, PROMPT, 12, temperature=0), out) and torch.equal(out[:, :5], PROMPT)
    assert torch.equal(generate(decoder, PROMPT, 12, top_k=1, seed=5), out)
    assert torch.equal(generate(decoder, PROMPT, 0), PROMPT)
    whole = continued(decoder, RAGGED, 5)
    assert all(continued(decoder, RAGGED, 5, chunk=chunk) == whole for chunk in (1, 2, 4))
    assert continued(decoder, RAGGED, 5, bits=8) == whole


def test_seed_alone_decides_and_a_row_draws_whatever_is_beside_it(make: Callable[..., Decoder]) -> None:
    decoder = make(moe=True)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    together = continued(decoder, RAGGED, 10, sampling=None, seed=5)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(4)
    for row, prompt in enumerate(RAGGED):
        assert continued(decoder, [prompt], 10, sampling=None, seed=5 + row) == [together[row]]
    assert continued(decoder, RAGGED, 10, sampling=None, seed=15) != together


def test_numbers_of_padding_reach_no_row(make: Callable[..., Decoder]) -> None:
    decoder, prompts = make(tie_embeddings=False), [[3, 9, 8, 7], [5]]
    right = list(Continuations(decoder, prompts, 6, GREEDY, stop_tokens={0}))
    with torch.no_grad():
        decoder.embedding.weight[0] = float("nan")  # of a token that is in no text
    assert list(Continuations(decoder, prompts, 6, GREEDY, stop_tokens={0})) == right


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_generation_works_in_other_precisions_and_leaves_no_gradient(
    make: Callable[..., Decoder], dtype: torch.dtype
) -> None:
    decoder = make(dtype, attention="mla", moe=True)
    out = generate(decoder, PROMPT, 4)
    assert out.shape == (3, 9) and ((out >= 0) & (out < 61)).all()
    assert not out.requires_grad and all(p.grad is None for p in decoder.parameters())


@torch.no_grad()
def test_logits_of_a_padded_row_are_those_of_the_row_alone(make: Callable[..., Decoder]) -> None:
    decoder = make(torch.float32, attention="mla", moe=True)
    tokens = torch.randint(0, 61, (2, 12), generator=torch.Generator().manual_seed(1))
    caches = decoder.new_caches(2, 20, padding=torch.tensor([0, 7]))
    parts = [decoder(part, caches=caches) for part in tokens.split([9, 1, 2], 1)]
    torch.testing.assert_close(torch.cat(parts, 1)[1:, 7:], decoder(tokens[1:, 7:]), rtol=0, atol=1e-5)


def test_long_prompts_are_read_in_small_chunks_where_masks_of_all_scores_are_made(
    make: Callable[..., Decoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generation, "SCORES", 2**14)
    rows = [[0] * 32, [1] * 32]
    chooses = make(attention={"name": "gqa", "selector": {"name": "dsa", "n_heads": 2, "top_k": 4}})
    assert [Continuations(m, rows, 1).chunk for m in (make(), chooses)] == [generation.CHUNK, 2**14 // 64]
    assert Continuations(make(), [rows[0], rows[1][:-1]], 1).chunk == 2**14 // 64


# --- what ends a row --------------------------------------------------------------------------------------------------


def test_stop_token_ends_its_row_alone_and_is_not_handed_out(make: Callable[..., Decoder]) -> None:
    decoder = make()
    free = continued(decoder, RAGGED, 9)
    stop = free[0][4]
    stopped = continued(decoder, RAGGED, 9, stop_tokens={stop})
    for before, after in zip(free, stopped, strict=True):
        n = before.index(stop) if stop in before else 9
        assert after == (before[:n] + [None] * 9)[: len(after)]
    assert any(None not in row for row in stopped) or len(stopped[0]) < 9


def test_batch_ends_with_its_last_row(make: Callable[..., Decoder]) -> None:
    rows = Continuations(make(), [[1], [2]], 9)
    assert len(next(rows)) == 2
    rows.end(0)
    assert next(rows)[0] is None
    rows.end(1)
    assert list(rows) == []


def test_repetition_penalty_sees_the_prompt_and_what_was_drawn(make: Callable[..., Decoder]) -> None:
    (row,) = continued(make(), [[3, 9]], 40, sampling=Sampling(temperature=0, repetition_penalty=1e9))
    assert len({3, 9, *row}) == 42


def test_what_cannot_be_continued_is_refused(make: Callable[..., Decoder]) -> None:
    ending = make(position="learned", max_positions=12)
    assert len(continued(ending, [[1, 2, 3]], 9)[0]) == 9
    assert Continuations(make(position="rope", max_positions=12), [[1, 2, 3]], 10).left == 10
    wrong: list[tuple[Any, int, str]] = [([[1], []], 3, "prompt"), ([], 3, "prompt"), ([[1]], -1, "new_tokens")]
    for prompts, n, parameter in (*wrong, ([[1, 2, 3]], 10, "new_tokens")):
        with pytest.raises(BlockError) as caught:
            Continuations(ending, prompts, n)
        assert caught.value.parameter == parameter
    attention = ending.layers[0].attention
    with pytest.raises(BlockError):
        ending.new_caches(1, 4, bits=5)
    attention.new_cache = lambda batch, length, dtype, device: None  # type: ignore[operator, union-attr, assignment]
    with pytest.raises(BlockError, match="exact caches only"):
        ending.new_caches(1, 4, bits=8)
