"""Settings of the process: chosen by what the machine is, and only where they cost no accuracy."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from blockwright.blocks.kernels import machine
from tests.blocks.kernels.compared import drawn


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


def test_faster_library_is_taken_on_an_amd_that_keeps_full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    for amd, error, expected in ((True, 4e-7, "medium"), (True, 2e-3, "highest"), (False, 4e-7, "highest")):
        torch.set_float32_matmul_precision("highest")
        monkeypatch.setattr(machine, "is_amd", lambda amd=amd: amd)
        monkeypatch.setattr(machine, "_error_of_medium", lambda error=error: error)
        assert machine.set_float32_matmul("auto") == expected == torch.get_float32_matmul_precision()
    assert machine.set_float32_matmul("high") == "high" == torch.get_float32_matmul_precision()


@pytest.mark.parametrize("amd", [True, False])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_gpu_multiplies_alike_on_every_host(amd: bool, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "is_amd", lambda: amd)
    monkeypatch.setattr(machine, "_error_of_medium", lambda: 4e-7)
    torch.set_float32_matmul_precision("high")  # what an earlier job of the process has left
    machine.set_float32_matmul("auto", device)
    assert torch.backends.cuda.matmul.fp32_precision == "ieee"
    on_cpu = torch.backends.mkldnn.matmul.fp32_precision  # type: ignore[attr-defined]
    assert on_cpu == ("bf16" if amd and device == "cpu" else "ieee")
    torch.get_float32_matmul_precision()  # raises where old and new settings contradict each other


def test_error_is_measured_and_the_automatic_choice_keeps_products_at_full_precision() -> None:
    torch.set_float32_matmul_precision("highest")
    assert 0 < machine._error_of_medium() < 1e-2 and torch.get_float32_matmul_precision() == "highest"
    machine.set_float32_matmul("auto")
    a, b = drawn(300, 700), drawn(700, 200, seed=1)
    product = (a.float() @ b.float()).double()
    assert (product - a.float().double() @ b.float().double()).norm() / product.norm() < machine.FULL_FP32


KEEP = """
import resource, torch
from blockwright.blocks.kernels.machine import keep_freed_memory
kept = keep_freed_memory() if {keep} else None
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3): torch.ones(16 << 20)
before = faults()
for _ in range(10): torch.ones(16 << 20)
print(kept, faults() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's settings")
def test_freed_memory_is_kept_for_the_next_allocation() -> None:
    counts = {}
    for keep in (True, False):
        output = subprocess.run([sys.executable, "-c", KEEP.format(keep=keep)], capture_output=True, text=True).stdout
        kept, faults = output.split()
        counts[keep] = int(faults)
        assert kept == ("True" if keep else "None")
    assert counts[True] < counts[False] / 5
