"""PoSE and strings to recall: what windows become, and mistakes with them and the callbacks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from blockwright.plugins.long_context.windows import PoSE, Recall
from blockwright.registry import ConfigError
from blockwright.training.data.order import BatchRows
from blockwright.training.data.packing import Stream, ring
from blockwright.training.data.windows import Making, Windows, stream_for
from blockwright.training.entry.execute import execute

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


IMPOSSIBLE = [
    (lambda: PoSE(32).check(T, 256), "pose.target"),
    (lambda: PoSE(100, chunks=1), "pose.chunks"),
    (lambda: PoSE(100, chunks=99).check(T, 256), "pose.chunks"),
    (lambda: PoSE(100, margin=1.0), "pose.margin"),
    (lambda: Recall(times=1), "recall.times"),
    (lambda: Recall(length=1), "recall.length"),
    (lambda: Recall(symbols=(5, 5)), "recall.symbols"),
    (lambda: Recall().check(T, 200), "recall.symbols"),
    (lambda: Recall(every=4).check(T, 256), "recall.every"),
]


def test_transforms_that_cannot_work_are_refused():
    for make, path in IMPOSSIBLE:
        with pytest.raises(ConfigError) as caught:
            make()
        assert caught.value.path == f"data.transforms.{path}"


def test_windows_take_both_and_draws_depend_on_batch_and_row_alone(tmp_path):
    (tmp_path / "s.bin").write_bytes((np.arange(5000) % 200).astype(np.uint16).tobytes())
    stream = Stream(tmp_path / "s.bin", "uint16", np.zeros(1, dtype=np.int64), 5000, 256)
    making = Making(transforms={"pose": PoSE(512), "recall": Recall()}, seed=3)
    data = Windows(stream, T, np.ones(257, dtype=np.int64), ring, making)
    whole = data[BatchRows([0, 100, 200, 300], T, 7, 0)]
    part = data[BatchRows([200, 300], T, 7, 2)]
    assert {"positions", "weights"} <= set(whole)
    assert all(torch.equal(part[name], whole[name][2:]) for name in whole)
    assert not torch.equal(data[BatchRows([0], T, 8, 0)]["positions"], whole["positions"][:1])


CALLBACKS = [
    "callbacks=[long_context,extrapolation]",
    "model.max_positions=128",
    "callbacks.report=null",
    "logger=none",
]
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("long_context", {"lengths": [8], "window": 8}, "lengths"),
    ("long_context", {"lengths": [4096]}, "lengths"),
    ("long_context", {"window": 129}, "window"),
    ("extrapolation", {"multiples": []}, "multiples"),
    ("extrapolation", {"multiples": [8]}, ""),  # windows of 256 tokens
]


def test_transform_that_cannot_work_is_refused_by_preflight(checked: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError) as refused:
        checked("data/transforms=pose", "data.transforms.pose.target=4000")
    assert refused.value.path == "data.transforms" and "max_positions to 4000" in refused.value.remedy


def test_callback_that_cannot_measure_is_refused_before_training(checked: Callable[..., Any]) -> None:
    good = checked(*CALLBACKS)
    for name, settings, path in REFUSED:
        only = {name: {**good.callbacks[name], **settings}}
        with pytest.raises(ConfigError) as refused:
            execute(replace(good, callbacks=only))
        assert refused.value.path.startswith(f"callbacks.{name}{path and f'.{path}'}") and refused.value.remedy
