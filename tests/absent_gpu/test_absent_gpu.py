"""The GPU path without a GPU: what runs there is traced at real widths, compiled and measured on a pretended device."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.absent_gpu import shim
from tests.absent_gpu.device import GPUS, Built
from tests.absent_gpu.page import Page
from tests.absent_gpu.run import Worker, worker

RECORD = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "absent_gpu.md"

pytestmark = [
    pytest.mark.xdist_group("absent_gpu"),
    pytest.mark.skipif(shim.missing() is not None, reason=shim.missing() or ""),
]


@pytest.fixture(scope="module")
def h100(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    with worker("sm_90", tmp_path_factory.mktemp("absent_gpu")) as made:
        yield made


@pytest.mark.slow
@pytest.mark.parametrize(
    ("planted", "seen"),
    [
        ("number_read", "_local_scalar_dense"),
        ("number_read_decoding", "_local_scalar_dense"),
        ("graph_broken", "graph_break"),
        ("all_scores_held", "MATH"),
        ("too_wide", "262,144 bytes of shared memory, and NVIDIA H100 80GB HBM3 has 232,448"),
    ],
)
def test_a_planted_fault_is_seen(h100: Worker, planted: str, seen: str) -> None:
    assert seen in (h100.ask("planted", planted)["fault"] or "nothing")


def test_a_kernel_that_fits_a_hopper_may_be_too_large_for_an_ampere() -> None:
    kernel = Built(shared=181_248, spilled=0, registers=128)
    assert kernel.fault(GPUS["sm_90"]) is None
    assert "166,912" in (kernel.fault(GPUS["sm_80"]) or "")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("check", "preset"),
    [("preset", "gpt2"), ("preset", "deepseek_v2_lite"), ("launches", "mistral_7b"), ("decode", "qwen3_8b")],
)
def test_operators_of_a_step_are_those_of_the_page(h100: Worker, check: str, preset: str) -> None:
    found = h100.ask(check, preset)
    recorded = Page(RECORD).cells[check][preset]["sm_90"]
    assert found["fault"] is None and found["operations"] <= 1.02 * int(recorded.replace(",", ""))


@pytest.mark.slow
def test_the_pretended_device_stays_in_its_process(h100: Worker) -> None:
    import torch

    h100.ask("block", "norm/rmsnorm")
    assert not torch.cuda.is_available()
