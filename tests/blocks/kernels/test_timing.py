"""The fastest ways are those that were timed, once, and kept; a clock of the test's own, since no test measures."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from blockwright import compose
from blockwright.blocks.kernels import products, timing
from blockwright.blocks.kernels.products import Choice
from blockwright.blocks.kernels.seam import kernel
from blockwright.blocks.kernels.timing import fastest, kept, least, matrices, measure, multiply_fastest
from blockwright.registry import ConfigError

OF = {(64, 64): 2, (128, 64): 1}


class Clock:
    """Seconds by the way's name."""

    def __init__(self, **took: float) -> None:
        self.took, self.calls = took, Counter[str]()

    def __call__(self, way: str, work: Callable[[], object]) -> float:
        work()
        self.calls[way] += 1
        return self.took.get(way, 1.0)


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(timing.VARIABLE)
    monkeypatch.setattr(timing, "error_of_medium", lambda: 4e-7)
    monkeypatch.setattr(products, "error_of_medium", lambda: 4e-7)
    return tmp_path / "blockwright" / "products"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock(medium=0.5, mkl=0.25)
    monkeypatch.setattr(timing, "seconds", made)
    return made


@pytest.fixture
def ways(temporary_blocks: None) -> None:
    """Two more for linear, of which the second takes one row alone."""

    def other(x: Any, weight: Any, bias: Any = None) -> Any:
        return F.linear(x, weight, bias)

    def single(x: Any, weight: Any, bias: Any = None) -> Any:
        assert len(x) == 1
        return F.linear(x, weight, bias)

    kernel("linear", "other", devices=("cpu",), automatic=False)(other)
    kernel("linear", "single", devices=("cpu",), automatic=False, takes=lambda x, w, b: len(x) == 1)(single)


@pytest.mark.usefixtures("ways")
def test_faster_ways_are_chosen_and_the_fastest_is_asked_first() -> None:
    tried = [
        ({"medium": 0.5, "other": 0.5, "single": 0.25}, "medium", ["single", "other"], ["other"]),
        ({"medium": 2.0, "other": 0.5, "single": 0.75}, "highest", ["other", "single"], ["other"]),
        ({"medium": 0.99, "other": 0.99, "single": 0.99}, "highest", [], []),  # as good as none
        ({"medium": 0.5, "other": 2.0, "single": 0.5}, "medium", ["single"], []),
    ]
    for took, matmul, one, more in tried:
        found = measure(OF, Clock(**took))
        assert (found.matmul, list(found.few_rows[1]), list(found.few_rows[8])) == (matmul, one, more), took
        ratios = {(each.of, each.way): each.ratio for each in found.found}
        assert ratios["1 row", "single"] == pytest.approx(1 / took["single"]) and ("8 rows", "single") not in ratios
        assert ratios["many rows", "oneDNN"] == pytest.approx(1 / took["medium"])


def test_a_cache_is_read_by_mkl_where_that_is_faster() -> None:
    if not torch.backends.mkl.is_available():
        pytest.skip("no MKL")
    for took, expected in ((0.5, True), (2.0, False)):
        assert measure(OF, Clock(medium=0.5, mkl=took)).cached == expected
        assert not measure(OF, Clock(medium=2.0, mkl=took)).cached  # all products are MKL's then


def test_medium_that_rounds_is_not_even_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "error_of_medium", lambda: 2e-3)
    clock = Clock(medium=0.1)
    assert measure(OF, clock).matmul == "highest" and "medium" not in clock.calls


def test_a_settled_precision_is_kept_and_measured_under() -> None:
    seen = set()

    def clock(way: str, work: Callable[[], object]) -> float:
        seen.add(torch.get_float32_matmul_precision())
        return 1.0

    for matmul in ("highest", "medium"):
        seen.clear()
        assert measure(OF, clock, matmul).matmul == matmul and seen == {matmul}  # type: ignore[arg-type]
    assert torch.get_float32_matmul_precision() == "highest"


def test_large_models_are_timed_in_part() -> None:
    read = timing._read({(150_000, 512): 1, (2048, 512): 4000})
    assert sum(weight.nbytes for weight, _ in read) < 1.5 * timing.READ
    stands = Counter[int]()
    for weight, share in read:
        stands[weight.shape[1]] += share * len(weight)  # type: ignore[assignment]
    assert stands[512] == pytest.approx(150_000 + 2048 * 4000)


def test_matrices_are_those_that_rows_are_multiplied_with(tiny: Callable[..., dict[str, Any]]) -> None:
    widths = {"vocab_size": 128, "d_model": 64, "ffn": {"name": "swiglu", "d_ff": 96}}
    tied, moe = compose(tiny(**widths, tie_embeddings=True)), compose(tiny(**widths, tie_embeddings=False))
    assert matrices(tied)[128, 64] == matrices(moe)[128, 64] == 1  # a table is read, not multiplied
    assert matrices(tied, moe)[96, 64] == 2 * matrices(tied)[96, 64]
    assert matrices(tied.to(torch.bfloat16)) == matrices(nn.Linear(8, 8)) == {}
    with torch.device("meta"):
        assert matrices(compose(tiny(**widths, tie_embeddings=False))) == matrices(moe)


def test_measured_once_and_kept(clock: Clock, own_cache: Path) -> None:
    first, timed = fastest(OF), sum(clock.calls.values())
    assert first.matmul == "medium" and timed
    clock.took = {}
    assert fastest(OF) == first == kept(OF) and sum(clock.calls.values()) == timed
    assert kept({**OF, (8, 8): 1}) is None and kept(OF, "highest") is None
    assert fastest(OF, "highest").matmul == "highest"
    assert len(list(own_cache.iterdir())) == 2


def test_what_other_work_disturbs_is_not_believed_and_measured_again(clock: Clock) -> None:
    clock.took = {"medium": math.inf, "mkl": math.inf}
    with_none = fastest(OF)
    assert with_none.matmul == "highest" and kept(OF) is None
    assert "too busy" in with_none.shown()["many rows"]
    clock.took = {"medium": 0.5}
    assert fastest(OF).matmul == "medium" and kept(OF) is not None


def test_timed_until_the_least_time_of_each_way_has_settled() -> None:
    took = {"torch": iter([9.0, 3.0, math.inf, *[2.0] * 99]), "other": iter([1.0, math.inf, *[1.0] * 99])}
    found = least({way: [partial(next, times)] for way, times in took.items()}, lambda way, work: work())  # type: ignore[arg-type, return-value]
    assert found == {"torch": [2.0], "other": [1.0]}
    assert len(list(took["torch"])) == 102 - 4 - timing.ROUNDS


def test_a_product_that_lost_its_processor_has_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    switched = [0]
    monkeypatch.setattr(timing.resource, "getrusage", lambda who: SimpleNamespace(ru_nivcsw=switched[0]))

    def lose() -> None:
        switched[0] += 1

    for threads, disturbed in ((2, True), (1, False)):  # of a single thread its own time is known
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert timing.seconds("torch", switched.copy) < math.inf
        assert (timing.seconds("torch", lose) == math.inf) == disturbed


def test_kept_for_a_processor_torch_and_threads(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    fastest(OF)
    changes = [
        (timing, "processor", lambda: "another"),
        (torch, "__version__", "0"),
        (torch, "get_num_threads", lambda: 99),
    ]
    for module, name, value in changes:
        with monkeypatch.context() as patched:
            patched.setattr(module, name, value)
            assert kept(OF) is None, name
        assert kept(OF) is not None


def test_damaged_and_hostile_files_count_as_none(clock: Clock, own_cache: Path, tmp_path: Path) -> None:
    good = fastest(OF)
    (file,) = own_cache.iterdir()
    written = json.loads(file.read_text())
    for text in (
        *("", "{", "[]", "null", "NaN", '"x"', "\xff", "[" * 5000, json.dumps(written)[:-9]),
        json.dumps({"choice": written["choice"]}),
        json.dumps({"key": {**written["key"], "threads": 99}, "choice": written["choice"]}),
        json.dumps({**written, "choice": {**written["choice"], "matmul": "__import__"}}),
        json.dumps(written) + " " * timing.MAX_BYTES,
    ):
        file.write_bytes(text.encode("latin-1"))
        assert kept(OF) is None, text[:80]
        assert fastest(OF) == good == kept(OF)  # measured and written again
    file.unlink()
    os.mkfifo(file)  # of which reading would wait forever
    assert kept(OF) is None


def test_a_folder_that_cannot_be_written_keeps_none(clock: Clock, own_cache: Path, tmp_path: Path) -> None:
    (tmp_path / "blockwright").write_text("no folder")
    assert fastest(OF).matmul == "medium" and kept(OF) is None


def test_without_a_home_nothing_is_kept(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")

    def none() -> Path:
        raise RuntimeError("no home")

    monkeypatch.setattr(Path, "home", none)
    assert fastest(OF).matmul == "medium" and kept(OF) is None


def _write_often(times: int) -> None:
    for i in range(times):
        timing._keep(Choice("medium", {1: ("torch",) * (1 + i % 3)}), OF, None)


def test_several_writers_leave_whole_files(own_cache: Path) -> None:
    timing._keep(Choice(), OF, None)
    writers = [multiprocessing.get_context("fork").Process(target=_write_often, args=(20,)) for _ in range(2)]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        assert kept(OF) is not None
    for writer in writers:
        writer.join()
    assert [file.suffix for file in own_cache.iterdir()] == [".json"] and [w.exitcode for w in writers] == [0, 0]


def test_environment_says_it(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(timing.VARIABLE, "torch")
    assert fastest(OF) == Choice() and fastest(OF, "high") == Choice("high") and not clock.calls
    monkeypatch.setenv(timing.VARIABLE, "fast")
    with pytest.raises(ConfigError) as refused:
        fastest(OF)
    assert refused.value.path == timing.VARIABLE


def test_models_of_a_process_are_multiplied_as_is_fastest(clock: Clock) -> None:
    multiply_fastest(nn.Linear(128, 64))
    assert products.used().matmul == "medium"
    multiply_fastest(nn.Linear(128, 64, device="meta"))  # on any other device than a CPU
    assert products.used() == Choice()
