"""Windows of a stream: transforms of them, long documents, joined documents, and that a batch is the same again."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import torch

from blockwright.registry import ConfigError
from blockwright.training.data.order import BatchRows
from blockwright.training.data.packing import Stream, cut, ring
from blockwright.training.data.windows import LongDocuments, Making, Transform, Windows

T = 64


class Later(Transform):
    """Moves all positions by a random distance."""

    def __call__(self, window, random):
        window["positions"] += random.randint(1, 1000)


class Light(Transform):
    """Halves the weight of a random target."""

    def __call__(self, window, random):
        window["weights"][random.randint(T)] = 0.5


def stream(tmp_path, lengths: list[int]) -> Stream:
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.int64)
    (tmp_path / "s.bin").write_bytes((np.arange(sum(lengths)) % 200).astype(np.uint16).tobytes())
    return Stream(tmp_path / "s.bin", "uint16", starts, sum(lengths), 256)


BYTES = np.ones(257, dtype=np.int64)


def test_draws_depend_on_batch_and_row_alone(tmp_path):
    making = Making(transforms={"later": Later(), "light": Light()}, seed=3)
    data = Windows(stream(tmp_path, [5000]), T, BYTES, ring, making)
    whole = data[BatchRows([0, 100, 200, 300], T, 7, 0)]
    part = data[BatchRows([200, 300], T, 7, 2)]
    assert {"positions", "weights"} <= set(whole) and len(whole["positions"][:, 0].unique()) == 4
    assert all(torch.equal(part[name], whole[name][2:]) for name in whole)
    assert not torch.equal(data[BatchRows([0], T, 8, 0)]["positions"], whole["positions"][:1])


def test_positions_of_one_document_are_kept_where_they_are_not_0_to_t(tmp_path):
    plain = Windows(stream(tmp_path, [5000]), T, BYTES, ring)[BatchRows([0], T, 0, 0)]
    assert set(plain) == {"tokens", "targets", "n_bytes"}
    making = Making(transforms={"later": Later()})
    moved = Windows(stream(tmp_path, [5000]), T, BYTES, ring, making)[BatchRows([0], T, 0, 0)]
    assert set(moved) == {"tokens", "targets", "n_bytes", "positions"}


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
