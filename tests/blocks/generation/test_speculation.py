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
from blockwright.blocks.cache.fixed import State
from blockwright.blocks.compose import compose
from blockwright.blocks.decoder import Decoder
from blockwright.blocks.generation.batch import Batch
from blockwright.blocks.generation.drafts import (
    Checked,
    Drafter,
    Lookup,
    MultiToken,
    MultiTokenDrafts,
    SmallerModel,
    continuation,
    draw_drafts,
)
from blockwright.blocks.generation.generate import Continuations
from blockwright.blocks.generation.job import Job
from blockwright.blocks.generation.sample import Acceptance, Draws, NotFiniteError, Sampling, draw_each
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
SAMPLINGS = [Sampling(0.0), Sampling(1.0, top_p=0.95), Sampling(0.8, top_k=4, repetition_penalty=1.3)]
SAMPLINGS += [Sampling(1.3, min_p=0.05)]
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


def alone(decoder: Decoder, job: Job, bits: int | None = None) -> list[int]:
    given: dict[str, Any] = {"seed": job.seed, "stop_tokens": job.stop_tokens, "bits": bits}
    return by_row(Continuations(decoder, [job.prompt], job.new_tokens, job.sampling, **given), 1)[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kind", "sampling", "n", "bits"), pairs(list(MODELS), list(KINDS), SAMPLINGS, [1, 3], [None, 6])
)
def test_drafts_change_no_token_under_any_sampling(
    name: str, kind: str, sampling: Sampling, n: int, bits: int | None
) -> None:
    decoder, stops = model(name), frozenset({0} if n > 1 else ())
    jobs = [Job(prompt, 16, sampling, 5 + i, stops) for i, prompt in enumerate(prompts(n))]
    given: dict[str, Any] = {"seed": 5, "stop_tokens": stops, "bits": bits, "drafts": KINDS[kind](decoder)}
    drafted = Speculation(decoder, prompts(n), 16, sampling, **given)
    assert by_row(drafted, n) == [alone(decoder, job, bits) for job in jobs]


def test_texts_may_be_shorter_than_the_depths_and_end_at_the_last_position() -> None:
    decoder = model("learned", depth=3)
    for prompt, new in (([3], 63), ([3, 1], 5)):
        drafted = by_row(Speculation(decoder, [prompt], new, seed=1, drafts=MultiToken(decoder)), 1)[0]
        assert drafted == alone(decoder, Job(prompt, new, seed=1))


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


@pytest.mark.slow
@torch.no_grad()
def test_drafts_are_right_as_often_as_coupling_promises(monkeypatch: pytest.MonkeyPatch) -> None:
    """At least (1 − TV) / (1 + TV) at temperature 1, and at most 1 − TV: Daliri et al. 2024, arXiv 2408.07978."""
    decoder, propose = model("gqa"), MultiTokenDrafts.propose
    drawn_from, drafts, apart, right, by_chance = list[Tensor](), list[tuple[int, int, Tensor]](), list[float](), 0, 0.0

    def noted_draw(draws: Any, logits: Tensor) -> list[int]:
        drawn_from.append(logits[0].softmax(-1))
        return draw_drafts(draws, logits)

    def noted_propose(self: Any, checked: Checked, draws: Any, most: int) -> list[list[int]]:
        (proposed,) = propose(self, checked, draws, most)
        drafts.extend((len(checked.texts[0]), token, drawn_from[-1]) for token in proposed)
        return [proposed]

    monkeypatch.setattr("blockwright.blocks.generation.drafts.draw_drafts", noted_draw)
    monkeypatch.setattr(MultiTokenDrafts, "propose", noted_propose)
    for seed in range(24):
        drafts.clear()
        rows = Speculation(decoder, [[1, 2]], 58, Sampling(1.0), seed=seed, drafts=MultiToken(decoder, 1))
        text = [1, 2, *by_row(rows, 1)[0]]
        assert rows.acceptance.drafted == len(drafts)
        assert rows.acceptance.accepted == sum(text[at] == token for at, token, _ in drafts)
        probabilities = decoder(torch.tensor([text]))[0].softmax(-1)
        for at, token, q in drafts:
            p = probabilities[at - 1]
            apart.append(float((p - q).abs().sum() / 2))
            right += text[at] == token
            by_chance += float(p @ q.to(p))
    n = len(apart)
    least, most = (sum(bound(t) for t in apart) / n for bound in (lambda t: (1 - t) / (1 + t), lambda t: 1 - t))
    error = 2.5 * math.sqrt(0.25 / n)
    assert by_chance / n < least - 3 * error  # so draws that are not coupled would be seen
    assert least - error <= right / n <= most + error


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
        assert job.tokens == ([] if job in failed else alone(model("hybrid"), job))
        assert (job.ended == "failed") == (job in failed)


OF_NO_TEXT = [("csa", None, "mtp"), ("hybrid", None, "smaller model")]
SLOW = [pytest.param(*row, marks=pytest.mark.slow) for row in each(list(MODELS), [None, 8, 6, 4], list(KINDS))]


@pytest.mark.parametrize(("name", "bits", "kind"), [*OF_NO_TEXT, *SLOW])
def test_jobs_that_come_and_go_notice_neither_drafts_nor_a_token_that_no_text_has_read(
    name: str, bits: int | None, kind: str
) -> None:
    """Whose numbers are not finite, in the model and in the one that drafts for it."""
    decoder, drafting = copy.deepcopy(model(name)), copy.deepcopy(small(torch.float64))
    with torch.no_grad():
        decoder.embedding.weight[0] = drafting.embedding.weight[0] = math.nan
    drafter = SmallerModel(drafting, 3) if kind == "smaller model" else KINDS[kind](decoder)
    batch, draws = Batch(decoder, 3, 40, bits=bits, chunk=4, drafts=drafter), random.Random(name + kind)
    texts = [[draws.randrange(1, V) for _ in range(draws.choice([1, 3, 7, 12]))] for _ in range(7)]
    jobs = [Job(t, draws.choice([2, 6, 20]), SAMPLINGS[i % 4], i, frozenset({0})) for i, t in enumerate(texts)]
    waiting, memory = list(jobs), batch.nbytes
    while waiting or batch.busy:
        if waiting and draws.random() < 0.6:
            batch.add(waiting.pop(0))
        assert all(token is None or token in job.tokens for job, token in batch.step())
        if draws.random() < 0.05 and batch.running:
            batch.cancel(batch.running[0])
    assert batch.nbytes == memory
    for job in jobs:
        right = alone(model(name), job, bits)
        assert job.ended != "failed"
        assert job.tokens == (right[: len(job.tokens)] if job.ended == "cancelled" else right)


def test_the_text_of_a_model_that_has_diverged_ends_with_an_error() -> None:
    decoder = copy.deepcopy(model("gqa"))
    with torch.no_grad():
        decoder.embedding.weight[3] = math.inf
    for rows in (Speculation(decoder, [[1], [3]], 5, drafts=MultiToken(decoder)), Continuations(decoder, [[3]], 5)):
        with pytest.raises(NotFiniteError):
            next(rows)


# --- kinds ------------------------------------------------------------------------------------------------------------


def test_look_up_continues_as_the_longest_repetition_did() -> None:
    rows: list[tuple[list[int], int, list[int]]] = [
        ([1, 2, 3, 4, 1, 2, 3], 2, [4, 1]),
        ([1, 2, 3, 4, 9, 2, 3, 5, 1, 2, 3], 2, [4, 9]),  # the longest occurrence, not the latest
        ([9, 3, 4, 8, 3, 5, 0, 3], 1, [5]),  # the latest of equal length
        ([1, 2, 3], 4, []),
        ([7, 7, 7], 4, [7]),
        ([1], 4, []),
    ]
    assert not [row for row in rows if continuation(row[0], 3, 1, row[1]) != row[2]]
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
    right = alone(decoder, Job([2, 3], 10, seed=1))
    rows, found = Speculation(decoder, [[1], [2, 3]], 10, drafts=Lookup(3, shortest=1)), []
    for i, tokens in enumerate(rows):
        found.append(tokens[1])
        if i == 2:
            rows.end(0)
    assert found == right and rows.ended[0]
