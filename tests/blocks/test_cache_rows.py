"""Rows that join, move, shift and leave, and tokens that are forgotten: each row has what it has alone."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from pairwise import each
from torch import Tensor

from blockwright.blocks.cache.base import Cache
from blockwright.blocks.cache.ring import Ring
from blockwright.blocks.cache.state import State
from blockwright.registry import BlockError

CPU, ROOM, ROWS = torch.device("cpu"), 24, 4
WINDOWS = {"full": ROOM, "ring": 5, "ring of one": 1}
Make = Callable[[int], Cache]


def maker(kind: str, bits: int | None) -> Make:
    window, cls = WINDOWS[kind], Cache if kind == "full" else Ring
    return lambda rows: cls(rows, window, {"k": (2, 3), "v": (4,)}, torch.float32, CPU, bits=bits)


def state(rows: int) -> State:
    return State(rows, ROOM, {"sum": ((3,), torch.float32), "tail": ((2,), torch.bfloat16)}, CPU)


def values(*shape: int) -> tuple[Tensor, Tensor]:
    return torch.randn(*shape, 2, 3), torch.randn(*shape, 4)


def left(cache: Cache, row: int, own: int) -> list[Tensor]:
    """What a row holds of its last tokens, oldest first, in the codes that it has."""
    n = min(own, cache.room)
    slots = torch.arange(cache.length - n, cache.length) % cache.room
    return [held[row, slots] for held in cache.buffers.values()]


def assert_rows_equal(found: list[Tensor], wanted: list[Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


KINDS = [(kind, bits) for kind in WINDOWS for bits in (None, 8, 6, 4)]


@pytest.mark.parametrize(("bits", "kind"), each([None, 8, 6, 4], list(WINDOWS)))
def test_any_schedule_leaves_each_row_the_codes_that_it_has_alone(kind: str, bits: int | None) -> None:
    make, draw = maker(kind, bits), random.Random(kind + str(bits))
    torch.manual_seed(0)
    batch, solo = make(ROWS), list[Cache]()
    before = batch.nbytes
    batch.use(0)
    for _ in range(80):
        joins = draw.random() < 0.3 and len(solo) < ROWS
        if joins:
            own = make(1)
            own.append(*values(1, n := draw.randint(1, 9)))
            if not solo:
                batch.length = n
            elif n > batch.length:
                batch.shift(n - batch.length)
            solo.append(own)
            batch.use(len(solo))
            batch.put(len(solo) - 1, own)
        elif solo and draw.random() < 0.25:
            row = draw.randrange(len(solo))
            batch.move(len(solo) - 1, row)
            solo[row] = solo[-1]
            solo.pop()
            batch.use(len(solo))
        solo_ended = [i for i, own in enumerate(solo) if own.length == ROOM]
        for i in reversed(solo_ended):
            batch.move(len(solo) - 1, i)
            solo[i] = solo[-1]
            solo.pop()
            batch.use(len(solo))
        if solo and (batch.length == ROOM or draw.random() < 0.2):
            batch.shift(max(own.length for own in solo) - batch.length)  # the padding that all have
        if solo:
            new = values(len(solo), 1)
            batch.append(*new)
            for row, own in enumerate(solo):
                own.append(*(t[row : row + 1] for t in new))
        for row, own in enumerate(solo):
            assert_rows_equal(left(batch, row, own.length), left(own, 0, own.length))
        assert batch.nbytes == before
        assert all(len(held) == len(solo) for held in batch.buffers.values())


def test_a_row_joins_from_any_row_of_a_padded_cache_and_holds_its_own_tokens_only() -> None:
    source, batch = (Cache(2, 9, {"k": (1,)}, torch.float32, CPU) for _ in range(2))
    source.padding = torch.tensor([0, 3])
    source.append(torch.arange(10.0).view(2, 5, 1))
    batch.append(torch.full((2, 7, 1), -1.0))
    batch.put(0, source, source=1)
    assert batch.buffers["k"][:, :, 0].tolist() == [[0] * 5 + [8, 9, 0, 0], [-1] * 7 + [0, 0]]


def test_rows_not_in_use_are_not_touched_and_keep_their_memory() -> None:
    batch = Cache(3, 4, {"k": (1,)}, torch.float32, CPU)
    batch.append(torch.ones(3, 2, 1))
    before = batch.nbytes
    batch.use(1)
    assert batch.append(torch.full((1, 1, 1), 7.0))[0].shape == (1, 3, 1)
    assert batch.nbytes == before
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
        (lambda full, ring: full.put(0, filled(maker("full", None), 4)), "Shift them by 1"),
        (lambda full, ring: full.rewind(full.mark(), 1), "ahead"),
        (lambda full, ring: ring.rewind(ring.mark(), 1), "ahead"),
    ],
)
def test_what_would_corrupt_rows_is_refused_with_a_remedy(wrong: Callable[[Cache, Cache], None], remedy: str) -> None:
    full, ring = filled(maker("full", None), 3), filled(maker("ring", None), 3)
    with pytest.raises(BlockError) as refusal:
        wrong(full, ring)
    assert remedy in refusal.value.remedy and full.length == ring.length == 3


def filled(make: Make, n: int) -> Cache:
    cache = make(2)
    cache.append(*values(2, n))
    return cache


# --- tokens that are forgotten ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cache", "before", "ahead"), each(KINDS, [0, 2, 11, 11, 2, 0, 2, 11, 0], [4, 1, 2, 4, 2]), ids=str
)
def test_first_tokens_since_a_mark_are_kept_by_row(cache: tuple[str, int | None], before: int, ahead: int) -> None:
    make = maker(*cache)
    torch.manual_seed(before)
    past, new = values(3, before), values(3, ahead)
    draw = random.Random(before)
    for keep in ([0] * 3, [ahead] * 3, [draw.randint(0, ahead) for _ in range(3)], [0, ahead, ahead // 2]):
        for chunk in (1, ahead):  # checked one by one, or at once
            made = make(3)
            if before:
                made.append(*past)
            mark = made.mark(ahead)
            for at in range(0, ahead, chunk):
                made.append(*(t[:, at : at + chunk] for t in new))
            made.rewind(mark, torch.tensor(keep))
            assert made.length == before + max(keep)
            for row, n in enumerate(keep):
                alone = make(1)
                if before + n:
                    alone.append(*(torch.cat((p, t[:, :n]), 1)[row : row + 1] for p, t in zip(past, new, strict=True)))
                assert_rows_equal(left(made, row, before + n), left(alone, 0, before + n))


@pytest.mark.parametrize("kind", WINDOWS)
def test_a_mark_stays_valid(kind: str) -> None:
    cache = maker(kind, None)(1)
    cache.append(*values(1, 7))
    before, mark = left(cache, 0, 7), cache.mark(3)
    cache.append(*values(1, 3))
    cache.rewind(mark, 2)
    cache.append(*values(1, 1))  # other than before
    cache.rewind(mark, 1)
    cache.append(*values(1, 2))
    cache.rewind(mark)
    assert cache.length == 7
    assert_rows_equal(left(cache, 0, 7), before)


def test_what_followed_a_return_is_not_taken_for_what_was_noted() -> None:
    ring = filled(maker("ring", None), 7)
    mark = ring.mark(2)
    ring.append(*values(2, 2))
    ring.rewind(mark, 0)
    ring.append(*values(2, 2))
    with pytest.raises(BlockError, match="0 of the 2"):
        ring.rewind(mark, 1)


def test_a_state_returns_to_what_it_was_after_each_token_by_row() -> None:
    for keep in (0, 1, 2, torch.tensor([0, 2, 1])):
        memory = state(3)
        memory.advance(5, {"sum": torch.full((3, 3), 10.0), "tail": torch.zeros(3, 2)})
        mark = memory.mark(2)
        for token in (1.0, 2.0):
            memory.advance(1, {"sum": 10 + torch.full((3, 3), token), "tail": torch.full((3, 2), token)})
        memory.rewind(mark, keep)
        wanted = torch.as_tensor(keep).expand(3)
        assert memory.held["sum"][:, 0].tolist() == (10 + wanted).tolist()
        assert memory.held["tail"][:, 1].tolist() == wanted.tolist()
        assert memory.length == 5 + int(wanted.max()) and memory.after is None


def test_a_ring_marked_with_tokens_ahead_copies_only_what_they_replace() -> None:
    ring = filled(maker("ring", None), 7)
    assert [held.shape[1] for held in ring.mark(2).held.values()] == [2, 2]
    assert [held.shape[1] for held in ring.mark(9).held.values()] == [5, 5]
