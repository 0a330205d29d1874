"""Generation: the cached loop gives what recomputing everything gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pairwise import each
from torch import Tensor

from blockwright.blocks.compose import compose
from blockwright.blocks.decoder import Decoder
from blockwright.blocks.generation import generate as generation
from blockwright.blocks.generation.generate import Continuations, generate
from blockwright.blocks.generation.sample import Sampling
from blockwright.registry import BlockError


@pytest.fixture
def make(tiny: Callable[..., Any], randomise: Callable[..., None]) -> Callable[..., Decoder]:
    def build(**changes: Any) -> Decoder:
        decoder = compose(tiny(**changes)).eval()
        randomise(decoder)
        return decoder

    return build


def prompt(batch: int = 3, length: int = 5) -> Tensor:
    return torch.randint(0, 61, (batch, length), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def greedy(decoder: Decoder, tokens: Tensor, new: int) -> Tensor:
    for _ in range(new):
        tokens = torch.cat((tokens, decoder(tokens)[:, -1:].argmax(-1)), 1)
    return tokens


# One of each kind of cache: that of every attention is checked against its one pass by the conformance kit.
CACHED = ["gqa", "mla", "gated_delta", "shared_kv", "depth", {"name": "sliding_window", "window": 3}]


@pytest.mark.parametrize(("attention", "position"), each(CACHED, ["rope", "alibi", "learned", "yarn"]), ids=str)
def test_greedy_decoding_equals_recomputing_everything(
    make: Callable[..., Decoder], attention: Any, position: str
) -> None:
    decoder = make(attention=attention, position=position).double()
    assert torch.equal(generate(decoder, prompt(), 12, temperature=0), greedy(decoder, prompt(), 12))


def test_numbers_of_padding_reach_no_row(make: Callable[..., Decoder]) -> None:
    decoder, prompts = make(tie_embeddings=False).double(), [[3, 9, 8, 7], [5]]
    right = list(Continuations(decoder, prompts, 6, Sampling(0.0), stop_tokens={0}))
    with torch.no_grad():
        decoder.embedding.weight[0] = float("nan")  # of a token that is in no text
    assert list(Continuations(decoder, prompts, 6, Sampling(0.0), stop_tokens={0})) == right


def test_greedy_decoding_works_with_experts(make: Callable[..., Decoder]) -> None:
    decoder = make(moe=True).double()
    assert torch.equal(generate(decoder, prompt(), 12, temperature=0), greedy(decoder, prompt(), 12))


def test_prompt_stays_and_rows_do_not_mix(make: Callable[..., Decoder]) -> None:
    decoder = make().double()
    out = generate(decoder, prompt(), 7, temperature=0)
    assert out.shape == (3, 12) and torch.equal(out[:, :5], prompt())
    for row in range(3):
        assert torch.equal(generate(decoder, prompt()[row : row + 1], 7, temperature=0)[0], out[row])


def test_nothing_new_is_the_prompt(make: Callable[..., Decoder]) -> None:
    assert torch.equal(generate(make(), prompt(), 0), prompt())


def test_seed_repeats_a_sample_and_another_seed_gives_another(make: Callable[..., Decoder]) -> None:
    decoder = make()
    one, again, other = (generate(decoder, prompt(), 20, seed=s) for s in (1, 1, 2))
    assert torch.equal(one, again) and not torch.equal(one, other)


def test_global_random_state_is_neither_read_nor_moved(make: Callable[..., Decoder]) -> None:
    decoder = make()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first = generate(decoder, prompt(), 5)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(4)
    assert torch.equal(generate(decoder, prompt(), 5), first)


def test_one_candidate_is_greedy(make: Callable[..., Decoder]) -> None:
    decoder = make().double()
    assert torch.equal(generate(decoder, prompt(), 12, top_k=1, seed=5), greedy(decoder, prompt(), 12))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_generation_works_in_other_precisions_and_leaves_no_gradient(
    make: Callable[..., Decoder], dtype: torch.dtype
) -> None:
    decoder = make(attention="mla", moe=True).to(dtype)
    out = generate(decoder, prompt(), 4)
    assert out.shape == (3, 9) and ((out >= 0) & (out < 61)).all()
    assert not out.requires_grad and all(p.grad is None for p in decoder.parameters())


# --- rows of unequal length -------------------------------------------------------------------------------------------

RAGGED = [[5, 9, 2, 30, 11, 7, 8, 40, 3], [17], [4, 4, 60, 1]]


def continued(decoder: Decoder, prompts: list[list[int]], n: int, **options: Any) -> list[list[int | None]]:
    """The tokens of each row."""
    return [list(row) for row in zip(*Continuations(decoder, prompts, n, **options), strict=True)]


@pytest.mark.parametrize(("position", "attention"), each(["learned", "yarn", "rope", "alibi"], CACHED), ids=str)
def test_rows_of_unequal_length_give_what_each_gives_alone(
    make: Callable[..., Decoder], attention: Any, position: str
) -> None:
    decoder = make(attention=attention, position=position, moe=True).double()
    greedily = Sampling(temperature=0)
    for prompt, got in zip(RAGGED, continued(decoder, RAGGED, 8, sampling=greedily), strict=True):
        assert got == greedy(decoder, torch.tensor([prompt]), 8)[0, len(prompt) :].tolist()


@pytest.mark.parametrize("scores", ["sinks", "softcap"])
def test_padding_is_seen_by_no_kind_of_scores(make: Callable[..., Decoder], scores: str) -> None:
    decoder = make(attention={"name": "gqa", "scores": scores}).double()
    for prompt, got in zip(RAGGED, continued(decoder, RAGGED, 8, sampling=Sampling(temperature=0)), strict=True):
        assert got == greedy(decoder, torch.tensor([prompt]), 8)[0, len(prompt) :].tolist()


@torch.no_grad()
def test_logits_of_a_padded_row_are_those_of_the_row_alone(make: Callable[..., Decoder]) -> None:
    decoder = make(attention="mla", moe=True)
    tokens = torch.randint(0, 61, (2, 12), generator=torch.Generator().manual_seed(1))
    caches = decoder.new_caches(2, 20, padding=torch.tensor([0, 7]))
    parts = [decoder(part, caches=caches) for part in tokens.split([9, 1, 2], 1)]
    alone = decoder(tokens[1:, 7:])
    torch.testing.assert_close(torch.cat(parts, 1)[1:, 7:], alone, rtol=0, atol=1e-5)


def test_long_prompts_in_chunks_give_what_they_give_whole(make: Callable[..., Decoder]) -> None:
    decoder = make(attention="mla", moe=True).double()
    whole = continued(decoder, RAGGED, 5, sampling=Sampling(temperature=0))
    for chunk in (1, 2, 4):
        assert continued(decoder, RAGGED, 5, sampling=Sampling(temperature=0), chunk=chunk) == whole


def test_long_prompts_are_read_in_small_chunks_where_masks_of_all_scores_are_made(
    make: Callable[..., Decoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generation, "SCORES", 2**14)
    rows = [[0] * 32, [1] * 32]
    chooses = make(attention={"name": "gqa", "selector": {"name": "dsa", "n_heads": 2, "top_k": 4}})
    sizes = [Continuations(model, rows, 1).chunk for model in (make(), chooses)]
    assert sizes == [generation.CHUNK, 2**14 // 64]
    assert Continuations(make(), [rows[0], rows[1][:-1]], 1).chunk == 2**14 // 64


def test_what_a_row_draws_does_not_depend_on_the_others(make: Callable[..., Decoder]) -> None:
    decoder = make(moe=True).double()
    together = continued(decoder, RAGGED, 10, seed=5)
    for row, prompt in enumerate(RAGGED):
        assert continued(decoder, [prompt], 10, seed=5 + row) == [together[row]]


# --- what ends a row --------------------------------------------------------------------------------------------------


def test_stop_token_ends_its_row_alone_and_is_not_handed_out(make: Callable[..., Decoder]) -> None:
    decoder = make().double()
    free = continued(decoder, RAGGED, 9, sampling=Sampling(temperature=0))
    stop = free[0][4]
    stopped = continued(decoder, RAGGED, 9, sampling=Sampling(temperature=0), stop_tokens={stop})
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


# --- quantised caches and refusals ------------------------------------------------------------------------------------


def test_quantised_caches_write_nearly_the_same(make: Callable[..., Decoder]) -> None:
    decoder = make(attention="mla").double()
    exact = continued(decoder, RAGGED, 6, sampling=Sampling(temperature=0))
    assert continued(decoder, RAGGED, 6, sampling=Sampling(temperature=0), bits=8) == exact


@pytest.mark.parametrize(
    ("prompts", "n", "parameter"), [([[1], []], 3, "prompt"), ([], 3, "prompt"), ([[1]], -1, "new_tokens")]
)
def test_what_cannot_be_continued_is_refused(
    make: Callable[..., Decoder], prompts: list[list[int]], n: int, parameter: str
) -> None:
    with pytest.raises(BlockError) as caught:
        Continuations(make(), prompts, n)
    assert caught.value.parameter == parameter


def test_positions_that_end_are_not_run_over(make: Callable[..., Decoder]) -> None:
    decoder = make(position="learned", max_positions=12)
    assert len(continued(decoder, [[1, 2, 3]], 9)[0]) == 9
    with pytest.raises(BlockError, match=r"positions for 12.*at most 9"):
        Continuations(decoder, [[1, 2, 3]], 10)
    assert Continuations(make(position="rope", max_positions=12), [[1, 2, 3]], 10).left == 10


def test_bits_are_refused_where_an_attention_knows_of_none(make: Callable[..., Decoder]) -> None:
    decoder = make()
    attention = decoder.layers[0].attention
    attention.new_cache = lambda batch, length, dtype, device: None  # type: ignore[operator, union-attr, assignment]
    with pytest.raises(BlockError, match="exact caches only"):
        decoder.new_caches(1, 4, bits=8)
    with pytest.raises(BlockError, match="8, 6 or 4"):
        make().new_caches(1, 4, bits=5)
