"""A running batch: whatever comes and goes, each job's tokens are those of a run of its own."""

from __future__ import annotations

import copy
import functools
import gc
import math
import random
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pairwise import each
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from blockwright import registry
from blockwright.blocks.cache.base import Cache
from blockwright.blocks.compose import compose
from blockwright.blocks.decoder import Decoder
from blockwright.blocks.generation.batch import Batch
from blockwright.blocks.generation.generate import Continuations
from blockwright.blocks.generation.job import Job
from blockwright.blocks.generation.sample import Sampling, narrow
from blockwright.registry import BlockError
from tests.blocks.generation.small_models import CSA, HYBRID, SMALL, WINDOW

V, ROOM = 61, 40
BASE: dict[str, Any] = {**SMALL, "vocab_size": V}
GQA_OF_4 = {"name": "gqa", "n_heads": 4, "n_kv_heads": 2}
SELECTORS: dict[str, dict[str, Any]] = {
    "block": {"name": "block", "block_size": 3, "top_k": 2},
    "dsa": {"name": "dsa", "n_heads": 2, "head_dim": 8, "top_k": 5},
    "pooled": {"name": "pooled", "n_heads": 2, "head_dim": 8, "block_size": 3, "top_k": 2},
}
MOE = {"ffn": {"name": "moe", "n_experts": 6}, "experts": {"name": "swiglu", "d_ff": 16}}
POSITIONS = ("alibi", "learned", "sinusoidal", "log_temperature", "none", "yarn")
MODELS: dict[str, dict[str, Any]] = {
    **{name: {"attention": {"name": name}} for name in registry.names("attention") if name != "none"},
    **{f"mla, {name}": {"attention": {"name": "mla", "selector": node}} for name, node in SELECTORS.items()},
    **{f"gqa, {name}": {"attention": {**GQA_OF_4, "selector": node}} for name, node in SELECTORS.items()},
    **{name: {"position": {"name": name}} for name in POSITIONS},
    "longrope": {"position": {"name": "longrope", "original_positions": 16, "factor": 4.0}},
    **{name: {"attention": {**GQA_OF_4, "scores": name}} for name in registry.names("scores")},
    "window of 5": {"attention": WINDOW},
    "csa": {"attention": {"name": "shared_kv", "n_heads": 4, "window": 6, "compressor": CSA}},
    "hca": {"attention": {"name": "shared_kv", "n_heads": 4, "window": 6, "compressor": {"name": "hca", "every": 4}}},
    "value_residual": {"attention": {**GQA_OF_4, "values": "value_residual"}},
    "attention_residual": {"residual": "attention_residual"},
    "experts": {**MOE, "gating": {"name": "softmax_topk", "top_k": 2}},
    "sinkhorn": {**MOE, "gating": {"name": "sinkhorn"}},
    "hybrid": HYBRID,
    "convolved": {"residual": {"name": "convolved", "residual": "prenorm", "attention_conv": "canon"}},
    "engram": {"memory": {"name": "engram", "rows": 31, "n_heads": 2, "width": 12, "end": 0}},
}
SAMPLINGS = [
    Sampling(0.0),
    Sampling(1.0),
    Sampling(0.0, repetition_penalty=1.4),
    Sampling(0.8, top_p=0.9),
    Sampling(1.0, top_k=5, repetition_penalty=1.3),
    Sampling(1.3, min_p=0.05),
]


@functools.cache
def model(name: str, dtype: torch.dtype = torch.float64) -> Decoder:
    return compose({**BASE, **MODELS[name]}, seed=1).eval().to(dtype)


class Schedule(NamedTuple):
    """What each job is made of, the step before which it is added, and (step, job) pairs that are cancelled."""

    jobs: list[dict[str, Any]]
    arrivals: list[int]
    cancelled: list[tuple[int, int]]
    rows: int
    chunk: int | None
    bits: int | None


@st.composite
def schedules(draw: st.DrawFn, samplings: list[Sampling] = SAMPLINGS) -> Schedule:
    token, steps = st.integers(0, V - 1), st.integers(0, 12)
    job = st.fixed_dictionaries(
        {
            "prompt": st.lists(token, min_size=1, max_size=26),
            "new_tokens": st.integers(1, 14),
            "sampling": st.sampled_from(samplings),
            "seed": st.integers(0, 2**40),
            "stop_tokens": st.frozensets(token, max_size=4),
        }
    )
    made = draw(st.lists(job, min_size=2, max_size=8))
    return Schedule(
        made,
        sorted(draw(steps) for _ in made),
        draw(st.lists(st.tuples(steps, st.integers(0, len(made) - 1)), max_size=2)),
        draw(st.integers(1, 4)),
        draw(st.sampled_from([None, 1, 3, 16])),
        draw(st.sampled_from([None, None, 8, 6, 4])),
    )


def run(decoder: Decoder, schedule: Schedule) -> list[Job]:
    """The jobs, ended; what the batch promises of its rows is checked at every step."""
    batch = Batch(decoder, schedule.rows, ROOM, bits=schedule.bits, chunk=schedule.chunk)
    made = [Job(**job) for job in schedule.jobs]
    news: dict[Job, list[int | None]] = {job: [] for job in made}
    before, step = batch.nbytes, 0
    while step <= max(schedule.arrivals) or batch.busy:
        for job, arrival in zip(made, schedule.arrivals, strict=True):
            if arrival == step:
                batch.add(job)
        for at, index in schedule.cancelled:
            if at == step and schedule.arrivals[index] <= step:
                batch.cancel(made[index])
        for job, token in batch.step():
            news[job].append(token)
        assert batch.nbytes == before and len(batch.running) <= schedule.rows
        assert all(len(held) == len(batch.running) for c in batch._caches for held in c.buffers.values())
        assert all(job.ended is None for job in batch.running)
        step += 1
    joined = sum(bool(job.tokens) for job in made)
    assert batch.shifts <= 2 * joined  # one for each that joins, and one for each that leaves
    for job in made:
        assert news[job] == [*job.tokens, *[None] * (job.ended != "cancelled")]
    return made


def alone(decoder: Decoder, job: Job, bits: int | None = None) -> list[int]:
    given: dict[str, Any] = {"seed": job.seed, "stop_tokens": job.stop_tokens, "bits": bits}
    made = Continuations(decoder, [job.prompt], job.new_tokens, job.sampling, **given)
    return [token for (token,) in made if token is not None]


def check(name: str, schedule: Schedule) -> None:
    """The tokens of each job are those of a run of its own."""
    for job in run(model(name), schedule):
        right = alone(model(name), job, schedule.bits)
        if job.ended == "cancelled":
            assert job.tokens == right[: len(job.tokens)]
        else:
            assert job.tokens == right and job.ended == ("length" if len(right) == job.new_tokens else "end")


def finished(batch: Batch, *jobs: Job) -> Batch:
    for job in jobs:
        batch.add(job)
    while batch.busy:
        batch.step()
    return batch


@pytest.mark.slow
@given(st.sampled_from(list(MODELS)), schedules())
@settings(max_examples=40)
def test_tokens_are_those_of_each_job_alone(name: str, schedule: Schedule) -> None:
    check(name, schedule)


def test_a_job_is_rotated_for_what_it_needs_and_not_for_the_room_of_the_batch() -> None:
    decoder, prompts = model("longrope"), [[3, 7, 9], list(range(1, 15)), [5, 8], [6] * 18]
    together = list(Continuations(decoder, prompts, 8, Sampling(0.0)))
    made = [Job(prompt, 8, Sampling(0.0)) for prompt in prompts]  # of 10 and 21 tokens; 16 are short
    finished(Batch(decoder, 2, ROOM, chunk=5), *made)
    for i, job in enumerate(made):
        assert job.tokens == alone(decoder, job) == [step[i] for step in together]


OF_EACH_CLASS = ["mla", "window of 5", "gated_delta", "hca", "convolved"]


def test_these_models_have_every_class_of_caches() -> None:
    """Of this package, that a block's cache may have; those of training hold no row of a job."""
    made = [cache for name in OF_EACH_CLASS for cache in model(name).new_caches(1, ROOM)]
    parts = [part for cache in made for part in getattr(cache, "parts", {}).values()]
    classes = [Cache]
    for cls in classes:
        classes += [c for c in cls.__subclasses__() if c not in classes]
    own = {c for c in classes[1:] if c.__module__.startswith(("blockwright.blocks.", "blockwright.plugins."))}
    assert {type(cache) for cache in (*made, *parts)} >= own


@pytest.mark.parametrize(("name", "bits"), each(OF_EACH_CLASS, [None, 8, 6, 4]))
def test_nothing_of_a_row_reaches_the_job_that_has_it_next(name: str, bits: int | None) -> None:
    """Whatever its caches held is NaN: see conftest.py."""
    some = [{"prompt": [i] * n, "new_tokens": 6 - i, "seed": i} for i, n in enumerate((3, 7, 2, 5))]
    check(name, Schedule(some, [0, 0, 1, 4], [], 2, 4, bits))


@pytest.mark.slow
@pytest.mark.parametrize("name", OF_EACH_CLASS)
def test_tokens_of_models_of_all_kinds_are_those_of_each_job_alone(name: str) -> None:
    settings(max_examples=6)(given(schedules())(lambda schedule: check(name, schedule)))()


# --- lower precision: another token only where two are nearly tied ----------------------------------------------------

NEAR = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
WHOLE_VOCABULARY = [Sampling(0.0), Sampling(1.0), Sampling(0.0, repetition_penalty=1.4), Sampling(1.3)]


@torch.inference_mode()
def gap(decoder: Decoder, job: Job, right: list[int], bits: int | None) -> float:
    """By how much two tokens differ in what is compared to draw them, relative to the logits, at the first place where
    a job has another one than it has alone; 0 where it has none."""
    at = next((i for i, (a, b) in enumerate(zip(job.tokens, right, strict=False)) if a != b), None)
    if at is None:
        assert len(job.tokens) == len(right)
        return 0.0
    before = [*job.prompt, *right[:at]]
    caches = decoder.new_caches(1, len(job.prompt) + job.new_tokens - 1, bits)
    logits = decoder.logits(decoder.hidden(torch.tensor([before]), caches=caches)[0][:, -1]).float()
    scores = perturbed(logits, job, at, before)[0]
    return float((scores[job.tokens[at]] - scores[right[at]]).abs() / logits.abs().max().clamp(min=1))


def perturbed(logits: Tensor, job: Job, at: int, before: list[int]) -> Tensor:
    """[1,V]: what is largest at the token drawn: log p_i − log e_i with the exponentials of the job's generator."""
    penalty = job.sampling.repetition_penalty
    seen = torch.zeros_like(logits, dtype=torch.bool)
    seen[0, before] = True
    logits = torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
    if job.sampling.temperature == 0:
        return logits
    generator, waits = torch.Generator().manual_seed(job.seed), torch.empty_like(logits)
    for _ in range(at + 1):
        waits[0].exponential_(generator=generator)
    return narrow(logits, job.sampling) - waits.log()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", NEAR, ids=str)
def test_in_lower_precision_the_first_other_token_is_a_near_tie(dtype: torch.dtype) -> None:
    @given(st.sampled_from(list(MODELS)), schedules(WHOLE_VOCABULARY))
    @settings(max_examples=15)
    def test(name: str, schedule: Schedule) -> None:
        decoder = model(name, dtype)
        for job in run(decoder, schedule):
            right = alone(decoder, job, schedule.bits)
            right = right[: len(job.tokens)] if job.ended == "cancelled" else right
            assert gap(decoder, job, right, schedule.bits) < NEAR[dtype]

    test()


@pytest.mark.parametrize("sampling", WHOLE_VOCABULARY, ids=str)
def test_a_token_that_is_no_near_tie_is_seen(sampling: Sampling) -> None:
    decoder, job = model("mla", torch.float32), Job([3, 9], 6, sampling, seed=7)
    finished(Batch(decoder, 1, ROOM), job)
    right = list(job.tokens)
    for at in range(len(right)):
        before = [*job.prompt, *right[:at]]
        with torch.inference_mode():
            scores = perturbed(decoder(torch.tensor([before]))[:, -1], job, at, before)[0]
        assert scores.argmax() == right[at]
        job.tokens = [*right[:at], int(scores.argmin()), *right[at + 1 :]]
        assert gap(decoder, job, right, None) > 100 * NEAR[torch.float32]


# --- what it costs ----------------------------------------------------------------------------------------------------


class Written(TorchDispatchMode):
    """Counts the numbers that are written to some tensors."""

    def __init__(self, tensors: list[Tensor]) -> None:
        super().__init__()
        self.count, self.watched = 0, {t.untyped_storage()._cdata for t in tensors}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket._qualified_op_name in ("aten::copy_", "aten::index_put_"):
            values = args[1] if "copy" in func.__name__ else args[2]
            self.count += values.numel() * (args[0].untyped_storage()._cdata in self.watched)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["mla", "window of 5", "gated_delta", "hca"])
def test_joining_writes_the_tokens_of_one_row_and_leaving_at_most_one_row(name: str) -> None:
    decoder, n = model(name), 9
    batch = Batch(decoder, 3, ROOM)
    first, second = (batch.add(Job([1] * length, 15)) for length in (20, 12))
    batch.step()
    held = [t for cache in batch._caches for t in cache.buffers.values()]
    row = sum(t[0].numel() for t in held)
    written = Written(held)
    for cache in batch._caches:
        cache.put = counting(cache.put, written)  # type: ignore[method-assign]
        cache.move = counting(cache.move, written)  # type: ignore[method-assign]
    new = batch.add(Job([1] * n, 15))
    batch.step()
    assert batch.running == [first, second, new]
    tokens = {"mla": n, "window of 5": 5}
    if name in tokens:
        assert written.count == tokens[name] * sum(t[0, 0].numel() for t in held)
    assert 0 < written.count <= row
    written.count = 0
    batch.cancel(first)
    assert 0 < written.count <= row and batch.running == [new, second]
    written.count = 0
    batch.cancel(second)
    assert written.count == 0  # it was the last row


def counting(call: Callable[..., Any], written: Written) -> Callable[..., Any]:
    def counted(*args: Any) -> None:
        with written:
            call(*args)

    return counted


@pytest.mark.parametrize("n", [40, pytest.param(1000, marks=pytest.mark.slow)])
def test_nothing_is_left_of_many_jobs(n: int) -> None:
    batch, draw = Batch(model("hybrid", torch.float32), 8, ROOM), random.Random(0)
    before, places = batch.nbytes, {t.data_ptr() for c in batch._caches for t in c.buffers.values()}
    alive: list[weakref.ref[Job]] = []
    for _ in range(n):
        alive.append(weakref.ref(job := Job([draw.randrange(V) for _ in range(draw.randint(1, 12))], 2)))
        batch.add(job)
        if draw.random() < 0.3:
            batch.cancel(job if draw.random() < 0.5 else draw.choice([*batch.running, job]))
        if len(batch._waiting) > 8:
            batch.step()
    finished(batch)
    del job
    gc.collect()
    assert not any(ref() for ref in alive)
    assert batch.nbytes == before and places == {t.data_ptr() for c in batch._caches for t in c.buffers.values()}
    assert batch.running == [] and batch.shifts <= 2 * n


# --- single properties ------------------------------------------------------------------------------------------------


def test_a_long_prompt_is_read_in_chunks_between_the_tokens_of_others() -> None:
    batch = Batch(model("mla"), 2, ROOM, chunk=4)
    running = batch.add(Job([5, 3], 12))
    batch.step()
    late = batch.add(Job([7] * 14, 3))
    progress = []
    while not late.tokens:
        batch.step()
        progress.append(len(running.tokens))
    assert progress == [3, 4, 5, 6]  # 14 tokens in four chunks


def test_short_prompts_are_read_in_one_step_as_far_as_a_chunk_and_the_rows_go() -> None:
    batch = Batch(model("mla"), 3, ROOM, chunk=8)
    made = [batch.add(Job([4, 4, 4], 5)) for _ in range(5)]
    batch.step()
    assert [len(job.tokens) for job in made] == [2, 2, 0, 0, 0]
    batch.step()
    assert len(batch.running) == 3


def test_jobs_wait_in_order_and_end_with_news_of_why() -> None:
    batch, ended = Batch(model("mla"), 1, ROOM), []
    first = batch.add(Job([3], 4))
    second = batch.add(Job([9], 2, stop_tokens=frozenset(range(V))))
    third = batch.add(Job([9], 1))
    assert batch.busy
    while batch.busy:
        ended += [job for job, token in batch.step() if token is None]
    assert ended == [first, second, third]
    assert [job.ended for job in ended] == ["length", "end", "length"] and second.tokens == []


@pytest.mark.parametrize("name", ["mla", "gated_delta"])
def test_a_job_is_cancelled_wherever_it_is(name: str) -> None:
    batch = Batch(model(name), 2, ROOM, chunk=4)
    running, reading, waiting, other = (batch.add(Job([1] * n, 20)) for n in (2, 12, 3, 3))
    batch.step()
    assert batch.running == [running] and batch._reading is not None and not torch.is_inference_mode_enabled()
    for job in (waiting, reading, running, running):
        batch.cancel(job)
        assert job.ended == "cancelled"
    news = [pair for _ in range(30) for pair in batch.step()]
    assert {job for job, _ in news} == {other} and not batch.busy
    assert other.tokens == alone(model(name), other)
    batch.cancel(other)
    assert other.ended == "length" and all(p.grad is None for p in model(name).parameters())


def test_likelihoods_are_of_the_model_and_not_of_the_sampling() -> None:
    decoder = model("mla")
    narrowed = Sampling(0.5, top_k=3, repetition_penalty=1.5)
    job, other, none = Job([4, 8], 6, narrowed, logprobs=4), Job([4], 6, logprobs=0), Job([4], 6)
    finished(Batch(decoder, 3, ROOM), job, other, none)
    with torch.no_grad():
        logp = decoder(torch.tensor([[*job.prompt, *job.tokens]]))[0].log_softmax(-1)[1:-1]
    for token, noted, right in zip(job.tokens, job.likelihoods, logp, strict=True):
        best = right.topk(4)
        assert noted.drawn == pytest.approx(right[token].item(), abs=1e-5)
        assert [i for i, _ in noted.likeliest] == best.indices.tolist()
        assert [p for _, p in noted.likeliest] == pytest.approx(best.values.tolist(), abs=1e-5)
    assert len(other.likelihoods) == 6 and all(noted.likeliest == [] for noted in other.likelihoods)
    assert none.likelihoods == []
    stopped = Job([4], 6, stop_tokens=frozenset(range(V)), logprobs=1)
    finished(Batch(decoder, 1, ROOM), stopped)
    assert stopped.likelihoods == []  # one for each token of the answer


@pytest.mark.slow
def test_room_is_shared_by_jobs_that_follow_each_other_for_longer_than_it() -> None:
    batch = Batch(model("mla"), 2, ROOM)
    made = [Job([i], ROOM - i) for i in range(4)]
    finished(batch, *made)
    assert batch.steps > 1.5 * ROOM and 0 < batch.shifts <= 2 * len(made)
    assert all(job.tokens == alone(model("mla"), job) and job.ended == "length" for job in made)


# --- logits that are not finite ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "bits"), [("mla", None), ("window of 5", None), ("hybrid", 6)])
def test_a_job_whose_logits_are_not_finite_fails_and_no_other_notices(name: str, bits: int | None) -> None:
    """One fails while its prompt is read, one while it runs; others run beside them, and take their rows."""
    bad, decoder = (V - 1, V - 2), copy.deepcopy(model(name))
    prompts = [[3] * 20, [bad[0], 3], [4] * 9, *([i, *[7] * i] for i in range(3))]
    made = [Job(prompt, 8, seed=i, stop_tokens=frozenset(bad)) for i, prompt in enumerate(prompts)]
    made[2].stop_tokens = frozenset()
    right = [alone(decoder, job, bits) for job in made]
    with torch.no_grad():
        decoder.embedding.weight[list(bad)] = math.nan if bits is None else math.inf
    batch = Batch(decoder, 2, ROOM, bits=bits, chunk=16)
    for job in made:
        batch.add(job)
    news = [each for _ in range(4) for each in batch.step()]
    made[2].tokens[-1] = bad[1]  # as if it had been drawn
    news += [each for _ in range(40) for each in batch.step()]
    assert not batch.busy and made[1].ended == made[2].ended == "failed" and made[1].tokens == []
    assert [token for job, token in news if job is made[2]][-1] is None
    for job, tokens in zip(made, right, strict=True):
        assert job in made[1:3] or (job.ended in ("end", "length") and job.tokens == tokens)


def test_every_job_of_a_model_that_has_diverged_fails() -> None:
    decoder = copy.deepcopy(model("mla"))
    with torch.no_grad():
        decoder.output_weight[3] = math.nan
    made = [Job([i], 5, sampling) for i, sampling in enumerate(SAMPLINGS)]
    batch = finished(Batch(decoder, 2, ROOM), *made)
    assert [(job.ended, job.tokens) for job in made] == [("failed", [])] * len(made) and batch.steps == 0


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_a_job_that_can_never_run_is_refused_and_changes_nothing() -> None:
    batch = Batch(model("mla"), 2, ROOM)
    running = batch.add(Job([1], 5))
    batch.step()
    prompts, long = [Job([], 3), Job([1, V], 3)], [Job([1], 0), Job([1] * ROOM, 2), Job([1] * (ROOM + 1), 1)]
    wrong = {"prompt": prompts, "new_tokens": long, "logprobs": [Job([1], 3, logprobs=n) for n in (-1, V + 1)]}
    wrong |= {"seed": [Job([1], 3, seed=2**63)], "image": [Job([1], 3, media={"image": None})]}
    for named, jobs in wrong.items():
        for job in jobs:
            with pytest.raises(BlockError) as refusal:
                batch.add(job)
            assert refusal.value.parameter == named and refusal.value.remedy
    longest = Job([1] * ROOM, 1)
    finished(batch, longest)
    assert running.tokens == alone(model("mla"), running) and len(longest.tokens) == 1
    for rows, room, chunk in ((0, 4, 4), (1, 0, 4), (1, 4, 0)):
        with pytest.raises(BlockError):
            Batch(model("mla"), rows, room, chunk=chunk)


class Alien:
    """A cache of another library: no ``Cache``."""

    length, padding, room = 0, None, 8


def test_blocks_whose_rows_cannot_be_batched_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BlockError, match="ExpertChoice") as refusal:  # it chooses over the batch
        Batch(compose({**BASE, **MODELS["experts"], "gating": {"name": "expert_choice"}}), 2, ROOM)
    assert refusal.value.parameter == "layers.0.ffn.gating"
    decoder = compose(BASE)

    def none(*given: Any) -> None:
        raise NotImplementedError

    for new_cache, named in ((lambda *given: Alien(), "Alien"), (none, "no cache")):
        monkeypatch.setattr(type(decoder.layers[0].attention), "new_cache", new_cache)
        with pytest.raises(BlockError, match=named):
            Batch(decoder, 2, ROOM)
