"""The GPU path without a GPU: what runs there is traced at real widths, compiled and measured on a pretended device.

No number is computed. What stays unknown: results of the kernels, torch's own fused attention and grouped products,
and speed. ``python -m tests.absent_gpu`` prints the whole table, for three GPUs; the default tests hold a part, on one.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.absent_gpu import cases, shim
from tests.absent_gpu.device import GPUS, Built
from tests.absent_gpu.run import Worker, asked, worker
from tests.gpu.blocks_at_work import PARTS

pytestmark = [
    pytest.mark.xdist_group("absent_gpu"),
    pytest.mark.skipif(shim.missing() is not None, reason=shim.missing() or ""),
]
PRESETS = ("deepseek_v3", "gemma2_9b", "gpt_oss_20b", "olmo2_7b", "qwen3_30b_a3b")


@pytest.fixture(scope="module")
def h100(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    with worker("sm_90", tmp_path_factory.mktemp("absent_gpu")) as made:
        yield made


# Of each kind one block by default, and every attention; the others with the slow tests.
SOME = {name for name in cases.block_names() if name.startswith("attention/")}
SOME |= set({name.split("/")[0]: name for name in cases.block_names()}.values())


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [name if name in SOME else pytest.param(name, marks=pytest.mark.slow) for name in cases.block_names()]
)
def test_a_block_takes_a_step(h100: Worker, name: str) -> None:
    assert h100.ask("block", name)["fault"] is None


@pytest.mark.slow
@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_takes_a_step(h100: Worker, name: str) -> None:
    assert h100.ask("preset", name)["fault"] is None


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
def test_what_is_timed_on_a_gpu_takes_a_step(h100: Worker, part: str) -> None:
    assert h100.ask("timed", part)["fault"] is None


@pytest.mark.slow
@pytest.mark.parametrize("name", ["attention/gqa", "attention/mla"])
def test_a_layer_that_chooses_keys_compiles_for_hopper(h100: Worker, name: str) -> None:
    """With every option on, a selector too, which counts booleans."""
    assert h100.ask("compiled", name)["fault"] is None


@pytest.mark.slow
def test_a_layer_compiles_for_hopper_without_a_break_and_fits_into_shared_memory(h100: Worker) -> None:
    """A layer with a window: FlexAttention's kernels, and its block mask, which is made inside the compiled layer."""
    found = h100.ask("compiled", "attention/sliding_window")
    assert found["fault"] is None
    assert found["kernels"] > 20
    assert 128 << 10 < found["shared"] <= GPUS["sm_90"].shared  # more than any other kernel of a layer takes


@pytest.mark.slow
@pytest.mark.parametrize(
    ("planted", "seen"),
    [
        ("number_read", "_local_scalar_dense"),
        ("graph_broken", "graph_break"),
        ("too_wide", "262,144 bytes of shared memory, and NVIDIA H100 80GB HBM3 has 232,448"),
    ],
)
def test_a_planted_fault_is_seen(h100: Worker, planted: str, seen: str) -> None:
    assert seen in (h100.ask("planted", planted)["fault"] or "nothing")


def test_a_kernel_that_fits_a_hopper_may_be_too_large_for_an_ampere() -> None:
    kernel = Built(shared=181_248, spilled=0, registers=128)
    assert kernel.fault(GPUS["sm_90"]) is None
    assert "166,912" in (kernel.fault(GPUS["sm_80"]) or "")


def test_the_pretended_device_stays_in_its_process(h100: Worker) -> None:
    import torch

    h100.ask("block", "norm/rmsnorm")
    assert not torch.cuda.is_available()


@pytest.mark.slow
@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("check", cases.NAMES)
def test_the_whole_table(check: str, gpu: str, tmp_path: Path) -> None:
    assert not {n: a["fault"] for n, a in asked(gpu, tmp_path, check, cases.NAMES[check]()) if a["fault"]}
