"""What attentions remember: room, rings, padding, codes; rows that join, move and leave; tokens that are forgotten."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pairwise import each
from torch import Tensor

from blockwright.blocks.cache import layer
from blockwright.blocks.cache.base import Cache
from blockwright.blocks.cache.fixed import Ring, State
from blockwright.blocks.compose import compose
from blockwright.blocks.generation.job import joinable_caches_of_depths
from blockwright.registry import BlockError
from tests.blocks.small import Make

CPU, ROOM, ROWS = torch.device("cpu"), 24, 4
WIDE = {"k": (3,), "v": (2, 2)}


def cache_of(*values: float, cls: type[Cache] = Cache, room: int = 5, rows: int = 1) -> Cache:
    made = cls(rows, room, {"k": (1,)}, torch.float32, CPU)
    for value in values:
        made.append(torch.full((rows, 1, 1), value))
    return made


def test_everything_stored_comes_back_in_order_in_bytes_that_stay() -> None:
    cache, other = (Cache(2, 5, WIDE, torch.bfloat16, CPU) for _ in range(2))
    k, v = torch.randn(2, 5, 3), torch.randn(2, 5, 2, 2)
    for start, end in ((0, 2), (2, 3), (3, 5)):
        assert cache.nbytes == 2 * 5 * (3 + 4) * 2
        got = cache.append(k[:, start:end], v[:, start:end])
        assert torch.equal(got[0], k[:, :end].bfloat16()) and torch.equal(got[1], v[:, :end].bfloat16())
        assert cache.length == end and cache.positions(CPU).tolist() == [list(range(end))]
    assert other.length == 0 and (other.buffers["k"] == 0).all()


def test_full_cache_refuses_and_stays_as_it_was() -> None:
    cache = cache_of(1.0, 1.0, room=3)
    with pytest.raises(BlockError, match="room for 3"):
        cache.append(torch.zeros(1, 2, 1))
    assert cache.length == 2 and cache.append(torch.full((1, 1, 1), 5.0))[0].flatten().tolist() == [1, 1, 5]


# --- rings and padding ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("room", [4, 1])
@pytest.mark.parametrize("chunks", [[1] * 12, [12], [3, 1, 1, 5, 2], [7, 5], [1, 11]], ids=str)
def test_ring_answers_what_each_new_token_may_see(chunks: list[int], room: int) -> None:
    ring, start = Ring(1, room, {"k": (1,)}, torch.float32, CPU), 0
    for n in chunks:
        got = ring.append(torch.arange(start, start + n, dtype=torch.float32)[None, :, None])
        start += n
        seen = list(range(max(0, start - n - room + 1), start))  # from what the first new token sees
        held = dict(zip(ring.indices(CPU).tolist(), got[0].flatten().tolist(), strict=True))
        assert held == {i: float(i) for i in seen} and ring.length == start
        if n > 1:  # in order of time
            assert got[0].flatten().tolist() == seen == ring.positions(CPU)[0].tolist()
    assert ring.nbytes == room * 4


def test_padding_is_hidden_from_tokens_seen_by_itself_and_no_position() -> None:
    cache, inf = Cache(2, 5, {"k": (1,)}, torch.float32, CPU), float("inf")
    assert cache.padding_bias(1) is None
    cache.padding = torch.tensor([0, 2])
    cache.append(torch.zeros(2, 4, 1))
    assert cache.positions(CPU).tolist() == [[0, 1, 2, 3], [0, 0, 0, 1]]
    bias = cache.padding_bias(3)
    assert bias is not None and bias.shape == (2, 1, 3, 4) and bias[0].abs().sum() == 0
    assert bias[1, 0].tolist() == [[0, 0, 0, 0], [-inf, -inf, 0, 0], [-inf, -inf, 0, 0]]
    ring = Ring(1, 3, {"k": (1,)}, torch.float32, CPU)
    ring.padding = torch.tensor([3])
    for i in range(5):
        ring.append(torch.full((1, 1, 1), float(i)))
    of_ring = ring.padding_bias(1)
    assert of_ring is not None
    assert dict(zip(ring.indices(CPU).tolist(), of_ring.flatten().tolist(), strict=True)) == {2: -inf, 3: 0, 4: 0}


# --- codes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "codes"), [(8, 160), (6, 120), (4, 80)])
def test_quantised_bytes_are_codes_and_scales(bits: int, codes: int) -> None:
    """A token has a slot of 128 + 32 numbers, and 3 scales of 2 bytes."""
    for device in ("cpu", "meta"):
        parts = {"latent": (128, 32)}
        cache = Cache(2, 5, {"latent": (160,)}, torch.float32, torch.device(device), bits=bits, parts=parts)
        assert cache.nbytes == 2 * 5 * (codes + 6) == sum(b.nbytes for b in cache.buffers.values())


@pytest.mark.parametrize(("make", "bits"), [(Cache, 8), (Ring, 6), (Cache, 4), (Ring, 4)])
def test_quantised_answers_are_the_same_however_tokens_come(make: type[Cache], bits: int) -> None:
    x, answers = torch.randn(2, 11, 2, 9, generator=torch.Generator().manual_seed(0)), []
    for chunks in ([11], [4, 7], [10, 1]):
        cache = make(2, 11, {"k": (2, 9)}, torch.float32, CPU, bits=bits)
        got = [cache.append(part)[0] for part in x.split(chunks, 1)][-1]
        answers.append(got[:, cache.indices(CPU).argsort()])
    assert torch.equal(answers[0], answers[1]) and torch.equal(answers[0], answers[2])
    assert 0 < (answers[0] - x).abs().max() < 4 / 2 ** (bits - 1)


def test_only_what_is_read_is_dequantised_and_rounded_up_in_length_where_there_is_room() -> None:
    (got,) = Cache(1, 1000, {"k": (4,)}, torch.float32, CPU, bits=8).append(torch.ones(1, 3, 4))
    assert got.shape == (1, 3, 4) and got.untyped_storage().nbytes() == 3 * 4 * 4
    for bits in (None, 8):
        cache = Cache(1, 10, {"k": (1,)}, torch.float32, CPU, bits=bits)
        assert cache.append(torch.ones(1, 3, 1), multiple=4)[0].round().flatten().tolist() == [1, 1, 1, 0]
        assert cache.append(torch.ones(1, 6, 1), multiple=4)[0].shape == (1, 10, 1) and cache.length == 9
    for wrong in (0, 5, 16):
        with pytest.raises(BlockError, match="8, 6 or 4"):
            Cache(1, 1, {"k": (1,)}, torch.float32, CPU, bits=wrong)


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("attention", "bits"), each(["gqa", "mla", "sliding_window", "gated_delta"], [None, 6]))
def test_caches_of_the_whole_memory_are_made_and_those_of_a_byte_more_are_refused(
    tiny: Make, monkeypatch: pytest.MonkeyPatch, attention: str, bits: int | None
) -> None:
    decoder = compose(tiny(attention=attention))
    needed = sum(cache.nbytes for cache in decoder.new_caches(3, 37, bits))
    monkeypatch.setattr(layer, "device_memory", lambda device: needed)
    assert sum(cache.nbytes for cache in decoder.new_caches(3, 37, bits)) == needed
    monkeypatch.setattr(layer, "device_memory", lambda device: needed - 1)
    with pytest.raises(BlockError, match="memory of cpu") as refused:
        decoder.new_caches(3, 37, bits)
    assert refused.value.parameter == "caches"


def test_sizes_that_no_number_of_64_bits_holds_are_refused(tiny: Make) -> None:
    decoder = compose(tiny(mtp={"depth": 1}))
    for rows, length in ((1, 2**70), (2**70, 1), (2**20, 2**20)):
        with pytest.raises(BlockError, match="memory of cpu"):
            decoder.new_caches(rows, length)
        with pytest.raises(BlockError, match="memory of cpu"):
            joinable_caches_of_depths(decoder, 1, rows, length, None)


# --- rows -------------------------------------------------------------------------------------------------------------

WINDOWS = {"full": ROOM, "ring": 5, "ring of one": 1}


def made(kind: str, bits: int | None, rows: int) -> Cache:
    cls = Cache if kind == "full" else Ring
    return cls(rows, WINDOWS[kind], {"k": (2, 3), "v": (4,)}, torch.float32, CPU, bits=bits)


def filled(kind: str, n: int, rows: int = 2) -> Cache:
    cache = made(kind, None, rows)
    cache.append(*values(rows, n))
    return cache


def state(rows: int) -> State:
    return State(rows, ROOM, {"sum": ((3,), torch.float32), "tail": ((2,), torch.bfloat16)}, CPU)


def values(*shape: int) -> tuple[Tensor, Tensor]:
    return torch.randn(*shape, 2, 3), torch.randn(*shape, 4)


def left(cache: Cache, row: int, own: int) -> list[Tensor]:
    """What a row holds of its last tokens, oldest first, in the codes that it has."""
    slots = torch.arange(cache.length - min(own, cache.room), cache.length) % cache.room
    return [held[row, slots] for held in cache.buffers.values()]


def same(found: list[Tensor], wanted: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize(("bits", "kind"), each([None, 8, 6, 4], list(WINDOWS)))
def test_any_schedule_leaves_each_row_the_codes_that_it_has_alone(kind: str, bits: int | None) -> None:
    draw, batch, solo = random.Random(kind + str(bits)), made(kind, bits, ROWS), list[Cache]()
    torch.manual_seed(0)
    before = batch.nbytes
    batch.use(0)

    def leave(row: int) -> None:
        batch.move(len(solo) - 1, row)
        solo[row] = solo[-1]
        solo.pop()
        batch.use(len(solo))

    for _ in range(60):
        if draw.random() < 0.3 and len(solo) < ROWS:
            own = made(kind, bits, 1)
            own.append(*values(1, n := draw.randint(1, 9)))
            if not solo:
                batch.length = n
            elif n > batch.length:
                batch.shift(n - batch.length)
            solo.append(own)
            batch.use(len(solo))
            batch.put(len(solo) - 1, own)
        elif solo and draw.random() < 0.25:
            leave(draw.randrange(len(solo)))
        for i in reversed([i for i, own in enumerate(solo) if own.length == ROOM]):
            leave(i)
        if solo and (batch.length == ROOM or draw.random() < 0.2):
            batch.shift(max(own.length for own in solo) - batch.length)  # the padding that all have
        if solo:
            new = values(len(solo), 1)
            batch.append(*new)
            for row, own in enumerate(solo):
                own.append(*(t[row : row + 1] for t in new))
        for row, own in enumerate(solo):
            assert same(left(batch, row, own.length), left(own, 0, own.length))
        assert batch.nbytes == before and all(len(held) == len(solo) for held in batch.buffers.values())


def test_a_row_joins_from_any_row_of_a_padded_cache_and_holds_its_own_tokens_only() -> None:
    source, batch = (Cache(2, 9, {"k": (1,)}, torch.float32, CPU) for _ in range(2))
    source.padding = torch.tensor([0, 3])
    source.append(torch.arange(10.0).view(2, 5, 1))
    batch.append(torch.full((2, 7, 1), -1.0))
    batch.put(0, source, source=1)
    assert batch.buffers["k"][:, :, 0].tolist() == [[0] * 5 + [8, 9, 0, 0], [-1] * 7 + [0, 0]]


def test_rows_not_in_use_are_not_touched_and_keep_their_memory() -> None:
    batch = cache_of(1.0, 1.0, room=4, rows=3)
    before = batch.nbytes
    batch.use(1)
    assert batch.append(torch.full((1, 1, 1), 7.0))[0].shape == (1, 3, 1) and batch.nbytes == before
    batch.use(3)
    assert batch.buffers["k"][:, 2, 0].tolist() == [7, 0, 0]


def test_a_state_joins_moves_and_keeps_no_positions() -> None:
    batch, own = state(3), state(1)
    own.advance(4, {"sum": torch.full((1, 3), 2.0), "tail": torch.ones(1, 2)})
    batch.length = 4
    batch.put(1, own)
    batch.move(1, 2)
    batch.shift(100)
    assert batch.held["sum"][:, 0].tolist() == [0, 2, 2] and batch.length == 104
    batch.use(2)
    assert batch.held["tail"].shape == (2, 2) and batch.nbytes == 3 * (3 * 4 + 2 * 2)


@pytest.mark.parametrize(
    ("wrong", "remedy"),
    [
        (lambda full, ring: full.put(0, ring), "new_cache"),
        (lambda full, ring: full.shift(ROOM), "longer"),
        (lambda full, ring: full.shift(-4), "less"),
        (lambda full, ring: full.put(0, filled("full", 4)), "Shift them by 1"),
        (lambda full, ring: full.rewind(full.mark(), 1), "ahead"),
        (lambda full, ring: ring.rewind(ring.mark(), 1), "ahead"),
    ],
)
def test_what_would_corrupt_rows_is_refused_with_a_remedy(wrong: Callable[[Cache, Cache], Any], remedy: str) -> None:
    full, ring = filled("full", 3), filled("ring", 3)
    with pytest.raises(BlockError) as refusal:
        wrong(full, ring)
    assert remedy in refusal.value.remedy and full.length == ring.length == 3


# --- tokens that are forgotten ----------------------------------------------------------------------------------------

KINDS = [(kind, bits) for kind in WINDOWS for bits in (None, 8, 6, 4)]


@pytest.mark.parametrize(
    ("kind", "before", "ahead"), each(KINDS, [0, 2, 11, 11, 2, 0, 2, 11, 0], [4, 1, 2, 4, 2]), ids=str
)
def test_first_tokens_since_a_mark_are_kept_by_row(kind: tuple[str, int | None], before: int, ahead: int) -> None:
    torch.manual_seed(before)
    past, new, draw = values(3, before), values(3, ahead), random.Random(before)
    for keep in ([0] * 3, [ahead] * 3, [draw.randint(0, ahead) for _ in range(3)], [0, ahead, ahead // 2]):
        for chunk in (1, ahead):  # checked one by one, or at once
            cache = made(*kind, 3)
            if before:
                cache.append(*past)
            mark = cache.mark(ahead)
            for at in range(0, ahead, chunk):
                cache.append(*(t[:, at : at + chunk] for t in new))
            cache.rewind(mark, torch.tensor(keep))
            assert cache.length == before + max(keep)
            for row, n in enumerate(keep):
                alone = made(*kind, 1)
                if before + n:
                    alone.append(*(torch.cat((p, t[:, :n]), 1)[row : row + 1] for p, t in zip(past, new, strict=True)))
                assert same(left(cache, row, before + n), left(alone, 0, before + n))


@pytest.mark.parametrize("kind", WINDOWS)
def test_a_mark_stays_valid(kind: str) -> None:
    cache = filled(kind, 7, rows=1)
    before, mark = left(cache, 0, 7), cache.mark(3)
    cache.append(*values(1, 3))
    cache.rewind(mark, 2)
    cache.append(*values(1, 1))  # other than before
    cache.rewind(mark, 1)
    cache.append(*values(1, 2))
    cache.rewind(mark)
    assert cache.length == 7 and same(left(cache, 0, 7), before)


def test_a_ring_copies_only_what_tokens_ahead_replace_and_takes_nothing_else_for_what_was_noted() -> None:
    ring = filled("ring", 7)
    assert [held.shape[1] for n in (2, 9) for held in ring.mark(n).held.values()] == [2, 2, 5, 5]
    mark = ring.mark(2)
    ring.append(*values(2, 2))
    ring.rewind(mark, 0)
    ring.append(*values(2, 2))
    with pytest.raises(BlockError, match="0 of the 2"):
        ring.rewind(mark, 1)


def test_a_state_returns_to_what_it_was_after_each_token_by_row() -> None:
    for keep in (0, 1, 2, torch.tensor([0, 2, 1])):
        memory, wanted = state(3), torch.as_tensor(keep).expand(3)
        memory.advance(5, {"sum": torch.full((3, 3), 10.0), "tail": torch.zeros(3, 2)})
        mark = memory.mark(2)
        for token in (1.0, 2.0):
            memory.advance(1, {"sum": 10 + torch.full((3, 3), token), "tail": torch.full((3, 2), token)})
        memory.rewind(mark, keep)
        assert memory.held["sum"][:, 0].tolist() == (10 + wanted).tolist()
        assert memory.held["tail"][:, 1].tolist() == wanted.tolist()
        assert memory.length == 5 + int(wanted.max()) and memory.after is None
