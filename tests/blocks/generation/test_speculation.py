"""Drafts change no token: neither the kind of drafts, nor how a row is sampled, nor the rows beside it."""

from __future__ import annotations

import copy
import functools
import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pairwise import each, pairs
from torch import Tensor

from blockwright import registry
from blockwright.blocks.cache.state import State
from blockwright.blocks.compose import compose
from blockwright.blocks.decoder import Decoder
from blockwright.blocks.generation.acceptance import Acceptance
from blockwright.blocks.generation.batch import Batch
from blockwright.blocks.generation.drafts.base import Checked, Drafter
from blockwright.blocks.generation.drafts.lookup import Lookup, continuation
from blockwright.blocks.generation.drafts.model import SmallerModel
from blockwright.blocks.generation.drafts.mtp import MultiToken
from blockwright.blocks.generation.draws import Draws, draw_each
from blockwright.blocks.generation.generate import Continuations
from blockwright.blocks.generation.job import Job
from blockwright.blocks.generation.sample import NotFiniteError, Sampling, narrow
from blockwright.blocks.generation.speculation import Speculation
from blockwright.registry import BlockError
from tests.blocks.generation.small_models import CSA, HYBRID, SMALL, WINDOW

V = 7  # few tokens, so that drafts are often right
BASE: dict[str, Any] = {**SMALL, "vocab_size": V, "mtp": {"depth": 2}}
MODELS: dict[str, dict[str, Any]] = {
    **{name: {"attention": {"name": name}} for name in registry.names("attention") if name != "none"},
    "mla, dsa": {"attention": {"name": "mla", "selector": {"name": "dsa", "n_heads": 2, "head_dim": 8, "top_k": 5}}},
    "gqa, block": {"attention": {"name": "gqa", "selector": {"name": "block", "block_size": 3, "top_k": 2}}},
    "window of 5": {"attention": WINDOW},
    "csa": {"attention": {"name": "shared_kv", "n_heads": 4, "window": 6, "compressor": CSA}},
    "learned": {"position": {"name": "learned"}},
    "longrope": {"position": {"name": "longrope", "original_positions": 22, "factor": 4.0}},
    "hybrid": HYBRID,
}
SAMPLINGS = [
    Sampling(0.0),
    Sampling(1.0, top_p=0.95),
    Sampling(0.8, top_k=4, repetition_penalty=1.3),
    Sampling(1.3, min_p=0.05),
]
KINDS: dict[str, Callable[[Decoder], Drafter]] = {
    "mtp": MultiToken,
    "mtp of depth 1": lambda decoder: MultiToken(decoder, 1),
    "lookup": lambda decoder: Lookup(3, longest=3, shortest=1),
    "smaller model": lambda decoder: SmallerModel(small(decoder.embedding.weight.dtype), 3),
}


@functools.cache
def model(name: str, dtype: torch.dtype = torch.float64, depth: int = 2) -> Decoder:
    return compose({**BASE, **MODELS[name], "mtp": {"depth": depth}}, seed=1).eval().to(dtype)


@functools.cache
def small(dtype: torch.dtype) -> Decoder:
    return compose({**BASE, "n_layers": 1, "attention": {"name": "gated_delta"}, "mtp": None}, seed=2).eval().to(dtype)


def prompts(n: int, seed: int = 0) -> list[list[int]]:
    draws = random.Random(seed)
    return [[draws.randrange(V) for _ in range(draws.choice([1, 3, 7, 12]))] for _ in range(n)]


def by_row(rows: Any, n: int) -> list[list[int]]:
    texts: list[list[int]] = [[] for _ in range(n)]
    for tokens in rows:
        for text, token in zip(texts, tokens, strict=True):
            text += [] if token is None else [token]
    return texts


def check(decoder: Decoder, kind: str, n: int, sampling: Sampling, new: int, bits: int | None = None) -> Acceptance:
    """Tokens of rows with drafts are those of each row alone without."""
    texts, stops = prompts(n), {0} if n > 1 else set()
    given: dict[str, Any] = {"stop_tokens": stops, "bits": bits}
    rows = [Continuations(decoder, [p], new, sampling, seed=5 + i, **given) for i, p in enumerate(texts)]
    alone = [by_row(row, 1)[0] for row in rows]
    drafted = Speculation(decoder, texts, new, sampling, seed=5, drafts=KINDS[kind](decoder), **given)
    assert by_row(drafted, n) == alone
    return drafted.acceptance


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kind", "sampling", "n", "bits"), pairs(list(MODELS), list(KINDS), SAMPLINGS, [1, 3], [None, 6])
)
def test_drafts_change_no_token_under_any_sampling(
    name: str, kind: str, sampling: Sampling, n: int, bits: int | None
) -> None:
    check(model(name), kind, n, sampling, 16, bits)


@pytest.mark.parametrize("depth", [3])
def test_texts_may_be_shorter_than_the_depths_and_end_at_the_last_position(depth: int) -> None:
    decoder = model("learned", depth=depth)
    for prompt, new in (([3], 63), ([3, 1], 5)):
        alone = by_row(Continuations(decoder, [prompt], new, seed=1), 1)
        assert by_row(Speculation(decoder, [prompt], new, seed=1, drafts=MultiToken(decoder)), 1) == alone


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_jobs_that_come_and_go_have_the_tokens_of_a_run_without_drafts(kind: str) -> None:
    decoder, draws = model("hybrid"), random.Random(3)
    batch = Batch(decoder, 3, 40, chunk=4, drafts=KINDS[kind](decoder))
    memory = batch.nbytes
    jobs = [Job(p, draws.choice([1, 5, 20]), draws.choice(SAMPLINGS), 9 + i) for i, p in enumerate(prompts(12))]
    waiting = list(jobs)
    while waiting or batch.busy:
        if waiting and draws.random() < 0.5:
            batch.add(waiting.pop(0))
        news = batch.step()
        assert all(token is None or token in job.tokens for job, token in news)
        if draws.random() < 0.05 and batch.running:
            batch.cancel(batch.running[0])
    assert batch.nbytes == memory and batch.acceptance.accepted > 0
    for job in jobs:
        alone = by_row(Continuations(decoder, [job.prompt], job.new_tokens, job.sampling, seed=job.seed), 1)[0]
        assert job.tokens == (alone[: len(job.tokens)] if job.ended == "cancelled" else alone)


@pytest.mark.parametrize("kind", ["mtp", "smaller model"])
def test_reading_a_prompt_notes_the_states_of_no_more_tokens_than_are_checked(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder, noted = model("gated_delta"), list[int]()
    drafter = KINDS[kind](decoder)
    batch, mark = Batch(decoder, 2, 60, drafts=drafter), State.mark
    monkeypatch.setattr(State, "mark", lambda cache, ahead=None: noted.append(ahead) or mark(cache, ahead))
    job = batch.add(Job([3] * 50, 5))
    while batch.busy:
        batch.step()
    assert len(job.tokens) == 5 and 1 in noted and max(noted) <= 1 + 2 * drafter.tokens


@pytest.mark.parametrize("name", ["gqa", "longrope"])  # whose rotations depend on the room, not on what drafts add
def test_a_model_that_drafts_for_itself_is_always_right(name: str) -> None:
    decoder = model(name)
    rows = Speculation(decoder, [[3, 1]], 21, Sampling(1.0), drafts=SmallerModel(decoder, 4))
    by_row(rows, 1)
    assert rows.acceptance == Acceptance(passes=4, drafted=16, accepted=16)
    assert rows.acceptance.share == 1.0 and rows.acceptance.tokens_a_pass == 5.0


@torch.no_grad()
@pytest.mark.parametrize("name", ["gqa", "gated_delta"])
def test_depths_draft_what_they_predict_in_one_pass_over_the_text(name: str) -> None:
    decoder = model(name, depth=3)
    for seed in range(4):
        text = prompts(1, seed)[0] + [3, 1, 5, 2]
        known, n = [*text, 5], len(text)
        drafts_of = MultiToken(decoder).new(decoder, 1, 40, None)
        drafts_of.align([0], torch.device("cpu"))
        hidden, _ = decoder.hidden(torch.tensor([text]))
        greedy = Draws.of(Sampling(0.0), 0, (), V, torch.device("cpu"))
        with torch.inference_mode():
            drafts_of.read(hidden[:, :4], torch.tensor([known[1:5]]))
            checked = Checked(hidden[:, 4:], torch.tensor([known[5:]]), [n - 4], [known])
            (drafts,) = drafts_of.propose(checked, [greedy], 3) if n > 4 else ([],)
        for k, draft in enumerate(drafts):
            whole = torch.tensor([[*known, *drafts[:k]]])
            states = [states for states, _ in decoder.mtp_states(decoder.hidden(whole)[0], whole)]
            assert draft == int(decoder.logits(states[k][:, n - 1]).argmax())


# --- draws ------------------------------------------------------------------------------------------------------------


def test_a_copy_draws_the_same_and_leaves_the_draws_as_they_are() -> None:
    own = Draws.of(Sampling(1.0, repetition_penalty=1.5), 4, [1, 2], V, torch.device("cpu"))
    logits = torch.randn(5, 1, V, generator=torch.Generator().manual_seed(0))
    copy = own.copy()
    guessed = [draw_each([copy], each)[0] for each in logits]
    assert [draw_each([own], each)[0] for each in logits] == guessed
    assert guessed != [draw_each([own], each)[0] for each in logits]


def second_tokens(decoder: Decoder, prompt: list[int], sampling: Sampling, seeds: int) -> tuple[Tensor, Tensor]:
    """How often each token was the second one, over seeds, and how often it should be."""
    counts = torch.zeros(V)
    for seed in range(seeds):
        rows = Speculation(decoder, [prompt], 2, sampling, seed=seed, drafts=KINDS["smaller model"](decoder))
        tokens = by_row(rows, 1)[0]
        counts[tokens[1]] += 1
    first = narrow(decoder(torch.tensor([prompt]))[:, -1].float(), sampling).softmax(-1)[0]
    each = torch.tensor([[*prompt, token] for token in range(V)])
    return counts, seeds * first @ narrow(decoder(each)[:, -1].float(), sampling).softmax(-1)


@torch.no_grad()
@pytest.mark.slow
def test_tokens_are_distributed_as_the_model_says() -> None:
    counts, expected = second_tokens(model("gqa"), [2, 5, 1], Sampling(1.2), 300)
    statistic = ((counts - expected).square() / expected).sum()
    assert statistic < 16.8  # the 99th percentile of chi-squared on 6 degrees of freedom; seeds are fixed


@pytest.mark.slow
@torch.no_grad()
def test_acceptance_is_at_least_that_of_coupled_distributions() -> None:
    """Of similar logits, over many draws: (1 − TV) / (1 + TV)."""
    draws = torch.Generator().manual_seed(0)
    for distance in (0.1, 0.5, 1.0):
        p = torch.randn(1, 20, generator=draws)
        q = p + distance * torch.randn(1, 20, generator=draws)
        t = 0.5 * (p.softmax(-1) - q.softmax(-1)).abs().sum().item()
        row = Draws.of(Sampling(1.0), 0, (), 20, torch.device("cpu"))
        right = 0
        for _ in range(3000):
            guess = draw_each([row.copy()], q)
            right += guess == draw_each([row], p)
        assert right / 3000 > (1 - t) / (1 + t) - 0.03
        assert right / 3000 < 1 - t + 0.03  # no coupling is better


# --- logits that are not finite ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "kind"), [("embedding.weight", "mtp"), ("mtp", "smaller model"), ("embedding.weight", "lookup")]
)
def test_drafts_from_numbers_that_are_not_finite_are_wrong_and_change_no_token(kind: str, part: str) -> None:
    """Either the row has diverged, which fails alone, or what drafts has, which costs drafts alone."""
    decoder, drafting = (copy.deepcopy(each) for each in (model("hybrid"), small(torch.float64)))
    texts = [[1, 2, 1, 2], [3, 1, 3, 1, 3]]
    with torch.no_grad():
        if part == "mtp":
            for weights in (*decoder.mtp.parameters(), *drafting.parameters()):
                weights.fill_(math.nan)
        else:
            decoder.embedding.weight[6] = drafting.embedding.weight[6] = math.nan
            texts[1][-1] = 6
    drafter = SmallerModel(drafting, 3) if kind == "smaller model" else KINDS[kind](decoder)
    batch = Batch(decoder, 2, 40, drafts=drafter)
    jobs = [batch.add(Job(text, 10, seed=i, stop_tokens={6})) for i, text in enumerate(texts)]
    later = batch.add(Job([2], 12, seed=2, stop_tokens={6}))
    while batch.busy:
        batch.step()
    failed = [jobs[1]] if part != "mtp" else []
    for job in (*jobs, later):
        alone = Continuations(model("hybrid"), [job.prompt], job.new_tokens, seed=job.seed, stop_tokens={6})
        assert job.tokens == ([] if job in failed else by_row(alone, 1)[0])
        assert (job.ended == "failed") == (job in failed)


def of_no_text(name: str, token: int = 0) -> tuple[Decoder, Decoder]:
    """A model, and one that drafts for it, whose numbers are not finite for a token."""
    decoders = copy.deepcopy(model(name)), copy.deepcopy(small(torch.float64))
    with torch.no_grad():
        for decoder in decoders:
            decoder.embedding.weight[token] = math.nan
    return decoders


def check_that_no_text_notices(name: str, kind: str, bits: int | None) -> None:
    """Rows come, go and change places beside others with drafts: of a token that none has read, nothing is seen."""
    decoder, drafting = of_no_text(name)
    drafter = SmallerModel(drafting, 3) if kind == "smaller model" else KINDS[kind](decoder)
    batch, draws = Batch(decoder, 3, 40, bits=bits, chunk=4, drafts=drafter), random.Random(name + kind)
    texts = [[draws.randrange(1, V) for _ in range(draws.choice([1, 3, 7, 12]))] for _ in range(7)]
    jobs = [Job(text, draws.choice([2, 6, 20]), SAMPLINGS[i % 4], i, {0}) for i, text in enumerate(texts)]
    waiting = list(jobs)
    while waiting or batch.busy:
        if waiting and draws.random() < 0.6:
            batch.add(waiting.pop(0))
        batch.step()
        if draws.random() < 0.05 and batch.running:
            batch.cancel(batch.running[0])
    for job in jobs:
        given: dict[str, Any] = {"seed": job.seed, "stop_tokens": {0}, "bits": bits}
        alone = by_row(Continuations(model(name), [job.prompt], job.new_tokens, job.sampling, **given), 1)[0]
        assert job.ended != "failed"
        assert job.tokens == (alone[: len(job.tokens)] if job.ended == "cancelled" else alone)


@pytest.mark.parametrize(("name", "kind"), [("csa", "mtp"), ("hybrid", "smaller model")])
def test_a_token_that_no_text_has_read_reaches_none(name: str, kind: str) -> None:
    check_that_no_text_notices(name, kind, None)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "bits", "kind"), each(list(MODELS), [None, 8, 6, 4], list(KINDS)))
def test_a_token_that_no_text_has_read_reaches_none_of_any_model(name: str, bits: int | None, kind: str) -> None:
    check_that_no_text_notices(name, kind, bits)


def test_the_text_of_a_model_that_has_diverged_ends_with_an_error() -> None:
    decoder = copy.deepcopy(model("gqa"))
    with torch.no_grad():
        decoder.embedding.weight[3] = math.inf
    for rows in (Speculation(decoder, [[1], [3]], 5, drafts=MultiToken(decoder)), Continuations(decoder, [[3]], 5)):
        with pytest.raises(NotFiniteError):
            next(rows)


# --- kinds ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "n", "right"),
    [
        ([1, 2, 3, 4, 1, 2, 3], 2, [4, 1]),
        ([1, 2, 3, 4, 9, 2, 3, 5, 1, 2, 3], 2, [4, 9]),  # the longest occurrence, not the latest
        ([9, 3, 4, 8, 3, 5, 0, 3], 1, [5]),  # the latest of equal length
        ([1, 2, 3], 4, []),
        ([7, 7, 7], 4, [7]),
        ([1], 4, []),
    ],
)
def test_look_up_continues_as_the_longest_repetition_did(text: list[int], n: int, right: list[int]) -> None:
    assert continuation(text, 3, 1, n) == right


def test_look_up_drafts_nothing_for_less_than_the_shortest_repetition() -> None:
    assert continuation([1, 2, 9, 2], 3, 2, 4) == [] and continuation([1, 2, 9, 1, 2], 3, 2, 4) == [9, 1, 2]


def test_drafts_that_do_not_suit_the_model_are_refused() -> None:
    decoder = model("gqa")
    other = compose({**BASE, "vocab_size": V + 1, "mtp": None}, seed=0).eval().double()
    short = compose({**BASE, "max_positions": 8, "position": {"name": "learned"}, "mtp": None}, seed=0).eval().double()
    for make, parameter in (
        (lambda: MultiToken(other), "drafts"),
        (lambda: MultiToken(decoder, 3), "draft_tokens"),
        (lambda: Lookup(0), "draft_tokens"),
        (lambda: Lookup(shortest=0), "shortest"),
        (lambda: SmallerModel(other, 0), "draft_tokens"),
        (lambda: Batch(decoder, 1, 20, drafts=SmallerModel(other)), "drafts"),
        (lambda: Batch(decoder, 1, 20, drafts=SmallerModel(short)), "drafts"),
    ):
        with pytest.raises(BlockError) as error:
            make()
        assert error.value.parameter == parameter and error.value.remedy


def test_a_row_can_be_ended_while_others_continue() -> None:
    decoder = model("gqa")
    alone = by_row(Continuations(decoder, [[2, 3]], 10, seed=1), 1)[0]
    rows, found = Speculation(decoder, [[1], [2, 3]], 10, drafts=Lookup(3, shortest=1)), []
    for i, tokens in enumerate(rows):
        found.append(tokens[1])
        if i == 2:
            rows.end(0)
    assert found == alone and rows.ended[0]
