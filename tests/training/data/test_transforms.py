"""Positions that skip, strings to recall, long documents: what windows become, and that it is the same again."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import torch

from blockwright.registry import ConfigError
from blockwright.training.data.long_documents import LongDocuments
from blockwright.training.data.order import BatchRows
from blockwright.training.data.packing import Stream, cut, ring
from blockwright.training.data.pose import PoSE
from blockwright.training.data.recall import Recall
from blockwright.training.data.transform import stream_for
from blockwright.training.data.windows import Making, Windows

T = 64


def window(size: int = T, documents: int = 1) -> dict[str, np.ndarray]:
    segments = np.arange(size) * documents // size
    starts = np.searchsorted(segments, segments)
    return {
        "tokens": np.arange(size) % 100,
        "targets": (np.arange(size) + 1) % 100,
        "segments": segments,
        "positions": np.arange(size) - starts,
        "weights": np.ones(size, dtype=np.float32),
    }


def random(row: int = 0) -> np.random.RandomState:
    return stream_for(0, "x", 0, row)


def test_pose_keeps_chunks_whole_and_reaches_every_distance():
    distances, longest = set(), 0
    for row in range(300):
        given = window()
        PoSE(512)(given, random(row))
        steps = np.diff(given["positions"])
        assert given["positions"][0] == 0 and (steps >= 1).all() and (steps > 1).sum() <= 1
        longest = max(longest, given["positions"][-1])
        distances |= set((given["positions"][-1] - given["positions"]).tolist())
    assert 480 < longest <= 511 and len(distances) > 480


def test_pose_with_many_chunks_never_exceeds_its_target():
    for row in range(100):
        given = window()
        PoSE(100, chunks=4)(given, random(row))
        assert given["positions"][-1] < 100 and (np.diff(given["positions"]) > 1).sum() <= 3


def test_pose_leaves_documents_their_own_zero_where_it_has_not_skipped_yet():
    given = window(documents=4)
    before = given["positions"].copy()
    PoSE(512)(given, random())
    more = given["positions"] - before
    assert (np.diff(more) >= 0).all() and more[0] == 0


def test_recalled_strings_occur_twice_off_any_grid_and_only_they_have_full_weight():
    places = set()
    for row in range(50):
        given = window()
        Recall(share=1.0)(given, random(row))
        symbols = given["tokens"] >= 128
        assert symbols.sum() == 2 * 2 * 8
        answers = given["weights"] == 1
        assert answers.sum() == 2 * 7 and np.allclose(given["weights"][~answers], 0.1)
        for at in np.flatnonzero(answers):  # each answer has stood in the text before, after the same symbol
            pair = [given["tokens"][at], given["targets"][at]]
            assert any(given["tokens"][i : i + 2].tolist() == pair for i in range(at))
        places.add(int(np.flatnonzero(symbols)[0]))
    assert len(places) > 3


def test_targets_are_the_next_tokens_after_strings_are_written():
    given = window()
    Recall(share=1.0)(given, random())
    assert (given["targets"][:-1] == given["tokens"][1:]).all()


def test_a_share_of_the_windows_has_strings_and_the_others_are_as_they_were():
    plain = 0
    for row in range(200):
        given = window()
        Recall(share=0.25)(given, random(row))
        plain += (given["tokens"] == window()["tokens"]).all() and np.allclose(given["weights"], 0.1)
    assert 130 < plain < 170


def test_a_string_in_another_document_is_no_answer():
    given = window(documents=2)
    Recall(share=1.0)(given, random())
    for at in np.flatnonzero(given["weights"] == 1):
        pair = [given["tokens"][at], given["targets"][at]]
        own = np.flatnonzero(given["segments"] == given["segments"][at])
        assert any(given["tokens"][i : i + 2].tolist() == pair for i in own if i < at)


@pytest.mark.parametrize(
    ("make", "path", "words"),
    [
        (lambda: PoSE(32).check(T, 256), "data.transforms.pose.target", "shorter than a window"),
        (lambda: PoSE(100, chunks=1), "data.transforms.pose.chunks", "skip between chunks"),
        (lambda: PoSE(100, chunks=99).check(T, 256), "data.transforms.pose.chunks", "more than a window has"),
        (lambda: PoSE(100, margin=1.0), "data.transforms.pose.margin", "below 1"),
        (lambda: Recall(times=1), "data.transforms.recall.times", "occurs again"),
        (lambda: Recall(length=1), "data.transforms.recall.length", "second symbol"),
        (lambda: Recall(symbols=(5, 5)), "data.transforms.recall.symbols", "at least two"),
        (lambda: Recall().check(T, 200), "data.transforms.recall.symbols", "beyond the tokenizer's ids"),
        (lambda: Recall(every=4).check(T, 256), "data.transforms.recall.every", "more than a window"),
    ],
)
def test_transforms_that_cannot_work_are_refused(make, path, words):
    with pytest.raises(ConfigError, match=words) as caught:
        make()
    assert caught.value.path == path


# --- windows ----------------------------------------------------------------------------------------------------------


def stream(tmp_path, lengths: list[int]) -> Stream:
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.int64)
    (tmp_path / "s.bin").write_bytes((np.arange(sum(lengths)) % 200).astype(np.uint16).tobytes())
    return Stream(tmp_path / "s.bin", "uint16", starts, sum(lengths), 256)


BYTES = np.ones(257, dtype=np.int64)


def test_draws_depend_on_batch_and_row_alone(tmp_path):
    making = Making(transforms={"pose": PoSE(512), "recall": Recall()}, seed=3)
    data = Windows(stream(tmp_path, [5000]), T, BYTES, ring, making)
    whole = data[BatchRows([0, 100, 200, 300], T, 7, 0)]
    part = data[BatchRows([200, 300], T, 7, 2)]
    assert all(torch.equal(part[name], whole[name][2:]) for name in whole)
    assert not torch.equal(data[BatchRows([0], T, 8, 0)]["positions"], whole["positions"][:1])


def test_positions_of_one_document_are_kept_where_they_are_not_0_to_t(tmp_path):
    plain = Windows(stream(tmp_path, [5000]), T, BYTES, ring)[BatchRows([0], T, 0, 0)]
    assert set(plain) == {"tokens", "targets", "n_bytes"}
    making = Making(transforms={"pose": PoSE(512)})
    skipped = Windows(stream(tmp_path, [5000]), T, BYTES, ring, making)[BatchRows([0], T, 0, 0)]
    assert set(skipped) == {"tokens", "targets", "n_bytes", "positions"}


def test_joined_documents_are_one_with_their_ends_as_targets(tmp_path):
    given = stream(tmp_path, [30, 30, 30])
    places = ring(np.array([10]), T + 1, 90)
    apart, joined = cut(given, places, BYTES), cut(given, places, BYTES, joined=True)
    assert apart["segments"].max() == 2 and (apart["targets"] == -100).sum() == 2
    assert not joined["segments"].any() and (joined["targets"] != -100).all()
    assert (joined["positions"] == np.arange(T)).all() and (joined["tokens"] == apart["tokens"]).all()


def test_long_windows_come_from_long_documents_and_short_ones_from_all(tmp_path):
    given = stream(tmp_path, [100, 10, 150, 20, 120])
    long = LongDocuments(given, 100)
    assert long.n_tokens == 370
    places = long.places(np.arange(370))
    assert places.tolist() == [*range(100), *range(110, 260), *range(280, 400)]
    data = Windows(given, T, BYTES, ring, Making(long=long))
    assert set(data[BatchRows(list(range(0, 370, 5)), T, 0, 0)]["tokens"].unique().tolist()) <= set(
        (places % 200).tolist()
    )
    short = data[BatchRows(list(range(0, 400, 5)), 16, 0, 0)]["tokens"]
    assert short.shape[1] == 16 and len(short.unique()) == 200
    with pytest.raises(ConfigError, match="the longest has 150 tokens"):
        LongDocuments(given, 151)


def test_memory_and_reading_are_linear_in_the_tokens_of_a_batch_whatever_the_corpus(tmp_path):
    def cost(n_tokens: int, length: int) -> tuple[int, int]:
        given = stream(tmp_path, [n_tokens])
        read = []

        class Counted(np.memmap):
            def __getitem__(self, index):
                found = np.asarray(super().__getitem__(index))
                read.append(found.size)
                return found

        given.__dict__["tokens"] = np.memmap(given.path, dtype="uint16", mode="r").view(Counted)
        data = Windows(given, length, BYTES, ring)
        data[[0]]  # what is made once
        read.clear()
        tracemalloc.start()
        data[[n_tokens - length // 2]]
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return sum(read), peak

    (read_short, peak_short), (read_long, peak_long) = cost(2**18, 2**14), cost(2**18, 2**17)
    assert (read_short, read_long) == (2**14 + 1, 2**17 + 1)
    assert peak_long < 8.5 * peak_short and peak_long < 120 * 2**17
    assert abs(cost(2**21, 2**14)[1] - peak_short) < 0.1 * peak_short
